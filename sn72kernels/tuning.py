"""Launch configurations: frozen, named, chosen by rule, and if asked for by measurement.

A rule is a pure function of shape, dtype and architecture, so that the same call always runs the
same code. Measurement (:func:`autotune`) happens only when called, on a GPU, and leaves its
result in a JSON file that :func:`tuned` reads once per process; no op measures on its own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sn72kernels import atomic, env
from sn72kernels import device as devices
from sn72kernels.errors import ArgumentError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class RowTile:
    """How a kernel over the rows of a matrix is cut.

    Attributes:
        rows: rows per program.
        cols: columns per program, a power of two; in a ``wide`` kernel, per pass.
        warps: warps per program.
        whole: whether ``cols`` covers the row, so that it is read once.
    """

    rows: int
    cols: int
    warps: int
    whole: bool = True


# Sums over columns: 16 bytes a thread along the row, a few rows in flight for the latency.
COLUMN_BLOCK = RowTile(rows=4, cols=256, warps=4)


@functools.cache
def row_tile(
    cols: int, itemsize: int, *, widest: int, tile_bytes: int, thread_bytes: int
) -> RowTile:
    """Configuration of a memory-bound kernel that reads rows of ``cols`` elements.

    Rule: each thread has ``thread_bytes`` of a tensor in flight (two 128-bit loads hide more
    latency than one and cost 8 registers); short rows are stacked until a program reads
    ``tile_bytes`` so that a block is worth its launch, at most 16 rows; rows longer than
    ``widest`` go in chunks.

    Args:
        cols: length of a row.
        itemsize: bytes per element.
        widest: longest row, in elements, that one program keeps in registers.
        tile_bytes: bytes that one program should read at least.
        thread_bytes: bytes of one tensor per thread.
    """
    width = power_of_two(cols)
    whole = width <= widest
    if not whole:
        width = min(widest, 4096)
    rows = max(1, min(16, tile_bytes // (width * itemsize))) if whole else 1
    threads = rows * width * itemsize // thread_bytes
    warps = max(1, min(16, power_of_two(-(-threads // 32))))
    # One warp for a tiny row starves the scheduler; one thread with over 32 elements spills.
    warps = max(warps, min(16, rows * width // (32 * 32)))
    return RowTile(rows=rows, cols=width, warps=warps, whole=whole)


def power_of_two(n: int) -> int:
    """Smallest power of two that is >= ``n`` (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


def sms(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``: how many programs fill it."""
    return devices.facts(device).sms


# --- measured configurations ---------------------------------------------------------------

Config = TypeVar("Config")


def tuned(op: str, key: Sequence[object], kind: type[Config], arch: int) -> Config | None:
    """The measured configuration of ``op`` for ``key`` on ``arch``, or None.

    Read from disk once per process. An entry that does not fit ``kind`` any more is ignored.
    """
    if env.get("SN72_TUNING") == "0":
        return None
    entry = _load(cache_file(arch)).get(_name(op, key))
    try:
        return kind(**entry["config"]) if entry else None
    except (TypeError, KeyError):
        return None


def autotune(
    op: str,
    key: Sequence[object],
    candidates: Sequence[Config],
    run: Callable[..., object],
    correct: Callable[[Config], bool],
    *,
    arch: int,
    arguments: Sequence[Any] = (),
    measure: Callable[..., float] | None = None,
) -> Config:
    """Measure every candidate, keep the fastest correct one on disk and return it.

    Args:
        op: name of the op.
        key: what the choice depends on besides the architecture (shape, dtype).
        candidates: frozen dataclass instances.
        run: runs the op once; called with a configuration and then ``arguments``.
        correct: whether the op's result with a configuration is right; a wrong one is dropped,
            however fast.
        arch: compute capability as one number.
        arguments: what the op works on; rotated between calls so that the L2 cache stays cold.
        measure: milliseconds of a call, given it and ``arguments``; by default
            :func:`sn72kernels.bench.cold_ms`.

    Raises:
        ArgumentError: no candidate is correct.
        NoGpuError: no CUDA device, and no ``measure`` given.
    """
    if measure is None:
        from sn72kernels import bench

        measure = bench.cold_ms
    right = [c for c in candidates if correct(c)]
    if not right:
        raise ArgumentError(f"none of the {len(candidates)} candidates for {op} computes it right")
    timed = [(measure(functools.partial(run, c), *arguments), i) for i, c in enumerate(right)]
    milliseconds, best = min(timed)
    path = cache_file(arch)
    entries = dict(_load(path))
    entries[_name(op, key)] = {"config": asdict(right[best]), "ms": milliseconds}  # type: ignore[call-overload]
    _save(path, entries)
    return right[best]


def cache_file(arch: int) -> Path:
    """Where measured configurations for ``arch`` live: one file per architecture and compiler."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "none"
    return env.cache_dir() / "tuning" / f"sm{arch}-triton{compiler}.json"


def _name(op: str, key: Sequence[object]) -> str:
    return "/".join([op, *(str(part) for part in key)])


@functools.cache
def _load(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _save(path: Path, entries: dict[str, Any]) -> None:
    atomic.write_text(path, json.dumps(entries, indent=1, sort_keys=True))
    _load.cache_clear()
