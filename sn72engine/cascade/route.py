"""The routing decision, in NumPy: the definition that every other implementation must match.

A score leaves the cascade as negative or positive, or escalates to the next stage:

===========================  ==============
``0 <= p < low``             NEGATIVE (0)
``high < p <= 1``            POSITIVE (1)
everything else              ESCALATE (2)
===========================  ==============

Everything else is: ``p`` equal to a threshold or between them, NaN, infinite or outside [0, 1];
``low > high``; a NaN threshold. A specification with ``low > high`` is refused, because it is a
mistake; thresholds that arrive with the samples are data, and data that makes no sense
escalates, so that a larger model looks at the sample.

Arithmetic: ``p``, ``low`` and ``high`` are rounded to float32 first (float16 widens exactly,
float64 rounds to nearest), then only compared. IEEE comparisons are exact, so the routes of two
implementations are equal bit for bit whenever their float32 scores are.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sn72engine.errors import InputError

NEGATIVE: Final = 0
POSITIVE: Final = 1
ESCALATE: Final = 2


def route(
    p: ArrayLike, low: ArrayLike, high: ArrayLike, *, from_logits: bool = False
) -> NDArray[np.uint8]:
    """Decide for each sample whether it leaves the cascade.

    Args:
        p: scores, shape (n,), any real dtype. Probabilities, or logits with ``from_logits``.
        low: scalar or shape (n,). Below it a sample is negative.
        high: scalar or shape (n,). Above it a sample is positive.
        from_logits: apply :func:`sigmoid` first. The thresholds stay probabilities.

    Returns:
        uint8 array of shape (n,): NEGATIVE, POSITIVE or ESCALATE.

    Raises:
        InputError: ``p`` is not one-dimensional, a threshold does not fit it, or one of them
            does not hold real numbers.
    """
    score = as_float32(p, "p")
    if score.ndim != 1:
        raise InputError(f"p must have shape (n,), got {score.shape}")
    if from_logits:
        score = sigmoid(score)
    lower, upper = as_float32(low, "low"), as_float32(high, "high")
    for name, bound in (("low", lower), ("high", upper)):
        if bound.ndim and bound.shape != score.shape:
            raise InputError(
                f"{name} must be a scalar or have the shape of p, {score.shape}, got {bound.shape}"
            )
    # A comparison with NaN is false, so `sound` is false for NaN scores and NaN thresholds.
    sound = (score >= 0) & (score <= 1) & (lower <= upper)
    routes = np.full(score.shape, ESCALATE, np.uint8)
    routes[sound & (score < lower)] = NEGATIVE
    routes[sound & (score > upper)] = POSITIVE
    return routes


def compact(routes: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Original positions of the escalated samples, in order.

    Args:
        routes: uint8 array of shape (n,), from :func:`route`.

    Returns:
        intp array of shape (count,), ascending.
    """
    return np.flatnonzero(routes == ESCALATE)


def sigmoid(logits: ArrayLike) -> NDArray[np.float32]:
    """Logistic function in float32, by ``exp(-|x|)``, which cannot overflow.

    ``1 / (1 + e)`` for ``x >= 0`` and ``e / (1 + e)`` below, with ``e = exp(-|x|)``. An infinite
    or NaN logit comes from a model that overflowed, not from one that is sure: it gives NaN,
    which escalates. Implementations of ``exp`` differ in the last bits, so routes from logits
    agree between implementations except where the score is within 4 float32 steps of a
    threshold.

    Args:
        logits: any shape, any real dtype; rounded to float32 first.

    Returns:
        float32 array of the same shape, in [0, 1] or NaN.
    """
    x = as_float32(logits, "logits")
    e = np.exp(-np.abs(x))
    one = np.float32(1)
    value = np.where(x >= 0, one, e) / (one + e)
    return np.where(np.isfinite(x), value, np.float32(np.nan))


def as_float32(values: ArrayLike, name: str) -> NDArray[np.float32]:
    """``values`` rounded to float32; out-of-range float64 becomes infinite.

    Raises:
        InputError: it is ragged or does not hold real numbers; the message uses ``name``.
    """
    if isinstance(values, np.ndarray) and values.dtype == np.float32:
        return values
    try:
        array: NDArray[Any] = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name} must be an array of real numbers ({error})") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} must hold real numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)
