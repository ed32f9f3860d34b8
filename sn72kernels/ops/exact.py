"""Arithmetic that gives the same bits on every device: the sigmoid and the route. PyTorch side.

A route is decided by comparing a probability with a threshold, so a sigmoid that differs in its
last bit between CPU and GPU would send one image two ways. The sigmoid here is made only of
float32 additions, multiplications, one division and bit shifts, each rounded to nearest on its
own, in a fixed order; no intermediate result is subnormal where it matters, so flushing changes
nothing. ``exact_kernel.py`` holds the same steps for Triton: change both together.
"""

from __future__ import annotations

import torch

# Beyond this a sigmoid differs from 0 or 1 by less than 2e-35; all steps stay normal numbers.
CLAMP = 80.0
LOG2_E = 1.4426950408889634
# ln 2 in two parts (Cody and Waite 1980): the first has so few bits that k * LN2_HIGH is exact.
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
# Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
ROUND = 12582912.0
# exp(-r) for |r| <= ln(2) / 2: Taylor to degree 7, whose rest is below 6e-9.
COEFFICIENTS = (-1.0 / 5040, 1.0 / 720, -1.0 / 120, 1.0 / 24, -1.0 / 6, 0.5, -1.0, 1.0)


NEGATIVE, POSITIVE, ESCALATE = 0, 1, 2


def route(p: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Routes of probabilities: 0 below ``low``, 1 above ``high``, 2 for everything else.

    Args:
        p: any shape, float32.
        low: float32, broadcast to ``p``.
        high: likewise.

    Returns:
        uint8, shape of ``p``.
    """
    # Every comparison with a NaN is false, so whatever is not sane escalates.
    sane = (p >= 0) & (p <= 1) & (low <= high)
    routes = torch.full_like(p, ESCALATE, dtype=torch.uint8)
    routes.masked_fill_(sane & (p > high), POSITIVE)
    return routes.masked_fill_(sane & (p < low), NEGATIVE)


def sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """Sigmoid in float32, the same bits on every device; within 4e-7 of the true value, relative.

    Args:
        logits: any shape, float32, float16 or bfloat16.

    Returns:
        Same shape, float32, in [0, 1]; NaN where a logit is not finite, since an overflowed logit
        is a fault and must not become a confident answer.
    """
    x = logits.float()
    finite = x.isfinite()
    size = torch.where(finite, x.abs(), torch.zeros_like(x)).clamp(max=CLAMP)
    k = (size * LOG2_E + ROUND) - ROUND
    r = (size - k * LN2_HIGH) - k * LN2_LOW
    power = torch.full_like(r, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        power = power * r + coefficient
    exponent = (127 - k.to(torch.int32)) << 23
    small = power * exponent.view(torch.float32)
    p = torch.where(x >= 0, torch.ones_like(small), small) / (small + 1.0)
    return torch.where(finite, p, torch.full_like(p, float("nan")))
