"""nvfp4 and mxfp8 quantisation in one read, and back, against the same in PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import sn72kernels
from benchmarks.kernels import gates, peers, work
from benchmarks.kernels.harness import Case
from sn72kernels.ops.quantize_blocks import reference

# Format -> elements to a block, bits of a code.
FORMATS = {"nvfp4": (16, 4), "mxfp8": (32, 8)}


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Activations of a ViT-L."""
    rows, cols = (16384, 1024) if device.type == "cuda" else (64, 1024)
    for name in FORMATS:
        yield f"{rows}x{cols} {name}", partial(build, device, rows, cols, name)
        yield f"{rows}x{cols} {name} back", partial(back, device, rows, cols, name)


def build(device: torch.device, rows: int, cols: int, name: str) -> Case:
    """float16 to codes and scales."""
    x = torch.randn(rows, cols, device=device, dtype=torch.float16)
    overall = reference.global_scale_of(x)

    def ours(x: torch.Tensor) -> Any:
        given = overall if name == "nvfp4" else None
        return sn72kernels.quantize_blocks(x, given, format=name)[:2]

    def eager(x: torch.Tensor) -> Any:
        if name == "nvfp4":
            return reference.quantize_nvfp4(x, overall)
        return reference.quantize_mxfp8(x)

    others, absent = peers.others(device, eager)
    block, bits = FORMATS[name]
    return Case(
        op="quantize_blocks",
        label=f"{rows} x {cols} to {name}",
        dtype="float16",
        shape=(rows, cols),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(x,),
        correct=gates.same_bits(*eager(x)),
        near=gates.share_equal(*eager(x), share=0.98),
        work=work.quantize_blocks(rows, cols, 2, block=block, bits=bits),
    )


def back(device: torch.device, rows: int, cols: int, name: str) -> Case:
    """Codes and scales to float16."""
    x = torch.randn(rows, cols, device=device, dtype=torch.float16)
    overall = reference.global_scale_of(x) if name == "nvfp4" else None
    quantized = sn72kernels.quantize_blocks(x, overall, format=name)
    codes, scales = quantized[:2]

    def ours(codes: torch.Tensor, scales: torch.Tensor) -> Any:
        return sn72kernels.dequantize_blocks(codes, scales, overall, dtype=torch.float16)

    def eager(codes: torch.Tensor, scales: torch.Tensor) -> Any:
        if overall is not None:
            return reference.dequantize_nvfp4(codes, scales, overall, torch.float16)
        return reference.dequantize_mxfp8(codes, scales, torch.float16)

    wanted = eager(codes, scales)
    others, absent = peers.others(device, eager)
    block, bits = FORMATS[name]
    return Case(
        op="quantize_blocks",
        label=f"{rows} x {cols} from {name}",
        dtype="float16",
        shape=(rows, cols),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(codes, scales),
        correct=gates.same_bits(wanted),
        near=gates.close(wanted, dtype=torch.float16),
        work=work.quantize_blocks(rows, cols, 2, block=block, bits=bits),
    )
