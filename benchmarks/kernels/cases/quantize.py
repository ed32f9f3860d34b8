"""Quantisation per token in one read, and back, against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import sn72kernels
from benchmarks.kernels import gates, peers, work
from benchmarks.kernels.harness import Case
from sn72kernels.ops.quantize import reference

FP8 = torch.float8_e4m3fn


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Activations of a ViT-L, and of its MLP."""
    sizes = ((16384, 1024), (16384, 4096), (581, 1024)) if device.type == "cuda" else ((64, 1024),)
    for rows, cols in sizes:
        for dtype in (torch.int8, FP8):
            kind = "fp8" if dtype == FP8 else "int8"
            yield f"{rows}x{cols} {kind}", partial(build, device, rows, cols, dtype)
            yield f"{rows}x{cols} {kind} back", partial(back, device, rows, cols, dtype)


def build(device: torch.device, rows: int, cols: int, dtype: torch.dtype) -> Case:
    """float16 to codes and a scale per row."""
    x = torch.randn(rows, cols, device=device, dtype=torch.float16)

    def ours(x: torch.Tensor) -> Any:
        return sn72kernels.quantize(x, granularity="token", dtype=dtype)

    def eager(x: torch.Tensor) -> Any:
        return reference.quantize_token(x, dtype == FP8)

    others, absent = peers.others(device, eager)
    return Case(
        op="quantize",
        label=f"{rows} x {cols} to {_name(dtype)}, per token",
        dtype="float16",
        shape=(rows, cols),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(x,),
        correct=gates.same_bits(*eager(x)),
        # A division that a compiler makes a multiplication moves a code by one, rarely.
        near=gates.share_equal(*eager(x), share=0.98),
        work=work.quantize(rows, cols, 2),
    )


def back(device: torch.device, rows: int, cols: int, dtype: torch.dtype) -> Case:
    """Codes and scales to float16."""
    x = torch.randn(rows, cols, device=device, dtype=torch.float16)
    values, scale = reference.quantize_token(x, dtype == FP8)

    def ours(values: torch.Tensor, scale: torch.Tensor) -> Any:
        return sn72kernels.dequantize(values, scale, granularity="token", dtype=torch.float16)

    def eager(values: torch.Tensor, scale: torch.Tensor) -> Any:
        return reference.dequantize(values, scale, "token", torch.float16)

    others, absent = peers.others(device, eager)
    return Case(
        op="quantize",
        label=f"{rows} x {cols} from {_name(dtype)}, per token",
        dtype="float16",
        shape=(rows, cols),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(values, scale),
        correct=gates.same_bits(eager(values, scale)),
        near=gates.close(eager(values, scale), dtype=torch.float16),
        work=work.dequantize(rows, cols, 2),
    )


def _name(dtype: torch.dtype) -> str:
    return "fp8" if dtype == FP8 else "int8"
