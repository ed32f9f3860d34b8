"""What of the timer can be seen without a GPU: its arithmetic, its gate, its words, its refusal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from sn72kernels import bench
from sn72kernels import device as devices
from sn72kernels.errors import ArgumentError, NoGpuError

PEAKS = bench.Peaks("example", copy_gb_s=1000.0, tflop_s={"bfloat16": 10.0})
WORK = bench.Work(bytes=2_000_000, flops=4_000_000_000, unit="bfloat16")


def test_bytes_of() -> None:
    assert bench.bytes_of(torch.zeros(3, 4), torch.zeros(5, dtype=torch.float16)) == 58


def test_enough_copies_to_turn_the_cache_over() -> None:
    l2, memory = 50 << 20, 80 << 30
    assert bench.sets_needed(10 << 20, l2, memory) == 15
    assert bench.sets_needed(1 << 30, l2, memory) == 2
    assert bench.sets_needed(64 << 10, l2, memory) == 2400
    # Too small for any number of copies.
    assert bench.sets_needed(0, l2, memory) == bench.sets_needed(1000, l2, memory) == 64
    # Memory is the bound: 8 copies of 5 GB fit in half of 80.
    assert bench.sets_needed(5 << 30, 100 << 30, memory) == 8
    assert [bench.is_cold(size, l2, memory) for size in (1000, 64 << 10, 1 << 30)] == [
        False,
        True,
        True,
    ]


def test_rates_and_percentages() -> None:
    """2 MB and 4 GFLOP in 0.5 ms (the median): 4 GB/s and 8 TFLOP/s."""
    timing = bench.Timing.of("x", [0.4, 0.5, 0.7, 0.5, 0.5], WORK, PEAKS)
    assert timing.ms == 0.5
    assert timing.gb_s == pytest.approx(4.0)
    assert timing.copy_percent == pytest.approx(0.4)
    assert timing.tflop_s == pytest.approx(8.0)
    assert timing.gemm_percent == pytest.approx(80.0)
    plain = bench.Timing.of("x", [0.5], bench.Work(2_000_000, 100), PEAKS)
    assert plain.gemm_percent is None
    assert PEAKS.least_ms(WORK) == pytest.approx(0.4)
    assert PEAKS.least_ms(bench.Work(2_000_000, 100)) == pytest.approx(0.002)


def race(*candidates: tuple[str, object], near: object = None) -> list[bench.Timing]:
    x = torch.randn(16)
    wanted = x.relu()
    return bench.compare(
        dict(candidates),  # type: ignore[arg-type]
        (x,),
        correct=lambda out: torch.equal(out, wanted),
        near=near,  # type: ignore[arg-type]
        work=WORK,
        peaks=PEAKS,
    )


def wrong(x: torch.Tensor) -> torch.Tensor:
    return x.relu() + 1e-3


def broken(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such kernel\nmore of it")


def test_a_wrong_candidate_has_no_time_and_nobody_a_speed_up_over_it() -> None:
    timings = race(("ours", torch.relu), ("wrong", wrong), ("broken", broken), ("other", relu))
    assert [t.ms is None for t in timings] == [False, True, True, False]
    assert timings[1].note == "wrong result"
    assert timings[2].note == "ValueError: no such kernel"
    assert list(bench.speedups(timings)) == ["other"]
    text = bench.format_timings("title", timings)
    assert "wrong  not timed: wrong result" in text


def test_when_ours_is_wrong_there_is_no_speed_up_at_all() -> None:
    timings = race(("ours", wrong), ("other", torch.relu))
    assert timings[0].ms is None
    assert timings[1].ms is not None
    assert bench.speedups(timings) == {}
    row = next(line for line in bench.format_timings("t", timings).splitlines() if "other" in line)
    assert len(row.split()) == 6, "a speed-up stands at the end of the row"


def relu(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0)


def test_nobody_right() -> None:
    with pytest.raises(ArgumentError, match="no candidate gave a right result"):
        race(("ours", wrong), ("other", broken))


def test_others_may_be_asked_less_of_than_ours() -> None:
    def near(out: torch.Tensor) -> bool:
        return True

    assert race(("ours", torch.relu), ("other", wrong), near=near)[1].ms is not None
    assert race(("ours", wrong), ("other", wrong), near=near)[0].ms is None


def test_what_ours_forgets_to_write_is_poison() -> None:
    """A candidate that returns memory it never wrote would pass when that holds an old result."""

    torch.use_deterministic_algorithms(False)  # every test of this folder is poisoned otherwise

    def forgetful(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    with pytest.raises(ArgumentError):
        bench.compare(
            {"ours": forgetful},
            (torch.zeros(8),),
            correct=lambda out: not bool(out.isnan().any()),
            work=WORK,
            peaks=PEAKS,
        )


def test_a_candidate_that_writes_its_arguments_spoils_nobody_elses() -> None:
    def in_place(x: torch.Tensor) -> torch.Tensor:
        return x.relu_()

    x = torch.full((8,), -1.0)
    timings = bench.compare(
        {"a": torch.relu, "b": in_place},
        (x,),
        correct=lambda out: bool((out == 0).all()),
        work=WORK,
        peaks=PEAKS,
    )
    assert all(t.ms is not None for t in timings)


def test_peaks_of_the_cpu_are_measured() -> None:
    peaks = bench.measure_peaks(torch.device("cpu"))
    assert "CPU" in peaks.device
    assert math.isfinite(peaks.copy_gb_s)
    assert peaks.copy_gb_s > 0.1
    assert peaks.tflop_s["float32"] > 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")
def test_no_gpu_is_said_so() -> None:
    with pytest.raises(NoGpuError, match="a CUDA device is needed to time kernels"):
        bench.cold_ms(torch.relu, torch.zeros(3))


# --- graphs, with a stand-in for the device ------------------------------------------------


class Device:
    """Stands in for CUDA: a graph remembers its calls, an event the time that they would take."""

    CALL_MS = 0.25

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.recording: list[object] | None = None
        outer = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[object] = []
                self.replays = 0

            def replay(self) -> None:
                self.replays += 1
                slower = 3.0 if self.replays == 1 else 1.0  # clocks have to come up first
                outer.now += slower * outer.CALL_MS * len(self.calls)

        class Event:
            def record(self) -> None:
                self.at = outer.now

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        @contextmanager
        def capture(graph: Graph, stream: object) -> Iterator[None]:
            self.recording = graph.calls
            try:
                yield
            finally:
                self.recording = None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": lambda: stream,
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda: stream,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(devices, "event", Event)
        monkeypatch.setattr(devices, "require_cuda", lambda purpose: torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(devices, "facts", lambda device: FACTS)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """What a kernel's launch is to a capture."""
        if self.recording is not None:
            self.recording.append(x.data_ptr())
        return x


FACTS = devices.DeviceFacts("stand-in", 90, 132, 50 << 20, 227 << 10, 80 << 30, None)


def test_calls_of_a_graph_go_round_over_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    x = torch.zeros(1 << 20, dtype=torch.uint8)
    seen: list[int] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        if device.recording is not None:
            seen.append(x.data_ptr())
        return device.call(x)

    samples = bench.interleaved({"a": call, "b": device.call}, x, calls=200, replays=5)
    # 150 copies of 1 MB turn a cache of 50 MB over three times; two rounds are 200 calls and more.
    assert len(seen) == 300
    assert len(set(seen)) == 150
    assert seen[:150] == seen[150:]
    assert x.data_ptr() not in seen
    # The first replay, with slow clocks, does not count.
    assert samples == {"a": [device.CALL_MS] * 5, "b": [device.CALL_MS] * 5}
    assert bench.cold_ms(device.call, x) == device.CALL_MS


def test_copies_lie_in_memory_as_what_they_are_copies_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table for all samples stays one table, and tensors in lists are not left in the cache."""
    Device(monkeypatch)
    table = torch.rand(1, 4, 8).expand(32, -1, -1)
    turned = torch.rand(5, 4, 8).transpose(0, 1)
    assert bench.bytes_of(table) == 4 * 8 * 4
    assert bench.bytes_of(table[:, :0], torch.zeros(())) == 4
    first, second = bench._copies((table, [turned, 3], None))[:2]
    for ours, (others, number), nothing in (first, second):
        assert torch.equal(ours, table)
        assert ours.stride() == table.stride()
        assert torch.equal(others, turned)
        assert others.stride() == turned.stride()
        assert (number, nothing) == (3, None)
    places = {t.data_ptr() for t in bench.tensors_of((table, turned, first, second))}
    assert len(places) == 6


def test_what_cannot_be_captured_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def waits(x: torch.Tensor) -> torch.Tensor:
        if device.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    x = torch.zeros(1 << 20)
    failures: dict[str, str] = {}
    samples = bench.interleaved({"ours": device.call, "waits": waits}, x, failures=failures)
    assert list(samples) == ["ours"]
    assert failures["waits"].startswith("cannot be captured in a graph: RuntimeError: operation")
    with pytest.raises(RuntimeError, match="not permitted"):
        bench.interleaved({"waits": waits}, x)
