"""What to choose thresholds for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sn72engine.errors import OptionError
from sn72engine.spec import Options, check_choice, check_int, check_number

Task = Literal["binary", "top1"]
ObjectiveName = Literal["accuracy", "mcc", "reward"]
Reference = Literal["best", "last"]


@dataclass(frozen=True, slots=True)
class ThresholdOptions(Options):
    """What to choose thresholds for.

    Args:
        task: ``binary``: scores are probabilities of label 1. ``top1``: scores are the stage's
            confidence in its own class; there is only a ``high`` threshold and ``low`` is 0.
        objective: ``accuracy``, ``mcc`` (Matthews correlation coefficient) or ``reward``, the
            expected subnet-72 reward. ``top1`` takes ``accuracy`` only.
        target: value of the objective to reach at least expected latency. None: the value of
            ``reference`` less ``tolerance``.
        reference: single stage that a target of None refers to: the ``best`` one, or the
            ``last``.
        tolerance: what the cascade may lose against ``reference``. With 0 only a cascade that is
            better than the stage can be certified.
        confidence: of the certificate, as 0.95.
        symmetric: only thresholds with ``low = 1 - high``.
        decision_threshold: above it a sample that no stage is sure of is labelled 1. None
            chooses it too.
        grid: most candidate values of each threshold; with fewer distinct scores, every value
            that separates two of them is tried.
        minimum: refuse fewer labels than this.
        windows: number of resampled windows of the reward.
        seed: of the split into halves and of the windows.
    """

    task: Task = "binary"
    objective: ObjectiveName = "accuracy"
    target: float | None = None
    reference: Reference = "best"
    tolerance: float = 0.01
    confidence: float = 0.95
    symmetric: bool = False
    decision_threshold: float | None = 0.5
    grid: int = 64
    minimum: int = 50
    windows: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("task", self.task, Task)
        check_choice("objective", self.objective, ObjectiveName)
        if self.task == "top1" and self.objective != "accuracy":
            raise OptionError(
                f"objective={self.objective!r} needs task='binary'; top1 takes 'accuracy'"
            )
        if self.task == "top1" and self.symmetric:
            raise OptionError("symmetric=True needs task='binary'; top1 has no low threshold")
        if self.target is not None:
            check_number("target", self.target, -1.0 if self.objective == "mcc" else 0.0, 1.0)
        check_choice("reference", self.reference, Reference)
        check_number("tolerance", self.tolerance, 0.0, 1.0)
        check_number("confidence", self.confidence, 0.5, 0.999999)
        check_choice("symmetric", self.symmetric, (True, False))
        if self.decision_threshold is not None:
            check_number("decision_threshold", self.decision_threshold, 0.0, 1.0)
        check_int("grid", self.grid, 2, 1024)
        check_int("minimum", self.minimum, 40)
        check_int("windows", self.windows, 16, 100_000)
        check_int("seed", self.seed, 0)
