"""Buckets chosen from measured times, on the simulated driver, where time passes as a test says."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sn72engine import latency
from sn72engine.cascade import Cascade
from sn72engine.cascade.buckets import escalation_counts
from sn72engine.cascade.modes import GraphOptions, default_buckets, make_executor
from sn72engine.cascade.sizing import expected_counts
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.errors import CudaUnavailableError, OptionError
from sn72engine.stages.base import StageScores
from sn72engine.stages.capture import Rows
from tests.cpu.simulated_cuda import ColumnOffer, SimulatedCapturer, SimulatedCuda

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

CAPACITY = 32
LANES = 2
#: Bytes that a capture takes in one lane, by the simulated capturer.
CAPTURE = 1000

Seconds = Callable[[int], float]


class Clock:
    """Stands for the module ``time`` where calls are timed."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TimedOffer(ColumnOffer):
    """Its work takes ``seconds`` of the clock, by the number of rows."""

    clock: Clock
    seconds: Seconds

    def bind(self, buffer: Any, rows: int, lane: int) -> Any:
        bound = super().bind(buffer, rows, lane)

        class Timed:
            output = bound.output

            def __call__(_) -> None:  # noqa: N805 - self is the offer
                bound()
                self.clock.now += self.seconds(rows)

        return Timed()


class TimedStage:
    """A stage that can be captured, at least ``least`` rows at a time."""

    needs = None

    def __init__(self, gpu: Gpu, seconds: Seconds, least: int = 1) -> None:
        self._gpu, self._seconds, self._least = gpu, seconds, least

    def offer_capture(self, device: int) -> TimedOffer:
        offer = TimedOffer(self._gpu.cuda, Rows((1,), "float32", "key"), 0)
        offer.clock, offer.seconds = self._gpu.clock, self._seconds
        offer.limits = self._least, 99
        return offer

    def prepare(self) -> None:
        pass

    def score(self, images: Any) -> StageScores:
        return StageScores(np.full(len(images), 0.5))

    def close(self) -> None:
        pass


class Gpu:
    """Opens one simulated GPU, on which time passes as the stages say."""

    def __init__(self, library: ctypes.CDLL, clock: Clock) -> None:
        self.cuda = SimulatedCuda(library)
        self.capturer = SimulatedCapturer(self.cuda)
        self.clock = clock

    def make(
        self,
        *seconds: Seconds,
        least: int = 1,
        mode: Any = "host",
        side_by_side: tuple[int, ...] = (),
        **options: Any,
    ) -> Any:
        stages = [TimedStage(self, one, least) for one in seconds]
        names = tuple(
            StageSpec(f"s{at}", group="group", combine="weighted")
            if at in side_by_side
            else StageSpec(f"s{at}")
            for at in range(len(stages))
        )
        spec = CascadeSpec(names, max_batch=CAPACITY)
        graphs = GraphOptions(lanes=LANES, buckets="measured", **options)
        opened = self.cuda, self.capturer
        return make_executor(spec, stages, mode, graphs, gpu=lambda device: opened)


@pytest.fixture
def gpu(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return Gpu(library, clock)


def step_at(rows: int) -> Seconds:
    """As long for any number up to ``rows``, and four times that above."""
    return lambda given: 0.001 if given <= rows else 0.004


def by_row(rows: int) -> float:
    return 0.001 * rows


@needs_compiler
@pytest.mark.parametrize("step", [4, 8, 16, 24])
def test_a_step_in_the_times_becomes_a_bucket(gpu: Gpu, step: int) -> None:
    executor, report = gpu.make(step_at(step), max_buckets=2)
    plan = report().plans["s0"]
    assert plan.buckets == (step, CAPACITY)
    assert plan.curve.batches == default_buckets(CAPACITY)
    np.testing.assert_allclose(plan.curve.seconds, [step_at(step)(b) for b in plan.curve.batches])
    # Any number of samples is as likely as any other.
    assert plan.seconds == pytest.approx(0.001 * (step + 4 * (CAPACITY - step)) / CAPACITY)
    assert {rows for _, rows in report().bytes} == {step, CAPACITY}
    executor.close(0.0)


@needs_compiler
def test_more_buckets_than_the_times_are_worth_are_not_taken(gpu: Gpu) -> None:
    executor, report = gpu.make(step_at(8), max_buckets=6)
    assert report().plans["s0"].buckets == (8, CAPACITY)
    executor.close(0.0)


@needs_compiler
def test_a_limit_of_memory_drops_buckets_where_they_save_least(gpu: Gpu) -> None:
    def slow(rows: int) -> float:
        return 10 * by_row(rows)

    executor, report = gpu.make(by_row, slow, shares=(1.0,))
    roomy = report().plans
    assert [len(plan.buckets) for plan in roomy.values()] == [6, 6]
    assert sum(plan.bytes for plan in roomy.values()) == 12 * LANES * CAPTURE
    executor.close(0.0)

    limit = 5 * LANES * CAPTURE
    executor, report = gpu.make(by_row, slow, shares=(1.0,), memory_bytes=limit)
    tight = report().plans
    assert [len(plan.buckets) for plan in tight.values()] == [1, 4]
    assert {plan.buckets[-1] for plan in tight.values()} == {CAPACITY}
    assert sum(report().bytes.values()) == sum(plan.bytes for plan in tight.values()) == limit
    executor.close(0.0)


@needs_compiler
def test_a_limit_that_nothing_keeps_is_refused_and_leaves_nothing(gpu: Gpu) -> None:
    with pytest.raises(OptionError, match=r"memory_bytes=3999 is too little.* takes 4000"):
        gpu.make(by_row, by_row, memory_bytes=2 * LANES * CAPTURE - 1)
    assert not gpu.cuda.executables
    assert not gpu.cuda._streams
    assert not gpu.cuda._events
    _, report = gpu.make(by_row, by_row, memory_bytes=2 * LANES * CAPTURE - 1, mode="auto")
    assert (report().mode, report().plans) == ("cpu", {})
    assert "memory_bytes=3999 is too little" in report().reason


@needs_compiler
def test_a_stage_that_few_samples_reach_gets_small_buckets(gpu: Gpu) -> None:
    executor, report = gpu.make(by_row, by_row, by_row, shares=(0.1, 1.0), max_buckets=3)
    first, second, third = (plan.buckets for plan in report().plans.values())
    assert second[:-1] < first[:-1]
    assert second[1] <= 8 < first[1]
    assert third == second
    assert {first[-1], second[-1]} == {CAPACITY}
    executor.close(0.0)


@needs_compiler
def test_a_stage_with_a_smallest_batch(gpu: Gpu) -> None:
    executor, report = gpu.make(by_row, least=6)
    plan = report().plans["s0"]
    assert plan.curve.batches == (6, 8, 16, 24, 32)
    assert plan.buckets == plan.curve.batches
    executor.close(0.0)


@needs_compiler
@pytest.mark.parametrize(("units", "buckets"), [(10, (4, 16, CAPACITY)), (8, (16, CAPACITY))])
def test_stages_side_by_side_get_the_same_buckets(
    gpu: Gpu, units: int, buckets: tuple[int, ...]
) -> None:
    """By the sum of their times, for the samples that reach the group, within one limit."""
    executor, report = gpu.make(
        by_row,
        step_at(4),
        step_at(16),
        by_row,
        side_by_side=(1, 2),
        shares=(1.0, 0.0),  # all of them reach the group, none the last stage
        max_buckets=3,
        memory_bytes=units * LANES * CAPTURE,
    )
    first, left, right, last = report().plans.values()
    assert left.buckets == right.buckets == buckets
    assert [len(first.buckets), len(last.buckets)] == [3, 1]
    assert left.probabilities == right.probabilities == first.probabilities
    np.testing.assert_allclose(left.curve.seconds, [step_at(4)(b) for b in left.curve.batches])
    np.testing.assert_allclose(right.curve.seconds, [step_at(16)(b) for b in left.curve.batches])
    for stage in ("s1", "s2"):
        assert {rows for name, rows in report().bytes if name == stage} == set(buckets)
    assert sum(report().bytes.values()) == units * LANES * CAPTURE
    assert sum(plan.bytes for plan in report().plans.values()) == units * LANES * CAPTURE
    executor.close(0.0)


@needs_compiler
def test_replays_are_timed_and_the_trial_leaves_nothing(gpu: Gpu) -> None:
    executor, report = gpu.make(by_row, max_buckets=1)
    candidates = len(default_buckets(CAPACITY))
    assert gpu.cuda.launches % candidates == 0
    assert gpu.cuda.launches >= 20 * candidates
    assert len(gpu.cuda.executables) == LANES  # of the one bucket
    assert len(gpu.cuda._streams) == LANES
    assert list(report().bytes.values()) == [LANES * CAPTURE]
    executor.close(0.0)


@needs_compiler
def test_a_trial_that_fails_leaves_nothing(gpu: Gpu) -> None:
    gpu.cuda.fail_at = 12
    with pytest.raises(CudaUnavailableError, match="CUDA_ERROR_LAUNCH_FAILED"):
        gpu.make(by_row)
    gpu.cuda.fail_at = 0
    assert not gpu.cuda.executables
    assert not gpu.cuda._streams


@needs_compiler
def test_the_report_explains_the_choice(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = gpu.cuda, gpu.capturer
    monkeypatch.setattr(
        "sn72engine.cascade.cascade.make_executor",
        lambda *a, device: make_executor(*a, device=device, gpu=lambda device: opened),
    )
    spec = CascadeSpec((StageSpec("small"), StageSpec("large")), max_batch=CAPACITY)
    stages = {"small": TimedStage(gpu, step_at(8)), "large": TimedStage(gpu, step_at(4))}
    options = GraphOptions(buckets="measured", max_buckets=2, memory_bytes=10**6)
    with Cascade(spec, stages, mode="host", graphs=options) as cascade:
        report = cascade.report()
    text = str(report)
    assert "small: buckets 8, 32: at most 2, within 1.0 MB" in text
    assert "large: buckets 4, 32: at most 2, within 1.0 MB" in text
    assert "powers of two" in text
    plans = json.loads(json.dumps(report.to_dict()))["executor"]["plans"]
    assert plans["small"]["buckets"] == [8, 32]
    assert plans["large"]["curve"]["seconds"][:4] == pytest.approx([0.001] * 3 + [0.004])


def test_numbers_of_samples_that_are_expected() -> None:
    first, second, third = expected_counts(8, 3, (0.5, 0.25))
    np.testing.assert_allclose(first, [0, *[1 / 8] * 8])
    mixed = np.zeros(9)
    for count in range(1, 9):
        mixed[: count + 1] += escalation_counts(count, 0.5) / 8
    np.testing.assert_allclose(second, mixed, atol=1e-12)
    means = [counts @ np.arange(9) for counts in (first, second, third)]
    np.testing.assert_allclose(means, [4.5, 2.25, 4.5 / 8])


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_a_full_batch_fits_however_unlikely(share: float) -> None:
    for counts in expected_counts(512, 4, (share,)):
        assert counts[-1] > 0
        assert counts.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": "fastest"}, "buckets='fastest' must be a tuple of numbers or 'measured'"),
        ({"memory_bytes": 10**9}, "memory_bytes=1000000000 is a limit for buckets='measured'"),
        ({"buckets": "measured", "memory_bytes": -1}, "memory_bytes=-1"),
        ({"max_buckets": 0}, "max_buckets=0"),
        ({"shares": ()}, r"shares=\(\) must hold"),
        ({"shares": (0.2, 1.5)}, "shares=1.5"),
    ],
)
def test_options_that_cannot_be_used(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GraphOptions(**options)


def test_options_survive_a_mapping() -> None:
    options = GraphOptions(buckets="measured", memory_bytes=5, shares=(0.5, 0.1))
    assert GraphOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
