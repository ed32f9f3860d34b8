"""Latencies are what was timed, percentiles are where they should be, and reports are whole."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sn72engine import latency as module
from sn72engine.builder import build
from sn72engine.errors import InputError, OptionError
from sn72engine.latency import BenchReport, Latency, bench, interleave, measure
from sn72engine.session import Session, load
from sn72engine.spec import BenchOptions, BuildOptions, RuntimeOptions, ShapeRange
from sn72engine.store import Store
from tests import tiny_models

QUICK = BenchOptions(warmup=2, repeats=20)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("bench")
    options = BuildOptions(batch=ShapeRange(1, 2, 4))
    engine = build(tiny_models.linear(folder / "m.onnx"), options, store=Store(folder / "store"))
    with load(engine, RuntimeOptions(threads=1)) as opened:
        yield opened


class Clock:
    """Stands in for time: every call takes the next of the given durations."""

    def __init__(self, durations: list[float]) -> None:
        self.now = 0.0
        self._durations = iter(durations)

    def perf_counter(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += next(self._durations)


@given(st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=300))
@settings(max_examples=60, deadline=None)
def test_percentiles_are_ordered_and_in_milliseconds(seconds: list[float]) -> None:
    latency = Latency.of(seconds)
    assert latency.n == len(seconds)
    assert latency.min == min(seconds) * 1e3
    assert latency.max == max(seconds) * 1e3
    ordered = [latency.min, latency.p50, latency.p90, latency.p95]
    if len(seconds) >= BenchOptions.MINIMUM_FOR_P99:
        assert latency.p99 is not None
        ordered.append(latency.p99)
    else:
        assert latency.p99 is None
    ordered.append(latency.max)
    slack = 1e-9 * max(latency.max, 1)
    assert all(a <= b + slack for a, b in itertools.pairwise(ordered))
    assert latency.mean == pytest.approx(1e3 * sum(seconds) / len(seconds), abs=1e-9)


def test_known_percentiles() -> None:
    latency = Latency.of([k / 1e3 for k in range(101)])
    assert (latency.p50, latency.p90, latency.p95) == pytest.approx((50, 90, 95))
    assert latency.p99 == pytest.approx(99)
    assert "p99 99.00" in str(latency)
    assert "p99" not in str(Latency.of([0.001] * 99))


@pytest.mark.parametrize("bad", [[], [np.nan], [np.inf], [-1.0]])
def test_times_that_are_none(bad: list[float]) -> None:
    with pytest.raises(InputError):
        Latency.of(bad)


def test_warmup_is_made_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([9.0, 8.0, 0.001, 0.002, 0.003])
    monkeypatch.setattr(module, "time", clock)
    latency = measure(clock.work, BenchOptions(warmup=2, repeats=3))
    assert latency.n == 3
    assert latency.min == pytest.approx(1)
    assert latency.max == pytest.approx(3)
    assert latency.mean == pytest.approx(2)


def test_a_call_that_fails_is_not_swallowed() -> None:
    def fail() -> None:
        raise RuntimeError("broken call")

    with pytest.raises(RuntimeError, match="broken call"):
        measure(fail, QUICK)


def test_measures_real_time() -> None:
    latency = measure(lambda: time.sleep(0.002), BenchOptions(warmup=0, repeats=3))
    assert latency.min >= 2.0


@given(names=st.integers(1, 4), warmup=st.integers(0, 3), repeats=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_calls_take_turns(names: int, warmup: int, repeats: int) -> None:
    order: list[str] = []
    calls = {f"c{k}": (lambda k=k: order.append(f"c{k}")) for k in range(names)}
    found = interleave(calls, warmup, repeats)
    assert list(found) == list(calls)
    assert all(latency.n == repeats for latency in found.values())
    rounds = [order[i : i + names] for i in range(0, len(order), names)]
    assert len(rounds) == warmup + repeats
    assert all(sorted(turn) == sorted(calls) for turn in rounds)
    # Who goes first changes from round to round, evenly.
    first = Counter(turn[0] for turn in rounds)
    assert max(first.values()) - min([*first.values(), *([0] * (names > len(rounds)))]) <= 1


def test_interleaved_times_go_to_the_right_name(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([])
    monkeypatch.setattr(module, "time", clock)

    def takes(seconds: float) -> None:
        clock.now += seconds

    found = interleave({"fast": lambda: takes(0.001), "slow": lambda: takes(0.004)}, 1, 5)
    assert found["fast"].p50 == pytest.approx(1)
    assert found["slow"].p50 == pytest.approx(4)


def test_interleave_refuses_nothing_to_do() -> None:
    with pytest.raises(InputError, match="calls is empty"):
        interleave({}, 0, 1)
    with pytest.raises(OptionError, match="repeats=0"):
        interleave({"a": lambda: None}, 0, 0)
    with pytest.raises(OptionError, match="warmup=-1"):
        interleave({"a": lambda: None}, -1, 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_report_of_a_session(session: Session, batch: int) -> None:
    report = bench(session, BenchOptions(batch=batch, warmup=3, repeats=120))
    assert report.latency.n == len(report.samples_ms) == 120
    assert report.throughput == pytest.approx(batch / report.latency.mean * 1e3)
    assert report.first_ms is not None
    assert report.first_ms > 0
    again = json.loads(json.dumps(report.to_dict()))
    assert again["latency_ms"]["p99"] == report.latency.p99
    assert again["batch"] == batch
    assert again["machine"]["threads"] == 1
    assert again["machine"]["target"] == "cpu"
    assert again["machine"]["cpu"]
    text = report.render()
    assert "p99" in text
    assert "samples/s" in text
    assert "first call" in text


def test_no_p99_from_few_calls(session: Session) -> None:
    report = bench(session, QUICK)
    assert report.latency.p99 is None
    assert report.to_dict()["latency_ms"]["p99"] is None
    assert "needs 100 calls" in report.render()


def test_without_warmup_there_is_no_first_call(session: Session) -> None:
    report = bench(session, BenchOptions(warmup=0, repeats=3))
    assert report.first_ms is None
    assert "first call" not in report.render()


def test_given_input_is_used_and_checked(session: Session) -> None:
    seen: list[np.ndarray] = []
    real = session._runner.run
    session._runner.run = lambda inputs: seen.append(inputs["x"]) or real(inputs)
    try:
        x = np.ones((2, 4), np.float32)
        bench(session, BenchOptions(batch=2, warmup=0, repeats=3), inputs={"x": x})
    finally:
        del session._runner.run
    assert len(seen) == 3
    assert all(array is x for array in seen)
    with pytest.raises(InputError, match="'x' has batch 2, but batch=1 is to be timed"):
        bench(session, QUICK, inputs={"x": x})
    with pytest.raises(InputError, match="'x' is missing"):
        bench(session, QUICK, inputs={})


def test_a_batch_outside_the_range_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match=r"batch 9, but the engine was built for 1\.\.4"):
        bench(session, BenchOptions(batch=9, repeats=3))


@pytest.mark.parametrize(
    "samples",
    [
        [1.0],
        [2.0] * 50,
        list(np.random.default_rng(0).gamma(4, 1, 500) + 5),
        [*([1.0] * 499), 1000.0],
    ],
    ids=["single", "constant", "usual", "outlier"],
)
def test_histogram_is_a_picture(tmp_path: Path, samples: list[float]) -> None:
    report = BenchReport(
        latency=Latency.of([value / 1e3 for value in samples]),
        throughput=1.0,
        batch=1,
        warmup=0,
        first_ms=None,
        machine={"backend": "onnxruntime", "precision": "fp32", "target": "cpu"},
        samples_ms=tuple(samples),
    )
    path = report.save_histogram(tmp_path / "deep" / "h.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert any(rgb == (122, 166, 214) for _, rgb in colours)  # the bars
    assert [entry.name for entry in path.parent.iterdir()] == ["h.png"]
