"""nvfp4 and mxfp8 on the card: the same bits as the CPU reference."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.quantize_blocks import op, reference
from sn72kernels.testing import assert_same, poisoned
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes


def make(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    magnitude = 10.0 ** torch.randint(-5, 3, (rows, cols), generator=generator)
    x = torch.randn(rows, cols, generator=generator) * magnitude
    x[torch.rand(rows, cols, generator=generator) < 0.05] = float("nan")
    x[torch.rand(rows, cols, generator=generator) < 0.05] = float("inf")
    return x.to(dtype)


def codes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", sizes([(0, 32), (1, 32), (33, 96), (577, 1024)], [(3, 96)]))
def test_same_bits_as_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = make(*shape, dtype)
    overall = reference.global_scale_of(x)
    assert torch.equal(reference.global_scale_of(x.to(DEVICE)).cpu(), overall)
    fours, eights = reference.quantize_nvfp4(x, overall), reference.quantize_mxfp8(x)
    with poisoned():
        have_fours = op.launch_quantize_nvfp4(x.to(DEVICE), overall.to(DEVICE))
        have_eights = op.launch_quantize_mxfp8(x.to(DEVICE))
    assert_same([codes(t) for t in have_fours], [codes(t) for t in fours])
    assert_same([codes(t) for t in have_eights], [codes(t) for t in eights])
    for out in (torch.float32, torch.float16, torch.bfloat16):
        assert_same(
            [op.launch_dequantize_nvfp4(*have_fours, overall.to(DEVICE), out)],
            [reference.dequantize_nvfp4(*fours, overall, out)],
        )
        assert_same(
            [op.launch_dequantize_mxfp8(*have_eights, out)],
            [reference.dequantize_mxfp8(*eights, out)],
        )


def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    fours = sn72kernels.quantize_blocks(x)
    eights = sn72kernels.quantize_blocks(x, format="mxfp8")
    return sn72kernels.dequantize_blocks(*fours), sn72kernels.dequantize_blocks(*eights)


def test_graph_streams_and_torch_compile() -> None:
    first, second = (
        make(64, 768, torch.float16).to(DEVICE),
        make(64, 768, torch.float16, 1).to(DEVICE),
    )
    check_graph_and_streams(call, (first,), (second,))
    assert_same(compiled(call)(first), call(first))
