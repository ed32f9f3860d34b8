"""Weighted vote in plain PyTorch: the definition that the kernel must match bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sn72kernels.ops import exact


def vote(scores: Sequence[torch.Tensor], weights: torch.Tensor, from_logits: bool) -> torch.Tensor:
    """``sum(w * p) / sum(w)`` over the models that did not abstain.

    Sums run in the order of the models, in float32, each product and sum rounded on its own.

    Args:
        scores: one tensor of shape (n,) per model.
        weights: shape (models,), float32.
        from_logits: apply the sigmoid of :mod:`sn72kernels.ops.exact` first.

    Returns:
        Shape (n,), float32, in [0, 1]; NaN where all abstain.
    """
    top = torch.zeros(scores[0].shape, dtype=torch.float32, device=scores[0].device)
    bottom = torch.zeros_like(top)
    for place, score in enumerate(scores):
        p = exact.sigmoid(score) if from_logits else score.float()
        weight = weights[place]
        counts = (p >= 0) & (p <= 1) & (weight > 0) & (weight < float("inf"))
        top = torch.where(counts, top + weight * p, top)
        bottom = torch.where(counts, bottom + weight, bottom)
    usable = (bottom > 0) & (bottom < float("inf"))
    return torch.where(usable, top / bottom, torch.full_like(top, float("nan")))
