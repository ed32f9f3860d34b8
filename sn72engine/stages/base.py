"""What a stage must do, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""One decoded image: upright RGB, shape (H, W, 3)."""

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True)
class StageScores:
    """Answers of a stage for a batch of n images.

    Attributes:
        probabilities: shape (n,), real; of the positive class, or of the best class for a stage
            that scores by ``top1``. NaN where the stage could not score an image.
        labels: shape (n,), integer class indices; needed for ``top1`` only.
        errors: position in the batch to reason, for images that could not be scored.
    """

    probabilities: NDArray[Any]
    labels: NDArray[Any] | None = None
    errors: Mapping[int, str] = field(default_factory=dict)


@runtime_checkable
class Stage(Protocol):
    """Scores batches of decoded images. Called by one thread at a time."""

    @property
    def needs(self) -> Size | None:
        """Smallest decoded height and width that lose nothing; None for the full image."""
        ...

    def prepare(self) -> None:
        """Do once what the first call would otherwise do: load, allocate, warm up.

        Raises:
            Sn72Error: the stage cannot work.
        """
        ...

    def score(self, images: Sequence[Image]) -> StageScores:
        """Score at least one image. The images are shared with other stages: never write to them.

        Any exception is taken as "none of these images could be scored".
        """
        ...

    def close(self) -> None:
        """Release what the stage holds; calling it twice is allowed."""
        ...
