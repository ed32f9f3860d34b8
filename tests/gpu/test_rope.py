"""Rotary embedding on the card, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.rope import op, reference, tables
from sn72kernels.testing import assert_capturable, assert_close, assert_stream_safe, poisoned

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def make(heads: int, dtype: torch.dtype, depth: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 24 * 24 + 5, heads, depth, generator=generator)
    return x.to(dtype).cuda().transpose(1, 2)


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("depth", [64, 80, 128])
def test_against_float64(depth: int, dtype: torch.dtype) -> None:
    q, k = make(12, dtype, depth, 0), make(4, dtype, depth, 1)
    cos, sin = (t.cuda().expand(2, -1, -1) for t in tables.axial(24, 24, depth))
    wanted = reference.rope(*(t.cpu().double() for t in (q, k, cos, sin)))
    with poisoned():
        have = op.launch_rope(q, k, cos, sin)
    op.launch_rope_(q, k, cos, sin)
    for one, same, want in zip(have, (q, k), wanted, strict=True):
        assert_close("x", one, want, relative=ROUNDOFF[dtype], absolute=2.0**-20)
        assert torch.equal(one, same)


def call(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sn72kernels.rope(q, k, *tables.axial(24, 24, 64, device=q.device))


def test_graph_streams_and_torch_compile() -> None:
    first, second = (
        (make(6, torch.float16, 64, seed), make(6, torch.float16, 64, seed + 1)) for seed in (0, 2)
    )
    assert_capturable(call, first, second)
    assert_stream_safe(call, first, second)
    for have, want in zip(torch.compile(call, fullgraph=True)(*first), call(*first), strict=True):
        torch.testing.assert_close(have, want, rtol=2.0**-10, atol=2.0**-10)
