"""GELU and its slope as kernels compute them, against the definition in float64.

The exact form is a polynomial in place of ``erf``. It is good to 6e-8 of the distribution function
in float32, one unit in the last place of 1, so GELU is good to that times its argument; and below
zero, where the distribution's tail is all there is, to 1e-5 of the value as far as -5.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from sn72kernels.ops import gelu
from sn72kernels.ops import gelu_kernel as kernels
from sn72kernels.testing import assert_close

gelu_block, slope_block = kernels.gelu, kernels.gelu_slope
NAN, INF = math.nan, math.inf


@triton.jit
def apply(z, out, slope, tanh: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * size + tl.arange(0, size)
    value = tl.load(z + at)
    tl.store(out + at, gelu_block(value, tanh))
    tl.store(slope + at, slope_block(value, tanh))


def run(z: torch.Tensor, tanh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, slope = torch.empty_like(z), torch.empty_like(z)
    with np.errstate(all="ignore"):
        apply[(1,)](z, out, slope, tanh=tanh, size=z.numel())
    return out, slope


@pytest.mark.parametrize("tanh", [False, True])
def test_against_float64(tanh: bool) -> None:
    z = torch.cat([torch.linspace(-40, 40, 1 << 15), torch.linspace(-1, 1, 1 << 15)])
    out, slope = run(z, tanh)
    exact = gelu.gelu(z.double(), tanh)
    assert ((out - exact).abs() <= 2e-7 * z.abs() + 1e-8).all()
    # The tanh form takes its gate from 1.
    absolute = 4e-6 if tanh else 4e-7
    assert_close(
        "slope", slope, gelu.gelu_slope(z.double(), tanh), relative=2e-7, absolute=absolute
    )


def test_the_tail_is_right_in_itself() -> None:
    """A formula that takes 1 from a number near 1 would have no digit left here."""
    z = torch.linspace(-5, -1, 1 << 12)
    tail = torch.special.erfc(-z.double() / math.sqrt(2)) / 2
    assert_close("gelu", run(z, False)[0], z.double() * tail, relative=1e-5, absolute=0.0)


def test_what_is_no_number_stays_so() -> None:
    z = torch.tensor([NAN, INF, 0.0, -0.0, 1e30, -1e30, 6.0, -6.0])
    out, slope = run(z, False)
    assert out[0].isnan()
    assert slope[0].isnan()
    assert out[1] == INF
    assert out[2] == out[3] == 0.0
    assert out[4] == 1e30
    assert -1e-8 < out[5] <= 0.0
    assert out[6] == 6.0
    assert -1e-8 < out[7] < 0.0
