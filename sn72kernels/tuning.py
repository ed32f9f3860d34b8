"""Launch configurations: frozen, named, chosen by rule, and if asked for by measurement.

A rule is a pure function of shape, dtype and architecture, so that the same call always runs the
same code. Measurement (:func:`autotune`) happens only when called, on a GPU, and leaves its
result in a JSON file that :func:`tuned` reads once per process; no op measures on its own. An op
declares each of its configurations as a :class:`Tunable` and launches with what that gives.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

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


MOST_ROWS = 16

# What measuring may change of a RowTile: never the columns, which have to cover the row.
ROW_CHOICES: dict[str, tuple[int, ...]] = {"rows": (1, 2, 4, 8, 16), "warps": (1, 2, 4, 8, 16)}


def fits_registers(tile: RowTile) -> bool:
    """Whether a thread has at most 64 elements: with more it spills, after minutes of compiling."""
    return tile.rows * tile.cols <= 64 * 32 * tile.warps


# Row lengths that are measured: the widths of ViT-S to ViT-g and of their MLPs.
WIDTHS = (384, 768, 1024, 1536, 3072, 4096)

# Sums over columns: 16 bytes a thread along the row, a few rows in flight for the latency.
COLUMN_BLOCK = RowTile(rows=4, cols=256, warps=4)


@functools.cache
def row_tile(
    cols: int,
    itemsize: int,
    *,
    widest: int,
    tile_bytes: int,
    thread_bytes: int,
    most_rows: int = MOST_ROWS,
) -> RowTile:
    """Configuration of a memory-bound kernel that reads rows of ``cols`` elements.

    Rule: each thread has ``thread_bytes`` of a tensor in flight (two 128-bit loads hide more
    latency than one and cost 8 registers); short rows are stacked until a program reads
    ``tile_bytes`` so that a block is worth its launch, at most ``most_rows``; rows longer than
    ``widest`` go in chunks. Where so few rows are stacked because there are no more, latency counts
    and not bandwidth: a thread has one 128-bit load, and there are twice as many.

    Args:
        cols: length of a row.
        itemsize: bytes per element.
        widest: longest row, in elements, that one program keeps in registers.
        tile_bytes: bytes that one program should read at least.
        thread_bytes: bytes of one tensor per thread.
        most_rows: rows per program at most, of :func:`most_rows`.
    """
    width = power_of_two(cols)
    whole = width <= widest
    if not whole:
        width = min(widest, 4096)
    wanted = max(1, min(MOST_ROWS, tile_bytes // (width * itemsize))) if whole else 1
    rows = min(wanted, most_rows)
    if rows < wanted:
        thread_bytes = min(thread_bytes, 16)
    threads = rows * width * itemsize // thread_bytes
    warps = max(1, min(16, power_of_two(-(-threads // 32))))
    # One warp for a tiny row starves the scheduler; one thread with over 32 elements spills.
    warps = max(warps, min(16, rows * width // (32 * 32)))
    return RowTile(rows=rows, cols=width, warps=warps, whole=whole)


def most_rows(rows: int, device: torch.device) -> int:
    """Rows per program, a power of two up to 16, that still give each multiprocessor two programs.

    What :func:`row_tile` is told of a batch of ``rows`` rows: a batch of 1024 in programs of 16
    would leave half of an H100 idle.
    """
    share = rows // (2 * sms(device))
    return max(1, min(MOST_ROWS, power_of_two(share + 1) // 2))


def power_of_two(n: int) -> int:
    """Smallest power of two that is >= ``n`` (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


def sms(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``: how many programs fill it."""
    return devices.facts(device).sms


# --- rules and measured configurations -----------------------------------------------------

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Block:
    """How a kernel over a list of items is cut.

    Attributes:
        size: items per program, a power of two.
        warps: warps per program.
    """

    size: int
    warps: int


@dataclass(frozen=True, eq=False, slots=True)
class Tunable(Generic[Config]):
    """One launch configuration: the rule that gives it, and what measuring may change.

    Attributes:
        name: op and kernel, ``"quantize.token"``; unique.
        rule: the configuration for a key, a pure function. Its name is what ``explain`` shows.
        vary: field -> values that measuring tries; every other field stays as the rule has it.
        usable: which combinations are worth compiling.
    """

    name: str
    rule: Callable[..., Config]
    vary: Mapping[str, tuple[int, ...]]
    usable: Callable[[Config], bool] = lambda _: True

    def candidates(self, *key: object) -> tuple[Config, ...]:
        """The rule's configuration for ``key``, then every usable combination of ``vary``."""
        first = self.rule(*key)
        combinations = itertools.product(*self.vary.values())
        others = (replace(first, **dict(zip(self.vary, c, strict=True))) for c in combinations)  # type: ignore[type-var]
        return tuple(dict.fromkeys((first, *filter(self.usable, others))))

    def config(self, device: torch.device, *key: object) -> Config:
        """The configuration to launch with: the measured one where there is one, else the rule's.

        Costs a dictionary look-up after the first call for a key.
        """
        if self.name in _forced:
            return cast("Config", _forced[self.name])
        return self._measured(device, key) or self.rule(*key)

    def explain(self, device: torch.device, *key: object) -> dict[str, Any]:
        """:meth:`config` as a dictionary, with ``chosen_by``: ``tuning`` or the rule's name."""
        measured = self._measured(device, key)
        chosen_by = "rule " + getattr(self.rule, "__name__", "?") if measured is None else "tuning"
        config: Any = self.config(device, *key)
        return {**asdict(config), "chosen_by": chosen_by}

    def _measured(self, device: torch.device, key: tuple[object, ...]) -> Config | None:
        if device.type != "cuda":
            return None  # interpreted, or only compiled: nothing was measured there
        return tuned(self, key, devices.arch(device))


@dataclass(frozen=True, slots=True)
class Case:
    """A call to measure a configuration with.

    Attributes:
        tunable: the configuration.
        key: what it is looked up by.
        launch: the launcher.
        reference: the same in plain PyTorch.
        args: of both.
        outputs: number of results that must agree; None for all.
    """

    tunable: Tunable[Any]
    key: tuple[object, ...]
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    args: tuple[Any, ...]
    outputs: int | None = None


_forced: dict[str, object] = {}


@contextmanager
def forced(tunable: Tunable[Config], config: Config) -> Iterator[None]:
    """Let ``tunable`` give ``config`` whatever the key. Process-wide, for measuring and tests."""
    _forced[tunable.name] = config
    try:
        yield
    finally:
        del _forced[tunable.name]


def tuned(tunable: Tunable[Config], key: Sequence[object], arch: int) -> Config | None:
    """The measured configuration of ``tunable`` for ``key`` on ``arch``, or None.

    Read from disk once per process. An entry that is not among the candidates is ignored, so
    that no file can ask for a launch that would be wrong.
    """
    if env.get("SN72_TUNING") == "0":
        return None
    return cast("Config | None", _find(tunable, tuple(key), arch, env.get("SN72_CACHE_DIR")))


@functools.cache
def _find(tunable: Tunable[Any], key: tuple[object, ...], arch: int, _folder: str) -> Any:
    entry = _load(cache_file(arch)).get(_name(tunable.name, key))
    wanted = entry.get("config") if isinstance(entry, dict) else None
    if wanted is None:
        return None
    return next((c for c in tunable.candidates(*key) if asdict(c) == wanted), None)


def autotune(
    tunable: Tunable[Config],
    key: Sequence[object],
    run: Callable[..., object],
    correct: Callable[[], bool],
    *,
    arch: int,
    arguments: Sequence[Any] = (),
    measure: Callable[..., float] | None = None,
) -> Measured[Config]:
    """Measure every candidate, keep the fastest correct one on disk and return it.

    Args:
        tunable: what to choose.
        key: what the choice depends on besides the architecture (shape, dtype).
        run: runs the op once; called with ``arguments``.
        correct: whether the op's result is right with the candidate that is in force; a wrong
            one, or one that the device refuses, is dropped, however fast.
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

        devices.require_cuda("measure launch configurations")
        measure = bench.cold_ms
    candidates = tunable.candidates(*key)
    timed: list[tuple[float, int]] = []
    for place, candidate in enumerate(candidates):
        with forced(tunable, candidate):
            if _passes(correct):
                timed.append((measure(run, *arguments), place))
    if not timed:
        raise ArgumentError(
            f"none of the {len(candidates)} candidates for {tunable.name} computes it right"
        )
    milliseconds, best = min(timed)
    # The rule's own time, where it is correct, is the first one.
    rule_ms = timed[0][0] if timed[0][1] == 0 else None
    path = cache_file(arch)
    _load.cache_clear()  # another process may have written since
    config: Any = candidates[best]
    entry = {"config": asdict(config), "ms": milliseconds}
    _save(path, {**_load(path), _name(tunable.name, key): entry})
    return Measured(candidates[best], milliseconds, rule_ms, len(timed), len(candidates))


@dataclass(frozen=True, slots=True)
class Measured(Generic[Config]):
    """What :func:`autotune` found.

    Attributes:
        config: the fastest correct candidate.
        ms: its milliseconds.
        rule_ms: milliseconds of the rule's configuration; None where that was dropped.
        correct: number of correct candidates.
        tried: number of candidates.
    """

    config: Config
    ms: float
    rule_ms: float | None
    correct: int
    tried: int


def _passes(correct: Callable[[], bool]) -> bool:
    try:
        return correct()
    except Exception:  # too much shared memory for this device, say: Triton has many such errors
        return False


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
    _find.cache_clear()
