"""The CPU executor against the oracle of tests/oracle.py, in 10,000 random cases."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from sn72engine.cascade import Cascade, executor, worker
from sn72engine.cascade.report import StageCounts
from sn72engine.cascade.result import Result, Status
from tests.oracle import Case, answers, expected, random_case

UNREADABLE = b"not an image"


class Clock:
    """Stands for the module ``time`` in the executor: time passes when the test says so."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from sn72engine.cascade import cascade

    clock = Clock()
    for module in (cascade, executor, worker):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "sn72engine.cascade")


def picture(number: int) -> np.ndarray:
    """A 1 x 1 image that carries its sample number."""
    return np.array([[[number, 0, 0]]], np.uint8)


def stage(case: Case, number: int) -> Callable[[Sequence[np.ndarray]], Any]:
    def call(images: Sequence[np.ndarray]) -> Any:
        assert 0 < len(images) <= case.spec.max_batch
        scores = np.array([case.scores[number][int(image[0, 0, 0])] for image in images])
        match case.broken[number]:
            case "raises":
                raise RuntimeError("broken")
            case "shape":
                return scores[:, None, None]
            case "nothing":
                return None
            case _:
                return scores

    return call


def run(case: Case, clock: Clock, deadline: float) -> tuple[list[Result], list[StageCounts]]:
    """Answer a case. With ``late_after`` time is over after that group, whatever ``deadline``."""
    clock.now = 0.0
    told: list[tuple[list[Result], list[bool]]] = []

    def progress(known: list[Result], settled: list[bool]) -> None:
        told.append((known, settled))
        if len(told) - 1 == case.late_after:
            clock.now = 2.0

    if case.late_after is not None:
        deadline = -1.0 if case.late_after < 0 else 1.0
    images = [picture(i) if ok else UNREADABLE for i, ok in enumerate(case.readable)]
    stages = {s.name: stage(case, k) for k, s in enumerate(case.spec.stages)}
    with Cascade(case.spec, stages) as cascade:
        results = cascade(
            images,
            deadline=deadline,
            flags=case.flags,
            thresholds=case.bounds,
            progress=progress,
        )
        counts = [s.counts for s in cascade.report().stages]
    check_progress(told, results, len(case.spec.groups))
    return results, counts


def check_progress(
    told: list[tuple[list[Result], list[bool]]], results: list[Result], groups: int
) -> None:
    """Told after every group but the last, and what was called settled did not change."""
    assert len(told) == groups - 1
    before = [False] * len(results)
    for known, settled in told:
        for early, final, result, was in zip(known, settled, results, before, strict=True):
            assert final or not was
            assert early == result if final else early.status is not Status.DONE
        before = settled


def check(case: Case, clock: Clock, deadline: float = math.inf) -> list[Result]:
    results, counts = run(case, clock, deadline)
    assert answers(results) == expected(case), case
    for result in results:
        assert (result.error != "") == (result.status is Status.STAGE_FAILED)
        assert 0.0 <= result.probability <= 1.0
    for count in counts:
        ends = count.negative, count.positive, count.escalated, count.failed, count.late
        assert sum(ends) == count.asked
        assert min(ends) >= 0
    exits = sum(count.negative + count.positive for count in counts)
    assert exits == sum(result.status is Status.DONE for result in results)
    return results


def random_cases(seed: int, count: int, **options: Any) -> Iterator[Case]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield random_case(rng, **options)


def test_every_sample_as_the_oracle_says(clock: Clock) -> None:
    seen: Counter[Status] = Counter()
    for case in random_cases(1, 6_000):
        seen.update(result.status for result in check(case, clock))
    # The cases are worth something: each status is common.
    assert min(seen[status] for status in Status) > 100


def test_stages_one_after_the_other(clock: Clock) -> None:
    for case in random_cases(2, 2_000, groups=False):
        check(case, clock)


def test_with_a_far_deadline_stages_run_on_their_threads_and_say_the_same(clock: Clock) -> None:
    for case in random_cases(3, 1_500, deadlines=False, most_samples=6):
        check(case, clock, deadline=600.0)


def test_many_samples(clock: Clock) -> None:
    for case in random_cases(4, 500, most_samples=40, most_stages=3):
        check(case, clock)


def test_the_answer_of_a_sample_does_not_depend_on_its_company(clock: Clock) -> None:
    rng = np.random.default_rng(5)
    for _ in range(100):
        case = random_case(rng, most_samples=6)
        together = answers(run(case, clock, math.inf)[0])
        for i in range(len(case)):
            alone = dataclasses.replace(
                case,
                scores=[[row[i]] for row in case.scores],
                flags={name: [marks[i]] for name, marks in case.flags.items()},
                thresholds={k: [pairs[i]] for k, pairs in case.thresholds.items()},
                readable=[case.readable[i]],
            )
            assert answers(run(alone, clock, math.inf)[0]) == [together[i]]
