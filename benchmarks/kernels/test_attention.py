"""Attention of a ViT-L at 384 pixels: the Triton kernel, SDPA, and flash-attn where it is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import sn72kernels
from sn72kernels import bench
from sn72kernels.ops.attention import op
from sn72kernels.testing import error_ratio


@pytest.mark.parametrize("depth", [64, 80, 128])
def test_attention(race: Callable[..., None], device: torch.device, depth: int) -> None:
    batch = 8 if device.type == "cuda" else 1
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(batch, 581, 16, depth, device=device, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    sdpa = functools.partial(sn72kernels.attention, implementation="sdpa")
    want = sdpa(q.float(), k.float(), v.float())
    candidates: dict[str, Callable[..., torch.Tensor]] = {"sn72kernels": sn72kernels.attention}
    if device.type == "cuda":
        candidates["Triton"] = functools.partial(op.launch_triton, scale=depth**-0.5)
    candidates["SDPA"] = sdpa
    race(
        f"attention {tuple(q.shape)} {dtype}",
        candidates,
        (q, k, v),
        lambda out: error_ratio(out, want) < 2e-3,
        bench.bytes_of(q, k, v, want.to(dtype)),
    )
