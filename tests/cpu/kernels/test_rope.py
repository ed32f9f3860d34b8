"""Rotary embedding: tables and rotation against transformers; kernel against float64.

Bound. A rotated element is the rounded sum of two products: u relative for the rounding and
3 * 2^-24 of the products' sizes, which may cancel.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sn72kernels
from sn72kernels.errors import ArgumentError, DtypeError, GradientError, ShapeError
from sn72kernels.ops.rope import op, reference, tables
from sn72kernels.testing import assert_close

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

pytest.importorskip("triton", reason="Triton is not installed")


def make(
    batch: int, heads: int, tokens: int, depth: int, dtype: torch.dtype, layout: str, seed: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(batch, tokens, heads, depth, generator=generator).to(dtype)
    if layout == "contiguous":
        return data.transpose(1, 2).contiguous()
    if layout == "tokens first":
        return data.transpose(1, 2)
    assert layout == "part of qkv"
    return torch.stack((data, data * float("nan")), 2)[:, :, 0].transpose(1, 2)


@given(
    batch=st.sampled_from((0, 1, 2)),
    heads=st.sampled_from(((1, 1), (3, 1), (2, 2))),
    patches=st.sampled_from((0, 1, 33)),
    prefix=st.sampled_from((0, 1, 5)),
    depth=st.sampled_from((2, 16, 80)),
    dtype=st.sampled_from(tuple(ROUNDOFF)),
    layout=st.sampled_from(("contiguous", "tokens first", "part of qkv")),
    per_sample=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_kernels_against_float64(
    batch: int,
    heads: tuple[int, int],
    patches: int,
    prefix: int,
    depth: int,
    dtype: torch.dtype,
    layout: str,
    per_sample: bool,
    seed: int,
) -> None:
    tokens = patches + prefix
    q, k = (make(batch, n, tokens, depth, dtype, layout, seed + n) for n in heads)
    angles = torch.randn(batch if per_sample else 1, patches, depth)
    cos, sin = (t.expand(batch, patches, depth) for t in (angles.cos(), angles.sin()))
    wanted = reference.rope(q.double(), k.double(), cos.double(), sin.double())
    before = q[:, :, :prefix].clone()
    have = op.launch_rope(q, k, cos, sin)
    q, k = q.clone(memory_format=torch.preserve_format), k.clone()
    op.launch_rope_(q, k, cos, sin)
    for name, one, same, want in zip("qk", have, (q, k), wanted, strict=True):
        assert one.is_contiguous()
        assert_close(name, one, want, relative=ROUNDOFF[dtype], absolute=2.0**-20)
        torch.testing.assert_close(one, same, rtol=0, atol=0)
    torch.testing.assert_close(have[0][:, :, :prefix], before, rtol=0, atol=0)


def test_prefix_tokens_pass_whatever_they_hold() -> None:
    x = torch.full((1, 1, 3, 4), float("inf"))
    x[:, :, 2] = 1.0
    cos, sin = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    have, _ = op.launch_rope(x, x, cos, sin)
    assert have[0, 0].tolist() == [[float("inf")] * 4] * 2 + [[-1.0, -1.0, 1.0, 1.0]]


@pytest.mark.parametrize("halves", ["equal", "free"])
def test_gradients_are_the_derivatives(halves: str) -> None:
    """Also of the gradients, and where a table's halves differ, which no model has."""
    q, k = (make(1, n, 4, 6, torch.float64, "tokens first", n).clone() for n in (2, 1))
    cos, sin = (torch.rand(3, 3 if halves == "equal" else 6, dtype=torch.float64) for _ in "cs")
    if halves == "equal":
        cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    leaves = (q.requires_grad_(), k.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: sn72kernels.rope(q, k, cos, sin), leaves)
    assert torch.autograd.gradgradcheck(lambda q, k: sn72kernels.rope(q, k, cos, sin), leaves)
    (alone,) = torch.autograd.grad(sn72kernels.rope(q, k.detach(), cos, sin)[0].sum(), q)
    assert alone.shape == q.shape


def test_backward_kernel_is_the_transpose() -> None:
    """The launcher on the gradient's tables: <R q, g> = <q, R^T g>."""
    q, g = (make(2, 3, 9, 16, torch.float32, "tokens first", seed) for seed in (0, 1))
    cos, sin = (t.expand(2, 8, 16) for t in tables.axial(2, 4, 16))
    turned, _ = op.launch_rope(q, q, cos, sin)
    back, _ = op.launch_rope(g, g, cos, -sin.roll(8, -1))
    torch.testing.assert_close((turned * g).sum(), (q * back).sum(), rtol=1e-5, atol=1e-4)


def test_axial_is_that_of_dinov3() -> None:
    module = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = module.DINOv3ViTConfig(
        hidden_size=64, num_attention_heads=2, image_size=48, patch_size=16
    )
    wanted = module.DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(1, 3, 48, 64))
    have = tables.axial(3, 4, 32, base=config.rope_theta)
    q, k = (make(2, 2, 12 + 5, 32, torch.float32, "contiguous", seed) for seed in (1, 2))
    for one, other in zip(have, wanted, strict=True):
        # An angle of up to 2 pi carries a few roundings of size 2^-22.
        torch.testing.assert_close(one, other, rtol=0, atol=2.0**-20)
    rotated = sn72kernels.rope(q, k, *have)
    for one, other in zip(rotated, module.apply_rotary_pos_emb(q, k, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_interleaved_is_that_of_qwen3_vl() -> None:
    module = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    config = module.Qwen3VLTextConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5], "mrope_interleaved": True,
        },
    )  # fmt: skip
    embedding = module.Qwen3VLTextRotaryEmbedding(config)
    positions = torch.randint(0, 50, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    wanted = embedding(torch.zeros(2, 9, 64), positions)
    have = tables.interleaved(positions, 32, (6, 5, 5), base=10000.0)
    q, k = (make(2, n, 9, 32, torch.float32, "contiguous", n) for n in (2, 1))
    for one, other in zip(have, wanted, strict=True):
        # An angle of up to 50 carries a few roundings of size 2^-19.
        torch.testing.assert_close(one, other, rtol=0, atol=2.0**-16)
    rotated = sn72kernels.rope(q, k, *have)
    for one, other in zip(rotated, module.apply_rotary_pos_emb(q, k, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_compile_and_export() -> None:
    torch.use_deterministic_algorithms(False)
    q, k = (make(2, n, 7, 8, torch.float32, "tokens first", n) for n in (2, 1))
    cos, sin = (t.expand(2, 6, 8) for t in tables.axial(2, 3, 8))
    want = sn72kernels.rope(q, k, cos, sin)

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return sn72kernels.rope(q, k, cos[0], sin[0])

    class Changing(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, k = q + 0.0, k + 0.0
            return sn72kernels.rope_(q, k, cos[0], sin[0])

    for model in (Model(), Changing()):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(q, k)
        exported = torch.export.export(model, (q, k)).module()(q, k)
        for have in (compiled, exported):
            assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_errors_name_the_argument() -> None:
    q, cos = torch.zeros(2, 3, 4, 8), torch.zeros(4, 8)
    with pytest.raises(ShapeError, match=r"shape of q: expected \(any, any, any, any\)"):
        sn72kernels.rope(q[0], q, cos, cos)
    with pytest.raises(ShapeError, match="shape of q: expected an even last axis"):
        sn72kernels.rope(q[..., :7], q, cos, cos)
    with pytest.raises(DtypeError, match="dtype of k: expected float32, got float16"):
        sn72kernels.rope(q, q.half(), cos, cos)
    with pytest.raises(ShapeError, match=r"shape of sin: expected \(4, 8\), got \(3, 8\)"):
        sn72kernels.rope(q, q, cos, cos[1:])
    with pytest.raises(ShapeError, match="at most 4 tokens, got"):
        sn72kernels.rope(q, q, torch.zeros(5, 8), torch.zeros(5, 8))
    with pytest.raises(ArgumentError, match=r"k has strides .* call rope\(\) instead"):
        sn72kernels.rope_(q, q[:, :1].expand(q.shape), cos, cos)
    with pytest.raises(GradientError, match="rope_ has no backward, and q requires a gradient"):
        sn72kernels.rope_(q.clone().requires_grad_(), q, cos, cos)
    with pytest.raises(GradientError, match="rope has no backward, and sin requires a gradient"):
        sn72kernels.rope(q, q, cos, cos.clone().requires_grad_())
    with pytest.raises(ArgumentError, match="head_dim is 6; give a multiple of 4"):
        tables.axial(2, 2, 6)
    with pytest.raises(ArgumentError, match=r"sections is \[1, 1, 1\]"):
        tables.interleaved(torch.zeros(3, 1, 2), 8, (1, 1, 1))
