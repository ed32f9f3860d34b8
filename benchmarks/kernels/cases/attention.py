"""Attention of a ViT-L at 384 pixels: ours, the Triton kernel, SDPA, flash-attn where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import sn72kernels
from benchmarks.kernels import gates, peers, work
from benchmarks.kernels.harness import OURS, Case
from sn72kernels.ops.attention import op

HEADS = 16


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Tokens of 224 and 384 pixels, heads of the usual widths."""
    gpu = device.type == "cuda"
    for batch, tokens, depth in (
        ((8, 581, 64), (8, 581, 80), (8, 581, 128), (1, 581, 64), (64, 197, 64))
        if gpu
        else ((1, 197, 64),)
    ):
        yield f"{batch} x {tokens} x {depth}", partial(build, device, batch, tokens, depth)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def build(device: torch.device, batch: int, tokens: int, depth: int) -> Case:
    """Queries, keys and values as a ViT's projection leaves them: (B, T, H, D) in memory."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(batch, tokens, HEADS, depth, device=device, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    others, absent = peers.others(device, sdpa, {"flash-attn": peers.lazily(_flash)})
    if device.type == "cuda":
        others[f"{OURS}, Triton"] = partial(op.launch_triton, scale=depth**-0.5)
    return Case(
        op="attention",
        label=f"{batch} x {HEADS} x {tokens} x {depth}",
        dtype=str(dtype).removeprefix("torch."),
        shape=(batch, tokens, depth),
        ours=sn72kernels.attention,
        others=others,
        absent=absent,
        arguments=(q, k, v),
        correct=gates.close(_exact(q, k, v), dtype=dtype),
        work=work.attention(batch, HEADS, tokens, depth, q.element_size()),
    )


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In float64, sample by sample: the scores of all at once would not fit."""
    rows = []
    for one, two, three in zip(q, k, v, strict=True):
        scores = one.double() @ two.double().transpose(-1, -2) / q.shape[-1] ** 0.5
        rows.append(scores.softmax(-1) @ three.double())
    return torch.stack(rows)


def _flash() -> Callable[..., torch.Tensor]:
    from flash_attn import flash_attn_func

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2)

    return call
