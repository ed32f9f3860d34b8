# mypy: ignore-errors
"""Triton kernels of nvfp4 and mxfp8. One pass; a program takes BLOCKS whole blocks.

Blocks are numbered through the rows, so that short rows fill a program as long ones do.
"""

import triton
import triton.language as tl

from sn72kernels.ops import fp8_kernel


@triton.jit
def _encode_e2m1(value):
    """Codes 0 to 15 of a float32 block as uint8: half to even, saturated to +-6; NaN is 0."""
    number = tl.where(value == value, value, 0.0)
    size = tl.minimum(tl.abs(number), 6.0)
    bits = size.to(tl.uint32, bitcast=True)
    # Keep 1 of 23 mantissa bits, half to even; rebias the exponent from 127 to 1.
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (126 << 1)
    # Below 1 codes are multiples of a half; adding 1.5 * 2^23 rounds half to even.
    tiny = ((size * 2.0 + 12582912.0) - 12582912.0).to(tl.uint32)
    sign = (number.to(tl.uint32, bitcast=True) >> 31) << 3
    return (tl.where(size < 1.0, tiny, normal) | sign).to(tl.uint8)


@triton.jit
def _decode_e2m1(code):
    """The float32 values of a block of codes 0 to 15."""
    bits = code.to(tl.uint32)
    exponent = (bits >> 1) & 3
    normal = (((exponent + 126) << 23) | ((bits & 1) << 22)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, (bits & 1).to(tl.float32) * 0.5, normal)
    signed = size.to(tl.uint32, bitcast=True) | ((bits >> 3) << 31)
    return signed.to(tl.float32, bitcast=True)


@triton.jit
def _blocks(blocks, per_row, stride, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """Numbers of this program's blocks, where each begins in a strided tensor, and a mask."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    start = (block // per_row) * stride + (block % per_row) * SIZE
    return block, start, block < blocks


@triton.jit
def _load(x, start, inside, SIZE: tl.constexpr):
    at = start[:, None] + tl.arange(0, SIZE)[None, :]
    return tl.load(x + at, inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _amax(value):
    size = tl.abs(value)
    return tl.max(tl.where(size < float("inf"), size, 0.0), axis=1)


@triton.jit
def quantize_nvfp4(
    x, global_scale, values, scale, blocks, per_row, x_stride, BLOCKS: tl.constexpr
):  # fmt: skip
    """BLOCKS blocks of 16."""
    block, start, inside = _blocks(blocks, per_row, x_stride, BLOCKS, 16)
    value = _load(x, start, inside, 16)
    overall = tl.load(global_scale)
    wanted = tl.div_rn(_amax(value), overall * 6.0 + tl.zeros((BLOCKS,), tl.float32))
    code = fp8_kernel.encode(tl.maximum(wanted, 0.001953125))
    tl.store(scale + block, code, inside)
    divisor = fp8_kernel.decode(code) * overall
    codes = _encode_e2m1(tl.div_rn(value, divisor[:, None] + tl.zeros_like(value)))
    low, high = tl.split(tl.reshape(codes, (BLOCKS, 8, 2)))
    at = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(values + at, low | (high << 4), inside[:, None])


@triton.jit
def quantize_mxfp8(x, values, scale, blocks, per_row, x_stride, BLOCKS: tl.constexpr):
    """BLOCKS blocks of 32."""
    block, start, inside = _blocks(blocks, per_row, x_stride, BLOCKS, 32)
    value = _load(x, start, inside, 32)
    bits = _amax(value).to(tl.int32, bitcast=True)
    # Exponent of the largest magnitude over 448 = 1.75 * 2^8, rounded up.
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.maximum(exponent, 0)
    tl.store(scale + block, exponent.to(tl.uint8), inside)
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(values + at, fp8_kernel.encode(value * factor[:, None]), inside[:, None])


@triton.jit
def dequantize_nvfp4(values, scale, global_scale, out, blocks, BLOCKS: tl.constexpr):
    """BLOCKS blocks of 16."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    at = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    packed = tl.load(values + at, inside[:, None], other=0)
    codes = tl.reshape(tl.join(packed & 15, packed >> 4), (BLOCKS, 16))
    factor = fp8_kernel.decode(tl.load(scale + block, inside, other=0)) * tl.load(global_scale)
    value = _decode_e2m1(codes) * factor[:, None]
    at = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), inside[:, None])


@triton.jit
def dequantize_mxfp8(values, scale, out, blocks, BLOCKS: tl.constexpr):
    """BLOCKS blocks of 32."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    code = tl.load(scale + block, inside, other=0).to(tl.uint32)
    bits = tl.where(code == 0, 1 << 22, code << 23)  # 2^-127 is subnormal
    factor = tl.where(code == 255, 0x7FC00000, bits).to(tl.uint32).to(tl.float32, bitcast=True)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    value = fp8_kernel.decode(tl.load(values + at, inside[:, None], other=0)) * factor[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), inside[:, None])
