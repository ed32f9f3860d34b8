"""What promises the same bits everywhere uses nothing that PyTorch computes otherwise on CUDA.

The CPU cannot show such a difference, so every PyTorch operation of the references is looked at. A
division by a number is the trap: on CUDA it is a multiplication by the number's reciprocal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sn72kernels
from tests.kernel_cases import operators

# Rounded as each device's library has it, or fused.
INEXACT = (
    "addcdiv", "addcmul", "erf", "exp", "exp2", "lerp", "log", "matmul", "mm", "pow", "rsqrt",
    "sigmoid", "softmax", "tanh",
)  # fmt: skip
EXACT = (
    "cascade_route", "dequantize", "dequantize_mxfp8", "dequantize_nvfp4", "ensemble_vote",
    "preprocess", "quantize_mxfp8", "quantize_nvfp4", "quantize_static", "quantize_token",
)  # fmt: skip


class Witness(TorchDispatchMode):
    """Operations whose bits depend on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        by = args[1] if name == "div" else None
        # The reciprocal of a power of two is exact.
        if name in INEXACT or (isinstance(by, (int, float)) and math.frexp(by)[0] != 0.5):
            self.seen.append(f"{func} {by}")
        return out


def seen(call: Callable[..., Any], *arguments: Any) -> list[str]:
    with Witness() as witness:
        call(*arguments)
    return witness.seen


@pytest.mark.parametrize("name", EXACT)
def test_references(name: str) -> None:
    reference = operators.specs()[name].reference
    for arguments in operators.examples()[name]:
        assert seen(reference, *arguments) == []


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_of_quantize(granularity: str, dtype: torch.dtype) -> None:
    def call(x: torch.Tensor) -> Any:
        return sn72kernels.quantize(x, granularity=granularity, dtype=dtype)  # type: ignore[arg-type]

    assert seen(call, torch.randn(3, 8)) == []


def test_scale_of_quantize_blocks() -> None:
    assert seen(sn72kernels.quantize_blocks, torch.randn(3, 32)) == []


def test_the_witness_sees_what_differs() -> None:
    x = torch.ones(3)
    assert seen(lambda: x / 127.0)
    assert seen(lambda: x.div_(3))
    assert seen(lambda: x.exp())
    assert not seen(lambda: x / 2)
    assert not seen(lambda: x / torch.full_like(x, 127.0))
