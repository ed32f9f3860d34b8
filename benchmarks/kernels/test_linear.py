"""The scaled linear layer with GELU against torch._scaled_mm (fp8) and a float16 layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sn72kernels
from sn72kernels import bench
from sn72kernels.testing import error_ratio

FP8 = torch.float8_e4m3fn


def ours(*arguments: torch.Tensor) -> torch.Tensor:
    return sn72kernels.linear(*arguments[:5], activation="gelu")


def scaled_mm(*arguments: torch.Tensor) -> torch.Tensor:
    x, xs, w, ws, bias = arguments[:5]
    out = torch._scaled_mm(
        x, w.t(), xs[:, None], ws[None], bias=bias.bfloat16(), out_dtype=torch.bfloat16
    )
    return torch.nn.functional.gelu(out)


def half(*arguments: torch.Tensor) -> torch.Tensor:
    bias, x, w = arguments[-3:]
    return torch.nn.functional.gelu(torch.nn.functional.linear(x, w, bias.to(x.dtype)))


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("rows", [1, 16, 64, 581])
def test_linear(
    race: Callable[..., None], device: torch.device, rows: int, dtype: torch.dtype
) -> None:
    depth, units = 1024, 4096
    plain = torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(rows, depth, device=device)
    w = torch.randn(units, depth, device=device) / depth**0.5
    bias = torch.randn(units, device=device)
    xq, wq = (sn72kernels.quantize(t, granularity="token", dtype=dtype) for t in (x, w))
    want = half(bias, x, w)
    candidates: dict[str, Callable[..., torch.Tensor]] = {"sn72kernels": ours}
    if device.type == "cuda":
        candidates["float16"] = half
        if dtype == FP8:
            candidates["torch._scaled_mm"] = scaled_mm
    race(
        f"linear {dtype} {rows} x {depth} -> {units}",
        candidates,
        (*xq, *wq, bias, x.to(plain), w.to(plain)),
        lambda out: error_ratio(out, want) < 0.1,
        bench.bytes_of(*xq, *wq, bias) + rows * units * 2,
    )
