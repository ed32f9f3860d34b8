"""GELU and its derivative in plain PyTorch.

Hendrycks and Gimpel 2016 (arXiv:1606.08415). ``gelu_kernel.py`` holds the same for Triton.
"""

from __future__ import annotations

import math

import torch

_CUBIC = 0.044715
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def gelu(z: torch.Tensor, tanh: bool) -> torch.Tensor:
    """GELU of ``z``: ``z * Phi(z)``, or its tanh form written with one exponential."""
    if tanh:
        return z * torch.sigmoid(2.0 * _SQRT_2_OVER_PI * (z + _CUBIC * z.pow(3)))
    return 0.5 * z * (1.0 + torch.erf(z / math.sqrt(2.0)))


def gelu_slope(z: torch.Tensor, tanh: bool) -> torch.Tensor:
    """Derivative of :func:`gelu` at ``z``."""
    if tanh:
        gate = torch.sigmoid(2.0 * _SQRT_2_OVER_PI * (z + _CUBIC * z.pow(3)))
        inner = 2.0 * _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * z.square())
        return gate + z * gate * (1.0 - gate) * inner
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0))) + z * density
