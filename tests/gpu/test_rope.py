"""Rotary embedding on the card, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.rope import op, reference, tables
from sn72kernels.testing import assert_close, poisoned
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


SIDE = sizes(24, 4)


def make(heads: int, dtype: torch.dtype, depth: int, seed: int) -> torch.Tensor:
    generator = seeded(seed)
    x = torch.randn(2, SIDE * SIDE + 5, heads, depth, generator=generator)
    return x.to(dtype).to(DEVICE).transpose(1, 2)


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("depth", [64, 80, 128])
def test_against_float64(depth: int, dtype: torch.dtype) -> None:
    q, k = make(12, dtype, depth, 0), make(4, dtype, depth, 1)
    cos, sin = (t.to(DEVICE).expand(2, -1, -1) for t in tables.axial(SIDE, SIDE, depth))
    wanted = reference.rope(*(t.cpu().double() for t in (q, k, cos, sin)))
    with poisoned():
        have = op.launch_rope(q, k, cos, sin)
    op.launch_rope_(q, k, cos, sin)
    for one, same, want in zip(have, (q, k), wanted, strict=True):
        assert_close("x", one, want, relative=ROUNDOFF[dtype], absolute=2.0**-20)
        assert torch.equal(one, same)


def call(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sn72kernels.rope(q, k, *tables.axial(SIDE, SIDE, 64, device=q.device))


def test_graph_streams_and_torch_compile() -> None:
    first, second = (
        (make(6, torch.float16, 64, seed), make(6, torch.float16, 64, seed + 1)) for seed in (0, 2)
    )
    check_graph_and_streams(call, first, second)
    for have, want in zip(compiled(call)(*first), call(*first), strict=True):
        torch.testing.assert_close(have, want, rtol=2.0**-10, atol=2.0**-10)


def test_gradient_is_the_rotation_back() -> None:
    """Through autograd, against float64 on the CPU."""
    q, k = make(4, torch.float32, 64, 0), make(2, torch.float32, 64, 1)
    grads = make(4, torch.float32, 64, 2), make(2, torch.float32, 64, 3)
    cos, sin = tables.axial(SIDE, SIDE, 64)

    def gradients(*tensors: torch.Tensor, exact: bool) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors[:2]]
        op = reference.rope if exact else sn72kernels.rope
        given = [t.to(leaves[0].device) for t in (cos, sin)]
        if exact:
            given = [t.double().expand(2, -1, -1) for t in given]
        return torch.autograd.grad(op(*leaves, *given), leaves, tensors[2:])

    have = gradients(q, k, *grads, exact=False)
    want = gradients(*(t.cpu().double() for t in (q, k, *grads)), exact=True)
    for one, other in zip(have, want, strict=True):
        assert_close("gradient", one, other, relative=2.0**-22, absolute=2.0**-20)
