"""nvfp4 and mxfp8 quantisation in one read against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sn72kernels
from sn72kernels import bench
from sn72kernels.ops.quantize_blocks import reference


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_quantize(race: Callable[..., None], device: torch.device, format: str) -> None:
    rows, cols = 16384 if device.type == "cuda" else 64, 1024
    x = torch.randn(rows, cols, device=device, dtype=torch.float16)
    overall = reference.global_scale_of(x)

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = overall if format == "nvfp4" else None
        return sn72kernels.quantize_blocks(x, given, format=format)[:2]

    def eager(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if format == "nvfp4":
            return reference.quantize_nvfp4(x, overall)
        return reference.quantize_mxfp8(x)

    want = eager(x)
    candidates = {"sn72kernels": ours, "PyTorch ops": eager}
    if device.type == "cuda":
        candidates["torch.compile"] = torch.compile(eager, dynamic=False)
    race(
        f"quantize_blocks {format} {rows} x {cols}",
        candidates,
        (x,),
        lambda out: all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(out, want, strict=True)
        ),
        bench.bytes_of(x, *want),
    )
