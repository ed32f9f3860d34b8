"""The executor, case by case; see test_cascade_oracle.py for random cases."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from sn72engine.cascade import Cascade
from sn72engine.cascade.result import Result, Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.cascade.tally import Tally
from sn72engine.cascade.worker import Overrun, Worker
from sn72engine.errors import CascadeError, InputError, OptionError
from sn72engine.stages.base import StageScores

NAN = math.nan
UNREADABLE = b"not an image"


def picture(number: int) -> np.ndarray:
    """A 1 x 1 image that carries its sample number."""
    return np.array([[[number % 256, number // 256, 0]]], np.uint8)


def number_of(image: np.ndarray) -> int:
    return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


def lookup(scores: Sequence[float]) -> Callable[[Any], np.ndarray]:
    """A stage that gives each sample the score of its number."""
    return lambda images: np.array([scores[number_of(i)] for i in images], np.float64)


def two_stages(first: Any, second: Any, **options: Any) -> Cascade:
    spec = CascadeSpec((StageSpec("first"), StageSpec("second")), **options)
    return Cascade(spec, {"first": first, "second": second})


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "sn72engine.cascade")


# ---------------------------------------------------------------- stages that misbehave


class Gate:
    """A stage that waits until it is let through, and counts who is inside."""

    def __init__(self, score: float = 0.5) -> None:
        self.score = score
        self.open = threading.Event()
        self.entered = threading.Event()
        self.calls = 0
        self.inside = 0
        self.most_inside = 0

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        self.calls += 1
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.entered.set()
        assert self.open.wait(60)
        self.inside -= 1
        return np.full(len(images), self.score)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


def test_a_stage_that_overruns_is_left_behind_with_the_best_answer_so_far() -> None:
    gate = Gate(0.99)
    with two_stages(lookup([0.3, 0.1, 0.95]), gate) as cascade:
        results = cascade([picture(i) for i in range(3)], deadline=0.15)
        gate.open.set()
        assert [r.status for r in results] == [Status.DEADLINE, Status.DONE, Status.DONE]
        assert results[0] == Result(pytest.approx(0.3), 0, "first", Status.DEADLINE)
        assert cascade.report().stages[1].counts.late == 1


def test_a_late_answer_does_not_reach_the_next_call() -> None:
    gate = Gate(0.99)
    with two_stages(lookup([0.3, 0.4]), gate) as cascade:
        late = cascade([picture(0)], deadline=0.1)
        assert late[0].status is Status.DEADLINE
        # The stage is still busy with the sample that was left behind: this call cannot enter.
        blocked = cascade([picture(1)], deadline=0.1)
        assert blocked[0] == Result(pytest.approx(0.4), 0, "first", Status.DEADLINE)
        assert gate.calls == 1
        gate.score = 0.02
        gate.open.set()
        wait_until(lambda: gate.inside == 0)
        fresh = cascade([picture(1)], deadline=60.0)
        assert fresh[0] == Result(pytest.approx(0.02), 0, "second", Status.DONE)
        assert (gate.calls, gate.most_inside) == (2, 1)


def test_a_stage_that_hangs_costs_one_thread_however_often_it_is_called() -> None:
    gate = Gate()
    with two_stages(lookup([0.3] * 20), gate) as cascade:
        cascade([picture(0)], deadline=0.05)
        before = threading.active_count()
        for i in range(20):
            assert cascade([picture(i)], deadline=0.01)[0].status is Status.DEADLINE
        assert threading.active_count() == before
        assert gate.calls == 1
        gate.open.set()


def test_a_deadline_in_the_first_stage_leaves_no_score() -> None:
    gate = Gate()
    with two_stages(gate, lookup([0.9])) as cascade:
        results = cascade([picture(0)], deadline=0.05)
        gate.open.set()
    assert results == [Result(0.5, 0, None, Status.DEADLINE)]


def test_the_deadline_of_the_specification_holds_unless_the_call_says_otherwise() -> None:
    gate = Gate(0.9)
    with two_stages(lookup([0.3]), gate, deadline=0.05) as cascade:
        assert cascade([picture(0)])[0].status is Status.DEADLINE
        threading.Timer(0.2, gate.open.set).start()
        assert cascade([picture(0)], deadline=math.inf)[0].status is Status.DONE


def test_a_slow_decoder_is_left_behind_too() -> None:
    slow = threading.Event()

    with two_stages(lookup([0.3]), lookup([0.3])) as cascade:
        decode = cascade._decode

        def waiting(source: Any) -> Any:
            assert slow.wait(60)
            return decode(source)

        cascade._decode = waiting  # type: ignore[method-assign]
        results = cascade([picture(0)], deadline=0.05)
        slow.set()
    assert results == [Result(0.5, 0, None, Status.DEADLINE)]


def test_chunks_after_the_one_that_overran_are_late_and_those_before_keep_their_exit() -> None:
    def first(images: Sequence[Any]) -> np.ndarray:
        if number_of(images[0]) == 2:
            assert release.wait(60)
        return np.full(len(images), 0.95)

    release = threading.Event()
    with two_stages(first, lookup([0.5]), max_batch=2) as cascade:
        results = cascade([picture(i) for i in range(5)], deadline=0.15)
        release.set()
    assert [r.status for r in results] == [Status.DONE] * 2 + [Status.DEADLINE] * 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (np.zeros((2, 2)), "two classes|shape"),
        (np.zeros(1), "shape (1,) for 2 images"),
        (np.zeros(3), "shape (3,) for 2 images"),
        (StageScores(np.zeros((2, 1))), "shape (2, 1) for 2 images"),
        (StageScores(np.array(["a", "b"])), "real numbers"),
        (StageScores(None), "real numbers"),  # type: ignore[arg-type]
        (None, "real numbers"),
        ("text", "real numbers"),
    ],
)
def test_a_malformed_answer_is_a_failure_of_the_stage(answer: Any, error: str) -> None:
    with two_stages(lookup([0.3, 0.6]), lambda images: answer) as cascade:
        results = cascade([picture(0), picture(1)])
    assert [(r.probability, r.label, r.stage) for r in results] == [
        (pytest.approx(0.3), 0, "first"),
        (pytest.approx(0.6), 1, "first"),
    ]
    for result in results:
        assert result.status is Status.STAGE_FAILED
        assert result.error.startswith("second: ")
        assert any(part in result.error for part in error.split("|"))


class Broken:
    """A Stage object that does not keep to the protocol."""

    needs = None

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def prepare(self) -> None: ...

    def score(self, images: Any) -> Any:
        return self.answer

    def close(self) -> None: ...


@pytest.mark.parametrize("answer", [None, [0.5], 0.5, (np.array([0.5]), None)])
def test_anything_but_stage_scores_is_refused(answer: Any) -> None:
    with two_stages(lookup([0.3]), Broken(answer)) as cascade:
        (result,) = cascade([picture(0)])
    assert result.status is Status.STAGE_FAILED
    assert "instead of StageScores" in result.error


def test_a_failed_first_stage_escalates_and_a_later_one_decides() -> None:
    def broken(images: Any) -> Any:
        raise MemoryError("no room")

    with two_stages(broken, lookup([0.9, 0.5])) as cascade:
        results = cascade([picture(0), picture(1)])
    assert [(r.status, r.stage, r.error) for r in results] == [
        (Status.DONE, "second", ""),
        (Status.UNDECIDED, "second", ""),
    ]


def test_a_reason_given_for_a_sample_is_passed_on() -> None:
    def second(images: Any) -> StageScores:
        return StageScores(np.array([NAN, 0.9]), errors={0: "server said maybe"})

    with two_stages(lookup([0.3, 0.3]), second) as cascade:
        results = cascade([picture(0), picture(1)])
    assert results[0].error == "second: server said maybe"
    assert results[1].status is Status.DONE


def test_an_interrupt_is_not_swallowed() -> None:
    def interrupted(images: Any) -> Any:
        raise KeyboardInterrupt

    with two_stages(interrupted, lookup([0.5])) as cascade:
        for deadline in (None, 60.0):
            with pytest.raises(KeyboardInterrupt):
                cascade([picture(0)], deadline=deadline)
        # and the stage is free again
        assert cascade._executor._workers[0].close(0.0)


# ---------------------------------------------------------------- combining, flags, labels


def spec_of(*stages: StageSpec, **options: Any) -> CascadeSpec:
    return CascadeSpec(tuple(stages), **options)


def answer(spec: CascadeSpec, scores: Sequence[float], **options: Any) -> Result:
    stages = {s.name: lookup([p]) for s, p in zip(spec.stages, scores, strict=True)}
    with Cascade(spec, stages) as cascade:
        return cascade([picture(0)], **options)[0]


def test_a_weighted_mean_is_over_the_stages_that_scored() -> None:
    spec = spec_of(
        StageSpec("a", combine="weighted", weight=0.40),
        StageSpec("b", combine="weighted", weight=0.15),
        StageSpec("c", combine="weighted", weight=0.25),
    )
    assert answer(spec, [0.5, 0.6, 0.7]).probability == pytest.approx(0.465 / 0.8)
    missing = answer(spec, [0.5, NAN, 0.7])
    assert missing.probability == pytest.approx(0.375 / 0.65)
    assert missing.stage == "c"


def test_a_weighted_mean_of_ones_is_one_and_leaves() -> None:
    spec = spec_of(
        StageSpec("a", combine="weighted", weight=0.4, high=1.0),
        StageSpec("b", combine="weighted", weight=0.6, high=0.999),
    )
    assert answer(spec, [1.0, 1.0]) == Result(1.0, 1, "b", Status.DONE)


def test_positive_only_raises_and_never_lowers() -> None:
    spec = spec_of(StageSpec("model"), StageSpec("signs", combine="positive_only", high=0.7))
    assert answer(spec, [0.4, 0.9]) == Result(pytest.approx(0.9), 1, "signs", Status.DONE)
    assert answer(spec, [0.4, 0.0]) == Result(pytest.approx(0.4), 0, "model", Status.UNDECIDED)
    # What earlier stages said does not leave by this stage's lower threshold.
    assert answer(spec, [0.8, 0.0]).status is Status.UNDECIDED


def test_positive_only_counts_where_nothing_else_scored() -> None:
    spec = spec_of(StageSpec("model"), StageSpec("signs", combine="positive_only"))
    assert answer(spec, [NAN, 0.95]) == Result(pytest.approx(0.95), 1, "signs", Status.DONE)
    unknown = answer(spec, [NAN, 0.1])
    assert (unknown.probability, unknown.stage) == (0.5, None)
    assert unknown.status is Status.STAGE_FAILED
    assert unknown.error.startswith("model: ")


def test_a_trigger_picks_the_samples_of_a_stage() -> None:
    seen: list[int] = []

    def second(images: Sequence[Any]) -> np.ndarray:
        seen.extend(number_of(image) for image in images)
        return np.full(len(images), 0.9)

    spec = spec_of(StageSpec("first"), StageSpec("second", when="text_visible"))
    with Cascade(spec, {"first": lookup([0.5] * 4), "second": second}) as cascade:
        images = [picture(i) for i in range(4)]
        results = cascade(images, flags={"text_visible": [False, True, False, True]})
        assert seen == [1, 3]
        assert [r.stage for r in results] == ["first", "second"] * 2
        cascade(images)
        assert seen == [1, 3]
        cascade(images, flags={"text_visible": True})
        assert seen == [1, 3, 0, 1, 2, 3]
        with pytest.raises(OptionError, match="no stage waits for 'text_visibel'"):
            cascade(images, flags={"text_visibel": True})
        with pytest.raises(InputError, match="4 bools"):
            cascade(images, flags={"text_visible": [True]})
        with pytest.raises(InputError, match="bools, got int64"):
            cascade(images, flags={"text_visible": [1, 0, 0, 1]})


def test_a_sample_that_no_stage_applies_to_has_failed() -> None:
    spec = spec_of(StageSpec("only", when="is_video"))
    result = answer(spec, [0.9])
    assert (result.probability, result.stage, result.status) == (0.5, None, Status.STAGE_FAILED)
    assert "no stage that applies" in result.error


def test_top1_gives_class_indices_and_has_no_negative_exit() -> None:
    def stage(probabilities: list[float], labels: list[int]) -> Callable[[Any], StageScores]:
        return lambda images: StageScores(
            np.array([probabilities[number_of(i)] for i in images]),
            labels=np.array([labels[number_of(i)] for i in images]),
        )

    spec = spec_of(StageSpec("small", score="top1", high=0.6), StageSpec("large", score="top1"))
    stages = {
        "small": stage([0.9, 0.01, 0.5, NAN], [7, 8, 9, 0]),
        "large": stage([0.0, 0.2, 0.9, NAN], [0, 80, 90, 0]),
    }
    with Cascade(spec, stages) as cascade:
        results = cascade([picture(i) for i in range(4)], thresholds={"large": (0.9, 0.95)})
    assert [(r.label, r.stage, r.status) for r in results] == [
        (7, "small", Status.DONE),
        (80, "large", Status.UNDECIDED),
        (90, "large", Status.UNDECIDED),
        (-1, None, Status.STAGE_FAILED),
    ]


def test_top1_without_labels_is_a_failure() -> None:
    result = answer(spec_of(StageSpec("a", score="top1")), [0.9])
    assert "1 integer labels" in result.error


# ---------------------------------------------------------------- stages side by side


def side_by_side(*members: StageSpec, **options: Any) -> CascadeSpec:
    return spec_of(StageSpec("first", low=0.1, high=0.9), *members, StageSpec("last"), **options)


LEFT = StageSpec("left", group="g", low=0.2, high=0.8)
RIGHT = StageSpec("right", group="g", combine="weighted")
SIGNS = StageSpec("signs", group="g", combine="positive_only")


def test_a_group_is_routed_once_on_what_its_stages_say_together() -> None:
    spec = side_by_side(LEFT, RIGHT)
    # Each alone would leave; together they escalate.
    assert answer(spec, [0.5, 0.1, 0.9, 0.95]) == Result(
        pytest.approx(0.95), 1, "last", Status.DONE
    )
    assert answer(spec, [0.5, 0.9, 0.8, 0.0]) == Result(
        pytest.approx(0.85), 1, "right", Status.DONE
    )


def test_a_stage_of_a_group_that_fails_leaves_its_share_out() -> None:
    spec = side_by_side(LEFT, RIGHT)
    assert answer(spec, [0.5, NAN, 0.9, 0.5]).probability == pytest.approx(0.5)
    assert answer(spec, [0.5, 0.95, NAN, 0.0]) == Result(
        pytest.approx(0.95), 1, "left", Status.DONE
    )
    failed = answer(spec, [0.5, 0.6, NAN, NAN])
    assert (failed.probability, failed.status) == (pytest.approx(0.6), Status.STAGE_FAILED)


def test_a_keyword_in_a_group_may_only_raise() -> None:
    spec = side_by_side(LEFT, SIGNS)
    assert answer(spec, [0.5, 0.3, 0.9, 0.0]) == Result(pytest.approx(0.9), 1, "signs", Status.DONE)
    assert answer(spec, [0.5, 0.1, 0.0, 0.9]).stage == "left"
    # Only the keyword stage scored it, and low: that is no reason to leave as negative.
    first = StageSpec("first", low=0.0, high=0.9)
    spec = spec_of(first, LEFT, SIGNS, StageSpec("last"))
    assert answer(spec, [0.05, NAN, 0.1, 0.95]).stage == "last"


def test_the_stages_of_a_group_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=60)

    def meet(score: float) -> Callable[[Sequence[Any]], np.ndarray]:
        def stage(images: Sequence[Any]) -> np.ndarray:
            meeting.wait()
            return np.full(len(images), score)

        return stage

    spec = side_by_side(LEFT, RIGHT)
    stages = {"first": lookup([0.5]), "left": meet(0.9), "right": meet(1.0), "last": lookup([0])}
    with Cascade(spec, stages) as cascade:
        for deadline in (None, 60.0):
            (result,) = cascade([picture(0)], deadline=deadline)
            assert result == Result(pytest.approx(0.95), 1, "right", Status.DONE)
        report = cascade.report()
    # One sample leaves once, by the last stage that had a say; the thresholds are the group's.
    counts = [stage.counts for stage in report.stages]
    assert [count.positive for count in counts] == [0, 0, 2, 0]
    assert [count.escalated for count in counts] == [2, 2, 0, 0]
    assert [(s.low, s.high) for s in report.stages[1:3]] == [(0.2, 0.8)] * 2


def test_a_stage_of_a_group_that_overruns_is_left_behind() -> None:
    gate = Gate(0.99)
    spec = side_by_side(
        LEFT, dataclasses.replace(RIGHT, when="marked"), decision_threshold=0.5, max_batch=4
    )
    stages = {"first": lookup([0.5] * 3), "left": lookup([0.7, 0.9, 0.7]), "right": gate}
    with Cascade(spec, stages | {"last": lookup([0.95] * 3)}) as cascade:
        results = cascade(
            [picture(i) for i in range(3)],
            deadline=0.15,
            flags={"marked": [True, False, True]},
        )
        gate.open.set()
        counts = cascade.report().stages[2].counts
    assert results[0] == results[2] == Result(pytest.approx(0.7), 1, "left", Status.DEADLINE)
    assert results[1] == Result(pytest.approx(0.9), 1, "left", Status.DONE)
    assert (counts.asked, counts.late) == (2, 2)


def test_an_image_that_cannot_be_read_has_failed_and_is_not_late() -> None:
    gate = Gate()
    with Cascade(spec_of(LEFT, RIGHT), {"left": lookup([0.9]), "right": gate}) as cascade:
        results = cascade([picture(0), UNREADABLE], deadline=0.1)
        gate.open.set()
    assert [r.status for r in results] == [Status.DEADLINE, Status.STAGE_FAILED]


def test_an_image_is_decoded_once_for_all_stages_of_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sn72engine.cascade import cascade as module

    decoded: list[int] = []
    real = module.decode

    def counting(source: Any, **options: Any) -> Any:
        decoded.append(number_of(source))
        time.sleep(0.002)
        return real(source, **options)

    monkeypatch.setattr(module, "decode", counting)
    first = dataclasses.replace(LEFT, low=None, high=0.85)
    spec = spec_of(first, RIGHT)
    with Cascade(spec, {"left": lookup([0.5] * 9), "right": lookup([0.5] * 9)}) as cascade:
        cascade([picture(i) for i in range(9)])
    assert sorted(decoded) == list(range(9))


def test_thresholds_of_a_call_are_set_at_the_first_stage_of_a_group() -> None:
    spec = side_by_side(LEFT, RIGHT)
    assert answer(spec, [0.5, 0.7, 0.7, 0], thresholds={"left": (0.1, 0.6)}).stage == "right"
    with pytest.raises(OptionError, match="'right' is routed with 'left'"):
        answer(spec, [0.5, 0.7, 0.7, 0], thresholds={"right": (0.1, 0.6)})


# ---------------------------------------------------------------- images


def test_an_image_that_cannot_be_decoded_fails_alone() -> None:
    with two_stages(lookup([0.9, 0.3, 0.1]), lookup([0.0, 0.9, 0.0])) as cascade:
        results = cascade([picture(0), UNREADABLE, picture(1), None, picture(2)])  # type: ignore[list-item]
        assert [r.status for r in results] == [
            Status.DONE,
            Status.STAGE_FAILED,
            Status.DONE,
            Status.STAGE_FAILED,
            Status.DONE,
        ]
        assert [r.stage for r in results] == ["first", None, "second", None, "first"]
        assert (results[1].probability, results[1].label) == (0.5, 0)
        assert "not an image" in results[1].error
        assert "NoneType" in results[3].error
        # The second stage is not asked again about what cannot be read.
        assert [s.counts.asked for s in cascade.report().stages] == [5, 1]


def test_each_image_is_decoded_once_and_dropped_when_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sn72engine.cascade import cascade as module

    decoded: list[int] = []
    real = module.decode

    def counting(source: Any, **options: Any) -> Any:
        decoded.append(number_of(source))
        return real(source, **options)

    monkeypatch.setattr(module, "decode", counting)
    identities: list[list[int]] = []

    def stage(images: Sequence[Any]) -> np.ndarray:
        identities.append([id(image) for image in images])
        return np.full(len(images), 0.5)

    with two_stages(stage, stage, max_batch=2) as cascade:
        cascade([picture(i) for i in range(3)])
    assert decoded == [0, 1, 2]
    assert identities[:2] == identities[2:]


class Needy(Broken):
    def __init__(self, needs: tuple[int, int] | None) -> None:
        super().__init__(None)
        self.needs = needs  # type: ignore[assignment]

    def score(self, images: Any) -> StageScores:
        self.seen = [image.shape[:2] for image in images]
        return StageScores(np.full(len(images), 0.5))


@pytest.mark.parametrize(
    ("first", "second", "smallest"),
    [
        ((32, 32), (64, 64), (128, 128)),
        ((64, 32), (32, 64), (128, 128)),
        ((64, 64), None, (1024, 1024)),
    ],
)
def test_a_jpeg_is_decoded_at_the_size_that_the_most_demanding_stage_needs(
    first: tuple[int, int], second: tuple[int, int] | None, smallest: tuple[int, int]
) -> None:
    from io import BytesIO

    from PIL import Image

    stream = BytesIO()
    Image.new("RGB", (1024, 1024)).save(stream, "JPEG")
    stages = Needy(first), Needy(second)
    with two_stages(*stages) as cascade:
        cascade([stream.getvalue()])
    assert stages[0].seen == stages[1].seen == [smallest]


@pytest.mark.parametrize("images", ["a.jpg", b"abc", None, 5, picture(0)])
def test_one_image_instead_of_a_sequence_is_refused(images: Any) -> None:
    with two_stages(lookup([0.5]), lookup([0.5])) as cascade, pytest.raises(InputError):
        cascade(images)


def test_an_array_of_images_and_no_images() -> None:
    with two_stages(lookup([0.1, 0.9]), lookup([0.5])) as cascade:
        assert [r.label for r in cascade(np.stack([picture(0), picture(1)]))] == [0, 1]
        assert cascade([]) == []


# ---------------------------------------------------------------- thresholds, deadline arguments


def test_thresholds_of_a_call() -> None:
    with two_stages(lookup([0.3, 0.3, 0.3]), lookup([0.5] * 3)) as cascade:
        images = [picture(i) for i in range(3)]
        results = cascade(images, thresholds={"first": ([0.4, 0.1, 0.9], [0.5, 0.2, 0.1])})
        assert [(r.label, r.stage) for r in results] == [(0, "first"), (1, "first"), (0, "second")]
        assert {r.stage for r in cascade(images, thresholds={"first": (0.4, 0.9)})} == {"first"}
        for thresholds, error in [
            ({"third": (0, 1)}, "no stage is called 'third'"),
            ({"first": 0.5}, "must be a pair"),
            ({"first": ([0.1], 0.9)}, "one value per image, 3"),
            ({"first": ("a", 0.9)}, "real numbers"),
        ]:
            with pytest.raises((InputError, OptionError), match=error):
                cascade(images, thresholds=thresholds)  # type: ignore[arg-type]


@pytest.mark.parametrize("deadline", [NAN, "soon", True, -math.inf])
def test_a_deadline_that_is_no_number_is_refused(deadline: Any) -> None:
    with two_stages(lookup([0.5]), lookup([0.5])) as cascade:
        with pytest.raises(OptionError, match="deadline="):
            cascade([picture(0)], deadline=deadline)


# ---------------------------------------------------------------- threads, futures, life cycle


def test_many_threads_get_their_own_answers_and_a_stage_runs_once_at_a_time() -> None:
    inside = []
    most = []
    table = [(i % 10) / 10 for i in range(200)]

    def stage(images: Sequence[Any]) -> np.ndarray:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.001)
        inside.pop()
        return np.array([table[number_of(i)] for i in images])

    with two_stages(stage, stage, max_batch=3) as cascade:
        futures = [
            cascade.submit([picture(10 * k + i) for i in range(10)], deadline=d)
            for k, d in enumerate([None, 60.0] * 10)
        ]
        for k, future in enumerate(futures):
            expected = [pytest.approx(table[10 * k + i]) for i in range(10)]
            assert [r.probability for r in future.result(60)] == expected
        report = cascade.report()
    assert max(most) <= 2  # one in each stage
    assert (report.calls, report.samples) == (20, 200)


def test_await_leaves_the_event_loop_free() -> None:
    gate = Gate(0.9)

    async def main(cascade: Cascade) -> list[Result]:
        running = asyncio.create_task(cascade.run_async([picture(0)]))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        gate.open.set()
        return await running

    with two_stages(gate, lookup([0.5])) as cascade:
        assert asyncio.run(main(cascade))[0].stage == "first"


def test_a_submitted_deadline_runs_from_submission() -> None:
    gate = Gate(0.9)
    spec = spec_of(StageSpec("only"))
    with Cascade(spec, {"only": gate}) as cascade:
        running = cascade.submit([picture(0)])
        waiting = cascade.submit([picture(0)], deadline=0.05)
        cancelled = cascade.submit([picture(0)])
        gate.entered.wait(60)
        assert cancelled.cancel()
        time.sleep(0.1)
        gate.open.set()
        assert waiting.result(60)[0].status is Status.DEADLINE
        assert running.result(60)[0].status is Status.DONE
        assert gate.calls == 1


def test_submit_refuses_bad_arguments_at_once() -> None:
    with two_stages(lookup([0.5]), lookup([0.5])) as cascade, pytest.raises(InputError):
        cascade.submit("a.jpg")


def test_a_closed_cascade_refuses_calls() -> None:
    cascade = two_stages(lookup([0.5]), lookup([0.5]))
    cascade.submit([picture(0)]).result(60)
    cascade.close()
    cascade.close()
    for call in (cascade, cascade.submit):
        with pytest.raises(CascadeError, match="closed"):
            call([picture(0)])


def test_close_lets_a_running_call_end() -> None:
    """Also where it has further batches to run, and stages to go to."""
    gate = Gate()
    cascade = two_stages(gate, lookup([0.9]), max_batch=1)
    results: list[Result] = []
    images = [picture(0)] * 2
    caller = threading.Thread(target=lambda: results.extend(cascade(images)), daemon=True)
    caller.start()
    assert gate.entered.wait(60)
    closer = threading.Thread(target=cascade.close, daemon=True)
    closer.start()
    until = time.monotonic() + 60
    while not cascade._executor._entrance._closed:  # type: ignore[attr-defined]
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(CascadeError, match="closed"):
        cascade([picture(0)])
    gate.open.set()
    for thread in (caller, closer):
        thread.join(60)
    assert [(r.stage, r.status) for r in results] == [("second", Status.DONE)] * 2


def test_close_gives_all_stages_together_what_patience_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sn72engine.cascade import cascade as module

    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    gates = [Gate() for _ in range(8)]
    spec = CascadeSpec(tuple(StageSpec(f"s{k}") for k in range(8)))
    cascade = Cascade(spec, {f"s{k}": gate for k, gate in enumerate(gates)})
    given: list[float] = []
    close = Worker.close

    def noted(self: Worker, patience: float) -> bool:
        given.append(patience)
        return close(self, patience)

    monkeypatch.setattr(Worker, "close", noted)
    for worker in cascade._executor._workers:  # type: ignore[attr-defined]
        worker.acquire(math.inf)
    cascade.close()
    assert len(given) == 8
    assert given[0] > 0.1
    assert given[1:] == [0.0] * 7


def test_close_leaves_a_hanging_stage_open(monkeypatch: pytest.MonkeyPatch) -> None:
    from sn72engine.cascade import cascade as module
    from sn72engine.cascade import opening

    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    closed: list[str] = []
    monkeypatch.setattr(opening, "_open", lambda spec, runtime: opened[spec.name])

    class Stage(Broken):
        def __init__(self, name: str, call: Callable[[Any], Any]) -> None:
            super().__init__(None)
            self.name, self.call = name, call

        def score(self, images: Any) -> StageScores:
            return StageScores(self.call(images))

        def close(self) -> None:
            closed.append(self.name)

    gate = Gate()
    opened = {"a": Stage("a", lookup([0.5])), "b": Stage("b", gate)}
    spec = spec_of(
        StageSpec("a", engine="a", score="sigmoid"), StageSpec("b", engine="b", score="sigmoid")
    )
    cascade = Cascade(spec)
    cascade([picture(0)], deadline=0.05)
    cascade.close()
    gate.open.set()
    assert closed == ["a"]


def test_stages_that_the_caller_made_are_not_closed() -> None:
    class Counting(Needy):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    stage = Counting(None)
    two_stages(stage, lookup([0.5])).close()
    assert stage.closed == 0


def test_threads_end_when_a_cascade_is_forgotten() -> None:
    cascade = two_stages(lookup([0.5]), lookup([0.5]))
    cascade([picture(0)], deadline=60.0)
    names = {"sn72-stage-first", "sn72-stage-second"}
    assert names <= {t.name for t in threading.enumerate()}
    ours = [t for t in threading.enumerate() if t.name in names]
    gone = weakref.ref(cascade)
    del cascade
    gc.collect()
    assert gone() is None
    for thread in ours:
        thread.join(0 if not thread.is_alive() else 30)
    # Threads of other tests may carry the same names while they wind up.
    assert not any(t.is_alive() for t in ours)


def test_construction_says_which_object_is_missing_or_wrong() -> None:
    spec = spec_of(StageSpec("a"), StageSpec("b"))
    good = lookup([0.5])
    for stages, error in [
        ({"a": good}, r"stage 'b' has no engine.*Cascade\(spec, stages=\{'b'"),
        ({"a": good, "b": good, "c": good}, "'c' is not a stage that takes"),
        ({"a": good, "b": 3}, r"stages\['b'\] is a int"),
    ]:
        with pytest.raises(OptionError, match=error):
            Cascade(spec, stages)  # type: ignore[arg-type]


def test_report_counts_and_prints() -> None:
    with two_stages(lookup([0.1, 0.5, 0.9, NAN, 0.5]), lookup([0, 0.9, 0, 0.1, 0.5])) as cascade:
        cascade([picture(i) for i in range(5)])
        report = cascade.report()
    first, second = (stage.counts for stage in report.stages)
    assert (first.asked, first.negative, first.positive) == (5, 1, 1)
    assert (first.escalated, first.failed) == (2, 1)
    assert (second.asked, second.negative, second.positive, second.escalated) == (3, 1, 1, 1)
    assert first.seconds > 0
    assert report.own_seconds > 0
    assert report.to_dict()["stages"][0]["counts"]["asked"] == 5
    assert "second" in str(report)
    # A report is a copy.
    assert report.stages[0].counts.asked == 5


def test_a_sample_without_a_status_is_a_bug_that_is_reported() -> None:
    tally = Tally(2)
    tally.add(np.array([0]), np.array([0.5], np.float32), 0, "replace", 1.0)
    tally._voter[1] = 0  # scored, yet pending: no path of the executor leads here
    with pytest.raises(CascadeError, match=r"samples \[1\] have no status"):
        tally.results(["a"], 0.5, top1=False)


def test_worker_is_free_after_a_job_that_raised() -> None:
    worker = Worker("test")
    for until in (math.inf, time.monotonic() + 60):
        worker.acquire(until)
        with pytest.raises(ZeroDivisionError):
            worker.run(lambda: 1 // 0, until)
    worker.acquire(math.inf)
    with pytest.raises(Overrun):
        worker.run(lambda: 1, time.monotonic() - 1)
    assert worker.close(0.0)
    with pytest.raises(CascadeError, match="test has been closed"):
        worker.acquire(math.inf)
