"""Weighted vote on the card: the same bits as the CPU reference."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.ensemble_vote import op, reference
from sn72kernels.testing import assert_same, poisoned
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes


def make(n: int, logits: bool, seed: int) -> torch.Tensor:
    generator = seeded(seed)
    scores = (
        torch.randn(n, generator=generator) * 4 if logits else torch.rand(n, generator=generator)
    )
    scores[torch.rand(n, generator=generator) < 0.3] = float("nan")
    return scores


@pytest.mark.parametrize("models", range(1, 9))
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("n", sizes([1, 1000, 100_003], [1, 1000]))
def test_same_bits_as_the_cpu(n: int, logits: bool, models: int) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    scores = [make(n, logits, seed).to(dtypes[seed % 3]) for seed in range(models)]
    weights = torch.rand(models, generator=seeded(9))
    want = reference.vote(scores, weights, logits)
    with poisoned():
        have = op.launch_vote([score.to(DEVICE) for score in scores], weights.to(DEVICE), logits)
    assert_same([have.cpu()], [want])


def call(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (sn72kernels.ensemble_vote([a, b], weights),)


def test_graph_streams_and_torch_compile() -> None:
    first = (
        make(500, False, 0).to(DEVICE),
        make(500, False, 1).to(DEVICE),
        torch.tensor([0.6, 0.4]).to(DEVICE),
    )
    second = (
        make(500, False, 2).to(DEVICE),
        make(500, False, 3).to(DEVICE),
        torch.tensor([0.1, 0.9]).to(DEVICE),
    )
    check_graph_and_streams(call, first, second)
    assert_same(compiled(call)(*first), call(*first))
