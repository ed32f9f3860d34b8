"""Rotary position embedding in plain PyTorch (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with their last tokens rotated, contiguous.

    Args:
        q: shape (B, H, T, D).
        k: shape (B, G, T, D).
        cos: shape (B, P, D), P <= T.
        sin: likewise.
    """
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def rope_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """:func:`rope` in place."""
    for x in (q, k):
        x.copy_(_rotated(x, cos, sin))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, half = x.shape[2] - cos.shape[1], x.shape[3] // 2
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens = x[:, :, first:].to(wide)
    turned = torch.cat((0 - tokens[..., half:], tokens[..., :half]), -1)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    out = (tokens * cos + turned * sin).to(x.dtype)
    return torch.cat((x[:, :, :first], out), 2).contiguous()
