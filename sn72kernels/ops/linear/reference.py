"""The scaled linear layer in plain PyTorch: the definition that the kernel is held to."""

from __future__ import annotations

import torch

from sn72kernels.ops.gelu import gelu


def linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``activation((x w^T) * x_scale * w_scale + bias)``.

    Args:
        x: shape (M, K), int8 or float8_e4m3fn.
        x_scale: float32, shape () or (M,).
        w: shape (N, K), dtype of ``x``.
        w_scale: float32, shape () or (N,).
        bias: shape (N,), or None.
        activation: ``"none"``, ``"gelu"`` or ``"gelu_tanh"``.
        dtype: of the result; float64 leaves out all rounding but that of the scales.

    Returns:
        Shape (M, N).
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Products of codes add up exactly in float64, so this rounds once, like an integer sum.
    total = (x.double() @ w.double().t()).to(wide)
    rows = x_scale.to(wide)[:, None] if x_scale.dim() else x_scale.to(wide)
    total = total * rows * w_scale.to(wide)
    if bias is not None:
        total = total + bias.to(wide)
    if activation != "none":
        total = gelu(total, activation == "gelu_tanh")
    return total.to(dtype)
