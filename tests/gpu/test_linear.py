"""The scaled linear layer on the card: int8 to the bit, fp8 against float64."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.linear import op, reference
from sn72kernels.testing import (
    assert_close,
    assert_same,
    poisoned,
)
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes


def make(rows: int, depth: int, units: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = seeded(seed)
    x, w = (torch.randn(n, depth, generator=generator) for n in (rows, units))
    xq, wq = (sn72kernels.quantize(t, granularity="token", dtype=dtype) for t in (x, w))
    return [*xq, *wq, torch.randn(units, generator=generator)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "shape", sizes([(1, 32, 1), (16, 1024, 256), (50, 1000, 300), (200, 768, 768)], [(5, 100, 30)])
)
def test_against_the_reference(
    shape: tuple[int, int, int], activation: str, dtype: torch.dtype
) -> None:
    arguments = make(*shape, dtype, 0)
    on_card = [t.to(DEVICE) for t in arguments]
    with poisoned():
        have = op.launch_linear(*on_card, activation, torch.float16)
    if dtype == torch.int8 and activation == "none":
        assert_same([have], [reference.linear(*arguments, activation, torch.float16)])
    wanted = reference.linear(*arguments, activation, torch.float64)
    # The instructions keep 13 bits below the largest of 32 products and the sum so far, and cut off
    # the rest of each: about 2^-12 of the size of a sum over K products. The worst of 10^5 sums,
    # with room; a wrong one is off by its size, sqrt(K).
    absolute = 2.0**-8 * shape[1] ** 0.5 if dtype != torch.int8 else 2.0**-16
    assert_close("out", have, wanted, relative=2.0**-10, absolute=absolute)


def call(*arguments: torch.Tensor) -> tuple[torch.Tensor]:
    return (sn72kernels.linear(*arguments, activation="gelu"),)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_graph_streams_and_torch_compile(dtype: torch.dtype) -> None:
    first, second = ([t.to(DEVICE) for t in make(16, 256, 64, dtype, seed)] for seed in (0, 1))
    check_graph_and_streams(call, first, second)
    assert_same(compiled(call)(*first), call(*first))
