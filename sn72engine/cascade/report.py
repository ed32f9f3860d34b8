"""What a cascade has done since it was made."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sn72engine.cascade.spec import StageSpec, parallel_groups

if TYPE_CHECKING:
    from sn72engine.cascade.buckets import BucketPlan


@dataclass(slots=True)
class StageCounts:
    """Sums over the calls of one stage.

    ``asked`` counts samples; each of them is in exactly one of ``negative``, ``positive``,
    ``escalated``, ``failed`` (the stage could not score it) and ``late`` (time ran out).
    ``seconds`` is time spent in the stage, ``decode_seconds`` in decoding images for it, and
    ``waited_seconds`` in waiting for other callers of it. ``padded`` counts rows that were computed
    with no sample in them, which only stages captured at fixed batch sizes have.
    """

    calls: int = 0
    asked: int = 0
    negative: int = 0
    positive: int = 0
    escalated: int = 0
    failed: int = 0
    late: int = 0
    padded: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    waited_seconds: float = 0.0

    def add(self, other: StageCounts) -> None:
        """Add another count to this one."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage: what it is and its counts since start."""

    name: str
    low: float
    high: float
    combine: str
    when: str
    counts: StageCounts


@dataclass(frozen=True, slots=True)
class ExecutorReport:
    """Which executor runs a cascade, and why; see :mod:`sn72engine.cascade.modes`.

    ``captured`` names the stages that run as CUDA graphs, ``lanes`` is how many batches can be on
    the GPU at a time, and ``bytes`` what capturing added to PyTorch's device memory, by stage and
    number of rows. ``plans`` has, by stage, how its numbers of rows were chosen, where they were
    measured.
    """

    mode: str
    reason: str
    captured: tuple[str, ...] = ()
    lanes: int = 0
    bytes: Mapping[tuple[str, int], int] = field(default_factory=dict)
    plans: Mapping[str, BucketPlan] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "mode": self.mode,
            "reason": self.reason,
            "captured": list(self.captured),
            "lanes": self.lanes,
            "bytes": [
                {"stage": stage, "rows": rows, "bytes": size}
                for (stage, rows), size in self.bytes.items()
            ],
            "plans": {stage: plan.to_dict() for stage, plan in self.plans.items()},
        }

    def explain(self) -> str:
        """The choice as text: of the executor, and of the buckets where they were measured."""
        plans = [f"{stage}: {plan.explain()}" for stage, plan in self.plans.items()]
        return "\n".join([str(self), *plans])

    def __str__(self) -> str:
        captured = f", captured: {', '.join(self.captured)}" if self.captured else ""
        return f"executor {self.mode}{captured} ({self.reason})"


@dataclass(frozen=True, slots=True)
class CascadeReport:
    """A cascade since start.

    ``own_seconds`` is the time that calls took beyond their stages, decoding and waiting: what
    the cascade itself costs.
    """

    calls: int
    samples: int
    own_seconds: float
    stages: tuple[StageReport, ...]
    executor: ExecutorReport = ExecutorReport("cpu", "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = dataclasses.asdict(dataclasses.replace(self, executor=ExecutorReport("", "")))
        return values | {"executor": self.executor.to_dict()}

    def __str__(self) -> str:
        header = (
            f"{'stage':<16} {'low':>6} {'high':>6} {'asked':>8} {'negative':>8} {'positive':>8} "
            f"{'escalated':>9} {'failed':>7} {'late':>6} {'ms/sample':>9}"
        )
        rows = [
            f"{s.name:<16.16} {s.low:>6.3f} {s.high:>6.3f} {s.counts.asked:>8} "
            f"{s.counts.negative:>8} {s.counts.positive:>8} {s.counts.escalated:>9} "
            f"{s.counts.failed:>7} {s.counts.late:>6} "
            f"{1e3 * s.counts.seconds / max(s.counts.asked, 1):>9.3f}"
            for s in self.stages
        ]
        total = (
            f"{self.calls} calls, {self.samples} samples, "
            f"{1e3 * self.own_seconds / max(self.calls, 1):.3f} ms a call in the cascade itself"
        )
        return "\n".join([header, *rows, total, self.executor.explain()])


class Counters:
    """Adds up the counts of calls; any thread may add."""

    def __init__(self, stages: Sequence[StageSpec]) -> None:
        self._stages = tuple(stages)
        self._groups = parallel_groups(self._stages)
        self._lock = threading.Lock()
        self._counts = [StageCounts() for _ in stages]
        self._calls = 0
        self._samples = 0
        self._own_seconds = 0.0

    def add(self, samples: int, seconds: float, counts: Sequence[StageCounts]) -> None:
        """Add one call that took ``seconds`` in all."""
        spent = [c.seconds + c.decode_seconds + c.waited_seconds for c in counts]
        # Stages of a parallel group run at the same time.
        elsewhere = sum(max(spent[number] for number in group) for group in self._groups)
        with self._lock:
            self._calls += 1
            self._samples += samples
            self._own_seconds += max(seconds - elsewhere, 0.0)
            for total, count in zip(self._counts, counts, strict=True):
                total.add(count)

    def report(self) -> CascadeReport:
        """The sums so far, as a copy."""
        with self._lock:
            stages = tuple(
                StageReport(
                    self._stages[number].name,
                    *self._stages[group[0]].thresholds,
                    self._stages[number].combine,
                    self._stages[number].when,
                    dataclasses.replace(self._counts[number]),
                )
                for group in self._groups
                for number in group
            )
            return CascadeReport(self._calls, self._samples, self._own_seconds, stages)
