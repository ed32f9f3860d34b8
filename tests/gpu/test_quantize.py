"""Quantisation on the card: the same bits as the CPU reference."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.quantize import op, reference
from sn72kernels.testing import assert_same, poisoned
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes

FP8 = torch.float8_e4m3fn


def make(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    magnitude = 10.0 ** torch.randint(-5, 3, (rows, cols), generator=generator)
    x = torch.randn(rows, cols, generator=generator) * magnitude
    x[torch.rand(rows, cols, generator=generator) < 0.05] = float("nan")
    x[torch.rand(rows, cols, generator=generator) < 0.05] = float("inf")
    return x.to(dtype)


def codes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in (torch.int8, FP8) else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
@pytest.mark.parametrize(
    "shape", sizes([(0, 8), (1, 1), (33, 1000), (577, 1024), (5, 20001)], [(3, 100), (2, 20001)])
)
def test_same_bits_as_the_cpu(
    shape: tuple[int, int], granularity: str, fp8: bool, dtype: torch.dtype
) -> None:
    x = make(*shape, dtype)
    scale = reference.scale_of(x, granularity, fp8)
    torch.testing.assert_close(
        reference.scale_of(x.to(DEVICE), granularity, fp8).cpu(), scale, rtol=0, atol=0
    )
    want = reference.quantize_static(x, scale, granularity, fp8)
    with poisoned():
        have = op.launch_static(x.to(DEVICE), scale.to(DEVICE), granularity, fp8)
    assert_same([codes(have)], [codes(want)])
    for out in (torch.float32, torch.float16, torch.bfloat16):
        back = op.launch_dequantize(have, scale.to(DEVICE), granularity, out)
        assert_same([back], [reference.dequantize(want, scale, granularity, out)])
    if granularity == "token":
        values, scales = op.launch_token(x.to(DEVICE), fp8)
        assert_same([codes(values), scales], [codes(want), scale])


def test_every_float32_step_near_every_fp8_boundary() -> None:
    """Neighbours of all midpoints: a kernel that rounds any other way differs somewhere."""
    values = torch.arange(0x7F, dtype=torch.int32).to(torch.uint8).view(FP8).float()
    middle = ((values[:-1] + values[1:]) / 2).view(torch.int32)
    near = (middle[:, None] + torch.arange(-3, 4, dtype=torch.int32)).view(torch.float32)
    near = torch.cat((near, -near))
    one = torch.ones(())
    have = op.launch_static(near.to(DEVICE), one.to(DEVICE), "tensor", True)
    assert_same([codes(have)], [codes(reference.quantize_static(near, one, "tensor", True))])


def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    quantized = sn72kernels.quantize(x, granularity="token", dtype=FP8)
    return (sn72kernels.dequantize(*quantized, granularity="token", dtype=torch.float16),)


def test_graph_streams_and_torch_compile() -> None:
    first, second = (
        make(64, 768, torch.float16).to(DEVICE),
        make(64, 768, torch.float16, 1).to(DEVICE),
    )
    check_graph_and_streams(call, (first,), (second,))
    assert_same(compiled(call)(first), call(first))
