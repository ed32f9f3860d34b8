"""Weighted vote of five models in one launch against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sn72kernels
from sn72kernels.ops.ensemble_vote import reference


def ours(*arguments: torch.Tensor) -> torch.Tensor:
    return sn72kernels.ensemble_vote(arguments[:-1], arguments[-1])


def eager(*arguments: torch.Tensor) -> torch.Tensor:
    return reference.vote(arguments[:-1], arguments[-1], False)


@pytest.mark.parametrize("n", [64, 1 << 20])
def test_vote(race: Callable[..., None], device: torch.device, n: int) -> None:
    scores = [torch.rand(n, device=device) for _ in range(5)]
    weights = torch.tensor([0.4, 0.15, 0.25, 0.1, 0.1], device=device)
    want = eager(*scores, weights)
    candidates = {"sn72kernels": ours, "PyTorch ops": eager}
    if device.type == "cuda":
        candidates["torch.compile"] = torch.compile(eager, dynamic=False)
    race(
        f"ensemble_vote 5 x {n}",
        candidates,
        (*scores, weights),
        lambda out: torch.allclose(out, want, rtol=1e-6, atol=0.0),
        n * 4 * 6,
    )
