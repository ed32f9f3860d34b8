# mypy: ignore-errors
"""Triton kernels of int8 and fp8 e4m3 quantisation.

fp8 is encoded and decoded with integer arithmetic: the same bits on every architecture, also on
those without fp8 instructions. Divisions round to nearest.
"""

import triton
import triton.language as tl


@triton.jit
def _encode(value, FP8: tl.constexpr):
    """Codes of ``value``, a float32 block, as unsigned bytes."""
    finite = tl.where(value == value, value, 0.0)
    if FP8:
        size = tl.minimum(tl.abs(finite), 448.0)
        bits = size.to(tl.uint32, bitcast=True)
        # Keep 3 of 23 mantissa bits, half to even; rebias the exponent from 127 to 7.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 codes are multiples of 2^-9; adding 1.5 * 2^23 rounds half to even.
        tiny = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.uint32)
        code = tl.where(size < 0.015625, tiny, normal)
        sign = (finite.to(tl.uint32, bitcast=True) >> 31) << 7
        return tl.where(value == value, code | sign, 0x7F).to(tl.uint8)
    near = tl.minimum(tl.maximum(finite, -128.0), 127.0)
    return ((near + 12582912.0) - 12582912.0).to(tl.int32).to(tl.uint8)


@triton.jit
def _decode(code, FP8: tl.constexpr):
    """The float32 value of unsigned byte codes."""
    if FP8:
        bits = code.to(tl.uint32)
        exponent = (bits >> 3) & 15
        mantissa = bits & 7
        normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
        size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
        # Triton negates by subtracting from zero, which would lose the sign of a zero.
        signed = size.to(tl.uint32, bitcast=True) | ((bits >> 7) << 31)
        return signed.to(tl.float32, bitcast=True)
    return code.to(tl.int8, bitcast=True).to(tl.float32)


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
def quantize_static(
    x, scale, out, rows, cols, x_stride,
    GRANULARITY: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x COLS elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
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
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    code = tl.load(values + row[:, None] * values_stride + col[None, :], inside, other=0)
    factor = _scale(scale, row, col, row < rows, col < cols, GRANULARITY)
    value = _decode(code, FP8) * factor
    tl.store(out + row[:, None] * cols + col[None, :], value.to(out.dtype.element_ty), inside)
