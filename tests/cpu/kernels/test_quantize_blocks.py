"""nvfp4 and mxfp8: kernels and reference give the same bits; the reference is the definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sn72kernels
from sn72kernels.errors import ArgumentError, DtypeError, ShapeError
from sn72kernels.ops.quantize_blocks import op, reference

pytest.importorskip("triton", reason="Triton is not installed")

NAN, INF = math.nan, math.inf
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def make(rows: int, cols: int, dtype: torch.dtype, strided: bool, seed: int) -> torch.Tensor:
    """Blocks of many magnitudes, some zero, with ties and unusable values among them."""
    rng = np.random.default_rng(seed)
    data = rng.normal(0, 1, (rows, cols)) * 10.0 ** rng.integers(-3, 3, (rows, cols))
    special = np.array((NAN, INF, -INF, 0.0, -0.0, 0.25, 0.75, -1.25, 2.5, 5.0, 448.0, 1e-42))
    data = np.where(rng.random((rows, cols)) < 0.2, rng.choice(special, (rows, cols)), data)
    data *= np.repeat(rng.choice((0.0, 1e-30, 1.0, 1e3), (rows, cols // 16)), 16, axis=1)
    tensor = torch.from_numpy(data.astype(np.float32)).to(dtype)
    return torch.cat((tensor, tensor), 1)[:, :cols] if strided else tensor


def assert_same(have: torch.Tensor, want: torch.Tensor) -> None:
    assert have.dtype == want.dtype
    if have.element_size() == 1:
        have, want = have.view(torch.uint8), want.view(torch.uint8)
    torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


@given(
    rows=st.sampled_from((0, 1, 5)),
    blocks=st.sampled_from((1, 3, 64, 70)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_kernels_give_the_bits_of_the_reference(
    rows: int, blocks: int, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    x = make(rows, blocks * 32, dtype, strided, seed)
    overall = reference.global_scale_of(x)
    fours = op.launch_quantize_nvfp4(x, overall)
    eights = op.launch_quantize_mxfp8(x)
    for have, want in zip(fours, reference.quantize_nvfp4(x, overall), strict=True):
        assert_same(have, want)
    for have, want in zip(eights, reference.quantize_mxfp8(x), strict=True):
        assert_same(have, want)
    for out in op.DTYPES:
        assert_same(
            op.launch_dequantize_nvfp4(*fours, overall, out),
            reference.dequantize_nvfp4(*fours, overall, out),
        )
        assert_same(
            op.launch_dequantize_mxfp8(*eights, out), reference.dequantize_mxfp8(*eights, out)
        )


def test_every_scale_of_e8m0_decodes() -> None:
    scale = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e8m0fnu)
    ones = torch.ones(256, 32).to(torch.float8_e4m3fn)
    have = op.launch_dequantize_mxfp8(ones, scale[:, None], torch.float32)
    wanted = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [NAN])
    assert_same(have, wanted[:, None].expand(256, 32).contiguous())
    assert_same(have, sn72kernels.dequantize_blocks(ones, scale[:, None]))


@pytest.mark.parametrize("quantize", [op.launch_quantize_nvfp4, reference.quantize_nvfp4])
def test_e2m1_rounds_half_to_even(quantize: object) -> None:
    """Every value and every middle, by hand; the block's largest value fixes its scale at 1."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
    x = torch.tensor([*E2M1, *middles, 6.0])
    codes = [0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 2, 4, 4, 6, 6, 7]
    for sign, offset in ((1.0, 0), (-1.0, 8)):
        values, scale = quantize((sign * x)[None], torch.ones(()))  # type: ignore[operator]
        assert scale.float().item() == 1.0
        halves = torch.stack((values & 15, values >> 4), -1).flatten().tolist()
        assert halves == [code + offset for code in codes]


def test_e2m1_neighbours_of_middles_go_to_the_nearest() -> None:
    middles = np.array([(a + b) / 2 for a, b in itertools.pairwise(E2M1)], np.float32)
    below, above = np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(9))
    x = torch.from_numpy(np.concatenate((below, above, [6.0, 0.0]))).float()[None]
    values, _ = op.launch_quantize_nvfp4(x, torch.ones(()))
    halves = torch.stack((values & 15, values >> 4), -1).flatten().tolist()
    assert halves == [*range(7), *range(1, 8), 7, 0]


@given(exponent=st.integers(-140, 127), mantissa=st.integers(0, 2**23 - 1))
@settings(max_examples=60, deadline=None)
def test_mxfp8_scale_is_the_smallest_power_that_fits(exponent: int, mantissa: int) -> None:
    largest = float(np.float32((1 + mantissa / 2**23) * 2.0**exponent))
    quantized = sn72kernels.quantize_blocks(torch.full((32,), largest), format="mxfp8")
    code = int(quantized.scale.view(torch.uint8))
    assert largest <= 448.0 * 2.0 ** (code - 127)
    assert code == 0 or largest > 448.0 * 2.0 ** (code - 128)


def test_error_of_going_there_and_back() -> None:
    """e2m1 errs by at most 1/6 of the block's largest value, e4m3 by 2^-4 of the value."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    back = sn72kernels.dequantize_blocks(*sn72kernels.quantize_blocks(x))
    largest = x.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True).expand(-1, -1, 16).flatten(1)
    # The block scale itself is rounded: 2^-4 relative.
    assert bool(((back - x).abs() <= largest / 6 * (1 + 2.0**-4)).all())
    back = sn72kernels.dequantize_blocks(*sn72kernels.quantize_blocks(x, format="mxfp8"))
    step = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    assert bool(((back - x).abs() <= x.abs() * 2.0**-4 + step * 2.0**-16).all())
    assert float((back - x).abs().max()) > 0.0


def test_zero_and_unusable_blocks() -> None:
    x = torch.tensor([[0.0] * 32, [NAN] * 16 + [INF] * 16])
    quantized = sn72kernels.quantize_blocks(x)
    assert quantized.global_scale is not None
    assert quantized.global_scale.item() == 1.0
    back = sn72kernels.dequantize_blocks(*quantized)
    assert back[0].tolist() == [0.0] * 32
    assert back[1].tolist() == [0.0] * 16 + [6 * 2.0**-9] * 16
    quantized = sn72kernels.quantize_blocks(x, format="mxfp8")
    back = sn72kernels.dequantize_blocks(*quantized)
    assert back[0].tolist() == [0.0] * 32
    assert back[1, :16].isnan().all()
    assert (back[1, 16:] == 448 * 2.0**-127).all()


def test_compile_and_export() -> None:
    torch.use_deterministic_algorithms(False)
    x = torch.randn(4, 64)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            fours = sn72kernels.quantize_blocks(x)
            eights = sn72kernels.quantize_blocks(x, format="mxfp8")
            return (
                sn72kernels.dequantize_blocks(*fours),
                sn72kernels.dequantize_blocks(*eights),
            )

    want = Model()(x)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")(x)
    exported = torch.export.export(Model(), (x,)).module()(x)
    for have in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_errors_name_the_argument() -> None:
    x = torch.zeros(2, 32)
    with pytest.raises(DtypeError, match="dtype of x"):
        sn72kernels.quantize_blocks(x.double())
    with pytest.raises(ShapeError, match=r"shape of x: .* multiple of 32 for mxfp8, got \(2, 16\)"):
        sn72kernels.quantize_blocks(x[:, :16], format="mxfp8")
    with pytest.raises(ArgumentError, match="format is 'fp4'; give 'nvfp4' or 'mxfp8'"):
        sn72kernels.quantize_blocks(x, format="fp4")
    with pytest.raises(ArgumentError, match="global_scale is given, but mxfp8 has none"):
        sn72kernels.quantize_blocks(x, torch.ones(()), format="mxfp8")
    with pytest.raises(ShapeError, match=r"shape of global_scale: expected \(\), got \(1,\)"):
        sn72kernels.quantize_blocks(x, torch.ones(1))
    values, scale, overall = sn72kernels.quantize_blocks(x)
    with pytest.raises(ArgumentError, match="global_scale is missing"):
        sn72kernels.dequantize_blocks(values, scale)
    with pytest.raises(ShapeError, match=r"shape of scale: expected \(2, 2\), got \(2, 1\)"):
        sn72kernels.dequantize_blocks(values, scale[:, :1], overall)
    with pytest.raises(ArgumentError, match=r"dtype is torch.int8; give one of"):
        sn72kernels.dequantize_blocks(values, scale, overall, dtype=torch.int8)
    with pytest.raises(ShapeError, match="whole blocks of 8 along the last axis"):
        sn72kernels.dequantize_blocks(values[:, :9], scale[:, :1], overall)
