"""The classifier head on the card, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops import exact
from sn72kernels.ops.classifier_head import op, reference
from sn72kernels.testing import assert_close, poisoned
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes

# Rounding of the features after the norm, times the sum of |terms| of a logit of order one
# (1.13 * sqrt(2 / pi) * sqrt(D) * sqrt(2 / pi) * sqrt(H) for normal inputs, below 512 here).
ROUNDOFF = {torch.float32: 2.0**-18, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def make(rows: int, depth: int, units: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = seeded(seed)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype).to(DEVICE)

    return [
        normal(rows, depth) + 1.5,
        normal(depth),
        normal(depth),
        normal(units, depth, size=depth**-0.5),
        normal(units),
        normal(units, size=units**-0.5),
        normal(),
    ]


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "shape", sizes([(0, 64, 16), (1, 1024, 256), (7, 100, 50), (256, 768, 300)], [(7, 100, 50)])
)
def test_against_float64(shape: tuple[int, int, int], norm: bool, dtype: torch.dtype) -> None:
    arguments = make(*shape, dtype, 0)
    if not norm:
        arguments[1:3] = [None, None]  # type: ignore[list-item]
    tail = (None, None, 0.3, 0.7, norm, 1e-5, False)
    with poisoned():
        logits, p, routes = op.launch_head(*arguments, *tail)
    wide = [None if t is None else t.cpu().double() for t in arguments]
    wanted, _, _ = reference.head(*wide, *tail)
    assert_close("logits", logits, wanted, relative=0.0, absolute=64 * ROUNDOFF[dtype])
    torch.testing.assert_close(p.cpu(), exact.sigmoid(logits.cpu()), rtol=0, atol=0)
    assert torch.equal(routes.cpu(), exact.route(p.cpu(), torch.tensor(0.3), torch.tensor(0.7)))


def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, nw, nb, w1, b1, w2, b2 = arguments
    return tuple(
        sn72kernels.classifier_head(x, w1, b1, w2, b2, norm=True, norm_weight=nw, norm_bias=nb)
    )


def test_graph_streams_and_torch_compile() -> None:
    first, second = (
        make(32, sizes(1024, 64), sizes(256, 16), torch.float16, seed) for seed in (0, 1)
    )
    check_graph_and_streams(call, first, second)
    for have, want in zip(compiled(call)(*first), call(*first), strict=True):
        assert torch.equal(have, want)


def test_large_batch_runs_the_composed_ops() -> None:
    arguments = make(300, 64, 16, torch.float16, 0)
    choice = sn72kernels.explain("classifier_head", arguments[0], arguments[3])
    assert choice.implementation == "reference"
    assert call(*arguments)[0].shape == (300,)
