# mypy: ignore-errors
"""GELU and its derivative: Triton side of ``gelu.py``."""

import triton
import triton.language as tl


@triton.jit
def gelu(z, TANH: tl.constexpr):
    """GELU of a float32 block, exact or in its tanh form."""
    if TANH:
        # 0.5 * (1 + tanh(u)) is sigmoid(2u): one exponential, no cancellation, no tanh intrinsic.
        return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z, TANH: tl.constexpr):
    """Derivative of :func:`gelu`."""
    if TANH:
        gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        return gate + z * gate * (1.0 - gate) * (1.5957691216057308 + 0.21406930706545478 * z * z)
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
