"""Labelled scores of all stages, checked, and what a cascade makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sn72engine.cascade.route import ESCALATE, POSITIVE, as_float32, route
from sn72engine.errors import InputError
from sn72engine.spec import check_number
from sn72engine.thresholds.options import ThresholdOptions

Bools = NDArray[np.bool_]

#: More stages would make the search over subsets of them long, and no cascade has them.
MAX_STAGES = 6

#: Fewest labels of either class: each half then has five of it.
MIN_PER_CLASS = 10


@dataclass(frozen=True, slots=True)
class Samples:
    """Scores float32 (stages, n), costs in seconds per sample and stage, and labels.

    ``positive`` says which samples have label 1; for ``top1`` all do. ``right`` (stages, n) says
    where the stage's own class is the label; None for a binary task.
    """

    scores: NDArray[np.float32]
    costs: NDArray[np.float64]
    positive: Bools
    right: Bools | None

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.positive.size)

    @property
    def valid(self) -> Bools:
        """Where a score is a probability; elsewhere a sample escalates."""
        return (self.scores >= 0) & (self.scores <= 1)

    def take(self, index: NDArray[np.intp]) -> Samples:
        """The samples at ``index``."""
        right = None if self.right is None else self.right[:, index]
        return Samples(self.scores[:, index], self.costs, self.positive[index], right)


@dataclass(frozen=True, slots=True)
class Config:
    """A cascade: the stages it keeps, ``(low, high)`` of each, and the decision threshold.

    All are float32 values. The last stage's thresholds both equal the decision threshold (0 for
    top1), so every sample with a usable score is decided there.
    """

    kept: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    decision: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a cascade did: correctness per sample, error counts, cost, share reaching each stage."""

    correct: Bools
    fp: int
    fn: int
    cost: float
    reach: tuple[float, ...]


def run(samples: Samples, config: Config) -> Outcome:
    """Send labelled samples through a cascade, by the rules of :mod:`sn72engine.cascade.route`.

    A sample that the last stage cannot score keeps the last usable score, or 0.5 if there is
    none; its label is 1 above the decision threshold. For top1 it keeps the class of the last
    stage with a usable score, and is wrong if there is none.
    """
    count = samples.count
    open_ = np.ones(count, bool)
    predicted = np.zeros(count, bool)
    probability = np.full(count, 0.5, np.float32)
    cost, reach = 0.0, []
    valid = samples.valid
    for stage, low, high in zip(config.kept, config.low, config.high, strict=True):
        reach.append(float(open_.mean()))
        cost += reach[-1] * float(samples.costs[stage])
        heard = open_ & valid[stage]
        probability[heard] = samples.scores[stage, heard]
        if samples.right is not None:
            predicted[heard] = samples.right[stage, heard]
        routes = route(samples.scores[stage], low, high)
        leaving = open_ & (routes != ESCALATE)
        if samples.right is None:
            predicted[leaving] = routes[leaving] == POSITIVE
        open_ &= ~leaving
    if samples.right is None:
        predicted[open_] = probability[open_] > np.float32(config.decision)
    correct = predicted == samples.positive
    return Outcome(
        correct=correct,
        fp=int((~correct & ~samples.positive).sum()),
        fn=int((~correct & samples.positive).sum()),
        cost=cost,
        reach=tuple(reach),
    )


def check(
    stage_scores: Sequence[ArrayLike],
    labels: ArrayLike,
    costs: Sequence[float],
    options: ThresholdOptions,
    stage_labels: Sequence[ArrayLike] | None,
) -> Samples:
    """Check labelled scores.

    Raises:
        InputError: lengths differ, a value is not what it must be, or there are too few labels.
        OptionError: a cost is not a positive number.
    """
    stages = len(stage_scores)
    if not 1 <= stages <= MAX_STAGES:
        raise InputError(f"stage_scores holds {stages} stages; give 1 to {MAX_STAGES}")
    truth = _integers(labels, "labels")
    count = truth.size
    scores = np.stack([_scores(s, k, count) for k, s in enumerate(stage_scores)])
    if len(costs) != stages:
        raise InputError(f"costs holds {len(costs)} values for {stages} stages; give one each")
    for stage, cost in enumerate(costs):
        check_number(f"costs[{stage}]", float(cost), 1e-12)
    if count < options.minimum:
        raise InputError(
            f"{count} labels are too few to choose thresholds on; at least {options.minimum} are "
            "needed, and a few hundred for a useful certificate"
        )
    classes = np.unique(truth)
    if classes.size < 2:
        raise InputError(f"all {count} labels are {classes[0]}; give samples of other classes too")
    if options.task == "binary":
        if stage_labels is not None:
            raise InputError("stage_labels are for task='top1'; a binary task has no use for them")
        return Samples(scores, np.array(costs, np.float64), _binary(truth, classes), None)
    if stage_labels is None or len(stage_labels) != stages:
        given = "none" if stage_labels is None else str(len(stage_labels))
        raise InputError(f"task='top1' needs stage_labels for each of {stages} stages; got {given}")
    right = [_right(given, stage, truth) for stage, given in enumerate(stage_labels)]
    return Samples(scores, np.array(costs, np.float64), np.ones(count, bool), np.stack(right))


def halves(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Two disjoint random halves, each with the same share of either label as the whole."""
    generator = np.random.default_rng(seed)
    first: list[NDArray[np.intp]] = []
    second: list[NDArray[np.intp]] = []
    for group in (samples.positive, ~samples.positive):
        index = generator.permutation(np.flatnonzero(group))
        first.append(index[::2])
        second.append(index[1::2])
    return (
        samples.take(np.sort(np.concatenate(first))),
        samples.take(np.sort(np.concatenate(second))),
    )


def _scores(values: ArrayLike, stage: int, count: int) -> NDArray[np.float32]:
    name = f"stage_scores[{stage}]"
    scores = as_float32(values, name)
    if scores.shape != (count,):
        raise InputError(f"{name} must have shape ({count},) like the labels, got {scores.shape}")
    bad = float(1 - ((scores >= 0) & (scores <= 1)).mean())
    if bad > 0.5:
        raise InputError(
            f"{name}: {bad:.0%} of the scores are NaN or outside [0, 1]; give probabilities "
            "(apply a sigmoid to logits)"
        )
    return scores


def _integers(values: ArrayLike, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise InputError(
            f"{name} must be a one-dimensional array of integers, got dtype {array.dtype} and "
            f"shape {array.shape}"
        )
    return array.astype(np.int64)


def _right(values: ArrayLike, stage: int, truth: NDArray[np.int64]) -> Bools:
    name = f"stage_labels[{stage}]"
    predicted = _integers(values, name)
    if predicted.shape != truth.shape:
        raise InputError(f"{name} holds {predicted.size} values for {truth.size} labels")
    right: Bools = predicted == truth
    return right


def _binary(truth: NDArray[np.int64], classes: NDArray[np.int64]) -> Bools:
    if not np.array_equal(classes, (0, 1)):
        raise InputError(f"labels of a binary task must be 0 and 1, got {classes[:6].tolist()}")
    positive: Bools = truth == 1
    fewest = int(min(positive.sum(), (~positive).sum()))
    if fewest < MIN_PER_CLASS:
        raise InputError(
            f"the rarer label occurs {fewest} times; at least {MIN_PER_CLASS} of each are needed"
        )
    return positive
