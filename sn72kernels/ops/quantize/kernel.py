# mypy: ignore-errors
"""Triton kernels of int8 and fp8 e4m3 quantisation. Divisions round to nearest."""

import triton
import triton.language as tl

from sn72kernels.ops import fp8_kernel


@triton.jit
def _encode(value, FP8: tl.constexpr):
    """Codes of ``value``, a float32 block, as unsigned bytes."""
    if FP8:
        code = fp8_kernel.encode(value)
    else:
        near = tl.where(value == value, value, 0.0)
        near = tl.minimum(tl.maximum(near, -128.0), 127.0)
        code = ((near + 12582912.0) - 12582912.0).to(tl.int32).to(tl.uint8)
    return code


@triton.jit
def _decode(code, FP8: tl.constexpr):
    """The float32 value of unsigned byte codes."""
    return fp8_kernel.decode(code) if FP8 else code.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _scale(scale, row, col, inside_row, inside_col, GRANULARITY: tl.constexpr):
    """Scale of each element of a tile: GRANULARITY is tensor, channel or token."""
    if GRANULARITY == "tensor":
        value = tl.load(scale)
    elif GRANULARITY == "channel":
        value = tl.load(scale + col, inside_col, other=1.0)[None, :]
    else:
        value = tl.load(scale + row, inside_row, other=1.0)[:, None]
    return value


@triton.jit
def _tile(cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns of a program. One axis of the grid, as the others end at 65535."""
    across = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, tl.program_id(0) % across * COLS + tl.arange(0, COLS)


@triton.jit
def quantize_static(
    x, scale, out, rows, cols, x_stride,
    GRANULARITY: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x COLS elements."""
    row, col = _tile(cols, ROWS, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    value = tl.load(x + row[:, None] * x_stride + col[None, :], inside, other=0.0).to(tl.float32)
    divisor = _scale(scale, row, col, row < rows, col < cols, GRANULARITY) + tl.zeros_like(value)
    code = _encode(tl.div_rn(value, divisor), FP8)
    tl.store(out + row[:, None] * cols + col[None, :], code, inside)


@triton.jit
def _token_scale(amax, FP8: tl.constexpr):
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0 if FP8 else 127.0, tl.float32))
    return tl.where(scale >= 1.1754943508222875e-38, scale, 1.0)


@triton.jit
def _finite_size(value):
    size = tl.abs(value)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def quantize_token(
    x, out, scale, rows, cols, x_stride,
    FP8: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: their scales, then their codes, from one read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    value = tl.load(x + row[:, None] * x_stride + col[None, :], inside, other=0.0).to(tl.float32)
    divisor = _token_scale(tl.max(_finite_size(value), axis=1), FP8)
    tl.store(scale + row, divisor, row < rows)
    code = _encode(tl.div_rn(value, divisor[:, None] + tl.zeros_like(value)), FP8)
    tl.store(out + row[:, None] * cols + col[None, :], code, inside)


@triton.jit
def quantize_token_wide(
    x, out, scale, rows, cols, x_stride, FP8: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """One row in two passes over chunks of COLS."""
    row = tl.program_id(0).to(tl.int64)
    amax = tl.zeros((COLS,), tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        value = tl.load(x + row * x_stride + col, col < cols, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, _finite_size(value))
    divisor = _token_scale(tl.max(amax, axis=0) + tl.zeros((COLS,), tl.float32), FP8)
    tl.store(scale + row + tl.arange(0, COLS), divisor, tl.arange(0, COLS) == 0)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        value = tl.load(x + row * x_stride + col, col < cols, other=0.0).to(tl.float32)
        tl.store(out + row * cols + col, _encode(tl.div_rn(value, divisor), FP8), col < cols)


@triton.jit
def dequantize(
    values, scale, out, rows, cols, values_stride,
    GRANULARITY: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x COLS elements."""
    row, col = _tile(cols, ROWS, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    code = tl.load(values + row[:, None] * values_stride + col[None, :], inside, other=0)
    factor = _scale(scale, row, col, row < rows, col < cols, GRANULARITY)
    value = _decode(code, FP8) * factor
    tl.store(out + row[:, None] * cols + col[None, :], value.to(out.dtype.element_ty), inside)
