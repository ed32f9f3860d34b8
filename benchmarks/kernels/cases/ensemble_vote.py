"""Weighted vote of five models in one launch against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import sn72kernels
from benchmarks.kernels import gates, peers, work
from benchmarks.kernels.harness import Case
from sn72kernels.ops.ensemble_vote import reference

WEIGHTS = (0.4, 0.15, 0.25, 0.1, 0.1)


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """A batch, and many at once."""
    for n in (1 << 20, 4096, 64) if device.type == "cuda" else (4096, 64):
        yield f"n={n}", partial(build, device, n)


def ours(*arguments: torch.Tensor) -> torch.Tensor:
    return sn72kernels.ensemble_vote(arguments[:-1], arguments[-1])


def eager(*arguments: torch.Tensor) -> torch.Tensor:
    return reference.vote(arguments[:-1], arguments[-1], False)


def build(device: torch.device, n: int) -> Case:
    """One in five models abstains."""
    scores = [torch.rand(n, device=device) for _ in WEIGHTS]
    for score in scores:
        score[torch.rand(n, device=device) < 0.2] = float("nan")
    weights = torch.tensor(WEIGHTS, device=device)
    wanted = eager(*scores, weights)

    def near(out: torch.Tensor) -> bool:
        return torch.allclose(out, wanted, rtol=1e-6, atol=0.0, equal_nan=True)

    others, absent = peers.others(device, eager)
    return Case(
        op="ensemble_vote",
        label=f"{len(WEIGHTS)} x {n}",
        dtype="float32",
        shape=(n,),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(*scores, weights),
        correct=gates.same_bits(wanted),
        near=near,
        work=work.ensemble_vote(n, len(WEIGHTS), 4),
    )
