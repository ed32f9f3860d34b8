"""What the cascade answers for one sample."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Status(Enum):
    """How a sample's answer came about."""

    DONE = "done"  #: a stage was sure
    UNDECIDED = "undecided"  #: the last stage was not sure; its answer stands
    DEADLINE = "deadline"  #: time ran out; the best answer so far stands
    STAGE_FAILED = "stage_failed"  #: a stage failed; the best answer so far stands


@dataclass(frozen=True, slots=True)
class Result:
    """Answer for one sample.

    Attributes:
        probability: of the positive class, finite and in [0, 1]; for a stage that scores by its
            top class, the confidence in ``label``. 0.5 when no stage could score the sample.
        label: 1 or 0, the side of the decision threshold; or the class index.
        stage: name of the stage whose score this is; None when no stage could score it.
        status: how the answer came about.
        error: why a stage failed, for STAGE_FAILED; empty otherwise.
    """

    probability: float
    label: int
    stage: str | None
    status: Status
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "probability": self.probability,
            "label": self.label,
            "stage": self.stage,
            "status": self.status.value,
            "error": self.error,
        }
