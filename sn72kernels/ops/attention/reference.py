"""Attention in plain PyTorch: ``scaled_dot_product_attention``, which is also a fallback."""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, implementation: str
) -> torch.Tensor:
    """``softmax(q k^T * scale) v``.

    Args:
        q: shape (B, H, T, D).
        k: shape (B, H, S, D).
        v: shape (B, H, S, D).
        scale: factor of the scores.
        implementation: ignored here.

    Returns:
        Shape (B, H, T, D); in memory the axes are in the order (B, T, H, D), so that joining the
        heads costs nothing.
    """
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
