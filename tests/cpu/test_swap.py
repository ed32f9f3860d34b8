"""Replacing a cascade under load: no gap, no mixed answers, the old one closed when idle."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sn72engine.batching import BatchingOptions, MicroBatcher
from sn72engine.cascade import Cascade
from sn72engine.cascade.result import Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.errors import CascadeError, OptionError, VerificationError
from sn72engine.events import ShadowEvent
from sn72engine.metrics import Metrics
from sn72engine.shadow import Shadow, ShadowOptions, ShadowReport
from sn72engine.swap import Swappable

PICTURE = np.full((2, 2, 3), 200, np.uint8)
ALL = ShadowOptions(share=1.0, max_waiting=1000, min_samples=1)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "sn72engine")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


class Watched(Cascade):
    """A cascade of one stage that scores all alike, waits at a gate, and says when it closes."""

    def __init__(self, value: float, **options: Any) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.inside = 0
        self.calls: list[list[Any]] = []
        self.closed = threading.Event()
        self.fault: Exception | None = None
        self.value = value
        super().__init__(CascadeSpec((StageSpec("only", **options),)), {"only": self._answer})

    def _answer(self, images: Sequence[Any]) -> np.ndarray:
        self.inside += 1
        self.calls.append(list(images))
        try:
            assert self.gate.wait(60)
            if self.fault is not None:
                raise self.fault
            return np.full(len(images), self.value)
        finally:
            self.inside -= 1

    def close(self) -> None:
        super().close()
        self.closed.set()


@pytest.fixture
def old() -> Iterator[Watched]:
    cascade = Watched(0.9)
    yield cascade
    cascade.gate.set()


@pytest.fixture
def new() -> Iterator[Watched]:
    cascade = Watched(0.8)
    yield cascade
    cascade.gate.set()


def score(service: Any) -> float:
    return round(service([PICTURE])[0].probability, 4)


# ---------------------------------------------------------------- promote, drop, close


def test_a_call_ends_on_the_cascade_it_began_on(old: Watched, new: Watched) -> None:
    with Swappable(old) as service:
        service.load(lambda: new)
        old.gate.clear()
        results: list[float] = []
        caller = threading.Thread(target=lambda: results.append(score(service)))
        caller.start()
        submitted = service.submit([PICTURE])
        wait_until(lambda: old.inside == 1)
        service.promote(force=True)
        assert score(service) == 0.8  # at once, though the old one still runs
        assert not old.closed.is_set()
        old.gate.set()
        caller.join(60)
        assert results == [0.9]
        assert submitted.result(60)[0].probability == pytest.approx(0.9)
        assert old.closed.wait(60)
        assert not new.closed.is_set()
    assert new.closed.is_set()


def test_an_idle_cascade_is_closed_when_it_is_replaced(old: Watched, new: Watched) -> None:
    with Swappable(old) as service:
        service.load(lambda: new)
        service.promote(force=True)
        assert old.closed.wait(60)
        assert score(service) == 0.8


def test_a_dropped_candidate_is_closed_and_the_current_one_goes_on(
    old: Watched, new: Watched
) -> None:
    with Swappable(old, ALL) as service:
        service.load(lambda: new)
        new.gate.clear()
        assert score(service) == 0.9
        wait_until(lambda: new.inside == 1)
        service.drop()
        assert score(service) == 0.9
        assert not new.closed.is_set()  # a call still runs on it
        new.gate.set()
        assert new.closed.wait(60)
        assert not old.closed.is_set()
        with pytest.raises(CascadeError, match="no candidate"):
            service.shadow()


def test_close_closes_everything(old: Watched, new: Watched) -> None:
    service = Swappable(old, ALL)
    service.load(lambda: new)
    service.close()
    service.close()
    assert old.closed.is_set()
    assert new.closed.is_set()
    for call in (service, service.submit):
        with pytest.raises(CascadeError, match="closed"):
            call([PICTURE])
    with pytest.raises(CascadeError, match="closed"):
        service.load(lambda: new)


def test_close_waits_for_calls_on_every_cascade(old: Watched, new: Watched) -> None:
    with Swappable(old) as service:
        results: list[float] = []
        threads = [threading.Thread(target=lambda: results.append(score(service))) for _ in "ab"]
        old.gate.clear()
        threads[0].start()
        wait_until(lambda: old.inside == 1)
        service.load(lambda: new)
        service.promote(force=True)
        new.gate.clear()
        threads[1].start()
        wait_until(lambda: new.inside == 1)
        closer = threading.Thread(target=service.close)
        closer.start()
        wait_until(lambda: service._closed)
        assert not old.closed.is_set()
        assert not new.closed.is_set()
        new.gate.set()
        old.gate.set()
        for thread in [*threads, closer]:
            thread.join(60)
    assert sorted(results) == [0.8, 0.9]
    assert old.closed.is_set()
    assert new.closed.is_set()


def test_close_does_not_wait_for_ever(old: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sn72engine.cascade.cascade._PATIENCE", 0.01)
    service = Swappable(old)
    old.gate.clear()
    caller = threading.Thread(target=lambda: score(service))
    caller.start()
    wait_until(lambda: old.inside == 1)
    service.close(patience=0.02)
    with pytest.raises(CascadeError, match="closed"):
        service([PICTURE])
    old.gate.set()
    caller.join(60)
    assert old.closed.wait(60)


def test_calls_may_be_awaited(old: Watched) -> None:
    with Swappable(old) as service:
        results = asyncio.run(service.run_async([PICTURE]))
        assert results[0].probability == pytest.approx(0.9)
        with pytest.raises(OptionError):
            service.submit([PICTURE], deadline="soon")  # type: ignore[arg-type]
        assert service._current.users == 0
        assert service.report().calls == 1
        assert service.spec is old.spec


# ---------------------------------------------------------------- loading


def test_a_candidate_that_cannot_be_loaded_changes_nothing(old: Watched) -> None:
    def broken() -> Cascade:
        raise CascadeError("no such engine")

    with Swappable(old) as service:
        with pytest.raises(CascadeError, match="no such engine"):
            service.load(broken)
        assert score(service) == 0.9
        good = Watched(0.8)
        service.load(lambda: good, warmup=[PICTURE])
        assert len(good.calls) == 1
        with pytest.raises(CascadeError, match="already"):
            service.load(lambda: Watched(0.7))


def test_a_candidate_that_fails_on_warm_up_is_closed(old: Watched, new: Watched) -> None:
    with Swappable(old) as service:
        new.fault = MemoryError("no room")
        with pytest.raises(CascadeError, match="warm-up image 0: only: MemoryError: no room"):
            service.load(lambda: new, warmup=[PICTURE])
        assert new.closed.is_set()
        assert score(service) == 0.9


def test_a_candidate_with_other_labels_is_refused(old: Watched) -> None:
    other = Watched(0.9, score="top1")
    with Swappable(old) as service, pytest.raises(OptionError, match="class indices"):
        service.load(lambda: other)
    assert other.closed.is_set()


def test_requests_go_on_while_a_candidate_loads(old: Watched, new: Watched) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow() -> Cascade:
        loading.set()
        assert go_on.wait(60)
        return new

    with Swappable(old) as service:
        loader = threading.Thread(target=lambda: service.load(slow))
        loader.start()
        assert loading.wait(60)
        assert score(service) == 0.9
        with pytest.raises(CascadeError, match="already"):
            service.load(lambda: Watched(0.7))
        go_on.set()
        loader.join(60)
        service.promote(force=True)
        assert score(service) == 0.8


# ---------------------------------------------------------------- the shadow


def test_the_shadow_is_off_the_callers_path_and_bounded(old: Watched, new: Watched) -> None:
    events: list[Any] = []
    options = ShadowOptions(share=1.0, max_waiting=3, min_samples=0)
    with Swappable(old, options, observe=events.append) as service:
        service.load(lambda: new)
        new.gate.clear()  # hangs
        for _ in range(10):
            assert score(service) == 0.9
        assert service.shadow().skipped_calls == 7
        new.gate.set()
        wait_until(lambda: service.shadow().calls == 3)
        assert [e.outcome for e in events] == ["skipped"] * 7 + ["compared"] * 3
        score(service)  # there is room again
        wait_until(lambda: service.shadow().calls == 4)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(0, 60))
def test_the_share_is_exact(share: float, calls: int) -> None:
    with Watched(0.9) as cascade:
        shadow = Shadow(cascade, ShadowOptions(share=share, max_waiting=1000))
        results = cascade([PICTURE])
        for _ in range(calls):
            shadow.offer([PICTURE], {}, results, 0.001)
        expected = share * calls
        wait_until(lambda: abs(shadow.report().calls - expected) <= 1)
        shadow.stop()
        shadow.join()
        assert abs(shadow.report().calls - expected) <= 1


def test_what_is_compared(old: Watched) -> None:
    table = {10: 0.95, 20: 0.6, 30: math.nan, 40: 0.9}

    def stage(images: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([table[int(image[0, 0, 0])] for image in images])

    candidate = Cascade(CascadeSpec((StageSpec("only"),)), {"only": stage})
    pictures = [np.full((1, 1, 3), value, np.uint8) for value in table]
    events: list[ShadowEvent] = []
    with Swappable(old, ALL, observe=events.append) as service:  # type: ignore[arg-type]
        service.load(lambda: candidate)
        service([*pictures, b"no image"])
        wait_until(lambda: len(events) == 1)
        report = service.shadow()
    assert (report.calls, report.compared, report.agreed, report.lost) == (1, 3, 3, 1)
    assert report.agreement == 0.75
    assert report.mean_difference == pytest.approx((0.05 + 0.3 + 0) / 3, abs=1e-6)
    assert report.max_difference == pytest.approx(0.3)
    assert report.current_seconds > 0
    assert report.candidate_seconds > 0
    assert "agreement 0.7500" in str(report)
    assert (events[0].samples, events[0].agreed, events[0].differed) == (5, 3, 0)


def test_a_candidate_that_raises_is_counted(old: Watched, new: Watched) -> None:
    with Swappable(old, ALL) as service:
        service.load(lambda: new)
        new.close()  # so that it raises
        assert score(service) == 0.9
        wait_until(lambda: service.shadow().failed_calls == 1)
        report = service.shadow()
        assert (report.calls, report.lost, report.agreement) == (1, 1, 0.0)
        with pytest.raises(VerificationError, match=r"agreement 0\.0000"):
            service.promote()


def test_arguments_of_the_call_hold_for_the_candidate(old: Watched, new: Watched) -> None:
    with Swappable(old, ALL) as service:
        service.load(lambda: new)
        results = service([PICTURE], thresholds={"only": (0.85, 0.95)})
        assert results[0].status is Status.UNDECIDED
        wait_until(lambda: service.shadow().calls == 1)
        assert service.shadow().agreement == 0.0  # 0.8 leaves as negative by these thresholds


@pytest.mark.parametrize(
    "image",
    [PICTURE, Image.fromarray(PICTURE), bytearray(b"\x00"), memoryview(bytearray(b"\x00"))],
    ids=["array", "pillow", "bytearray", "memoryview"],
)
def test_the_caller_may_change_an_image_after_the_call(
    old: Watched, new: Watched, image: Any
) -> None:
    with Swappable(old, ALL) as service:
        service.load(lambda: new)
        new.gate.clear()
        score(service)  # keeps the candidate busy
        copy = image.copy() if hasattr(image, "copy") else memoryview(bytearray(image))
        service([copy])
        if isinstance(copy, Image.Image):
            copy.putpixel((0, 0), (0, 0, 0))
        else:
            copy[:] = copy[:] * 0 if isinstance(copy, np.ndarray) else b"\xff"
        new.gate.set()
        wait_until(lambda: service.shadow().calls == 2)
    if isinstance(image, (np.ndarray, Image.Image)):
        assert (new.calls[1][0] == 200).all()


def test_an_image_that_cannot_be_copied_takes_no_place(old: Watched, new: Watched) -> None:
    class Odd:
        def copy(self) -> None:
            raise ValueError("closed")

    with Swappable(old, ShadowOptions(share=1.0, max_waiting=1)) as service:
        service.load(lambda: new)
        for _ in range(3):
            assert service([Odd()])[0].status is Status.STAGE_FAILED  # type: ignore[list-item]
        score(service)
        wait_until(lambda: service.shadow().calls == 1)
        assert service.shadow().skipped_calls == 0


def test_a_batch_array_is_copied(old: Watched, new: Watched) -> None:
    with Swappable(old, ALL) as service:
        service.load(lambda: new)
        new.gate.clear()
        score(service)
        batch = np.stack([PICTURE, PICTURE])
        service(batch)
        batch[:] = 0
        new.gate.set()
        wait_until(lambda: service.shadow().calls == 2)
    assert all((image == 200).all() for image in new.calls[1])


def test_metrics_count_what_was_served_and_not_what_was_tried(old: Watched, new: Watched) -> None:
    served = Metrics()
    old.observe = new.observe = served
    with Swappable(old, ALL) as service:
        service.load(lambda: new, warmup=[PICTURE])
        for _ in range(3):
            score(service)
        wait_until(lambda: service.shadow().calls == 3)
        assert served.value("sn72_calls") == 3
        service.promote()
        score(service)
        assert served.value("sn72_calls") == 4


# ---------------------------------------------------------------- the bounds


def report_of(**values: Any) -> ShadowReport:
    base = dict.fromkeys(ShadowReport.__dataclass_fields__, 0)
    return ShadowReport(**{**base, "current_seconds": 0.01, "candidate_seconds": 0.01, **values})


@pytest.mark.parametrize(
    ("report", "options", "errors"),
    [
        (report_of(), {"min_samples": 0}, []),
        (
            report_of(compared=99, agreed=99),
            {},
            ["99 samples compared, fewer than min_samples=100"],
        ),
        (report_of(compared=100, agreed=98), {}, []),
        (report_of(compared=100, agreed=97), {}, ["agreement 0.9700 on 100 samples"]),
        (report_of(compared=98, agreed=98, lost=3), {}, ["agreement 0.9703"]),
        (
            report_of(compared=100, agreed=100, candidate_seconds=0.021),
            {"max_slowdown": 2.0},
            ["21.000 ms against 10.000 ms is more than max_slowdown=2.0"],
        ),
        (report_of(compared=100, agreed=100), {"max_slowdown": 1.0}, []),
        (
            report_of(compared=100, agreed=100, candidate_seconds=math.nan),
            {"max_slowdown": 2.0},
            ["more than max_slowdown"],
        ),
    ],
)
def test_bounds(report: ShadowReport, options: dict[str, Any], errors: list[str]) -> None:
    broken = report.failures(ShadowOptions(**options))
    assert len(broken) == len(errors)
    for text, error in zip(broken, errors, strict=True):
        assert error in text


def test_a_candidate_that_breaks_a_bound_stays_until_it_is_dropped_or_forced(
    old: Watched, new: Watched
) -> None:
    with Swappable(old) as service:
        service.load(lambda: new)
        with pytest.raises(VerificationError, match=r"0 samples compared.*promote\(force=True\)"):
            service.promote()
        assert score(service) == 0.9
        assert service.promote(force=True).calls == 0
        for call in (service.promote, service.drop, service.shadow):
            with pytest.raises(CascadeError, match="no candidate"):
                call()


@pytest.mark.parametrize(
    "options",
    [
        {"share": 1.1},
        {"max_waiting": 0},
        {"min_samples": -1},
        {"min_agreement": math.nan},
        {"max_slowdown": -1.0},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        ShadowOptions(**options)


# ---------------------------------------------------------------- under load


def test_swaps_under_load_lose_nothing_and_never_use_a_closed_cascade() -> None:
    """Callers, with and without a batcher, see only scores that were current during their call."""
    cascades = [Watched(round(0.5 + k / 100, 2)) for k in range(1, 21)]
    stop = threading.Event()
    answers: list[list[tuple[int, float, int]]] = []
    errors: list[BaseException] = []
    generation = [0]

    with Swappable(cascades[0], ShadowOptions(share=0.5, min_samples=0)) as service:
        with MicroBatcher(service, BatchingOptions(max_batch=4, max_wait=0.0)) as batcher:

            def caller(call: Callable[[], float]) -> None:
                mine: list[tuple[int, float, int]] = []
                answers.append(mine)
                try:
                    while not stop.is_set():
                        before = generation[0]
                        value = call()
                        mine.append((before, value, generation[0]))
                except BaseException as error:
                    errors.append(error)

            calls: list[Callable[[], float]] = [
                lambda: score(service),
                lambda: round(batcher(PICTURE).probability, 4),
                lambda: round(service.submit([PICTURE]).result(60)[0].probability, 4),
            ] * 2
            threads = [threading.Thread(target=caller, args=(call,)) for call in calls]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(answers) == len(threads))
            for k in range(1, 20):
                counts = [len(mine) for mine in answers]
                service.load(lambda k=k: cascades[k])  # type: ignore[misc]
                wait_until(
                    lambda c=counts: (
                        all(len(m) > n for m, n in zip(answers, c, strict=True))  # type: ignore[misc]
                        or bool(errors)
                    )
                )
                service.promote(force=True)
                generation[0] = k
            stop.set()
            for thread in threads:
                thread.join(60)
    assert not errors
    for cascade in cascades:
        assert cascade.closed.is_set()
    for mine in answers:
        for before, value, after in mine:
            used = round((value - 0.5) * 100) - 1
            # generation[0] is raised just after the promotion, hence one more.
            assert before <= used <= after + 1
