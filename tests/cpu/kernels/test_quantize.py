"""Quantisation: kernels and reference give the same bits; the reference is the plain definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sn72kernels
from sn72kernels.errors import ArgumentError, DtypeError, ShapeError
from sn72kernels.ops.quantize import op, reference

pytest.importorskip("triton", reason="Triton is not installed")

NAN, INF = math.nan, math.inf
FP8 = torch.float8_e4m3fn
GRANULARITIES = ("tensor", "channel", "token")


def make(rows: int, cols: int, dtype: torch.dtype, strided: bool, seed: int) -> torch.Tensor:
    """Values over many magnitudes, with ties of both formats and unusable ones among them."""
    rng = np.random.default_rng(seed)
    data = rng.normal(0, 1, (rows, cols)) * 10.0 ** rng.integers(-5, 3, (rows, cols))
    special = np.array(
        (NAN, INF, -INF, 0.0, -0.0, 0.5, 1.5, -2.5, 126.5, 127.5, -128.5, 448.0, 464.0, 480.0,
         2.0**-10, 3 * 2.0**-10, 2.0**-6, 15.5 * 2.0**-10, 17.0, 19.0, 1e-42)
    )  # fmt: skip
    data = np.where(rng.random((rows, cols)) < 0.3, rng.choice(special, (rows, cols)), data)
    tensor = torch.from_numpy(data.astype(np.float32)).to(dtype)
    if not strided:
        return tensor
    return torch.cat((tensor, tensor), 1)[:, :cols]


def scales(x: torch.Tensor, granularity: str, unit: bool, seed: int) -> torch.Tensor:
    shape = {"tensor": (), "channel": x.shape[-1:], "token": x.shape[:-1]}[granularity]
    if unit:
        return torch.ones(shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.3 + 1e-4


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in (torch.int8, FP8) else tensor


def assert_same(have: torch.Tensor, want: torch.Tensor) -> None:
    assert have.dtype == want.dtype
    torch.testing.assert_close(bits(have), bits(want), rtol=0, atol=0, equal_nan=True)


CASES = {
    "rows": st.sampled_from((0, 1, 3, 17)),
    "cols": st.sampled_from((1, 7, 64, 1000, 2049)),
    "dtype": st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    "strided": st.booleans(),
    "granularity": st.sampled_from(GRANULARITIES),
    "fp8": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@given(**CASES, unit=st.booleans(), out=st.sampled_from(op.DTYPES))
@settings(max_examples=40, deadline=None)
def test_static_kernels_give_the_bits_of_the_reference(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    strided: bool,
    granularity: str,
    fp8: bool,
    seed: int,
    unit: bool,
    out: torch.dtype,
) -> None:
    x = make(rows, cols, dtype, strided, seed)
    scale = scales(x, granularity, unit, seed)
    codes = op.launch_static(x, scale, granularity, fp8)
    assert_same(codes, reference.quantize_static(x, scale, granularity, fp8))
    assert_same(
        op.launch_dequantize(codes, scale, granularity, out),
        reference.dequantize(codes, scale, granularity, out),
    )


@given(
    rows=st.sampled_from((0, 1, 5)),
    cols=st.sampled_from((1, 7, 1000, 16384, 20001)),
    dtype=CASES["dtype"],
    strided=st.booleans(),
    fp8=st.booleans(),
    seed=CASES["seed"],
)
@settings(max_examples=25, deadline=None)
def test_token_kernels_give_the_bits_of_the_reference(
    rows: int, cols: int, dtype: torch.dtype, strided: bool, fp8: bool, seed: int
) -> None:
    x = make(rows, cols, dtype, strided, seed)
    for have, want in zip(op.launch_token(x, fp8), reference.quantize_token(x, fp8), strict=True):
        assert_same(have, want)


def test_every_code_of_fp8_goes_there_and_back() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8)[None]
    one = torch.ones(())
    values = op.launch_dequantize(codes, one, "tensor", torch.float32)
    torch.testing.assert_close(values, codes.float(), rtol=0, atol=0, equal_nan=True)
    again = op.launch_static(values, one, "tensor", True)
    number = ~values.isnan()
    assert torch.equal(bits(again)[number], bits(codes)[number])
    assert (bits(again)[~number] == 0x7F).all()


def test_fp8_rounds_half_to_even_between_all_neighbours() -> None:
    values = torch.arange(0x7F, dtype=torch.int32).to(torch.uint8).view(FP8).float()
    middle = (values[:-1] + values[1:]) / 2
    codes = bits(op.launch_static(middle[None], torch.ones(()), "tensor", True))[0].int()
    lower = torch.arange(0x7E, dtype=torch.int32)
    assert torch.equal(codes, lower + (lower & 1))


@given(seed=CASES["seed"], granularity=CASES["granularity"])
@settings(max_examples=20, deadline=None)
def test_int8_is_the_plain_definition(seed: int, granularity: str) -> None:
    x = make(4, 9, torch.float32, False, seed)
    scale = scales(x, granularity, False, seed)
    codes = sn72kernels.quantize(x, scale, granularity=granularity).values
    spread = scale.numpy()[:, None] if granularity == "token" else scale.numpy()
    value = np.nan_to_num(x.numpy() / spread, nan=0.0, posinf=1e9, neginf=-1e9)
    wanted = np.clip(np.rint(value), -128, 127).astype(np.int8)
    np.testing.assert_array_equal(codes.numpy(), wanted)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.int8, 0.5 / 127), (FP8, 2.0**-4)])
def test_error_of_going_there_and_back(granularity: str, dtype: torch.dtype, error: float) -> None:
    """int8 errs by half a step of amax / 127; fp8 by half a step of 3 mantissa bits."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    quantized = sn72kernels.quantize(x, granularity=granularity, dtype=dtype)
    back = sn72kernels.dequantize(*quantized, granularity=granularity)
    largest = {"tensor": x.abs().amax(), "channel": x.abs().amax(0), "token": x.abs().amax(1, True)}
    bound = error * largest[granularity] * 1.001
    assert bool(((back - x).abs() <= bound).all())
    assert float((back - x).abs().max()) > 0.0


def test_zeros_and_unusable_rows_get_scale_one() -> None:
    x = torch.tensor([[0.0, 0.0], [NAN, INF], [1e-45, 0.0]])
    for dtype in (torch.int8, FP8):
        quantized = sn72kernels.quantize(x, granularity="token", dtype=dtype)
        assert quantized.scale.tolist() == [1.0, 1.0, 1.0]
    assert sn72kernels.quantize(x, granularity="token").values.tolist() == [
        [0, 0],
        [0, 127],
        [0, 0],
    ]
    empty = sn72kernels.quantize(torch.zeros(0, 3), granularity="channel")
    assert empty.scale.tolist() == [1.0, 1.0, 1.0]


def test_compile_and_export() -> None:
    torch.use_deterministic_algorithms(False)
    x = torch.randn(4, 8)

    def call(x: torch.Tensor) -> torch.Tensor:
        quantized = sn72kernels.quantize(x, granularity="token", dtype=FP8)
        return sn72kernels.dequantize(*quantized, granularity="token")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(x)

    assert torch.equal(torch.export.export(Model(), (x,)).module()(x), call(x))


def test_errors_name_the_argument() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(DtypeError, match="dtype of x"):
        sn72kernels.quantize(x.int())
    with pytest.raises(ShapeError, match=r"shape of scale: expected \(3\), got \(2,\)"):
        sn72kernels.quantize(x, torch.ones(2), granularity="channel")
    with pytest.raises(ShapeError, match=r"shape of scale: expected \(\), got \(1,\)"):
        sn72kernels.quantize(x, torch.ones(1))
    with pytest.raises(ArgumentError, match="granularity is 'row'; give"):
        sn72kernels.quantize(x, granularity="row")
    with pytest.raises(ArgumentError, match=r"dtype is torch.uint8; give"):
        sn72kernels.quantize(x, dtype=torch.uint8)
    with pytest.raises(DtypeError, match="dtype of values: expected int8 or float8_e4m3fn"):
        sn72kernels.dequantize(x, torch.ones(()))
    with pytest.raises(ArgumentError, match=r"dtype is torch.int8; give one of"):
        sn72kernels.dequantize(x.to(torch.int8), torch.ones(()), dtype=torch.int8)
    with pytest.raises(ShapeError, match=r"shape of x: expected \(\.\.\., N\)"):
        sn72kernels.quantize(torch.zeros(()))
