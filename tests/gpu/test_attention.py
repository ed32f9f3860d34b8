"""Attention on the card, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.attention import op, reference
from sn72kernels.testing import assert_close, poisoned
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes

# Weights and result are rounded once each; float32 runs SDPA.
RELATIVE = {torch.float32: 2.0**-17, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def make(tokens: int, depth: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = seeded(seed)
    x = torch.randn(2, tokens, 3, depth, generator=generator)
    return x.to(dtype).to(DEVICE).transpose(1, 2)


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("depth", [16, 64, 72, 80, 128])
@pytest.mark.parametrize("tokens", sizes([1, 64, 197, 581], [33]))
def test_against_float64(tokens: int, depth: int, dtype: torch.dtype) -> None:
    """What ``auto`` chooses, and the kernel where there is one for the dtype."""
    q, k, v = (make(tokens, depth, dtype, seed) for seed in range(3))
    wanted = reference.attention(*(t.cpu().double() for t in (q, k, v)), depth**-0.5, "auto")
    with poisoned():
        outputs = [sn72kernels.attention(q, k, v)]
        if dtype in op.KERNEL_DTYPES:
            outputs.append(op.launch_triton(q, k, v, depth**-0.5))
    largest = float(v.abs().max())
    for out in outputs:
        assert_close("out", out, wanted, relative=0.0, absolute=RELATIVE[dtype] * largest)


def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor]:
    return (sn72kernels.attention(q, k, v, implementation=sizes("triton", "auto")),)


def test_graph_streams_and_torch_compile() -> None:
    first, second = (
        [make(sizes(197, 20), 64, torch.float16, seed + n) for n in range(3)] for seed in (0, 3)
    )
    check_graph_and_streams(call, first, second)
    assert torch.equal(compiled(call)(*first)[0], call(*first)[0])
