"""Any Python callable as a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sn72engine.preprocessing import preprocess, required_size
from sn72engine.spec import Preprocess
from sn72engine.stages.base import Image, Size, StageScores
from sn72engine.stages.scoring import Score, to_scores


class FunctionStage:
    """Scores images with a callable.

    Args:
        call: without ``transform`` it gets a list of decoded images, uint8 (H, W, 3), which it
            must not write to; with it, one array of shape (n, \\*transform.shape). It returns
            model outputs as ``score`` wants them, or :class:`StageScores`.
        transform: how the images become the array that ``call`` takes.
        score: how outputs become a probability, see :class:`~sn72engine.cascade.spec.StageSpec`.
        positive: index of the positive class for ``softmax``.
        needs: smallest decoded (height, width) that loses nothing; None for full images. Taken
            from ``transform`` where that is given.
    """

    def __init__(
        self,
        call: Callable[[Any], Any],
        *,
        transform: Preprocess | None = None,
        score: Score = "probability",
        positive: int = 1,
        needs: Size | None = None,
    ) -> None:
        self._call = call
        self._transform = transform
        self._score = score
        self._positive = positive
        self.needs = required_size(transform) if transform else needs

    def prepare(self) -> None:
        """Nothing: what ``call`` needs is its own business."""

    def score(self, images: Sequence[Image]) -> StageScores:
        """Call the function on the whole batch."""
        inputs = images if self._transform is None else preprocess(images, self._transform)
        outputs = self._call(inputs)
        if isinstance(outputs, StageScores):
            return outputs
        return to_scores(outputs, self._score, positive=self._positive)

    def close(self) -> None:
        """Nothing to release."""
