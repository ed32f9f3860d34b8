"""The search: cascades on the frontier of expected latency and objective.

Every subset of the stages is searched, so that dropping a stage is a candidate like any other.
One stage needs no thresholds. For two, all pairs of candidate thresholds are tried. For more,
thresholds of one boundary at a time are all tried with the others fixed, from the last boundary
backwards and round again until nothing improves, for a ladder of prices of latency against the
objective (coordinate ascent on ``objective - price * cost``); what every step tries is kept, so
the frontier is richer than the end points. A cascade whose last stage no sample reaches is left
out. All of it is deterministic.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sn72engine.thresholds.objective import Objective
from sn72engine.thresholds.options import ThresholdOptions
from sn72engine.thresholds.samples import Config, Samples, run

Floats = NDArray[np.float64]

#: Prices of latency, as objective lost for the cost of all stages together.
_PRICES = (0.0, 0.002, 0.01, 0.03, 0.1, 0.3, 1.0)

_SWEEPS = 6

#: Most candidates for the decision threshold.
_DECISIONS = 33


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cascade with its expected cost in seconds and its objective, both on the searched half."""

    config: Config
    cost: float
    value: float


def frontier(
    samples: Samples, objective: Objective, options: ThresholdOptions
) -> dict[tuple[int, ...], list[Candidate]]:
    """For each subset of the stages its Pareto frontier, cheapest first.

    On a frontier the objective rises strictly with the cost.
    """
    stages = range(len(samples.costs))
    subsets = [
        kept for size in range(1, len(stages) + 1) for kept in itertools.combinations(stages, size)
    ]
    return {kept: _subset(samples, objective, options, kept) for kept in subsets}


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that nothing else matches at the same or lower cost, cheapest first."""
    best = -np.inf
    kept = []
    for candidate in sorted(candidates, key=lambda c: (c.cost, -c.value, len(c.config.kept))):
        if candidate.value > best:
            best = candidate.value
            kept.append(candidate)
    return kept


def cuts(scores: NDArray[np.float32], most: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Candidate ``low`` and ``high`` thresholds: halfway between neighbouring scores.

    Between two neighbouring scores every threshold acts alike, so with ``most`` not reached the
    candidates are exhaustive. Otherwise those at evenly spaced ranks are taken. Either list also
    has 0 and 1: a low of 0 is no negative exit, a high of 1 no positive exit.
    """
    distinct, counts = np.unique(scores[(scores >= 0) & (scores <= 1)], return_counts=True)
    below, above = distinct[:-1], distinct[1:]
    if below.size > most:
        # By rank among samples, not among distinct values: ties carry weight.
        ranks = np.cumsum(counts)[:-1]
        wanted = np.linspace(ranks[0], ranks[-1], most)
        chosen = np.unique(np.searchsorted(ranks, wanted).clip(0, below.size - 1))
        below, above = below[chosen], above[chosen]
    middle = (0.5 * (below.astype(np.float64) + above)).astype(np.float32)
    # Rounding may land on a neighbour; each comparison is strict, so take the side that cuts.
    low = np.where(middle > below, middle, above)
    high = np.where(middle < above, middle, below)
    ends = np.array([0, 1], np.float32)
    return np.unique(np.concatenate([low, ends])), np.unique(np.concatenate([high, ends]))


def single(stage: int, decision: float) -> Config:
    """The cascade of one stage alone."""
    return Config((stage,), (decision,), (decision,), decision)


def best_single(
    samples: Samples, objective: Objective, options: ThresholdOptions, stage: int
) -> Candidate:
    """One stage alone, with the best of the allowed decision thresholds."""
    return max(
        (
            _measured(samples, objective, single(stage, decision))
            for decision in _decisions(samples, options, stage)
        ),
        key=lambda c: c.value,
    )


def _subset(
    samples: Samples, objective: Objective, options: ThresholdOptions, kept: tuple[int, ...]
) -> list[Candidate]:
    if len(kept) == 1:
        return [best_single(samples, objective, options, kept[0])]
    found: list[Candidate] = []
    boundaries = [_Boundary.of(samples, options, stage) for stage in kept[:-1]]
    decisions = _decisions(samples, options, kept[-1])
    if len(kept) > 2:
        # A full grid for each would take long; the last stage's own best is near the best.
        alone = best_single(samples, objective, options, kept[-1]).config.decision
        decisions = sorted({decisions[0], alone})
    for decision in decisions:
        walk = _Walk(samples, objective, kept, boundaries, decision)
        if len(kept) == 2:
            found += walk.step(0, walk.open_thresholds())[1]
            continue
        for price in _PRICES:
            found += walk.ascend(price / float(samples.costs[list(kept)].sum()))
    used = [c for c in pareto(found) if run(samples, c.config).reach[-1] > 0]
    return pareto([_measured(samples, objective, c.config) for c in used])


def _decisions(samples: Samples, options: ThresholdOptions, last: int) -> list[float]:
    if samples.right is not None:
        return [0.0]
    if options.decision_threshold is not None:
        return [float(np.float32(options.decision_threshold))]
    # 0.5 first: it wins ties.
    return [0.5, *map(float, cuts(samples.scores[last], min(_DECISIONS, options.grid))[0])]


def _measured(samples: Samples, objective: Objective, config: Config) -> Candidate:
    outcome = run(samples, config)
    return Candidate(config, outcome.cost, objective.value(outcome.fp, outcome.fn))


@dataclass(frozen=True, slots=True)
class _Boundary:
    """The candidate thresholds of a stage, and its usable samples in the order of its scores.

    ``first[i]`` is the rank of the first sample not below ``lows[i]``, ``after[j]`` that of the
    first above ``highs[j]``; ``allowed`` (lows, highs) leaves out crossed pairs.
    """

    lows: NDArray[np.float32]
    highs: NDArray[np.float32]
    order: NDArray[np.intp]
    first: NDArray[np.intp]
    after: NDArray[np.intp]
    allowed: NDArray[np.bool_]

    @classmethod
    def of(cls, samples: Samples, options: ThresholdOptions, stage: int) -> _Boundary:
        scores = samples.scores[stage]
        lows, highs = cuts(scores, options.grid)
        if options.task == "top1":
            lows = lows[:1]
        if options.symmetric:
            # Either side of the middle gives candidates; the other threshold is its mirror.
            highs = np.unique(np.concatenate([highs[highs >= 0.5], 1 - lows[lows <= 0.5]]))
            lows = 1 - highs
        usable = np.flatnonzero(samples.valid[stage])
        order = usable[np.argsort(scores[usable], kind="stable")]
        ranked = scores[order]
        allowed = lows[:, None] <= highs[None, :]
        if options.symmetric:
            allowed &= np.eye(len(lows), dtype=bool)
        return cls(
            lows=lows,
            highs=highs,
            order=order,
            first=np.searchsorted(ranked, lows, side="left"),
            after=np.searchsorted(ranked, highs, side="right"),
            allowed=allowed,
        )


@dataclass(frozen=True, slots=True)
class _Walk:
    """The thresholds of one subset of the stages with one decision threshold.

    A set of thresholds is a tuple of ``(low, high)`` per boundary. Per sample, what happens from
    a boundary on is a row of three: false positives, false negatives, seconds.
    """

    samples: Samples
    objective: Objective
    kept: tuple[int, ...]
    boundaries: list[_Boundary]
    decision: float

    def open_thresholds(self) -> tuple[tuple[float, float], ...]:
        """Thresholds that let everything through to the last stage."""
        return ((0.0, 1.0),) * len(self.boundaries)

    def ascend(self, price: float) -> list[Candidate]:
        """Coordinate ascent on ``objective - price * cost``; returns all that was worth keeping."""
        found: list[Candidate] = []
        thresholds = self.open_thresholds()
        for _ in range(_SWEEPS):
            before = thresholds
            for number in reversed(range(len(self.boundaries))):
                thresholds, tried = self.step(number, thresholds, price)
                found += tried
            if thresholds == before:
                break
        return found

    def step(
        self, number: int, thresholds: tuple[tuple[float, float], ...], price: float = 0.0
    ) -> tuple[tuple[tuple[float, float], ...], list[Candidate]]:
        """Try all thresholds of one boundary.

        Returns:
            ``thresholds`` with the best pair at this boundary (the given one wins ties), and the
            Pareto frontier of what was tried.
        """
        boundary = self.boundaries[number]
        arriving, gone = self._head(number, thresholds)
        tail = self._tail(number + 1, thresholds) * arriving[:, None]
        tail[:, 2] += arriving * self.samples.costs[self.kept[number]]
        left, right = self._exits(self.kept[number])
        seconds = arriving * self.samples.costs[self.kept[number]]
        order = boundary.order
        negative, positive, onward = (
            _sums((errors * arriving[:, None])[order]) for errors in (left, right, tail)
        )
        unusable = np.setdiff1d(np.arange(self.samples.count), order, assume_unique=True)
        fixed = gone + tail[unusable].sum(0)
        first, after = boundary.first[:, None], boundary.after[None, :]
        totals = fixed + (positive[-1] - positive[after]) + negative[first]
        totals = totals + (onward[after] - onward[first])
        # Those that leave here have paid for this stage; in `onward` the others have already.
        paid = _sums(seconds[order][:, None])[:, 0]
        totals[..., 2] += paid[-1] - paid[after] + paid[first]
        fp, fn, cost = totals[..., 0], totals[..., 1], totals[..., 2] / self.samples.count
        # Nobody going on would be the earlier stages alone, with a decision threshold of its own.
        walked = _sums(arriving[order][:, None])[:, 0]
        going = walked[after] - walked[first] + arriving[unusable].sum()
        allowed = boundary.allowed & (going > 0)
        value = np.where(allowed, self.objective.values(fp, fn), -np.inf)
        score = value - price * cost
        row, column = np.unravel_index(int(np.argmax(score)), score.shape)
        chosen = _replaced(thresholds, number, boundary, int(row), int(column))
        current = thresholds[number]
        same = (boundary.lows == current[0])[:, None] & (boundary.highs == current[1])[None, :]
        if same.any() and score[same].max() >= score[row, column]:
            chosen = thresholds
        tried = [
            Candidate(
                self._config(_replaced(thresholds, number, boundary, i, j)),
                float(cost[i, j]),
                float(value[i, j]),
            )
            for i, j in _undominated(cost, value)
        ]
        return chosen, tried

    def _config(self, thresholds: tuple[tuple[float, float], ...]) -> Config:
        lows, highs = zip(*thresholds, (self.decision, self.decision), strict=True)
        return Config(self.kept, lows, highs, self.decision)

    def _exits(self, stage: int) -> tuple[Floats, Floats]:
        """Errors of leaving ``stage`` as negative and as positive, per sample."""
        count = self.samples.count
        left, right = np.zeros((count, 3)), np.zeros((count, 3))
        if self.samples.right is None:
            left[:, 1] = self.samples.positive
            right[:, 0] = ~self.samples.positive
        else:
            right[:, 1] = ~self.samples.right[stage]
        return left, right

    def _routed(
        self, number: int, thresholds: tuple[tuple[float, float], ...]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Who would leave at a boundary as negative and as positive."""
        stage = self.kept[number]
        scores, valid = self.samples.scores[stage], self.samples.valid[stage]
        low, high = map(np.float32, thresholds[number])
        return valid & (scores < low), valid & (scores > high)

    def _head(
        self, number: int, thresholds: tuple[tuple[float, float], ...]
    ) -> tuple[Floats, Floats]:
        """1 for samples that arrive at a boundary, and the totals of those that left before."""
        arriving = np.ones(self.samples.count)
        gone = np.zeros(3)
        for earlier in range(number):
            stage = self.kept[earlier]
            gone[2] += arriving.sum() * self.samples.costs[stage]
            left, right = self._exits(stage)
            for errors, leaves in zip(
                (left, right), self._routed(earlier, thresholds), strict=True
            ):
                gone += errors[(arriving > 0) & leaves].sum(0)
                arriving[leaves] = 0
        return arriving, gone

    def _tail(self, number: int, thresholds: tuple[tuple[float, float], ...]) -> Floats:
        """What would happen to each sample from a stage on, seconds included."""
        rows = self._end()
        for later in reversed(range(number, len(self.boundaries))):
            left, right = self._exits(self.kept[later])
            negative, positive = self._routed(later, thresholds)
            rows = np.where(negative[:, None], left, np.where(positive[:, None], right, rows))
            rows[:, 2] += self.samples.costs[self.kept[later]]
        return rows

    def _end(self) -> Floats:
        """Errors of each sample that reaches the last stage, and that stage's seconds."""
        samples = self.samples
        rows = np.zeros((samples.count, 3))
        rows[:, 2] = samples.costs[self.kept[-1]]
        probability = np.full(samples.count, 0.5, np.float32)
        right = np.zeros(samples.count, bool)
        for stage in self.kept:
            usable = samples.valid[stage]
            probability[usable] = samples.scores[stage, usable]
            if samples.right is not None:
                right[usable] = samples.right[stage, usable]
        if samples.right is not None:
            rows[:, 1] = ~right
        else:
            predicted = probability > np.float32(self.decision)
            rows[:, 0] = predicted & ~samples.positive
            rows[:, 1] = ~predicted & samples.positive
        return rows


def _sums(rows: Floats) -> Floats:
    """Prefix sums along axis 0, beginning with 0."""
    return np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)])


def _replaced(
    thresholds: tuple[tuple[float, float], ...], number: int, boundary: _Boundary, i: int, j: int
) -> tuple[tuple[float, float], ...]:
    pair = (float(boundary.lows[i]), float(boundary.highs[j]))
    return (*thresholds[:number], pair, *thresholds[number + 1 :])


def _undominated(cost: Floats, value: Floats) -> Iterator[tuple[int, int]]:
    order = np.lexsort((-value.ravel(), cost.ravel()))
    ranked = value.ravel()[order]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(ranked)[:-1]])
    for flat in order[ranked > before]:
        row, column = np.unravel_index(int(flat), value.shape)
        yield int(row), int(column)
