"""Attention on the card, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.attention import op, reference
from sn72kernels.testing import assert_capturable, assert_close, assert_stream_safe, poisoned

# Weights and result are rounded once each; float32 runs SDPA.
RELATIVE = {torch.float32: 2.0**-17, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def make(tokens: int, depth: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 3, depth, generator=generator)
    return x.to(dtype).cuda().transpose(1, 2)


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("depth", [16, 64, 72, 80, 128])
@pytest.mark.parametrize("tokens", [1, 64, 197, 581])
@pytest.mark.parametrize("implementation", ["triton", "auto"])
def test_against_float64(implementation: str, tokens: int, depth: int, dtype: torch.dtype) -> None:
    if implementation == "triton" and dtype not in op.KERNEL_DTYPES:
        pytest.skip("there is no kernel for float32")
    q, k, v = (make(tokens, depth, dtype, seed) for seed in range(3))
    wanted = reference.attention(*(t.cpu().double() for t in (q, k, v)), depth**-0.5, "auto")
    with poisoned():
        out = sn72kernels.attention(q, k, v, implementation=implementation)
    largest = float(v.abs().max())
    assert_close("out", out, wanted, relative=0.0, absolute=RELATIVE[dtype] * largest)


def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor]:
    return (sn72kernels.attention(q, k, v, implementation="triton"),)


def test_graph_streams_and_torch_compile() -> None:
    first, second = ([make(197, 64, torch.float16, seed + n) for n in range(3)] for seed in (0, 3))
    assert_capturable(call, first, second)
    assert_stream_safe(call, first, second)
    assert torch.equal(torch.compile(call, fullgraph=True)(*first)[0], call(*first)[0])
