"""LayerNorm+GELU against eager PyTorch and torch.compile; bytes: read once, write once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sn72kernels
from sn72kernels import bench
from sn72kernels.testing import error_ratio


def eager(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (x.shape[-1],), w, b))


@pytest.mark.parametrize("cols", [768, 1024, 4096, 16384])
def test_forward(race: Callable[..., None], device: torch.device, cols: int) -> None:
    rows = 16384 if device.type == "cuda" else 64
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(rows, cols, device=device, dtype=dtype)
    w, b = (torch.randn(cols, device=device, dtype=dtype) for _ in range(2))
    want = eager(x.double(), w.double(), b.double())
    candidates = {"sn72kernels": sn72kernels.layernorm_gelu, "eager": eager}
    if device.type == "cuda":
        candidates["torch.compile"] = torch.compile(eager, dynamic=False)
    race(
        f"layernorm_gelu {rows} x {cols} {dtype}",
        candidates,
        (x, w, b),
        lambda out: error_ratio(out, want) < 1e-3,
        2 * bench.bytes_of(x),
    )
