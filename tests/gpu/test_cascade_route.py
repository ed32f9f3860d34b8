"""Routing on the card: the same bits as the CPU reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import sn72kernels
from sn72kernels.ops.cascade_route import op, reference
from sn72kernels.testing import assert_same, poisoned
from tests.gpu.support import DEVICE, SEED, check_graph_and_streams, compiled, sizes
from tests.kernel_cases import routing

SPECIAL = (0.15, 0.85, 0.0, 1.0, 1.0000001, -1e-9, float("nan"), float("inf"), -float("inf"))


def make(n: int, dtype: torch.dtype, logits: bool, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    data = rng.normal(0, 4, n) if logits else rng.random(n)
    chosen = np.where(rng.random(n) < 0.3, rng.choice(np.array(SPECIAL), n), data)
    return torch.from_numpy(chosen.astype(np.float32)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("n", sizes([0, 1, 33, 4096, 4097, 16385, 1 << 20], [0, 33, 4097]))
def test_same_bits_as_the_cpu(n: int, per_sample: bool, logits: bool, dtype: torch.dtype) -> None:
    for seed in range(3):
        scores = make(n, dtype, logits, seed)
        lows, highs = (make(n, torch.float32, False, seed + k) for k in (10, 20))
        if not per_sample:
            lows = highs = None  # type: ignore[assignment]
        buckets = [7, 64, 4096, max(5000, n)]
        want = reference.route(scores, lows, highs, 0.15, 0.85, logits, buckets)
        device = [t.to(DEVICE) if t is not None else None for t in (scores, lows, highs)]
        with poisoned():
            have = op.launch_route(*device, 0.15, 0.85, logits, buckets)  # type: ignore[arg-type]
        assert_same([t.cpu() for t in have], want)


@pytest.mark.parametrize("part", range(10))
def test_100000_random_batches_have_the_same_bits(part: int) -> None:
    """Ties, NaN, infinities, thresholds per sample, all three dtypes, both paths of the launcher.

    In ten parts, so that a run that is cut off says how many it did. Results are fetched a few
    hundred batches at a time.
    """
    count = sizes(10_000, 20)
    drawn = routing.batches(count, SEED + part, largest=sizes(routing.LARGEST, 300))
    done = 0
    while chunk := list(itertools.islice(drawn, 500)):
        with poisoned():
            have = [op.launch_route(*to_device(batch)) for batch in chunk]
        for batch, outputs in zip(chunk, have, strict=True):
            assert_same(outputs, reference.route(*batch))
        done += len(chunk)
    assert done == count


def to_device(batch: routing.Batch) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in batch]


def test_every_logit_of_half_precision_has_the_same_sigmoid() -> None:
    """All 65536 bit patterns, and as many float32 values between them."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for scores in (
        bits.view(torch.float16),
        bits.view(torch.bfloat16),
        torch.linspace(-90, 90, 1 << 16),
    ):
        want = reference.route(scores, None, None, 0.15, 0.85, True, [])
        have = op.launch_route(scores.to(DEVICE), None, None, 0.15, 0.85, True, [])
        assert_same([t.cpu() for t in have], want)


def call(scores: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(sn72kernels.cascade_route(scores, low, high, buckets=(8, 64, 1 << 20)))


@pytest.mark.parametrize("n", sizes([256, 40000], [256]))
def test_graph_and_streams(n: int) -> None:
    """Thresholds are tensors here, so a replay takes new ones."""
    first = (
        make(n, torch.float32, False, 0).to(DEVICE),
        torch.tensor(0.1).to(DEVICE),
        torch.tensor(0.9).to(DEVICE),
    )
    second = (
        make(n, torch.float32, False, 1).to(DEVICE),
        torch.tensor(0.3).to(DEVICE),
        torch.tensor(0.5).to(DEVICE),
    )
    check_graph_and_streams(call, first, second)


def test_torch_compile() -> None:
    arguments = (
        make(500, torch.float32, False, 0).to(DEVICE),
        torch.tensor(0.1).to(DEVICE),
        torch.tensor(0.9).to(DEVICE),
    )
    assert_same(compiled(call)(*arguments), call(*arguments))
