"""Attention: kernel against float64, the choice of implementation.

Bound. A result is a mean of values with weights that sum to one. Rounding the weights to the
dtype of the values (u) and the result (u) errs by 2u of the largest value. A score is a float32
sum of D products, so it errs by at most D * 2^-24 of the sum of their sizes, and a weight by
twice that, relative.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import sn72kernels
from sn72kernels import device as devices
from sn72kernels import library
from sn72kernels.errors import ArgumentError, DtypeError, GradientError, ShapeError
from sn72kernels.ops.attention import op, reference
from sn72kernels.testing import assert_close

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

pytest.importorskip("triton", reason="Triton is not installed")


def make(
    heads: int, tokens: int, depth: int, dtype: torch.dtype, layout: str, seed: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(2, tokens, heads, depth, generator=generator).to(dtype)
    if layout == "tokens first":
        return data.transpose(1, 2)
    if layout == "part of qkv":
        return torch.stack((data, data * float("nan")), 2)[:, :, 0].transpose(1, 2)
    assert layout == "columns apart"
    return data.permute(0, 3, 2, 1).contiguous().permute(0, 2, 3, 1)


@given(
    tokens=st.sampled_from((0, 1, 33)),
    keys=st.sampled_from((1, 31, 64, 133)),
    depth=st.sampled_from((3, 16, 64, 72, 80, 128)),
    dtype=st.sampled_from(tuple(ROUNDOFF)),
    layout=st.sampled_from(("tokens first", "part of qkv", "columns apart")),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None)
def test_kernel_against_float64(
    tokens: int, keys: int, depth: int, dtype: torch.dtype, layout: str, seed: int
) -> None:
    q = make(2, tokens, depth, dtype, layout, seed) * 3
    k, v = (make(2, keys, depth, dtype, layout, seed + n) for n in (1, 2))
    scale = depth**-0.5
    out = op.launch_triton(q, k, v, scale)
    wide = [t.double() for t in (q, k, v)]
    sizes = float((wide[0].abs() @ wide[1].abs().mT).max()) * scale if tokens else 0.0
    largest = float(wide[2].abs().max())
    share = 2 * ROUNDOFF[dtype] + (2 * (depth + 4) * sizes + keys + 16) * 2.0**-24
    assert_close(
        "out",
        out,
        reference.attention(*wide, scale, "auto"),
        relative=0.0,
        absolute=share * largest,
    )
    assert out.transpose(1, 2).is_contiguous()


def test_large_scores_do_not_overflow() -> None:
    q = torch.full((1, 1, 2, 16), 1e3)
    v = torch.arange(40.0).expand(16, 40).t()[None, None]
    k = torch.zeros(1, 1, 40, 16)
    k[0, 0, 37] = 1e3
    out = op.launch_triton(q, k, v, 1.0)
    assert (out == 37.0).all()


def test_public_op_is_the_plain_formula() -> None:
    q, k, v = (make(2, n, 8, torch.float64, "tokens first", n) for n in (5, 7, 7))
    weights = torch.softmax(q @ k.mT / 8**0.5, -1)
    torch.testing.assert_close(sn72kernels.attention(q, k, v), weights @ v)
    weights = torch.softmax(q @ k.mT * 0.3, -1)
    torch.testing.assert_close(sn72kernels.attention(q, k, v, scale=0.3), weights @ v)


@pytest.mark.parametrize(
    ("flash", "depth", "dtype", "asked", "ran", "why"),
    [
        (True, 64, torch.float16, "auto", "flash_attn", "installed and takes"),
        (True, 64, torch.float16, "triton", "triton", "asked for"),
        (True, 64, torch.float16, "sdpa", "sdpa", "asked for"),
        (True, 64, torch.float32, "triton", "sdpa", "better kernel for torch.float32"),
        (True, 192, torch.bfloat16, "auto", "flash_attn", "installed and takes"),
        (False, 80, torch.float16, "auto", "triton", "not installed"),
        (False, 192, torch.float16, "auto", "sdpa", "wider than 128, and flash-attn is not"),
        (True, 300, torch.float16, "auto", "sdpa", "does not take heads of 300"),
    ],
)
def test_choice_and_its_reason(
    monkeypatch: pytest.MonkeyPatch,
    flash: bool,
    depth: int,
    dtype: torch.dtype,
    asked: str,
    ran: str,
    why: str,
) -> None:
    monkeypatch.setattr(library, "triton_available", lambda: True)
    monkeypatch.setattr(op, "flash_available", lambda: flash)
    with FakeTensorMode():  # knows dtype, device and shape, and has no memory
        q = torch.empty(1, 2, 5, depth, dtype=dtype, device="cuda")
    with devices.assume(90):
        choice = op.explain(q, q, q, implementation=asked)
    assert choice.implementation == ran
    assert why in choice.reason


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "ran"),
    [
        ((2, 3, 5, 64), (960, 64, 192, 1), 8, "flash_attn"),
        ((2, 3, 5, 64), (960, 64, 192, 1), 1, "triton"),
        ((2, 3, 5, 64), (975, 65, 195, 1), 0, "triton"),
        ((1, 1, 5, 64), (7, 7, 64, 1), 0, "flash_attn"),
        ((2, 3, 5, 64), (960, 64, 192, 3), 0, "flash_attn"),
        ((0, 3, 5, 64), (960, 64, 192, 1), 0, "triton"),
    ],
    ids=["whole vectors", "misaligned", "odd rows", "steps not taken", "copied", "empty"],
)
def test_flash_attn_gets_only_what_it_reads_safely(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    ran: str,
) -> None:
    """It checks no alignment: a misaligned read takes the whole process down."""
    monkeypatch.setattr(library, "triton_available", lambda: True)
    monkeypatch.setattr(op, "flash_available", lambda: True)
    with FakeTensorMode(), devices.assume(90):
        memory = torch.empty(1 << 13, dtype=torch.float16, device="cuda")
        q = memory.as_strided(shape, stride, offset)
        plain = torch.empty(shape, dtype=torch.float16, device="cuda")
        for tensors in ((q, plain, plain), (plain, q, plain), (plain, plain, q)):
            assert op.explain(*tensors).implementation == ran


def test_compile_and_export() -> None:
    torch.use_deterministic_algorithms(False)
    q, k, v = (make(2, n, 8, torch.float32, "tokens first", n) for n in (5, 7, 7))

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return sn72kernels.attention(q, k, v)

    want = Model()(q, k, v)
    assert torch.equal(torch.compile(Model(), fullgraph=True, backend="aot_eager")(q, k, v), want)
    assert torch.equal(torch.export.export(Model(), (q, k, v)).module()(q, k, v), want)


def test_gradients_are_those_of_the_plain_formula() -> None:
    q, k, v = (make(2, n, 3, torch.float64, "tokens first", n)[:1] for n in (4, 5, 5))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(sn72kernels.attention, leaves)
    choice = sn72kernels.explain("attention", *leaves)
    assert (choice.implementation, "a gradient is wanted" in choice.reason) == ("sdpa", True)
    with pytest.raises(GradientError, match=r"attention\(implementation='triton'\) has no backwa"):
        sn72kernels.attention(*leaves, implementation="triton")
    with torch.no_grad():
        assert "not on a CUDA device" in sn72kernels.explain("attention", *leaves).reason


def test_errors_name_the_argument() -> None:
    q = torch.zeros(2, 3, 4, 8)
    assert sn72kernels.explain("attention", q, q, q).implementation == "sdpa"
    with pytest.raises(ArgumentError, match="implementation='triton' cannot run here: the tensors"):
        sn72kernels.attention(q, q, q, implementation="triton")
    with pytest.raises(ArgumentError, match="implementation is 'best'; give one of auto"):
        sn72kernels.attention(q, q, q, implementation="best")
    with pytest.raises(ShapeError, match=r"shape of k: expected \(2, 3, any, 8\)"):
        sn72kernels.attention(q, q[:1], q)
    with pytest.raises(DtypeError, match="dtype of v: expected float32, got float16"):
        sn72kernels.attention(q, q, q.half())
    with pytest.raises(ShapeError, match="shape of k: expected at least one key"):
        sn72kernels.attention(q, q[:, :, :0], q[:, :, :0])
