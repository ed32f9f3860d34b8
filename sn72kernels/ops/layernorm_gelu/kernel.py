# mypy: ignore-errors
"""Triton kernels of LayerNorm then GELU.

Rows that fit one block are read once (``*_tile``). Longer rows take several passes over chunks
(``*_wide``); the later passes find the row in the L2 cache. Statistics and all arithmetic are
float32, row offsets are int64.
"""

import triton
import triton.language as tl

from sn72kernels.ops.gelu_kernel import gelu, gelu_slope


@triton.jit
def _affine(normal, weight, bias, col, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    # Every thread loads what its own elements need, from the L1 cache: one row of parameters would
    # be handed around in shared memory, with barriers, wherever a warp holds less than all rows.
    col, inside = tl.broadcast_to(col, normal.shape), tl.broadcast_to(inside, normal.shape)
    if HAS_WEIGHT:
        normal *= tl.load(weight + col, inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normal += tl.load(bias + col, inside, other=0.0).to(tl.float32)
    return normal


@triton.jit
def _total(x, residual, x_at, residual_at, inside, HAS_RESIDUAL: tl.constexpr):
    """The sum rounded to the input's dtype: what is stored is what is normalised."""
    value = tl.load(x + x_at, inside, other=0.0)
    if HAS_RESIDUAL:
        other = tl.load(residual + residual_at, inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def forward_tile(
    x, residual, weight, bias, out, total, stats,
    rows, cols, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    KEEP_TOTAL: tl.constexpr, KEEP_STATS: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One block of ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows)[:, None] & (col < cols)
    at = row[:, None] * cols + col
    value = _total(
        x, residual, row[:, None] * x_stride + col, row[:, None] * residual_stride + col, inside,
        HAS_RESIDUAL,
    )  # fmt: skip
    if KEEP_TOTAL:
        tl.store(total + at, value, inside)
    value = value.to(tl.float32)
    mean = tl.sum(value, axis=1) / cols
    # Lanes past the row's end hold zeros, which minus the mean are zeros no more.
    centred = tl.where(inside, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / cols + eps)
    if KEEP_STATS:
        tl.store(stats + row, mean, row < rows)
        tl.store(stats + rows + row, rstd, row < rows)
    z = _affine(centred * rstd[:, None], weight, bias, col, col < cols, HAS_WEIGHT, HAS_BIAS)
    tl.store(out + at, gelu(z, TANH).to(out.dtype.element_ty), inside)


@triton.jit
def forward_wide(
    x, residual, weight, bias, out, total, stats,
    rows, cols, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    KEEP_TOTAL: tl.constexpr, KEEP_STATS: tl.constexpr, TANH: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """One row in two passes over chunks of COLS.

    The first pass merges each chunk's mean and sum of squared deviations into the row's (Chan,
    Golub, LeVeque 1979), which stays accurate where a sum of squares would cancel.
    """
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    deviation = 0.0
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = col < cols
        value = _total(
            x, residual, row * x_stride + col, row * residual_stride + col, inside, HAS_RESIDUAL
        )
        if KEEP_TOTAL:
            tl.store(total + row * cols + col, value, inside)
        value = value.to(tl.float32)
        count = tl.minimum(cols - start, COLS).to(tl.float32)
        seen = count + start
        chunk_mean = tl.sum(value, axis=0) / count
        centred = tl.where(inside, value - chunk_mean, 0.0)
        gap = chunk_mean - mean
        deviation += tl.sum(centred * centred, axis=0) + gap * gap * (start * (count / seen))
        mean += gap * (count / seen)
    rstd = tl.rsqrt(deviation / cols + eps)
    if KEEP_STATS:
        tl.store(stats + row, mean)
        tl.store(stats + rows + row, rstd)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = col < cols
        value = _total(
            x, residual, row * x_stride + col, row * residual_stride + col, inside, HAS_RESIDUAL
        )
        normal = (value.to(tl.float32) - mean) * rstd
        z = _affine(normal, weight, bias, col, inside, HAS_WEIGHT, HAS_BIAS)
        tl.store(out + row * cols + col, gelu(z, TANH).to(out.dtype.element_ty), inside)


@triton.jit
def _grad_affine(
    grad, total, weight, bias, grad_at, total_at, col, inside, inside_col, mean, rstd,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """Normalised input, and the gradient of what GELU was applied to: zero outside."""
    upstream = tl.load(grad + grad_at, inside, other=0.0).to(tl.float32)
    value = tl.load(total + total_at, inside, other=0.0).to(tl.float32)
    normal = (value - mean) * rstd
    z = _affine(normal, weight, bias, col, inside_col, HAS_WEIGHT, HAS_BIAS)
    return normal, upstream * gelu_slope(z, TANH)


@triton.jit
def backward_tile(
    grad, grad_total, total, stats, weight, bias, grad_x, grad_weight, grad_bias,
    rows, cols, grad_stride, grad_total_stride, total_stride,
    HAS_GRAD_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Every program walks its own blocks of rows and keeps one row of weight and bias sums.

    Which rows a program takes depends on the grid alone, so the sums are the same every time.
    """
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, COLS)[None, :]
    inside_col = col < cols
    sum_weight = tl.zeros((ROWS, COLS), tl.float32)
    sum_bias = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & inside_col
        mean = tl.load(stats + row, row < rows, other=0.0)[:, None]
        rstd = tl.load(stats + rows + row, row < rows, other=0.0)[:, None]
        normal, grad_z = _grad_affine(
            grad, total, weight, bias, row[:, None] * grad_stride + col,
            row[:, None] * total_stride + col, col, inside, inside_col, mean, rstd,
            HAS_WEIGHT, HAS_BIAS, TANH,
        )  # fmt: skip
        inner = _affine(grad_z, weight, bias, col, inside_col, HAS_WEIGHT, False)
        across = tl.sum(inner, axis=1)[:, None] / cols
        along = tl.sum(inner * normal, axis=1)[:, None] / cols
        result = (inner - across - normal * along) * rstd
        if HAS_GRAD_TOTAL:
            at = row[:, None] * grad_total_stride + col
            result += tl.load(grad_total + at, inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row[:, None] * cols + col, result.to(grad_x.dtype.element_ty), inside)
        if HAS_WEIGHT:
            sum_weight += grad_z * normal
        if HAS_BIAS:
            sum_bias += grad_z
    at = program * cols + tl.arange(0, COLS)
    mask = tl.arange(0, COLS) < cols
    if HAS_WEIGHT:
        tl.store(grad_weight + at, tl.sum(sum_weight, axis=0), mask)
    if HAS_BIAS:
        tl.store(grad_bias + at, tl.sum(sum_bias, axis=0), mask)


@triton.jit
def backward_wide(
    grad, grad_total, total, stats, weight, bias, grad_x,
    rows, cols, grad_stride, grad_total_stride, total_stride,
    HAS_GRAD_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Input gradient of one row, in two passes over chunks of COLS."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(stats + row)
    rstd = tl.load(stats + rows + row)
    across = tl.zeros((COLS,), tl.float32)
    along = tl.zeros((COLS,), tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = col < cols
        normal, grad_z = _grad_affine(
            grad, total, weight, bias, row * grad_stride + col, row * total_stride + col, col,
            inside, inside, mean, rstd, HAS_WEIGHT, HAS_BIAS, TANH,
        )  # fmt: skip
        inner = _affine(grad_z, weight, bias, col, inside, HAS_WEIGHT, False)
        across += inner
        along += inner * normal
    mean_across = tl.sum(across, axis=0) / cols
    mean_along = tl.sum(along, axis=0) / cols
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        inside = col < cols
        normal, grad_z = _grad_affine(
            grad, total, weight, bias, row * grad_stride + col, row * total_stride + col, col,
            inside, inside, mean, rstd, HAS_WEIGHT, HAS_BIAS, TANH,
        )  # fmt: skip
        inner = _affine(grad_z, weight, bias, col, inside, HAS_WEIGHT, False)
        result = (inner - mean_across - normal * mean_along) * rstd
        if HAS_GRAD_TOTAL:
            at = row * grad_total_stride + col
            result += tl.load(grad_total + at, inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * cols + col, result.to(grad_x.dtype.element_ty), inside)


@triton.jit
def backward_columns(
    grad, total, stats, weight, bias, grad_weight, grad_bias,
    rows, cols, grad_stride, total_stride,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Weight and bias sums of COLS columns over every num_programs(1)-th block of ROWS rows."""
    part = tl.program_id(1).to(tl.int64)
    col = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :]
    inside_col = col < cols
    sum_weight = tl.zeros((ROWS, COLS), tl.float32)
    sum_bias = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(part * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & inside_col
        mean = tl.load(stats + row, row < rows, other=0.0)[:, None]
        rstd = tl.load(stats + rows + row, row < rows, other=0.0)[:, None]
        normal, grad_z = _grad_affine(
            grad, total, weight, bias, row[:, None] * grad_stride + col,
            row[:, None] * total_stride + col, col, inside, inside_col, mean, rstd,
            HAS_WEIGHT, HAS_BIAS, TANH,
        )  # fmt: skip
        sum_weight += grad_z * normal
        sum_bias += grad_z
    flat = tl.program_id(0) * COLS + tl.arange(0, COLS)
    if HAS_WEIGHT:
        tl.store(grad_weight + part * cols + flat, tl.sum(sum_weight, axis=0), flat < cols)
    if HAS_BIAS:
        tl.store(grad_bias + part * cols + flat, tl.sum(sum_bias, axis=0), flat < cols)
