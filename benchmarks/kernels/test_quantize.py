"""Quantisation per token in one read against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sn72kernels
from sn72kernels import bench
from sn72kernels.ops.quantize import reference


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("cols", [1024, 4096])
def test_token(race: Callable[..., None], device: torch.device, cols: int, fp8: bool) -> None:
    rows = 16384 if device.type == "cuda" else 64
    x = torch.randn(rows, cols, device=device, dtype=torch.float16)
    dtype = torch.float8_e4m3fn if fp8 else torch.int8

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sn72kernels.quantize(x, granularity="token", dtype=dtype)

    def eager(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reference.quantize_token(x, fp8)

    values, scale = eager(x)
    candidates = {"sn72kernels": ours, "PyTorch ops": eager}
    if device.type == "cuda":
        candidates["torch.compile"] = torch.compile(eager, dynamic=False)
    race(
        f"quantize per token {rows} x {cols} {dtype}",
        candidates,
        (x,),
        lambda out: (
            torch.equal(out[1], scale)
            and torch.equal(out[0].view(torch.uint8), values.view(torch.uint8))
        ),
        bench.bytes_of(x, values, scale),
    )
