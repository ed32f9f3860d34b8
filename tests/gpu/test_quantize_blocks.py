"""nvfp4 and mxfp8 on the card: the same bits as the CPU reference."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.quantize_blocks import op, reference
from sn72kernels.testing import assert_capturable, assert_same, assert_stream_safe, poisoned


def make(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** torch.randint(-5, 3, (rows, cols), generator=generator)
    x = torch.randn(rows, cols, generator=generator) * magnitude
    x[torch.rand(rows, cols, generator=generator) < 0.05] = float("nan")
    x[torch.rand(rows, cols, generator=generator) < 0.05] = float("inf")
    return x.to(dtype)


def codes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (33, 96), (577, 1024)])
def test_same_bits_as_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = make(*shape, dtype)
    overall = reference.global_scale_of(x)
    assert torch.equal(reference.global_scale_of(x.cuda()).cpu(), overall)
    fours, eights = reference.quantize_nvfp4(x, overall), reference.quantize_mxfp8(x)
    with poisoned():
        have_fours = op.launch_quantize_nvfp4(x.cuda(), overall.cuda())
        have_eights = op.launch_quantize_mxfp8(x.cuda())
    assert_same([codes(t) for t in have_fours], [codes(t) for t in fours])
    assert_same([codes(t) for t in have_eights], [codes(t) for t in eights])
    for out in (torch.float32, torch.float16, torch.bfloat16):
        assert_same(
            [op.launch_dequantize_nvfp4(*have_fours, overall.cuda(), out)],
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
    first, second = make(64, 768, torch.float16).cuda(), make(64, 768, torch.float16, 1).cuda()
    assert_capturable(call, (first,), (second,))
    assert_stream_safe(call, (first,), (second,))
    assert_same(torch.compile(call, fullgraph=True)(first), call(first))
