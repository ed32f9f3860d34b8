"""Random batches for routing: ties, NaN, infinities, thresholds per sample, every awkward size.

Used under Triton's interpreter and on the card, so that both prove the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

NAN, INF = math.nan, math.inf

# Ties with the thresholds below, both ends, neighbours of the ends, and everything unusable.
SPECIAL = (
    0.15, 0.85, 0.5, 0.0, -0.0, 1.0, 1.0000001, -1e-9, 1e-45, NAN, -NAN, INF, -INF, 3.0, -2.0,
)  # fmt: skip
THRESHOLDS = (
    (0.15, 0.85), (0.5, 0.5), (0.0, 1.0), (0.9, 0.1), (NAN, 0.5), (0.5, NAN), (-1.0, 2.0),
    (-INF, INF),
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One list: sizes of buckets are compiled into the kernel.
BUCKETS = (7, 64, 1 << 16)
LARGEST = 40000


class Batch(NamedTuple):
    """Arguments of ``cascade_route``'s launcher and of its reference, on the CPU."""

    scores: torch.Tensor
    lows: torch.Tensor | None
    highs: torch.Tensor | None
    low: float
    high: float
    from_logits: bool
    buckets: list[int]


def batches(
    count: int, seed: int = 0, *, largest: int = LARGEST, border: float = 0.1
) -> Iterator[Batch]:
    """``count`` batches, the same for the same ``seed``.

    A share ``border`` of them lies around the borders of blocks and of the one-launch path, up to
    ``largest``; the others have fewer than 258 samples, so that many fit a second.
    """
    rng = np.random.default_rng(seed)
    borders = [n for n in (0, 1, 1024, 4095, 4096, 4097, 16384, 16385, LARGEST) if n <= largest]
    for _ in range(count):
        at_border = rng.random() < border
        n = int(rng.choice(borders)) if at_border else int(rng.integers(0, min(258, largest + 1)))
        logits, per_sample = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
        low, high = THRESHOLDS[rng.integers(len(THRESHOLDS))]
        scores = values(rng, n, logits).to(DTYPES[rng.integers(len(DTYPES))])
        lows = highs = None
        if per_sample:
            lows, highs = values(rng, n, False), values(rng, n, False)
            tied = torch.from_numpy(rng.random(n) < 0.2)
            lows = torch.where(tied, scores.float(), lows)
            low = high = 0.0
        yield Batch(scores, lows, highs, low, high, logits, list(BUCKETS))


def values(rng: np.random.Generator, n: int, logits: bool) -> torch.Tensor:
    """Shape (n,), float32: random scores of which about a third are special values."""
    data = rng.normal(0, 4, n) if logits else rng.random(n)
    special = rng.choice(np.array(SPECIAL), n)
    return torch.from_numpy(np.where(rng.random(n) < 0.3, special, data).astype(np.float32))
