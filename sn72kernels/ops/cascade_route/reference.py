"""Early-exit routing in plain PyTorch: the definition that the kernel must match bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sn72kernels.ops import exact


def route(
    scores: torch.Tensor,
    lows: torch.Tensor | None,
    highs: torch.Tensor | None,
    low: float,
    high: float,
    from_logits: bool,
    buckets: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Route every sample and list the escalated ones in order.

    Args:
        scores: shape (n,), float32, float16 or bfloat16.
        lows: thresholds per sample, shape (n,), float32; None to use ``low``.
        highs: likewise; None exactly where ``lows`` is.
        low: threshold of all samples.
        high: threshold of all samples.
        from_logits: apply the sigmoid of :mod:`sn72kernels.ops.exact` first.
        buckets: batch sizes, ascending.

    Returns:
        routes, uint8 (n,); positions, int32 (n,): positions of the escalated samples, then zeros;
        summary, int32 (4,): escalated, bucket, negative, positive; probability, float32 (n,).
    """
    p = exact.sigmoid(scores) if from_logits else scores.float().clone()
    bottom = torch.full((), low, device=p.device) if lows is None else lows
    top = torch.full((), high, device=p.device) if highs is None else highs
    routes = exact.route(p, bottom, top)
    negative, positive, escalated = (
        routes == kind for kind in (exact.NEGATIVE, exact.POSITIVE, exact.ESCALATE)
    )
    # Samples that leave are all written to one extra place, which is cut off: the shapes never
    # depend on the data, so the device is never waited for.
    n = p.shape[0]
    place = torch.where(escalated, escalated.cumsum(0) - 1, n)
    numbers = torch.arange(n, dtype=torch.int32, device=p.device)
    positions = numbers.new_zeros(n + 1).scatter_(0, place, numbers)[:n].clone()
    count = escalated.sum()
    bucket = torch.where(count == 0, len(buckets), torch.zeros_like(count))
    for size in buckets:
        bucket = bucket + (count > size)
    summary = torch.stack((count, bucket, negative.sum(), positive.sum())).to(torch.int32)
    return routes, positions, summary, p
