"""What must become of one sample of a cascade, in plain Python, and random cases to ask about.

Written from the rules of docs/cascade.md and not from an executor, so that every executor can be
held against it: make a case with :func:`random_case`, run its samples through the executor with
stages that answer ``case.scores``, and compare with :func:`expected`, exactly: probabilities are
float32.

An executor is asked ``case.late_after``, too: the number of the parallel group after which time is
over, so that no stage of a later group is asked; None for no deadline, -1 if it was over before.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sn72engine.cascade.result import Result, Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec

NAN = math.nan

#: How a stage fails for all samples: it raises, or answers with the wrong shape or nothing.
Broken = Literal["", "raises", "shape", "nothing"]


@dataclass(frozen=True)
class Case:
    """A cascade, its samples, and what each stage says about each of them.

    Attributes:
        spec: the cascade; its stages have no engine, so they are objects of the test.
        scores: by stage, by sample.
        broken: by stage, how it fails for every sample.
        flags: by trigger, by sample.
        thresholds: by stage number, by sample; stages that are not in it use the spec's.
        readable: by sample, whether its image can be decoded.
        late_after: see the module.
    """

    spec: CascadeSpec
    scores: list[list[float]]
    broken: list[Broken]
    flags: dict[str, list[bool]]
    thresholds: dict[int, list[tuple[float, float]]]
    readable: list[bool]
    late_after: int | None = None

    def __len__(self) -> int:
        return len(self.readable)

    @property
    def bounds(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """``thresholds`` as a call to a cascade takes them."""
        return {
            self.spec.stages[k].name: tuple(np.array(pairs, np.float64).reshape(-1, 2).T)  # type: ignore[misc]
            for k, pairs in self.thresholds.items()
        }


Answer = tuple[float, int, str | None, Status]


def expected(case: Case) -> list[Answer]:
    """Probability, label, deciding stage and status of every sample."""
    return [_one(case, sample) for sample in range(len(case))]


def answers(results: Sequence[Result]) -> list[Answer]:
    """The same of an executor's results."""
    return [(r.probability, r.label, r.stage, r.status) for r in results]


def _one(case: Case, sample: int) -> Answer:
    stages = case.spec.stages
    groups: list[list[int]] = []
    for k, stage in enumerate(stages):
        if k and stage.group is not None and stage.group == stages[k - 1].group:
            groups[-1].append(k)
        else:
            groups.append([k])

    votes: list[tuple[float, float]] = []  # weight, score
    floor: tuple[float, str] | None = None
    voter: str | None = None
    status: Status | None = None

    def answer() -> tuple[float, str | None]:
        mean = 0.5
        if votes:
            total = 0.0
            for weight, score in votes:
                total += weight * score
            mean = f32(total / sum(weight for weight, _ in votes))
        if floor is not None and floor[0] > mean:
            return floor
        return mean, voter

    def end(status: Status, label: int | None = None) -> Answer:
        p, who = answer()
        if label is None:
            label = int(p > f32(case.spec.decision_threshold))
        return p, label, who, status

    for number, group in enumerate(groups):
        asked = [
            k for k in group if stages[k].when == "always" or case.flags[stages[k].when][sample]
        ]
        if not asked:
            continue
        if case.late_after is not None and number > case.late_after:
            return end(Status.DEADLINE)
        if not case.readable[sample]:
            return end(Status.STAGE_FAILED)
        changed = negative_exit = False
        for k in asked:
            stage = stages[k]
            score = NAN if case.broken[k] else f32(case.scores[k][sample])
            if not 0.0 <= score <= 1.0:
                status = Status.STAGE_FAILED
                continue
            if stage.combine == "positive_only":
                if score <= answer()[0]:
                    continue
                floor = (score, stage.name)
            else:
                if stage.combine == "replace":
                    votes, floor = [], None
                votes.append((stage.weight, score))
                voter = stage.name
                negative_exit = True
            changed = True
            status = Status.UNDECIDED
        if not changed:
            continue
        pair = stages[group[0]].thresholds
        if group[0] in case.thresholds:
            pair = case.thresholds[group[0]][sample]
        low, high = f32(pair[0]), f32(pair[1])
        p, _ = answer()
        if low <= high and p > high:
            return end(Status.DONE, 1)
        if low <= high and p < low and negative_exit:
            return end(Status.DONE, 0)
    return end(status or Status.STAGE_FAILED)


def f32(value: float) -> float:
    """``value`` rounded to float32."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


# Few distinct values, so that ties and equal scores are common.
_SCORES = [0.0, 0.1, 0.15, 0.3, 0.5, 0.7, 0.85, 0.9, 1.0]
_BAD_SCORES = [NAN, math.inf, -math.inf, -0.1, 1.1]
_BAD_BOUNDS = [NAN, -1.0, 2.0]


def random_case(
    rng: np.random.Generator,
    *,
    most_samples: int = 12,
    most_stages: int = 5,
    groups: bool = True,
    combine: bool = True,
    triggers: bool = True,
    unreadable: bool = True,
    deadlines: bool = True,
) -> Case:
    """A case drawn at random; what an executor cannot do is switched off by its name.

    Args:
        rng: source of every choice.
        most_samples: the number of samples is 0 to this.
        most_stages: the number of stages is 1 to this.
        groups: some stages run side by side.
        combine: some stages vote or may only raise; else all replace.
        triggers: some stages wait for a trigger.
        unreadable: some images cannot be decoded.
        deadlines: time runs out in some cases.
    """

    def pick(values: Sequence[Any]) -> Any:
        return values[int(rng.integers(len(values)))]

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    count = int(rng.integers(most_samples + 1))
    stages: list[StageSpec] = []
    for k in range(int(rng.integers(1, most_stages + 1))):
        before = stages[-1] if stages else None
        beside = groups and before is not None and before.group is not None and chance(0.6)
        options = ["weighted", "positive_only"] if beside else ["replace", "weighted"]
        if not beside and k:
            options.append("positive_only")
        how = pick(options) if combine or beside else "replace"
        if beside and before is not None:
            group = before.group
            first = next(s for s in stages if s.group == group)
            if first.combine == "positive_only":
                how = "positive_only"
            thresholds: dict[str, float] = {}
        else:
            group = f"g{k}" if groups and chance(0.5) else None
            low, high = sorted((pick(_SCORES), pick(_SCORES)))
            thresholds = {"low": 0.0 if how == "positive_only" else low, "high": high}
        stages.append(
            StageSpec(
                f"s{k}",
                combine=how,
                weight=pick([0.1, 0.4, 1.0, 3.0]),
                when=pick(["always", "always", "t0", "t1"]) if triggers else "always",
                group=group,
                **thresholds,
            )
        )
    spec = CascadeSpec(
        tuple(stages),
        decision_threshold=pick([0.5, 0.3, 0.43]),
        max_batch=pick([1, 2, 3, 5, 32]),
    )

    def score() -> float:
        if chance(0.12):
            return float(pick(_BAD_SCORES))
        return float(rng.random()) if chance(0.4) else float(pick(_SCORES))

    def bound() -> float:
        return float(pick(_BAD_BOUNDS)) if chance(0.15) else float(pick(_SCORES))

    broken: list[Broken] = ["raises", "shape", "nothing"]
    firsts = [group[0] for group in spec.groups]
    return Case(
        spec,
        scores=[[score() for _ in range(count)] for _ in stages],
        broken=[pick(broken) if chance(0.1) else "" for _ in stages],
        flags={name: [chance(0.5) for _ in range(count)] for name in spec.triggers},
        thresholds={k: [(bound(), bound()) for _ in range(count)] for k in firsts if chance(0.25)},
        readable=[not (unreadable and chance(0.08)) for _ in range(count)],
        late_after=int(rng.integers(-1, len(spec.groups))) if deadlines and chance(0.2) else None,
    )
