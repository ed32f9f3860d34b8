# mypy: ignore-errors
"""fp8 e4m3 codes by integer arithmetic: Triton side.

The same bits on every architecture, also on those without fp8 instructions.
"""

import triton
import triton.language as tl


@triton.jit
def encode(value):
    """Codes of a float32 block as uint8: half to even, saturated to +-448; NaN is 0x7F."""
    number = tl.where(value == value, value, 0.0)
    size = tl.minimum(tl.abs(number), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    # Keep 3 of 23 mantissa bits, half to even; rebias the exponent from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9; adding 1.5 * 2^23 rounds half to even.
    tiny = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.uint32)
    code = tl.where(size < 0.015625, tiny, normal)
    sign = (number.to(tl.uint32, bitcast=True) >> 31) << 7
    return tl.where(value == value, code | sign, 0x7F).to(tl.uint8)


@triton.jit
def decode(code):
    """The float32 values of a block of uint8 codes."""
    bits = code.to(tl.uint32)
    exponent = (bits >> 3) & 15
    mantissa = bits & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
    # Triton negates by subtracting from zero, which would lose the sign of a zero.
    signed = size.to(tl.uint32, bitcast=True) | ((bits >> 7) << 31)
    return signed.to(tl.float32, bitcast=True)
