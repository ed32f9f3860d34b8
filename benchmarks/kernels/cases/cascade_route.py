"""Routing in one launch against the same in PyTorch ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import sn72kernels
from benchmarks.kernels import gates, peers, work
from benchmarks.kernels.harness import Case
from sn72kernels.ops.cascade_route import reference

LOW, HIGH = 0.15, 0.85
BUCKETS = (8, 64, 1 << 20)


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Logits, one pair of thresholds; and thresholds per sample."""
    for n in (1 << 20, 4096, 64) if device.type == "cuda" else (4096, 64):
        yield f"n={n}", partial(build, device, n, per_sample=False)
        yield f"n={n} per sample", partial(build, device, n, per_sample=True)


def build(device: torch.device, n: int, *, per_sample: bool) -> Case:
    """``n`` logits, none so near a threshold that rounding decides."""
    scores = torch.randn(n, device=device) * 3
    for threshold in (LOW, HIGH):
        edge = math.log(threshold / (1 - threshold))
        scores[(scores - edge).abs() < 1e-3] += 1e-2
    limits = [torch.full((n,), t, device=device) for t in (LOW, HIGH)] if per_sample else []

    def ours(scores: torch.Tensor, *limits: torch.Tensor) -> Any:
        low, high = limits if limits else (LOW, HIGH)
        return tuple(
            sn72kernels.cascade_route(scores, low, high, from_logits=True, buckets=BUCKETS)
        )

    def eager(scores: torch.Tensor, *limits: torch.Tensor) -> Any:
        low, high = limits if limits else (None, None)
        return reference.route(scores, low, high, LOW, HIGH, True, BUCKETS)

    wanted = eager(scores, *limits)
    others, absent = peers.others(device, eager)

    def near(out: Any) -> bool:
        exact, probability = gates.same_bits(*wanted[:3]), gates.close(wanted[3], dtype=FLOAT)
        return exact(out[:3]) and probability(out[3])

    return Case(
        op="cascade_route",
        label=f"n = {n}{', thresholds per sample' if per_sample else ''}",
        dtype="float32",
        shape=(n,),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(scores, *limits),
        correct=gates.same_bits(*wanted),
        near=near,
        work=work.cascade_route(n, 4, per_sample=per_sample),
    )


FLOAT = torch.float32
