# mypy: ignore-errors
"""Triton kernels of the classifier head, for small batches.

``hidden`` spreads the first layer over blocks of rows and of hidden units, so that many programs
share the reading of the weights, and leaves one number per row and block of units. ``finish``
adds these in a fixed order, so that results are the same every time.
"""

import triton
import triton.language as tl

from sn72kernels.ops import exact_kernel
from sn72kernels.ops.gelu_kernel import gelu


@triton.jit
def _statistics(x, start_of_row, inside_row, depth, eps, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Mean and reciprocal standard deviation of ROWS rows, merged over chunks of DEPTH.

    Chan, Golub, LeVeque 1979: accurate where a sum of squares would cancel.
    """
    mean = tl.zeros((ROWS,), tl.float32)
    deviation = tl.zeros((ROWS,), tl.float32)
    for start in range(0, depth, DEPTH):
        col = start + tl.arange(0, DEPTH)
        inside = inside_row[:, None] & (col < depth)[None, :]
        value = tl.load(x + start_of_row[:, None] + col[None, :], inside, other=0.0).to(tl.float32)
        count = tl.minimum(depth - start, DEPTH).to(tl.float32)
        seen = count + start
        chunk_mean = tl.sum(value, axis=1) / count
        centred = tl.where(inside, value - chunk_mean[:, None], 0.0)
        gap = chunk_mean - mean
        deviation += tl.sum(centred * centred, axis=1) + gap * gap * (start * (count / seen))
        mean += gap * (count / seen)
    return mean, tl.rsqrt(deviation / depth + eps)


@triton.jit
def hidden(
    x, norm_weight, norm_bias, w1, b1, w2, partial,
    rows, depth, units, x_stride, w1_stride, eps,
    NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_B1: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Contribution of UNITS hidden units to the logits of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    inside_row, inside_unit = row < rows, unit < units
    start_of_row = row.to(tl.int64) * x_stride
    if NORM:
        mean, rstd = _statistics(x, start_of_row, inside_row, depth, eps, ROWS, DEPTH)
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, depth, DEPTH):
        col = start + tl.arange(0, DEPTH)
        inside_col = col < depth
        inside = inside_row[:, None] & inside_col[None, :]
        value = tl.load(x + start_of_row[:, None] + col[None, :], inside, other=0.0)
        if NORM:
            normal = (value.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if HAS_NORM_WEIGHT:
                normal *= tl.load(norm_weight + col, inside_col, other=0.0).to(tl.float32)[None, :]
            if HAS_NORM_BIAS:
                normal += tl.load(norm_bias + col, inside_col, other=0.0).to(tl.float32)[None, :]
            # Lanes outside held zeros, which minus the mean are zeros no more.
            value = tl.where(inside, normal, 0.0).to(value.dtype)
        at = unit.to(tl.int64)[:, None] * w1_stride + col[None, :]
        weight = tl.load(w1 + at, inside_unit[:, None] & inside_col[None, :], other=0.0)
        total = tl.dot(value, tl.trans(weight), total, input_precision="ieee")
    if HAS_B1:
        total += tl.load(b1 + unit, inside_unit, other=0.0).to(tl.float32)[None, :]
    share = gelu(total, TANH) * tl.load(w2 + unit, inside_unit, other=0.0).to(tl.float32)[None, :]
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + at, tl.sum(share, axis=1), inside_row)


@triton.jit
def finish(
    partial, b2, lows, highs, low, high, logits, probability, routes,
    rows, parts, low_stride, high_stride,
    HAS_B2: tl.constexpr, PER_SAMPLE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Logit, probability and route of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    inside = row < rows
    at = row[:, None] * parts + part[None, :]
    logit = tl.sum(
        tl.load(partial + at, inside[:, None] & (part < parts)[None, :], other=0.0), axis=1
    )
    if HAS_B2:
        logit += tl.load(b2).to(tl.float32)
    if PER_SAMPLE:
        low = tl.load(lows + row.to(tl.int64) * low_stride, inside, other=0.0)
        high = tl.load(highs + row.to(tl.int64) * high_stride, inside, other=0.0)
    p = exact_kernel.sigmoid(logit)
    tl.store(logits + row, logit, inside)
    tl.store(probability + row, p, inside)
    tl.store(routes + row, exact_kernel.route(p, low, high).to(tl.uint8), inside)
