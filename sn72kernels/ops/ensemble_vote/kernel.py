# mypy: ignore-errors
"""Triton kernel of the weighted vote."""

import triton
import triton.language as tl

from sn72kernels.ops import exact_kernel


@triton.jit
def _add(top, bottom, scores, weights, at, inside, PLACE: tl.constexpr, FROM_LOGITS: tl.constexpr):
    p = tl.load(scores + at, inside, other=0.0).to(tl.float32)
    if FROM_LOGITS:
        p = exact_kernel.sigmoid(p)
    weight = tl.load(weights + PLACE) + tl.zeros_like(p)
    counts = (p >= 0.0) & (p <= 1.0) & (weight > 0.0) & (weight < float("inf"))
    return tl.where(counts, top + weight * p, top), tl.where(counts, bottom + weight, bottom)


@triton.jit
def vote(
    scores0, scores1, scores2, scores3, scores4, scores5, scores6, scores7, weights, out, n,
    MODELS: tl.constexpr, FROM_LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK samples; the first MODELS score pointers are used."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    top = tl.zeros((BLOCK,), tl.float32)
    bottom = tl.zeros((BLOCK,), tl.float32)
    top, bottom = _add(top, bottom, scores0, weights, at, inside, 0, FROM_LOGITS)
    if MODELS > 1:
        top, bottom = _add(top, bottom, scores1, weights, at, inside, 1, FROM_LOGITS)
    if MODELS > 2:
        top, bottom = _add(top, bottom, scores2, weights, at, inside, 2, FROM_LOGITS)
    if MODELS > 3:
        top, bottom = _add(top, bottom, scores3, weights, at, inside, 3, FROM_LOGITS)
    if MODELS > 4:
        top, bottom = _add(top, bottom, scores4, weights, at, inside, 4, FROM_LOGITS)
    if MODELS > 5:
        top, bottom = _add(top, bottom, scores5, weights, at, inside, 5, FROM_LOGITS)
    if MODELS > 6:
        top, bottom = _add(top, bottom, scores6, weights, at, inside, 6, FROM_LOGITS)
    if MODELS > 7:
        top, bottom = _add(top, bottom, scores7, weights, at, inside, 7, FROM_LOGITS)
    usable = (bottom > 0.0) & (bottom < float("inf"))
    # Lanes that are not usable divide by 1 so that no division by zero happens at all.
    mean = tl.div_rn(top, tl.where(usable, bottom, 1.0))
    tl.store(out + at, tl.where(usable, mean, float("nan")), inside)
