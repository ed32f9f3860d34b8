"""Quantisation in plain PyTorch: the definition that the kernels must match bit for bit.

int8 follows ONNX QuantizeLinear: divide, round half to even, saturate to [-128, 127]. fp8 is
e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433), rounded half to even, saturated to +-448.
"""

from __future__ import annotations

import torch

# Largest magnitude that a scale maps to: symmetric, so that -amax and amax both fit.
INT8_MAX = 127.0
FP8_MAX = 448.0


def scale_of(x: torch.Tensor, granularity: str, fp8: bool) -> torch.Tensor:
    """Scales that map the largest finite magnitude to the largest code; 1 where all are zero.

    Args:
        x: shape (..., N).
        granularity: ``"tensor"``, ``"channel"`` (of the last axis) or ``"token"`` (rows).
        fp8: e4m3 instead of int8.

    Returns:
        float32, shape (), (N,) or (...,).
    """
    size = x.float().abs()
    size = torch.where(size.isfinite(), size, torch.zeros_like(size))
    if granularity == "tensor":
        amax = size.amax() if size.numel() else size.new_zeros(())
    elif granularity == "channel":
        rows = size.reshape(-1, x.shape[-1])
        amax = rows.amax(0) if rows.shape[0] else size.new_zeros(x.shape[-1])
    else:
        amax = size.amax(-1)
    # A tensor: by a number, PyTorch on CUDA multiplies with the reciprocal, which rounds twice.
    scale = amax / torch.full_like(amax, FP8_MAX if fp8 else INT8_MAX)
    # A magnitude so small that its scale is no normal number counts as zero.
    return torch.where(scale >= SMALLEST_SCALE, scale, torch.ones_like(scale))


SMALLEST_SCALE = 2.0**-126


def quantize_static(
    x: torch.Tensor, scale: torch.Tensor, granularity: str, fp8: bool
) -> torch.Tensor:
    """Codes of ``x`` for given scales; NaN becomes 0 in int8 and NaN in fp8.

    Args:
        x: shape (..., N), float32, float16 or bfloat16.
        scale: float32, shape (), (N,) or (...,) by ``granularity``.
        granularity: as in :func:`scale_of`.
        fp8: e4m3 instead of int8.
    """
    value = x.float() / _spread(scale, granularity)
    if fp8:
        value = torch.where(value.isnan(), torch.full_like(value, float("nan")), value)
        return value.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).contiguous()
    value = torch.where(value.isnan(), torch.zeros_like(value), value)
    return value.round().clamp(-128.0, 127.0).to(torch.int8).contiguous()


def quantize_token(x: torch.Tensor, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales per row, and codes for them."""
    scale = scale_of(x, "token", fp8)
    return quantize_static(x, scale, "token", fp8), scale


def dequantize(
    values: torch.Tensor, scale: torch.Tensor, granularity: str, dtype: torch.dtype
) -> torch.Tensor:
    """``values * scale`` in float32, rounded to ``dtype``."""
    return (values.float() * _spread(scale, granularity)).to(dtype).contiguous()


def _spread(scale: torch.Tensor, granularity: str) -> torch.Tensor:
    return scale.unsqueeze(-1) if granularity == "token" else scale
