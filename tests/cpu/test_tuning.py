"""Scoring stages on labelled images, and writing the thresholds that were chosen into a cascade."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sn72engine.cascade import Cascade
from sn72engine.cascade.opening import open_stages
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.cascade.tuning import score_stages, with_choice
from sn72engine.errors import CascadeError, ImageError, InputError, OptionError
from sn72engine.stages.base import StageScores
from sn72engine.thresholds import ThresholdOptions, choose


class Marked:
    """Scores an image by its first byte, over 255; remembers how it was called."""

    needs = (1, 1)

    def __init__(self, calls: list[tuple[str, int]], name: str, *, top1: bool = False) -> None:
        self.calls = calls
        self.name = name
        self.top1 = top1
        self.prepared = 0
        self.bad: tuple[int, str | None] | None = None  # mark of an image it cannot score, and why

    def prepare(self) -> None:
        self.prepared += 1

    def score(self, images: Sequence[Any]) -> StageScores:
        self.calls.append((self.name, len(images)))
        marks = np.array([image[0, 0, 0] for image in images])
        scores = marks / 255
        errors: dict[int, str] = {}
        if self.bad is not None:
            for position in np.flatnonzero(marks == self.bad[0]):
                scores[position] = math.nan
                if self.bad[1] is not None:
                    errors[int(position)] = self.bad[1]
        return StageScores(scores, marks % 3 if self.top1 else None, errors)

    def close(self) -> None:
        raise AssertionError("the stages belong to the caller")


def images(count: int) -> list[np.ndarray]:
    """Images whose first byte is their number."""
    return [np.full((4, 4, 3), index, np.uint8) for index in range(count)]


@given(count=st.integers(1, 40), batch=st.integers(1, 12), stages=st.integers(1, 3))
@settings(max_examples=40)
def test_every_stage_scores_every_image_in_turn(count: int, batch: int, stages: int) -> None:
    calls: list[tuple[str, int]] = []
    given_stages = {f"s{i}": Marked(calls, f"s{i}") for i in range(stages)}
    table = score_stages(given_stages, images(count), batch=batch)
    assert table.names == tuple(given_stages)
    assert table.probabilities.dtype == np.float32
    wanted = np.arange(count, dtype=np.float32) / np.float32(255)
    np.testing.assert_array_equal(table.probabilities, [wanted] * stages)
    assert table.labels is None
    assert len(table.seconds) == stages
    assert min(table.seconds) > 0
    assert [stage.prepared for stage in given_stages.values()] == [1] * stages
    sizes = [min(batch, count - start) for start in range(0, count, batch)]
    assert calls == [(name, size) for size in sizes for name in given_stages]


def test_classes_are_kept_for_top1() -> None:
    calls: list[tuple[str, int]] = []
    stages = {name: Marked(calls, name, top1=True) for name in ("a", "b")}
    table = score_stages(stages, images(10), batch=4)
    assert table.labels is not None
    assert table.labels.dtype == np.int64
    np.testing.assert_array_equal(table.labels, [np.arange(10) % 3] * 2)


@pytest.mark.parametrize("reason", ["the server is down", None])
def test_an_image_without_a_score_stops_it(reason: str | None) -> None:
    stage = Marked([], "s")
    stage.bad = (13, reason)
    wanted = f"stage 's', image 13: {reason or 'no finite score'}"
    with pytest.raises(CascadeError) as refused:
        score_stages({"s": stage}, images(20), batch=6)
    assert str(refused.value) == wanted


def test_no_images_and_no_batch_are_refused() -> None:
    with pytest.raises(InputError, match="no images to score"):
        score_stages({"s": Marked([], "s")}, [])
    with pytest.raises(OptionError, match="batch=0"):
        score_stages({"s": Marked([], "s")}, images(1), batch=0)


def test_files_are_read_and_a_broken_one_stops_it(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images(3), strict=True):
        Image.fromarray(image).save(path)
    table = score_stages({"s": Marked([], "s")}, paths)
    np.testing.assert_array_equal(table.probabilities[0], np.arange(3, dtype=np.float32) / 255)
    paths[1].write_bytes(b"not a picture")
    with pytest.raises(ImageError, match=r"1\.png"):
        score_stages({"s": Marked([], "s")}, paths)


def labelled_scores(count: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """A first stage that is right where it is sure, and a second that is right nearly always."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, count)
    sign = 2 * labels - 1
    first = 0.5 + sign * rng.uniform(-0.12, 0.5, count)
    second = 0.5 + sign * rng.uniform(-0.005, 0.5, count)
    return np.stack([first, second]).clip(0, 1).astype(np.float32), labels


SPEC = CascadeSpec((StageSpec("first"), StageSpec("second")), deadline=3.0, max_batch=5)


def test_the_chosen_thresholds_reproduce_the_figures() -> None:
    """The tuned cascade, run, has the accuracy and the cost that the choice states."""
    scores, labels = labelled_scores()
    choice = choose(list(scores), labels, (0.001, 0.010), ThresholdOptions())
    tuned = with_choice(SPEC, choice)
    assert (tuned.deadline, tuned.max_batch) == (3.0, 5)
    assert [stage.name for stage in tuned.stages] == [SPEC.stages[k].name for k in choice.kept]
    assert tuned.stages[0].thresholds == (choice.low[0], choice.high[0])
    assert tuned.decision_threshold == choice.decision_threshold
    assert len(choice.kept) == 2

    def stage(row: np.ndarray) -> Any:
        return lambda batch: np.array([row[int(i[0, 0, 0]) * 256 + int(i[0, 0, 1])] for i in batch])

    pictures = [
        np.broadcast_to(np.array([i // 256, i % 256, 0], np.uint8), (4, 4, 3)).copy()
        for i in range(len(labels))
    ]
    spec = dataclasses.replace(tuned, deadline=None)
    given_stages = {s.name: stage(scores[k]) for s, k in zip(spec.stages, choice.kept, strict=True)}
    with Cascade(spec, given_stages) as cascade:
        results = cascade(pictures)
        report = cascade.report()
    right = np.mean([r.label == label for r, label in zip(results, labels, strict=True)])
    # The figures are of the held-out half; this is of both.
    assert right == pytest.approx(choice.figures.accuracy, abs=0.03)
    assert report.stages[1].counts.asked / len(labels) == pytest.approx(
        choice.stages[1].reach, abs=0.08
    )


def test_a_stage_that_does_not_help_is_left_out() -> None:
    scores, labels = labelled_scores()
    useless = np.full_like(scores[0], 0.5)
    choice = choose([useless, scores[1]], labels, (0.001, 0.010), ThresholdOptions())
    assert choice.kept == (1,)
    assert [stage.name for stage in with_choice(SPEC, choice).stages] == ["second"]


def test_a_choice_for_more_stages_is_refused() -> None:
    scores, labels = labelled_scores()
    choice = choose(list(scores), labels, (0.001, 0.010), ThresholdOptions())
    short = CascadeSpec(SPEC.stages[:1])
    with pytest.raises(OptionError, match="stage 1, but the cascade has stages 0 to 0"):
        with_choice(short, choice)


def test_opened_stages_score_as_the_cascade_does() -> None:
    """Plain functions become stages; what is given stays open."""
    stage = Marked([], "second")
    with open_stages(SPEC, given={"first": lambda b: np.full(len(b), 0.25), "second": stage}) as s:
        table = score_stages(s, images(6), batch=4)
    np.testing.assert_array_equal(table.probabilities[0], np.full(6, 0.25, np.float32))
    np.testing.assert_array_equal(table.probabilities[1], np.arange(6, dtype=np.float32) / 255)


def test_stages_that_are_not_given_are_named() -> None:
    with pytest.raises(OptionError, match="stage 'second' has no engine"):
        with open_stages(SPEC, given={"first": lambda batch: np.zeros(len(batch))}):
            pass
