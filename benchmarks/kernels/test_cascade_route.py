"""Routing in one launch against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sn72kernels
from sn72kernels.ops.cascade_route import reference


def ours(scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(sn72kernels.cascade_route(scores, 0.15, 0.85, from_logits=True, buckets=BUCKETS))


def eager(scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return reference.route(scores, None, None, 0.15, 0.85, True, BUCKETS)


BUCKETS = (8, 64, 1 << 20)


@pytest.mark.parametrize("n", [64, 4096, 1 << 20])
def test_route(race: Callable[..., None], device: torch.device, n: int) -> None:
    scores = torch.randn(n, device=device) * 3
    want = eager(scores)
    candidates = {"sn72kernels": ours, "PyTorch ops": eager}
    if device.type == "cuda":
        candidates["torch.compile"] = torch.compile(eager, dynamic=False)
    race(
        f"cascade_route n={n}",
        candidates,
        (scores,),
        lambda out: all(torch.equal(a, b) for a, b in zip(out, want, strict=True)),
        n * (4 + 1 + 4 + 4),  # score in; route, position and probability out
    )
