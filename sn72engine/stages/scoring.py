"""From model outputs to probabilities."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sn72engine.cascade.route import as_float32, sigmoid
from sn72engine.errors import InputError
from sn72engine.stages.base import StageScores

Score = Literal["sigmoid", "softmax", "probability", "top1"]


def to_scores(outputs: Any, score: Score, *, positive: int = 1) -> StageScores:
    """Turn a batch of model outputs into probabilities, in float32.

    Args:
        outputs: shape (n,) or (n, 1) for ``sigmoid`` and ``probability``, (n, classes) with at
            least two classes for ``softmax`` and ``top1``.
        score: see :class:`~sn72engine.cascade.spec.StageSpec`.
        positive: index of the class that counts, for ``softmax``.

    Returns:
        One probability per row; with ``top1`` also the index of the best class, the lowest of
        equals. A row that holds an infinite or NaN logit gets NaN.

    Raises:
        InputError: the shape does not fit ``score``, or the outputs are not real numbers.
    """
    values = as_float32(outputs, "outputs")
    if score in ("sigmoid", "probability"):
        column = _single(values, score)
        return StageScores(sigmoid(column) if score == "sigmoid" else column)
    if values.ndim != 2 or values.shape[1] < 2:
        raise InputError(
            f"score={score!r} needs outputs of shape (n, classes) with two classes or more, "
            f"got {values.shape}"
        )
    shares = _softmax(values)
    if score == "top1":
        best = values.argmax(axis=1)  # of the logits: shares may round to the same value
        return StageScores(shares[np.arange(len(shares)), best], labels=best)
    if positive >= values.shape[1]:
        raise InputError(
            f"positive={positive} is not a class of outputs with {values.shape[1]} classes"
        )
    return StageScores(shares[:, positive])


def _single(values: NDArray[np.float32], score: str) -> NDArray[np.float32]:
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise InputError(
            f"score={score!r} needs outputs of shape (n,) or (n, 1), got {values.shape}; "
            "use 'softmax' or 'top1' for one column per class"
        )
    return values


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    finite = np.isfinite(logits).all(axis=1, keepdims=True)
    safe = np.where(finite, logits, np.float32(0))
    powers = np.exp(safe - safe.max(axis=1, keepdims=True))
    shares = powers / powers.sum(axis=1, keepdims=True)
    # Rounding may leave a share one step above 1, which routing would take for a bad score.
    return np.where(finite, np.minimum(shares, np.float32(1)), np.float32(np.nan))
