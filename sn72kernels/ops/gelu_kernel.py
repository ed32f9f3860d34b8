# mypy: ignore-errors
"""GELU and its derivative: Triton side of ``gelu.py``."""

import triton
import triton.language as tl


@triton.jit
def _upper_tail(size):
    """1 - Phi of a float32 block of numbers in [0, 6], the normal distribution's upper tail.

    2 to a polynomial fitted to the tail's logarithm: within 6e-8 in float32, and within 6e-6 of the
    tail itself. The library's ``erf`` is 36 instructions, with which LayerNorm+GELU would wait for
    arithmetic and not for memory on an H100; this is 12.
    """
    power = tl.full(size.shape, -2.64994693e-08, tl.float32)
    power = power * size + 8.04732338e-07
    power = power * size - 1.04412502e-05
    power = power * size + 7.36394213e-05
    power = power * size - 2.70502933e-04
    power = power * size - 1.85988429e-05
    power = power * size + 6.96988776e-03
    power = power * size - 5.24573326e-02
    power = power * size - 4.59215313e-01
    power = power * size - 1.15110493e00
    return tl.exp2(power * size - 1.0)


@triton.jit
def gelu(z, TANH: tl.constexpr):
    """GELU of a float32 block, exact or in its tanh form."""
    if TANH:
        # 0.5 * (1 + tanh(u)) is sigmoid(2u): one exponential, no cancellation, no tanh intrinsic.
        return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    # z * Phi(z) without cancellation; what is left out beyond -6 is below 6e-9.
    size = tl.minimum(tl.abs(z), 6.0)
    above = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return above - size * _upper_tail(size)


@triton.jit
def gelu_slope(z, TANH: tl.constexpr):
    """Derivative of :func:`gelu`."""
    if TANH:
        gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        return gate + z * gate * (1.0 - gate) * (1.5957691216057308 + 0.21406930706545478 * z * z)
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    tail = _upper_tail(tl.minimum(tl.abs(z), 6.0))
    return tl.where(z >= 0.0, 1.0 - tail, tail) + z * density
