"""Rotary embedding of queries and keys in one launch against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import sn72kernels
from benchmarks.kernels import gates, peers, work
from benchmarks.kernels.harness import Case
from sn72kernels.ops.rope import reference, tables

HEADS, PREFIX = 16, 5


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """A ViT-L at 384 pixels; in place, with every token rotated, as liger-kernel does it."""
    batch, side = (32, 24) if device.type == "cuda" else (1, 14)
    yield f"{batch} samples", partial(build, device, batch, side)
    yield f"{batch} samples in place", partial(in_place, device, batch, side)


def build(device: torch.device, batch: int, side: int, depth: int = 64) -> Case:
    """Out of place, the prefix tokens untouched."""
    dtype = torch.float16
    q, k, cos, sin = _tensors(device, batch, side, PREFIX, depth, dtype)
    others, absent = peers.others(device, reference.rope)
    tokens = side * side + PREFIX
    return Case(
        op="rope",
        label=f"{batch} x {HEADS} x {tokens} x {depth}",
        dtype="float16",
        shape=(batch, tokens, depth),
        ours=sn72kernels.rope,
        others=others,
        absent=absent,
        arguments=(q, k, cos, sin),
        correct=gates.close(*reference.rope(*(t.double() for t in (q, k, cos, sin))), dtype=dtype),
        work=work.rope(batch, HEADS, tokens, side * side, depth, 2),
    )


def in_place(device: torch.device, batch: int, side: int, depth: int = 64) -> Case:
    """In place; a rotation keeps lengths, so calls can follow one another."""
    dtype = torch.float16
    q, k, cos, sin = _tensors(device, batch, side, 0, depth, dtype)

    def ours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        sn72kernels.rope_(q, k, cos, sin)
        return q, k

    def eager(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        reference.rope_(q, k, cos, sin)
        return q, k

    wide = [t.double() for t in (q, k, cos, sin)]
    others, absent = peers.others(device, eager, {"liger-kernel": peers.lazily(_liger)})
    return Case(
        op="rope",
        label=f"{batch} x {HEADS} x {side * side} x {depth}, in place",
        dtype="float16",
        shape=(batch, side * side, depth),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(q, k, cos, sin),
        correct=gates.close(*reference.rope(*wide), dtype=dtype),
        work=work.rope(batch, HEADS, side * side, side * side, depth, 2),
    )


def _tensors(
    device: torch.device, batch: int, side: int, prefix: int, depth: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (batch, side * side + prefix, HEADS, depth)
    q, k = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    cos, sin = (t[None] for t in tables.axial(side, side, depth, device=device))
    return q, k, cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)


def _liger() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_rope

    def call(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return liger_rope(q, k, cos[:1], sin[:1])  # one table for all samples, or it copies them

    return call
