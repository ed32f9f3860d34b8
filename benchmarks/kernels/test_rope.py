"""Rotary embedding of queries and keys in one launch against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable

import torch

import sn72kernels
from sn72kernels import bench
from sn72kernels.ops.rope import reference, tables


def test_rope(race: Callable[..., None], device: torch.device) -> None:
    batch = 32 if device.type == "cuda" else 1
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    q, k = (
        torch.randn(batch, 581, 16, 64, device=device, dtype=dtype).transpose(1, 2)
        for _ in range(2)
    )
    cos, sin = (t.expand(batch, -1, -1) for t in tables.axial(24, 24, 64, device=device))
    want = reference.rope(q, k, cos, sin)
    candidates = {"sn72kernels": sn72kernels.rope, "PyTorch ops": reference.rope}
    if device.type == "cuda":
        candidates["torch.compile"] = torch.compile(reference.rope, dynamic=False)
    race(
        f"rope {tuple(q.shape)} {dtype}",
        candidates,
        (q, k, cos, sin),
        lambda out: all(torch.allclose(a, b, 1e-3, 1e-3) for a, b in zip(out, want, strict=True)),
        2 * bench.bytes_of(q, k),
    )
