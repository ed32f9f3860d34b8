"""The scaled linear layer: int8 to the bit, fp8 and GELU against float64.

Bound for fp8. A float32 sum of K products errs by at most K * 2^-24 of the sum of their sizes,
scaled; scales and bias add three roundings, GELU a few more and at most a slope of 1.13.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sn72kernels
from sn72kernels import device as devices
from sn72kernels.errors import ArgumentError, DtypeError, ShapeError
from sn72kernels.ops.linear import op, reference
from sn72kernels.testing import assert_close

FP8 = torch.float8_e4m3fn
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

pytest.importorskip("triton", reason="Triton is not installed")


def codes(rows: int, depth: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, depth), generator=generator).to(dtype)
    return (torch.randn(rows, depth, generator=generator) * 50).to(dtype)


def scales(count: int, per: bool, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count if per else (), generator=generator) * 1e-3 + 1e-4


@given(
    rows=st.sampled_from((0, 1, 17, 70)),
    depth=st.sampled_from((1, 32, 128, 200)),
    units=st.sampled_from((1, 32, 50)),
    dtype=st.sampled_from((torch.int8, FP8)),
    arch=st.sampled_from((80, 90)),
    out=st.sampled_from(tuple(ROUNDOFF)),
    per=st.tuples(st.booleans(), st.booleans()),
    with_bias=st.booleans(),
    activation=st.sampled_from(("none", "gelu", "gelu_tanh")),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_kernel_against_reference(
    rows: int,
    depth: int,
    units: int,
    dtype: torch.dtype,
    arch: int,
    out: torch.dtype,
    per: tuple[bool, bool],
    with_bias: bool,
    activation: str,
    seed: int,
) -> None:
    x, w = codes(rows, depth, dtype, seed), codes(units, depth, dtype, seed + 1)
    xs, ws = scales(rows, per[0], seed), scales(units, per[1], seed + 1)
    bias = scales(units, True, seed + 2) * 1e3 - 0.5 if with_bias else None
    # The first of the two has no fp8 instructions, so codes are decoded; the other multiplies them.
    with devices.assume(arch):
        have = op.launch_linear(x, xs, w, ws, bias, activation, out)
    if dtype == torch.int8 and activation == "none":
        want = reference.linear(x, xs, w, ws, bias, activation, out)
        torch.testing.assert_close(have, want, rtol=0, atol=0)
    wanted = reference.linear(x, xs, w, ws, bias, activation, torch.float64)
    if rows:
        sizes = reference.linear(
            x.float().abs().to(FP8) if dtype == FP8 else x, xs,
            w.float().abs().to(FP8) if dtype == FP8 else w, ws, None, "none", torch.float64,
        ).abs().max()  # fmt: skip
        added = depth if dtype == FP8 else 0
        absolute = (added + 16) * 2.0**-24 * (float(sizes) + 1.0)
        assert_close("out", have, wanted, relative=2 * ROUNDOFF[out], absolute=absolute)


def test_quantised_layer_is_near_the_layer() -> None:
    """Per-token int8 errs by half a step of amax / 127 on either side of each product."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 24).requires_grad_(False), torch.randn(2, 5, 64)
    for dtype, error in ((torch.int8, 0.5 / 127), (FP8, 2.0**-4)):
        xq = sn72kernels.quantize(x, granularity="token", dtype=dtype)
        wq = sn72kernels.quantize(layer.weight, granularity="token", dtype=dtype)
        have = sn72kernels.linear(*xq, *wq, layer.bias, activation="gelu", dtype=torch.float32)
        want = torch.nn.functional.gelu(layer(x))
        largest = x.abs().amax(-1, keepdim=True) * layer.weight.abs().amax(1)
        assert bool(((have - want).abs() <= 1.13 * 64 * largest * (2 * error + error**2)).all())


def test_compile_and_export() -> None:
    torch.use_deterministic_algorithms(False)
    x, w = codes(5, 32, torch.int8, 0), codes(8, 32, torch.int8, 1)
    xs, ws = scales(5, True, 0), scales(8, True, 1)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sn72kernels.linear(x, xs[0], w, ws, activation="gelu_tanh")

    want = Model()(x)
    assert torch.equal(torch.compile(Model(), fullgraph=True, backend="aot_eager")(x), want)
    assert torch.equal(torch.export.export(Model(), (x,)).module()(x), want)


def test_long_rows_of_int8_run_the_reference() -> None:
    """131071 products of -128 and -128 fit 32 bits, one more does not."""
    assert op.LINEAR.unsupported(torch.empty(1, 131071, dtype=torch.int8)) is None
    assert "131072 products" in str(op.LINEAR.unsupported(torch.empty(1, 131072, dtype=torch.int8)))
    assert op.LINEAR.unsupported(torch.empty(1, 131072, dtype=FP8)) is None


def test_errors_name_the_argument() -> None:
    x, w, one = codes(5, 32, torch.int8, 0), codes(8, 32, torch.int8, 1), torch.ones(())
    with pytest.raises(DtypeError, match="dtype of x: expected int8 or float8_e4m3fn"):
        sn72kernels.linear(x.float(), one, w, one)
    with pytest.raises(DtypeError, match="dtype of w: expected int8"):
        sn72kernels.linear(x, one, w.float().to(FP8), one)
    with pytest.raises(ShapeError, match=r"shape of w: expected \(any, 32\), got \(8, 31\)"):
        sn72kernels.linear(x, one, w[:, 1:], one)
    with pytest.raises(ShapeError, match=r"shape of x_scale: expected \(5\), got \(4,\)"):
        sn72kernels.linear(x, torch.ones(4), w, one)
    with pytest.raises(ShapeError, match=r"shape of w_scale: expected \(8\), got \(5,\)"):
        sn72kernels.linear(x, one, w, torch.ones(5))
    with pytest.raises(ArgumentError, match="activation is 'relu'"):
        sn72kernels.linear(x, one, w, one, activation="relu")
    with pytest.raises(ArgumentError, match=r"dtype is torch\.int8"):
        sn72kernels.linear(x, one, w, one, dtype=torch.int8)
