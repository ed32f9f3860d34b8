"""The scaled linear layer with GELU against a 16-bit layer and PyTorch's own scaled products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import sn72kernels
from benchmarks.kernels import peers, work
from benchmarks.kernels.harness import Call, Case
from sn72kernels.ops.linear import reference
from sn72kernels.testing import error_ratio

FP8 = torch.float8_e4m3fn
DEPTH, UNITS = 1024, 4096


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """The first layer of a ViT-L's MLP, from one row to a batch of images."""
    for rows in (4648, 581, 64, 16, 1) if device.type == "cuda" else (16, 1):
        for dtype in (torch.int8, FP8):
            yield f"{rows} {'fp8' if dtype == FP8 else 'int8'}", partial(build, device, rows, dtype)


def ours(*arguments: torch.Tensor) -> torch.Tensor:
    return sn72kernels.linear(*arguments[:5], activation="gelu")


def scaled_mm(*arguments: torch.Tensor) -> torch.Tensor:
    x, xs, w, ws, bias = arguments[:5]
    out = torch._scaled_mm(
        x, w.t(), xs[:, None], ws[None], bias=bias.bfloat16(), out_dtype=torch.bfloat16
    )
    return torch.nn.functional.gelu(out)


def int_mm(*arguments: torch.Tensor) -> torch.Tensor:
    x, xs, w, ws, bias = arguments[:5]
    out = torch._int_mm(x, w.t()) * (xs[:, None] * ws[None]) + bias
    return torch.nn.functional.gelu(out).half()


def half(*arguments: torch.Tensor) -> torch.Tensor:
    """The layer before it was quantised: a 16-bit product, bias and GELU."""
    bias, x, w = arguments[-3:]
    return torch.nn.functional.gelu(torch.nn.functional.linear(x, w, bias.to(x.dtype)))


def build(device: torch.device, rows: int, dtype: torch.dtype) -> Case:
    """Codes per token and per unit; the 16-bit layer takes what the codes were made of."""
    gpu = device.type == "cuda"
    x = torch.randn(rows, DEPTH, device=device)
    w = torch.randn(UNITS, DEPTH, device=device) / DEPTH**0.5
    bias = torch.randn(UNITS, device=device)
    quantized = [sn72kernels.quantize(t, granularity="token", dtype=dtype) for t in (x, w)]
    codes = (*quantized[0], *quantized[1], bias)
    exact = reference.linear(*codes, "gelu", torch.float64)
    others, absent = peers.others(device, half)
    own: dict[str, Call] = (
        {"torch._scaled_mm": scaled_mm} if dtype == FP8 else {"torch._int_mm": int_mm}
    )
    if gpu:
        others |= own
    else:
        absent |= dict.fromkeys(own, "it is timed on a GPU only")
    plain = torch.float16 if gpu else torch.float32
    return Case(
        op="linear",
        label=f"{rows} x {DEPTH} to {UNITS}, {'fp8' if dtype == FP8 else 'int8'}",
        dtype="float8_e4m3fn" if dtype == FP8 else "int8",
        shape=(rows, DEPTH, UNITS),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(*codes, x.to(plain), w.to(plain)),
        # Products of codes are summed in 13 bits or more and rounded to 16 at the end.
        correct=lambda out: error_ratio(out, exact) < 2e-3,
        # The 16-bit layer does not see the rounding to codes: a step of 1/16 at most.
        near=lambda out: error_ratio(out, exact) < 0.1,
        work=work.linear(
            rows, DEPTH, UNITS, unit=("float8_e4m3fn" if dtype == FP8 else "int8"), itemsize=2
        ),
    )
