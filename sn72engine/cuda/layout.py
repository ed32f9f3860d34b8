"""Arguments and launch shapes of the kernels in ``csrc/``; mirrors ``csrc/layout.h``.

Each kernel takes one record by value. Pointers are device addresses as ints; None is null. "Per
sample" means indexed by the sample's original position in the batch, with ``capacity`` entries.
How the kernels follow one another is written in ``csrc/README.md``.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np

from sn72engine.errors import OptionError

NO_STAGE: Final = 255
MAX_BUCKETS: Final = 32
#: Stages that have a bit in ``SAMPLE["failed"]``.
FAILURE_BITS: Final = 8

_WARP = 32
_ROUTE_THREADS = 1024
_MOVE_THREADS = 256
_LARGEST_GRID_Y = 65535

Score = Literal["f32", "f16", "bf16"]
"""Element type of a stage's scores."""

SAMPLE: Final = np.dtype(
    [
        ("sum", np.float64),
        ("weight", np.float64),
        ("floor", np.float32),
        ("probability", np.float32),
        ("route", np.uint8),
        ("status", np.uint8),
        ("stage", np.uint8),
        ("voter", np.uint8),
        ("raiser", np.uint8),
        ("open", np.uint8),
        ("closed", np.uint8),
        ("failed", np.uint8),
    ]
)
"""All that is known about one sample, 32 bytes: what the host copies back as the answer.

``probability`` is finite and in [0, 1]; ``route`` is 0 or 1 for a sample that a stage was sure of
and 2 otherwise; ``status`` is a :class:`Code`; ``stage`` is the number of the stage whose
probability it is, or NO_STAGE; ``closed`` the stage at whose boundary the sample left or its time
ran out, or NO_STAGE; bit ``s`` of ``failed`` says that stage ``s`` gave it no probability.
"""

CONTROL: Final = np.dtype(
    [("count", np.int32), ("bucket", np.int32), ("rows", np.int32), ("elapsed_us", np.uint32)]
)
"""What one boundary decided, and when, counted from ``sn72_begin``; 16 bytes."""


class Code(enum.IntEnum):
    """Values of ``SAMPLE["status"]``."""

    PENDING = 0
    DONE = 1
    UNDECIDED = 2
    DEADLINE = 3
    STAGE_FAILED = 4


class Combine(enum.IntEnum):
    """How a stage's score joins what earlier stages said."""

    REPLACE = 0
    WEIGHTED = 1
    POSITIVE_ONLY = 2


class Flag(enum.IntFlag):
    """Switches of a route or scatter launch."""

    FROM_LOGITS = 1
    LAST_STAGE = 2
    SET_CONDITION = 4
    NO_NEGATIVE_EXIT = 8
    SET_EACH = 16
    COMBINE_ONLY = 32


_Fields = list[tuple[str, Any]]


class BeginArgs(ctypes.Structure):
    """For ``sn72_begin``: fresh samples, and the clock from which time budgets count."""

    _fields_: ClassVar[_Fields] = [
        ("samples", ctypes.c_void_p),  # SAMPLE, per sample
        ("scored", ctypes.c_void_p),  # uint8, per sample
        ("start_ns", ctypes.c_void_p),  # uint64, one value
        ("capacity", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class RouteArgs(ctypes.Structure):
    """For ``sn72_route_*``: one boundary between stages, or the end of the last one."""

    _fields_: ClassVar[_Fields] = [
        ("samples", ctypes.c_void_p),  # SAMPLE, per sample
        ("score", ctypes.c_void_p),  # per sample, every score_stride elements
        ("scored", ctypes.c_void_p),  # uint8, per sample; null: the stage scored every sample
        ("low", ctypes.c_void_p),  # float32, one value or per sample
        ("high", ctypes.c_void_p),  # float32, one value or per sample
        ("eligible", ctypes.c_void_p),  # uint8, per sample; null: the next stage takes all
        ("budget_ns", ctypes.c_void_p),  # uint64, one value or per sample; null: no limit
        ("start_ns", ctypes.c_void_p),  # uint64, one value, from sn72_begin
        ("batch", ctypes.c_void_p),  # int32, one value: samples in use
        ("index", ctypes.c_void_p),  # int32, as many as the largest bucket has rows; output
        ("control", ctypes.c_void_p),  # CONTROL; output
        ("condition", ctypes.c_uint64),  # handle of the SWITCH node, with SET_CONDITION
        ("conditions", ctypes.c_void_p),  # uint64 handles of IF nodes, with SET_EACH
        ("score_stride", ctypes.c_int64),
        ("weight", ctypes.c_double),
        ("threshold_stride", ctypes.c_int32),  # 0: one value; 1: per sample
        ("budget_stride", ctypes.c_int32),  # 0: one value; 1: per sample
        ("capacity", ctypes.c_int32),
        ("stage", ctypes.c_int32),
        ("combine", ctypes.c_int32),  # Combine
        ("flags", ctypes.c_uint32),  # Flag
        ("bucket_count", ctypes.c_int32),
        ("first", ctypes.c_int32),  # first stage of the group; stage for one by itself
        ("buckets", ctypes.c_int32 * MAX_BUCKETS),
    ]


class ScatterArgs(ctypes.Structure):
    """For ``sn72_scatter_*``: scores of a stage's rows to their samples."""

    _fields_: ClassVar[_Fields] = [
        ("score", ctypes.c_void_p),  # per row, every score_stride elements
        ("label", ctypes.c_void_p),  # int64, per row; null: none
        ("index", ctypes.c_void_p),  # int32, row to sample; null: row is the sample
        ("count", ctypes.c_void_p),  # int32, one value: rows in use
        ("out", ctypes.c_void_p),  # float32, per sample; output
        ("label_out", ctypes.c_void_p),  # int64, per sample; output
        ("scored", ctypes.c_void_p),  # uint8, per sample; output
        ("score_stride", ctypes.c_int64),
        ("stage", ctypes.c_int32),
        ("flags", ctypes.c_uint32),  # Flag.FROM_LOGITS
    ]


class GatherArgs(ctypes.Structure):
    """For ``sn72_gather``: rows of any type, copied as bytes."""

    _fields_: ClassVar[_Fields] = [
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("index", ctypes.c_void_p),  # int32, target row to source row
        ("row_bytes", ctypes.c_int64),
        ("source_stride", ctypes.c_int64),  # bytes
        ("target_stride", ctypes.c_int64),  # bytes
        ("rows", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its arguments and shape. No kernel uses dynamic shared memory or a workspace.

    The record is read when the launch is made or recorded, so it may be changed afterwards.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: ctypes.Structure


def begin(args: BeginArgs) -> Launch:
    """Launch that starts a batch."""
    _at_least("capacity", args.capacity, 1)
    return Launch("sn72_begin", _over(args.capacity), (_MOVE_THREADS, 1, 1), args)


def route(args: RouteArgs, score: Score) -> Launch:
    """Launch that ends a stage and, unless it is the last one, picks who sees the next.

    With COMBINE_ONLY it takes the scores of a stage into the samples and does nothing else: for
    the stages of a parallel group but the last, whose launch decides for all of them.

    Raises:
        OptionError: a value that the kernel could not use; it does not check them itself.
    """
    _at_least("capacity", args.capacity, 1)
    _check_stage(args.stage)
    if not 0 <= args.first <= args.stage:
        raise OptionError(f"first={args.first} must be 0 to stage={args.stage}")
    if not args.weight > 0:
        raise OptionError(f"weight={args.weight!r} must be greater than 0")
    for name in ("threshold_stride", "budget_stride"):
        if getattr(args, name) not in (0, 1):
            raise OptionError(f"{name}={getattr(args, name)} must be 0 (one value) or 1")
    if args.budget_ns and not args.start_ns:
        raise OptionError("start_ns must be given with budget_ns")
    if args.flags & Flag.SET_EACH and not args.conditions:
        raise OptionError("conditions must be given with SET_EACH")
    _check_buckets(args)
    threads = min(_ROUTE_THREADS, -(-args.capacity // _WARP) * _WARP)
    return Launch(f"sn72_route_{score}", (1, 1, 1), (threads, 1, 1), args)


def scatter(args: ScatterArgs, score: Score, rows: int) -> Launch:
    """Launch that hands scores of up to ``rows`` rows to their samples."""
    _at_least("rows", rows, 1)
    _check_stage(args.stage)
    if args.label and not args.label_out:
        raise OptionError("label_out must be given with label")
    return Launch(f"sn72_scatter_{score}", _over(rows), (_MOVE_THREADS, 1, 1), args)


def gather(args: GatherArgs) -> Launch:
    """Launch that copies the indexed rows, padding included, into a stage's input."""
    _at_least("rows", args.rows, 1)
    _at_least("row_bytes", args.row_bytes, 1)
    if args.target_stride < args.row_bytes:
        raise OptionError(
            f"target_stride={args.target_stride} must be at least row_bytes={args.row_bytes}"
        )
    # 16 bytes a thread where addresses allow it; further ones in turns.
    columns = min(-(-args.row_bytes // (16 * _MOVE_THREADS)), 256)
    grid = (columns, min(args.rows, _LARGEST_GRID_Y), 1)
    return Launch("sn72_gather", grid, (_MOVE_THREADS, 1, 1), args)


def _over(items: int) -> tuple[int, int, int]:
    return (-(-items // _MOVE_THREADS), 1, 1)


def _at_least(name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise OptionError(f"{name}={value} must be at least {lowest}")


def _check_stage(stage: int) -> None:
    if not 0 <= stage < NO_STAGE:
        raise OptionError(f"stage={stage} must be 0 to {NO_STAGE - 1}")


def _check_buckets(args: RouteArgs) -> None:
    count = args.bucket_count
    if args.flags & (Flag.LAST_STAGE | Flag.COMBINE_ONLY):
        if count:
            raise OptionError(f"bucket_count={count} must be 0 where no stage follows")
        return
    if not 1 <= count <= MAX_BUCKETS:
        raise OptionError(f"bucket_count={count} must be 1 to {MAX_BUCKETS}")
    buckets = list(args.buckets)[:count]
    if buckets[0] < 1 or any(a >= b for a, b in itertools.pairwise(buckets)):
        raise OptionError(f"buckets={buckets} must be positive and ascending")
    if buckets[-1] < args.capacity:
        raise OptionError(
            f"buckets={buckets} must end with capacity={args.capacity} or more, so that every "
            "count fits"
        )
