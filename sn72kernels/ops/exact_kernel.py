# mypy: ignore-errors
"""Arithmetic that gives the same bits on every device: Triton side of ``exact.py``.

Launch kernels that use it with ``enable_fp_fusion=False``: a fused multiply-add rounds once where
the definition rounds twice.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(logits):
    """The steps of ``exact.sigmoid`` on a float32 block."""
    finite = tl.abs(logits) < float("inf")
    size = tl.minimum(tl.where(finite, tl.abs(logits), 0.0), 80.0)
    k = (size * 1.4426950408889634 + 12582912.0) - 12582912.0
    r = (size - k * 0.693359375) - k * -2.12194440e-4
    power = tl.full(r.shape, -1.0 / 5040, tl.float32)
    power = power * r + 1.0 / 720
    power = power * r + -1.0 / 120
    power = power * r + 1.0 / 24
    power = power * r + -1.0 / 6
    power = power * r + 0.5
    power = power * r + -1.0
    power = power * r + 1.0
    exponent = (127 - k.to(tl.int32)) << 23
    small = power * exponent.to(tl.float32, bitcast=True)
    p = tl.div_rn(tl.where(logits >= 0.0, 1.0, small), small + 1.0)
    return tl.where(finite, p, float("nan"))


@triton.jit
def route(p, low, high):
    """The comparisons of ``exact.route`` on a float32 block."""
    # Every comparison with a NaN is false, so whatever is not sane escalates.
    sane = (p >= 0.0) & (p <= 1.0) & (low <= high)
    return tl.where(sane & (p < low), 0, tl.where(sane & (p > high), 1, 2))
