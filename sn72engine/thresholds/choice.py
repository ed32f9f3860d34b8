"""The choice: which stages, which thresholds, what they give, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from sn72engine.errors import OptionError
from sn72engine.thresholds.certify import difference_bound, value_bound
from sn72engine.thresholds.objective import Objective
from sn72engine.thresholds.options import ObjectiveName, ThresholdOptions
from sn72engine.thresholds.samples import Config, Samples, check, halves, run
from sn72engine.thresholds.search import Candidate, best_single, frontier, pareto

#: Most candidates that are tested one after the other.
_SEQUENCE = 24

#: Cascades whose objectives differ by less are taken for equal: rounding of sums.
_SAME = 1e-12


@dataclass(frozen=True, slots=True)
class Figures:
    """Held-out figures of a cascade or of a stage alone.

    ``cost`` is the expected latency in seconds per sample; ``mcc`` and ``reward`` are None for
    top1; ``value`` is the one that was the objective.
    """

    value: float
    accuracy: float
    mcc: float | None
    reward: float | None
    cost: float


@dataclass(frozen=True, slots=True)
class StageThresholds:
    """One stage that stays: its number, thresholds, share of samples that reach it, its cost.

    Below ``low`` a sample leaves as 0, above ``high`` as 1 (or as its class). The last stage's
    two are equal, so it decides everything it can score.
    """

    stage: int
    low: float
    high: float
    reach: float
    cost: float


@dataclass(frozen=True, slots=True)
class Dropped:
    """A stage that is left out, and why."""

    stage: int
    reason: str


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """A cascade of the frontier, chosen on one half of the labels, measured on the other."""

    kept: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    decision_threshold: float
    cost: float
    value: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class ThresholdChoice:
    """Thresholds and what is known about them.

    Figures are of the held-out half. Where nothing could be certified that half took part in the
    choice, and they flatter a little; ``lower_bound`` allows for it.

    Attributes:
        options: what was asked for.
        stages: the stages that stay, in order.
        dropped: those that do not, with reasons.
        decision_threshold: above it the last stage's label is 1.
        figures: of the cascade.
        singles: of each given stage alone, with its best allowed decision threshold.
        target: value that was to be reached, in the objective's units; a relative one from the
            reference's held-out value.
        target_met: whether the held-out value reaches it; the value is an estimate.
        certified: whether the true value reaches it with ``options.confidence``; trivially so
            where the choice is the reference itself.
        lower_bound: of the true value, with ``options.confidence``; of value less the
            reference's value where the certificate compares the two on the same samples. When
            certified it is what was certified: the target, or ``-tolerance``.
        statement: the guarantee, or its absence, in words.
        pareto: the frontier, cheapest first.
        fitted_on, certified_on: number of labels in each half.
    """

    options: ThresholdOptions
    stages: tuple[StageThresholds, ...]
    dropped: tuple[Dropped, ...]
    decision_threshold: float
    figures: Figures
    singles: tuple[Figures, ...]
    target: float
    target_met: bool
    certified: bool
    lower_bound: float
    statement: str
    pareto: tuple[ParetoPoint, ...]
    fitted_on: int
    certified_on: int

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the stages that stay."""
        return tuple(stage.stage for stage in self.stages)

    @property
    def low(self) -> tuple[float, ...]:
        """Low thresholds of the stages that stay."""
        return tuple(stage.low for stage in self.stages)

    @property
    def high(self) -> tuple[float, ...]:
        """High thresholds of the stages that stay."""
        return tuple(stage.high for stage in self.stages)

    @property
    def accuracy(self) -> float:
        """Held-out accuracy."""
        return self.figures.accuracy

    @property
    def mcc(self) -> float | None:
        """Held-out Matthews correlation; None for top1."""
        return self.figures.mcc

    @property
    def reward(self) -> float | None:
        """Expected subnet reward on the held-out half; None for top1."""
        return self.figures.reward

    @property
    def expected_cost(self) -> float:
        """Expected latency in seconds per sample."""
        return self.figures.cost

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {
            name: getattr(self, name)
            for name in (
                "decision_threshold",
                "target",
                "target_met",
                "certified",
                "lower_bound",
                "statement",
                "fitted_on",
                "certified_on",
            )
        }
        groups = {
            name: [_listed(item) for item in getattr(self, name)]
            for name in ("stages", "dropped", "singles", "pareto")
        }
        return {
            "options": self.options.to_dict(),
            **values,
            "figures": asdict(self.figures),
            **groups,
        }

    def plot(self, path: str | Path, *, names: Sequence[str] = ()) -> Path:
        """Draw the frontier as a PNG; see :func:`sn72engine.thresholds.plot.plot`."""
        from sn72engine.thresholds.plot import plot

        return plot(self, Path(path), names)


def choose(
    stage_scores: Sequence[ArrayLike],
    labels: ArrayLike,
    costs: Sequence[float],
    options: ThresholdOptions | None = None,
    stage_labels: Sequence[ArrayLike] | None = None,
    *,
    names: Sequence[str] = (),
) -> ThresholdChoice:
    """Choose stages and thresholds that reach a target at the least expected latency.

    One half of the labels gives the frontier of cascades; with a relative target, of those no
    dearer than the reference. If one can be certified on the other half (see
    :mod:`sn72engine.thresholds.certify`), the cheapest certified is taken. If none can, the
    cheapest whose estimates on both halves reach the target; if none does, the reference of a
    relative target, or the cheapest within one standard error of the best (Breiman et al. 1984,
    "Classification and Regression Trees"). A stage that none of this needs is dropped.

    Args:
        stage_scores: per stage the scores of all samples, shape (n,), also of those that would
            not reach it. Probabilities of label 1, or confidences for top1. NaN and values
            outside [0, 1] escalate, as they do at run time. Rounded to float32, as there.
        labels: 0 or 1, shape (n,); class indices for top1.
        costs: seconds per sample of each stage.
        options: what to choose for; None for the defaults.
        stage_labels: for top1, the class that each stage gives each sample.
        names: of the stages, for what is said of them; by default their numbers from 0.

    Raises:
        InputError: lengths differ, labels are too few or of one class, scores are no
            probabilities.
        OptionError: a cost is not a positive number, or the number of names is not that of costs.
    """
    if names and len(names) != len(costs):
        raise OptionError(f"names={list(names)!r} must name all {len(costs)} stages")
    titles = list(names) or [f"stage {k}" for k in range(len(costs))]
    options = options or ThresholdOptions()
    samples = check(stage_scores, labels, costs, options, stage_labels)
    fit, held_out = halves(samples, options.seed)
    goal = _objective(fit, options, options.objective)
    by_subset = frontier(fit, goal, options)
    candidates = pareto([c for found in by_subset.values() for c in found])
    singles = [best_single(fit, goal, options, k) for k in range(len(costs))]
    reference = singles[-1]
    if options.reference == "best":
        reference = max(singles, key=lambda c: (c.value, -c.cost))
    target = options.target
    eligible = candidates
    if target is None:
        target = reference.value - options.tolerance
        # What costs more than the reference has no use; the reference itself always reaches it.
        eligible = [c for c in candidates if c.cost < reference.cost]
    eligible = [c for c in eligible if c.value >= target - _SAME]
    judge = _Judge(held_out, options, reference, target, eligible)
    tested = judge.certified()
    chosen = tested or judge.reaching() or judge.fallback(candidates)
    certified = tested is not None or judge.trivial(chosen.config)
    bound = judge.claim if tested else judge.bound(chosen.config)
    outcome = run(held_out, chosen.config)
    figures = _figures(held_out, options, chosen.config)
    met = figures.value >= judge.held_out_target - _SAME
    return ThresholdChoice(
        options=options,
        stages=tuple(
            StageThresholds(stage, low, high, reach, float(samples.costs[stage]))
            for stage, low, high, reach in zip(
                chosen.config.kept,
                chosen.config.low,
                chosen.config.high,
                outcome.reach,
                strict=True,
            )
        ),
        dropped=_dropped(chosen, by_subset, singles, target, titles),
        decision_threshold=chosen.config.decision,
        figures=figures,
        singles=tuple(_figures(held_out, options, s.config) for s in singles),
        target=judge.held_out_target,
        target_met=met,
        certified=certified,
        lower_bound=bound,
        statement=judge.statement(chosen.config, certified, bound, titles),
        pareto=tuple(_point(held_out, judge.goal, c.config) for c in candidates),
        fitted_on=fit.count,
        certified_on=held_out.count,
    )


class _Judge:
    """Tests eligible cascades on the held-out half against the target.

    Estimates are held against a relative target on the same samples. So is a certificate of
    accuracy; one of MCC or reward is of a number: the target on the first half.
    """

    def __init__(
        self,
        samples: Samples,
        options: ThresholdOptions,
        reference: Candidate,
        target: float,
        eligible: list[Candidate],
    ) -> None:
        self._samples = samples
        self._options = options
        self._relative = options.target is None
        self._paired = self._relative and options.objective == "accuracy"
        self._reference = reference
        self._sequence = _thinned(eligible[::-1])
        self.goal = _objective(samples, options, options.objective)
        self.held_out_target = target
        if self._relative:
            self.held_out_target = self._value(reference) - options.tolerance
        self.claim = -options.tolerance if self._paired else target

    def certified(self) -> Candidate | None:
        """The last that passes, tested from the most accurate down to the first that fails."""
        passed = None
        for candidate in self._sequence:
            if self._bound(candidate.config, 1 - self._options.confidence) < self.claim:
                break
            passed = candidate
        return passed

    def reaching(self) -> Candidate | None:
        """The cheapest whose estimate on this half reaches the target as well."""
        good = [c for c in self._sequence if self._value(c) >= self.held_out_target - _SAME]
        return min(good, key=lambda c: c.cost, default=None)

    def fallback(self, candidates: list[Candidate]) -> Candidate:
        """The reference of a relative target, or the cheapest that is best here but for noise."""
        if self._relative:
            return self._reference
        tried = [(c, self._value(c)) for c in _thinned(candidates)]
        best = max(value for _, value in tried)
        count = self._samples.count
        spread = math.sqrt(max(best * (1 - best), 1 / count) / count)
        return next(c for c, value in tried if value >= best - spread)

    def bound(self, config: Config) -> float:
        """Lower bound of one that was picked by its estimate on this half.

        The error level is divided by the most that were looked at (Bonferroni): the sequence,
        and in :meth:`fallback` as many again.
        """
        return self._bound(config, (1 - self._options.confidence) / (2 * _SEQUENCE))

    def trivial(self, config: Config) -> bool:
        """Whether the claim is that the reference is as accurate as itself."""
        return self._paired and config == self._reference.config

    def _bound(self, config: Config, alpha: float) -> float:
        outcome = run(self._samples, config)
        if not self._paired:
            return value_bound(outcome, self.goal, alpha)
        if self.trivial(config):
            return 0.0
        return difference_bound(outcome, run(self._samples, self._reference.config), alpha)

    def _value(self, candidate: Candidate) -> float:
        outcome = run(self._samples, candidate.config)
        return self.goal.value(outcome.fp, outcome.fn)

    def statement(
        self, config: Config, certified: bool, bound: float, titles: Sequence[str]
    ) -> str:
        """The guarantee in words."""
        if self.trivial(config):
            return (
                f"The choice is {titles[config.kept[0]]} alone, which is its own reference: "
                "there is nothing to certify."
            )
        options = self._options
        count = self._samples.count
        level = f"{options.confidence:.6g}"
        if self._paired:
            rival = titles[self._reference.config.kept[0]]
            loss = f" less {options.tolerance:.2%}" if options.tolerance else ""
            claim = f"accuracy is at least that of {rival}{loss}"
            measured = f"it is at most {-bound:.2%} lower" if bound < 0 else f"{bound:.2%} higher"
        else:
            name = {"accuracy": "accuracy", "mcc": "MCC", "reward": "expected reward"}
            what = name[options.objective]
            claim = f"{what} is at least {self.claim:.4f}"
            measured = f"{what} is at least {bound:.4f}"
        if certified:
            return (
                f"Certified on {count} held-out samples with confidence {level}: {claim} "
                "(fixed-sequence testing, Clopper-Pearson bounds; samples drawn independently "
                "from what the cascade will see)."
            )
        return (
            f"Not certified: {count} held-out samples do not show with confidence {level} that "
            f"{claim}. What they show is that {measured}. More labels, a lower target or a larger "
            "tolerance would help."
        )


def _thinned(candidates: list[Candidate]) -> list[Candidate]:
    if len(candidates) <= _SEQUENCE:
        return candidates
    step = (len(candidates) - 1) / (_SEQUENCE - 1)
    return [candidates[round(i * step)] for i in range(_SEQUENCE)]


def _dropped(
    chosen: Candidate,
    by_subset: dict[tuple[int, ...], list[Candidate]],
    singles: list[Candidate],
    target: float,
    titles: Sequence[str],
) -> tuple[Dropped, ...]:
    """Reasons, from the half that the choice was made on."""
    result = []
    for stage, alone in enumerate(singles):
        if stage in chosen.config.kept:
            continue
        better = [s for s in singles if s.value >= alone.value and s.cost < alone.cost]
        if better:
            rival = max(better, key=lambda c: c.value)
            reason = (
                f"alone it reaches {alone.value:.4f} at {_milliseconds(alone.cost)}, no more than "
                f"{titles[rival.config.kept[0]]} with {rival.value:.4f} at "
                f"{_milliseconds(rival.cost)}; "
            )
        else:
            reason = f"alone it reaches {alone.value:.4f} at {_milliseconds(alone.cost)}; "
        with_it = [c for kept, found in by_subset.items() if stage in kept for c in found]
        reaching = [c for c in with_it if c.value >= min(target, chosen.value) - _SAME]
        if reaching:
            cheapest = min(reaching, key=lambda c: c.cost)
            if cheapest.cost < chosen.cost:
                reason += (
                    "cascades with it are good enough only on the half that they were fitted on"
                )
            else:
                reason += (
                    f"the cheapest cascade with it that is good enough costs "
                    f"{_milliseconds(cheapest.cost)}, the chosen one {_milliseconds(chosen.cost)}"
                )
        else:
            reason += "no cascade with it is as good as the chosen one"
        result.append(Dropped(stage, reason))
    return tuple(result)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def _objective(samples: Samples, options: ThresholdOptions, name: ObjectiveName) -> Objective:
    positives = int(samples.positive.sum())
    return Objective(
        name,
        options.task,
        positives,
        samples.count - positives,
        windows=options.windows,
        seed=options.seed,
    )


def _figures(samples: Samples, options: ThresholdOptions, config: Config) -> Figures:
    outcome = run(samples, config)
    names: tuple[ObjectiveName, ...] = ("accuracy", "mcc", "reward")
    values: dict[str, float | None] = {
        name: _objective(samples, options, name).value(outcome.fp, outcome.fn)
        if options.task == "binary" or name == "accuracy"
        else None
        for name in names
    }
    value = values[options.objective]
    accuracy = values["accuracy"]
    if value is None or accuracy is None:
        raise OptionError(f"objective={options.objective!r} is not defined for {options.task!r}")
    return Figures(value, accuracy, values["mcc"], values["reward"], outcome.cost)


def _point(samples: Samples, goal: Objective, config: Config) -> ParetoPoint:
    outcome = run(samples, config)
    return ParetoPoint(
        kept=config.kept,
        low=config.low,
        high=config.high,
        decision_threshold=config.decision,
        cost=outcome.cost,
        value=goal.value(outcome.fp, outcome.fn),
        accuracy=float(outcome.correct.mean()),
    )


def _listed(item: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(item).items()}
