"""Honest timing of kernels: cold L2, no launch overhead, never a wrong result.

On a GPU, one CUDA graph holds many calls that go round over copies of the arguments, enough of them
that together they are several times the L2 cache; the time of a replay over the number of calls is
the time of a call whose data comes from memory. On a CPU the same candidates are timed by the
clock, warm. Bandwidth and arithmetic rate are given beside what the same device reaches in the same
process in a plain copy and a plain matrix product. A candidate whose result is wrong gets no time
at all, and so nobody gets a speed-up over it, nor it over anybody.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sn72kernels import device as devices
from sn72kernels.errors import ArgumentError

if TYPE_CHECKING:
    import torch

# Beyond this many copies, capturing the calls takes longer than timing them is worth.
MOST_SETS = 4096


@dataclass(frozen=True, slots=True)
class Work:
    """What one call has to do at least, counted from its sizes.

    Attributes:
        bytes: each input read once and each output written once.
        flops: arithmetic operations; of matrix products alone where there are some.
        unit: name of the dtype whose matrix product is the bound on ``flops``; empty for an op
            without matrix products, whose arithmetic is far from any bound.
    """

    bytes: int
    flops: int
    unit: str = ""

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a device reached in this process: the roofs that candidates are held against.

    Attributes:
        device: its name.
        copy_gb_s: bytes read plus bytes written by a copy, in 10^9 per second.
        tflop_s: dtype -> 10^12 operations per second in a large matrix product.
    """

    device: str
    copy_gb_s: float
    tflop_s: Mapping[str, float] = field(default_factory=dict)

    def least_ms(self, work: Work) -> float:
        """The shortest time in which a device with these peaks could do ``work``."""
        copying = work.bytes / self.copy_gb_s / 1e6
        peak = self.tflop_s.get(work.unit)
        return copying if peak is None else max(copying, work.flops / peak / 1e9)


@dataclass(frozen=True, slots=True)
class Timing:
    """One candidate's result; every figure is None where it was not timed.

    Attributes:
        name: of the candidate.
        ms: median milliseconds of a call.
        spread: difference of the quartiles over the median.
        gb_s: bytes of the work over ``ms``, in 10^9 per second.
        tflop_s: operations of the work over ``ms``, in 10^12 per second.
        copy_percent: ``gb_s`` of the copy bandwidth measured in the same process.
        gemm_percent: ``tflop_s`` of the matrix product measured in the same process; None for an
            op without matrix products.
        note: why it was not timed; empty where it was.
    """

    name: str
    ms: float | None = None
    spread: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    copy_percent: float | None = None
    gemm_percent: float | None = None
    note: str = ""

    @classmethod
    def of(cls, name: str, samples: Sequence[float], work: Work, peaks: Peaks) -> Timing:
        """Rates of ``work`` done in the median of ``samples`` milliseconds."""
        ms = statistics.median(samples)
        low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (ms, ms, ms)
        gb_s, tflop_s = work.bytes / ms / 1e6, work.flops / ms / 1e9
        peak = peaks.tflop_s.get(work.unit)
        return cls(
            name=name,
            ms=ms,
            spread=(high - low) / ms,
            gb_s=gb_s,
            tflop_s=tflop_s,
            copy_percent=100 * gb_s / peaks.copy_gb_s,
            gemm_percent=None if peak is None else 100 * tflop_s / peak,
        )


def speedups(timings: Sequence[Timing]) -> dict[str, float]:
    """Time of every other candidate over that of the first; only of those with a right result."""
    if not timings or timings[0].ms is None:
        return {}
    ours = timings[0].ms
    return {t.name: t.ms / ours for t in timings[1:] if t.ms is not None}


def bytes_of(*tensors: torch.Tensor) -> int:
    """Bytes of the elements of ``tensors``; what an expanded one repeats counts once."""
    return sum(
        t.element_size()
        * math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step or n == 0)
        for t in tensors
    )


def cold_ms(
    call: Callable[..., object], *arguments: Any, calls: int = 100, replays: int = 11
) -> float:
    """Median milliseconds of ``call(*arguments)`` with a cold L2 cache and no launch overhead.

    Args:
        call: capturable in a CUDA graph: no waiting, no shapes that depend on data.
        arguments: tensors among them, and in lists among them, are copied as often as needed;
            other values are shared.
        calls: calls in the graph, at least.
        replays: replays of the graph; the median is taken over them.

    Raises:
        NoGpuError: no CUDA device is visible.
    """
    samples = interleaved({"": call}, *arguments, calls=calls, replays=replays)[""]
    return statistics.median(samples)


def interleaved(
    candidates: Mapping[str, Callable[..., object]],
    *arguments: Any,
    calls: int = 100,
    replays: int = 11,
    failures: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """:func:`cold_ms` of several candidates, replayed in turns, so that a clock that drifts hits
    all of them alike. Gives the milliseconds of a call in every replay, not their median.

    Args:
        candidates: name -> callable of ``arguments``.
        arguments: see :func:`cold_ms`.
        calls: likewise.
        replays: likewise.
        failures: takes the name of, and the reason for, every candidate that cannot be captured,
            which is then left out; without it the error is raised.

    Raises:
        NoGpuError: no CUDA device is visible.
    """
    import torch

    devices.require_cuda("time kernels")
    sets = _copies(arguments)
    rounds = -(-calls // len(sets))
    graphs = {}
    for name, call in candidates.items():
        try:
            graphs[name] = _capture(call, sets, rounds)
        except Exception as error:
            if failures is None:
                raise
            failures[name] = f"cannot be captured in a graph: {_first_line(error)}"
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(replays + 1):
        for name, (graph, _) in graphs.items():
            start, stop = devices.event(), devices.event()
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            if turn:  # the first replay warms the clocks up
                times[name].append(start.elapsed_time(stop) / (rounds * len(sets)))
    return times


def on_the_clock(
    candidates: Mapping[str, Callable[..., object]], *arguments: Any, repeats: int = 7
) -> dict[str, list[float]]:
    """Milliseconds of a call on the CPU, warm, candidates in turns; each sample is a mean of as
    many calls as take a millisecond.
    """
    counts: dict[str, int] = {}
    for name, call in candidates.items():
        call(*arguments)
        counts[name] = max(1, round(1.0 / max(_host_ms(call, arguments, 1), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            times[name].append(_host_ms(call, arguments, counts[name]))
    return times


def compare(
    candidates: Mapping[str, Callable[..., Any]],
    arguments: Sequence[Any],
    *,
    correct: Callable[[Any], bool],
    work: Work,
    peaks: Peaks,
    near: Callable[[Any], bool] | None = None,
) -> list[Timing]:
    """Time every candidate whose result is right; say of the others why they were not timed.

    Every candidate is checked on its own copy of the arguments, the first one with its outputs
    poisoned with NaN before.

    Args:
        candidates: name -> callable of ``arguments``; the first is the one under test.
        arguments: on a CUDA device, see :func:`cold_ms`; on the CPU, see :func:`on_the_clock`.
        correct: whether a candidate's result is right.
        work: what one call has to do.
        peaks: of the device, from :func:`measure_peaks`.
        near: whether the result of any but the first candidate is right, where that is asked less
            of: a compiler that fuses multiplications with additions does not give the same bits.

    Raises:
        ArgumentError: no candidate is right.
    """
    import torch

    notes: dict[str, str] = {}
    for place, (name, call) in enumerate(candidates.items()):
        passes = correct if place == 0 or near is None else near
        try:
            if not passes(_checked_call(call, arguments, poison=place == 0)):
                notes[name] = "wrong result"
        except Exception as error:  # a peer's own error is its result
            notes[name] = _first_line(error)
    right = {name: call for name, call in candidates.items() if name not in notes}
    if not right:
        raise ArgumentError(f"no candidate gave a right result: {notes}")
    if any(isinstance(t, torch.Tensor) and t.is_cuda for t in arguments):
        samples = interleaved(right, *arguments, failures=notes)
    else:
        samples = on_the_clock(right, *arguments)
    return [
        Timing(name, note=notes[name])
        if name in notes
        else Timing.of(name, samples[name], work, peaks)
        for name in candidates
    ]


def format_timings(title: str, timings: Sequence[Timing]) -> str:
    """A table: microseconds, rates, percent of the measured peaks, and our speed-up."""
    ratios = speedups(timings)
    width = max((len(timing.name) for timing in timings), default=4)
    lines = [
        title,
        f"  {'':<{width}} {'us':>10} {'GB/s':>8} {'% of copy':>9} {'TFLOP/s':>8} {'% of GEMM':>9}"
        f" {'speed-up':>8}",
    ]
    for t in timings:
        if t.ms is None:
            lines.append(f"  {t.name:<{width}} not timed: {t.note}")
            continue
        percent = "" if t.gemm_percent is None else f"{t.gemm_percent:.1f}"
        ratio = f"{ratios[t.name]:.2f}" if t.name in ratios else ""
        lines.append(
            f"  {t.name:<{width}} {t.ms * 1e3:>10.2f} {t.gb_s:>8.1f} {t.copy_percent:>9.1f}"
            f" {t.tflop_s:>8.3g} {percent:>9} {ratio:>8}"
        )
    return "\n".join(lines)


def sets_needed(argument_bytes: int, l2_bytes: int, memory_bytes: int) -> int:
    """Copies of the arguments such that a round is over three L2 caches, within half the memory.

    At least 2. Where more than ``MOST_SETS`` would be needed it is 64: arguments so small (under
    40 kB for an L2 cache of 50 MB) stay in the cache, and their time is that of a launch anyway.
    """
    wanted = -(-3 * l2_bytes // max(1, argument_bytes))
    room = memory_bytes // 2 // max(1, argument_bytes)
    return max(2, min(64 if wanted > MOST_SETS else wanted, room))


def is_cold(argument_bytes: int, l2_bytes: int, memory_bytes: int) -> bool:
    """Whether as many copies as :func:`sets_needed` do turn the L2 cache over."""
    return sets_needed(argument_bytes, l2_bytes, memory_bytes) * argument_bytes > l2_bytes


@functools.cache
def measure_peaks(device: torch.device) -> Peaks:
    """Copy bandwidth and matrix products of ``device``, measured once per process.

    On CUDA: an 8192 x 8192 x 8192 product of random bfloat16, float8_e4m3fn and int8 matrices, each
    where the device has it. On the CPU: 2048 x 2048 x 2048 in float32, on all of PyTorch's threads.
    """
    import torch

    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        name = devices.facts(device).name
        return Peaks(name, devices.achieved_gb_s(index), _cuda_products(device))
    size = 256 << 20
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    copying = min(_host_ms(target.copy_, (source,), 1) for _ in range(5))
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    product = min(_host_ms(torch.mm, (a, b), 1) for _ in range(5))
    name = f"CPU, {torch.get_num_threads()} threads"
    return Peaks(name, 2 * size / copying / 1e6, {"float32": 2 * 2048**3 / product / 1e9})


def _cuda_products(device: torch.device) -> dict[str, float]:
    import torch

    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    one = torch.ones((), device=device)
    a8, b8 = (t.to(torch.float8_e4m3fn) for t in (a, b.t().contiguous()))
    ai, bi = ((t * 16).to(torch.int8) for t in (a, b.t().contiguous()))
    calls: dict[str, Callable[[], object]] = {
        "bfloat16": lambda: torch.mm(a, b),
        "float8_e4m3fn": lambda: torch._scaled_mm(
            a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "int8": lambda: torch._int_mm(ai, bi.t()),
    }
    found = {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
        except (RuntimeError, NotImplementedError):  # not on this device
            continue
        best = float("inf")
        for _ in range(10):
            start, stop = devices.event(), devices.event()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            best = min(best, start.elapsed_time(stop))
        found[name] = 2 * n**3 / best / 1e9
    return found


def _checked_call(call: Callable[..., Any], arguments: Sequence[Any], *, poison: bool) -> Any:
    """The result of a call on copies of the arguments."""
    from sn72kernels.testing import poisoned

    own = [_copy(value) for value in arguments]
    if not poison:
        return call(*own)
    with warnings.catch_warnings(), poisoned():
        # Filling memory comes with PyTorch's warnings about ops that are not deterministic.
        warnings.simplefilter("ignore")
        return call(*own)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _host_ms(call: Callable[..., object], arguments: Sequence[Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call(*arguments)
    return (time.perf_counter() - begin) * 1e3 / count


def _copies(arguments: Sequence[Any]) -> list[tuple[Any, ...]]:
    import torch

    facts = devices.facts(torch.device("cuda", torch.cuda.current_device()))
    count = sets_needed(bytes_of(*tensors_of(arguments)), facts.l2_bytes, facts.memory_bytes)
    return [tuple(_copy(value) for value in arguments) for _ in range(count)]


def _copy(value: Any) -> Any:
    """A copy of a tensor, or of those in a list, as it lies in memory; anything else as it is."""
    import torch

    if isinstance(value, (list, tuple)):
        return type(value)(_copy(part) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    # An expanded tensor is read from the cache: each of its copies would come from memory.
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())
    return value[once].clone().expand(value.shape)


def tensors_of(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among ``arguments`` and in lists among them."""
    import torch

    found: list[torch.Tensor] = []
    for value in arguments:
        if isinstance(value, (list, tuple)):
            found += tensors_of(value)
        elif isinstance(value, torch.Tensor):
            found.append(value)
    return found


def _capture(
    call: Callable[..., object], sets: Sequence[tuple[Any, ...]], rounds: int
) -> tuple[torch.cuda.CUDAGraph, object]:
    """Capture ``rounds`` rounds over ``sets``; the second value keeps the sets alive."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and load before capture
            call(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Outputs of one round stay alive, so that outputs rotate through memory as inputs do.
    kept: deque[object] = deque(maxlen=len(sets))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for arguments in sets:
                kept.append(call(*arguments))
    return graph, sets
