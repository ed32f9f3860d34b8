"""Honest timing of kernels on a GPU: cold L2, no launch overhead, never a wrong result.

One CUDA graph holds many calls that go round over copies of the arguments, enough of them that
together they are several times the L2 cache; the time of a replay over the number of calls is the
time of a call whose data comes from memory. Bandwidth is given beside the copy bandwidth that the
same device reaches in the same process. A candidate whose result is wrong gets no time at all.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sn72kernels import device as devices
from sn72kernels.errors import ArgumentError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Timing:
    """One candidate's result.

    Attributes:
        name: of the candidate.
        ms: median milliseconds of a call; None where it was not timed.
        gb_s: bytes of the model over ``ms``, in 10^9 bytes/s; None likewise.
        percent: ``gb_s`` as a percentage of the copy bandwidth measured in the same process.
        note: why it was not timed; empty where it was.
    """

    name: str
    ms: float | None = None
    gb_s: float | None = None
    percent: float | None = None
    note: str = ""


def bytes_of(*tensors: torch.Tensor) -> int:
    """Bytes of the elements of ``tensors``: the model's reads or writes of one call."""
    return sum(t.numel() * t.element_size() for t in tensors)


def cold_ms(
    call: Callable[..., object], *arguments: Any, calls: int = 100, replays: int = 11
) -> float:
    """Median milliseconds of ``call(*arguments)`` with a cold L2 cache and no launch overhead.

    Args:
        call: capturable in a CUDA graph: no waiting, no shapes that depend on data.
        arguments: tensors among them are copied as often as needed; other values are shared.
        calls: calls in the graph, at least.
        replays: replays of the graph; the median is taken over them.

    Raises:
        NoGpuError: no CUDA device is visible.
    """
    return interleaved({"": call}, *arguments, calls=calls, replays=replays)[""]


def interleaved(
    candidates: Mapping[str, Callable[..., object]],
    *arguments: Any,
    calls: int = 100,
    replays: int = 11,
) -> dict[str, float]:
    """:func:`cold_ms` of several candidates, replayed in turns, so that a clock that drifts hits
    all of them alike.
    """
    import torch

    devices.require_cuda("time kernels")
    sets = _copies(arguments)
    rounds = -(-calls // len(sets))
    graphs = {name: _capture(call, sets, rounds) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(replays + 1):
        for name, (graph, _) in graphs.items():
            start, stop = devices.event(), devices.event()
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            if turn:  # the first replay warms the clocks up
                times[name].append(start.elapsed_time(stop) / (rounds * len(sets)))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(
    candidates: Mapping[str, Callable[..., Any]],
    arguments: Sequence[Any],
    *,
    correct: Callable[[Any], bool],
    bytes_moved: int,
) -> list[Timing]:
    """Time every candidate whose result is right; say of the others why they were not timed.

    Args:
        candidates: name -> callable of ``arguments``.
        arguments: see :func:`cold_ms`.
        correct: whether a candidate's result is right.
        bytes_moved: what one call has to read and write at least.

    Raises:
        NoGpuError: no CUDA device is visible.
        ArgumentError: no candidate is right.
    """
    device = devices.require_cuda("time kernels")
    notes: dict[str, str] = {}
    for name, call in candidates.items():
        try:
            if not correct(call(*arguments)):
                notes[name] = "wrong result"
        except Exception as error:  # a peer's own error is its result
            notes[name] = f"{type(error).__name__}: {error}"
    right = {name: call for name, call in candidates.items() if name not in notes}
    if not right:
        raise ArgumentError(f"no candidate gave a right result: {notes}")
    ceiling = devices.achieved_gb_s(device.index or 0)
    milliseconds = interleaved(right, *arguments)
    timings = []
    for name in candidates:
        if name in notes:
            timings.append(Timing(name, note=notes[name]))
            continue
        gb_s = bytes_moved / milliseconds[name] / 1e6
        timings.append(Timing(name, milliseconds[name], gb_s, 100 * gb_s / ceiling))
    return timings


def format_timings(title: str, timings: Sequence[Timing]) -> str:
    """A table: microseconds, GB/s and percent of the measured copy bandwidth."""
    width = max((len(timing.name) for timing in timings), default=4)
    lines = [f"{title}", f"  {'':<{width}} {'us':>9} {'GB/s':>8} {'% of copy':>9}"]
    for timing in timings:
        if timing.ms is None or timing.gb_s is None or timing.percent is None:
            lines.append(f"  {timing.name:<{width}} not timed: {timing.note}")
        else:
            lines.append(
                f"  {timing.name:<{width}} {timing.ms * 1e3:>9.2f} {timing.gb_s:>8.1f}"
                f" {timing.percent:>9.1f}"
            )
    return "\n".join(lines)


def sets_needed(argument_bytes: int, l2_bytes: int, memory_bytes: int) -> int:
    """Copies of the arguments such that a round is over three L2 caches, within half the memory.

    At least 2, at most 64 (beyond which a graph of 100 calls would not repeat a set).
    """
    wanted = -(-3 * l2_bytes // max(1, argument_bytes))
    room = memory_bytes // 2 // max(1, argument_bytes)
    return max(2, min(64, wanted, room))


def _copies(arguments: Sequence[Any]) -> list[tuple[Any, ...]]:
    import torch

    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    facts = devices.facts(torch.device("cuda", torch.cuda.current_device()))
    count = sets_needed(bytes_of(*tensors), facts.l2_bytes, facts.memory_bytes)
    return [
        tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in arguments)
        for _ in range(count)
    ]


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
