"""Thresholds of a cascade, chosen from labelled scores, with a statement of what is certain.

:func:`choose` takes the scores that every stage gives every labelled sample and finds, for a
target accuracy (or MCC, or subnet reward), the stages and thresholds with the least expected
latency. Half of the labels choose, the other half certify; see :mod:`.certify` for what that
guarantees.
"""

from __future__ import annotations

from sn72engine.thresholds.choice import (
    Dropped,
    ParetoPoint,
    StageThresholds,
    ThresholdChoice,
    choose,
)
from sn72engine.thresholds.options import ThresholdOptions

__all__ = [
    "Dropped",
    "ParetoPoint",
    "StageThresholds",
    "ThresholdChoice",
    "ThresholdOptions",
    "choose",
]
