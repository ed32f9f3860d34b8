"""The classifier head in plain PyTorch ops: the definition, and what runs for large batches."""

from __future__ import annotations

import torch

from sn72kernels.ops import exact
from sn72kernels.ops.gelu import gelu


def head(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    lows: torch.Tensor | None,
    highs: torch.Tensor | None,
    low: float,
    high: float,
    norm: bool,
    eps: float,
    tanh: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, probabilities and routes.

    Args:
        x: shape (n, D).
        norm_weight: shape (D,), or None for ones.
        norm_bias: shape (D,), or None for zeros.
        w1: shape (H, D), dtype of ``x``.
        b1: shape (H,), or None.
        w2: shape (H,).
        b2: shape (), or None.
        lows: thresholds per sample, shape (n,), float32; None to use ``low``.
        highs: likewise; None exactly where ``lows`` is.
        low: threshold of all samples.
        high: threshold of all samples.
        norm: normalise ``x`` first.
        eps: added to the variance.
        tanh: the tanh form of GELU.

    Returns:
        logits, float32 (n,) (float64 for float64 ``x``); probability, float32 (n,); routes,
        uint8 (n,).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if norm:
        weight = None if norm_weight is None else norm_weight.to(x.dtype)
        bias = None if norm_bias is None else norm_bias.to(x.dtype)
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    hidden = torch.nn.functional.linear(x, w1, None if b1 is None else b1.to(x.dtype))
    logits = gelu(hidden.to(wide), tanh) @ w2.to(wide)
    if b2 is not None:
        logits = logits + b2.to(wide)
    p = exact.sigmoid(logits)
    bottom = torch.full((), low, device=p.device) if lows is None else lows
    top = torch.full((), high, device=p.device) if highs is None else highs
    return logits, p, exact.route(p, bottom, top)
