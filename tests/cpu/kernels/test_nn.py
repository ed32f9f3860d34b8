"""Modules and patching: the same numbers, the same state dict, and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sn72kernels.errors import ArgumentError, PatchError
from sn72kernels.nn import (
    TOLERANCE,
    Attention,
    ClassifierHead,
    LayerNormGelu,
    RotaryAttention,
    patch,
)
from sn72kernels.testing import error_ratio


class PlainAttention(nn.Module):
    """As in timm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.Identity()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.q_norm(q) @ self.k_norm(k).mT * self.scale
        if mask is not None:
            scores = scores + mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = PlainAttention(24, 3)
        self.stem = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.GELU("tanh"))
        self.head = nn.Sequential(
            nn.LayerNorm(24), nn.Linear(24, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x + self.attention(x)).mean(1))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


X = torch.linspace(-2, 2, 2 * 7 * 24).view(2, 7, 24).sin()


def test_patch_and_revert(model: Model) -> None:
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(X)
        patched = patch(model, (X,))
        assert {(c.name, c.before, c.after) for c in patched.changes} == {
            ("attention", "PlainAttention", "Attention"),
            ("stem.1", "LayerNorm, GELU", "LayerNormGelu"),
            ("head", "Sequential", "ClassifierHead"),
        }
        assert patched.refused == ()
        assert isinstance(model.attention, Attention)
        assert isinstance(model.stem[1], LayerNormGelu)
        assert isinstance(model.head, ClassifierHead)
        assert "3 modules swapped" in str(patched)
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(X), before)
        assert patch(model, (X,)).changes == ()
        patched.revert()
        patched.revert()
        assert isinstance(model.attention, PlainAttention)
        assert type(model.head) is nn.Sequential
        assert torch.equal(model(X), before)


def test_gradients_flow_as_before(model: Model) -> None:
    model(X).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    patch(model, (X,))
    model(X).sum().backward()
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want)


def test_a_mask_goes_to_the_original(model: Model) -> None:
    mask = torch.full((7, 7), float("-inf")).triu(1)
    with torch.no_grad():
        want = model.attention(X, mask=mask)
        patch(model, (X,))
        assert torch.equal(model.attention(X, mask=mask), want)


def test_what_differs_is_refused(model: Model) -> None:
    class Odd(PlainAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1.0

    model.attention = Odd(24, 3).eval()
    patched = patch(model, {"x": X})
    assert [change.name for change in patched.refused] == ["attention"]
    assert patched.refused[0].error > 0.1
    assert "refused attention: Odd -> Attention" in str(patched)
    assert isinstance(model.attention, Odd)


class Casting(nn.Linear):
    """Takes what is of another dtype than its weights, which no op here does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


def test_what_the_op_does_not_take_is_refused(model: Model) -> None:
    model.head = nn.Sequential(Casting(24, 16).double(), nn.GELU(), nn.Linear(16, 1).double())
    patched = patch(model.eval(), (X,), tolerance=1e-5)
    assert {change.name for change in patched.changes} == {"attention", "stem.1"}
    assert [(change.name, change.error) for change in patched.refused] == [("head", float("inf"))]
    assert type(model.head) is nn.Sequential


def test_an_error_on_the_way_leaves_the_model_as_it_was(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ClassifierHead, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        patch(model, (X,))
    assert isinstance(model.attention, PlainAttention)
    assert isinstance(model.stem[1], nn.LayerNorm)


def test_a_module_that_the_example_does_not_reach_stays(model: Model) -> None:
    model.spare = nn.Sequential(nn.LayerNorm(4), nn.GELU())
    assert "spare.0" not in {change.name for change in patch(model, (X,)).changes}
    assert isinstance(model.spare[0], nn.LayerNorm)


def test_tolerance_of_the_whole_model(model: Model) -> None:
    with pytest.raises(ArgumentError, match=r"call model.eval\(\) first"):
        patch(model.train(), (X,))
    model.eval()

    class Amplify(nn.Module):
        """Stands for a model that makes much of the last bit: 1 the first time, then 0."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.inner(x) * 0.0 + float(self.calls == 1)

    outer = Amplify(model).eval()
    with pytest.raises(PatchError, match="the model is as it was"):
        patch(outer, (X,))
    assert isinstance(outer.inner.attention, PlainAttention)


def test_head_decides(model: Model) -> None:
    head = ClassifierHead(model.head).eval()
    x = torch.randn(5, 24)
    with torch.no_grad():
        decision = head.decide(x, 0.5, 0.5)
        torch.testing.assert_close(head(x)[:, 0], decision.logits)
        assert torch.equal(decision.routes, (decision.logits > 0).to(torch.uint8))
    with pytest.raises(ArgumentError, match=r"layers are \['Linear'\]"):
        ClassifierHead(nn.Sequential(nn.Linear(2, 1)))


def test_dinov3_of_transformers() -> None:
    module = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    torch.manual_seed(0)
    config = module.DINOv3ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=8, num_register_tokens=4,
    )  # fmt: skip
    model = module.DINOv3ViTModel(config).eval()
    pixels = torch.randn(2, 3, 32, 48)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        patched = patch(model, {"pixel_values": pixels})
        assert [change.after for change in patched.changes] == ["RotaryAttention"] * 2
        assert sum(isinstance(m, RotaryAttention) for m in model.modules()) == 2
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(pixels).last_hidden_state, before)
        patched.revert()
        assert torch.equal(model(pixels).last_hidden_state, before)


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.float32, "eager"), (torch.float64, "sdpa"), (torch.bfloat16, "sdpa")],
)
def test_everything_that_fits_a_classifier_on_dinov3(dtype: torch.dtype, attention: str) -> None:
    """Attention with rotary embedding, LayerNorm and GELU, and the head: numbers, report, back."""
    module = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = module.DINOv3ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=8, num_register_tokens=4, attn_implementation=attention,
    )  # fmt: skip

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = module.DINOv3ViTModel(config)
            self.neck = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU())
            self.head = nn.Sequential(
                nn.LayerNorm(32), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 1)
            )

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.head(self.neck(self.backbone(pixels).pooler_output))

    torch.manual_seed(0)
    model = Classifier().to(dtype).eval()
    with torch.no_grad():  # random weights this small leave attention nothing to do
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
    pixels, others = torch.randn(2, 2, 3, 32, 48).to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = [model(images) for images in (pixels, others)]
        patched = patch(model, (pixels,))
        kinds = [change.after for change in patched.changes]
        assert sorted(kinds) == ["ClassifierHead", "LayerNormGelu"] + ["RotaryAttention"] * 3
        assert patched.refused == ()
        limit = TOLERANCE[dtype]
        assert all(change.error <= limit for change in patched.changes)
        assert patched.error <= limit
        # Also on what it was not patched with.
        assert error_ratio(model(others), before[1]) <= limit
        assert "RotaryAttention (error" in str(patched)
        assert model.state_dict().keys() == state.keys()
        model.load_state_dict(state)
        assert error_ratio(model(pixels), before[0]) <= limit
        if dtype == torch.float32:  # what a tracer sees is the same for all
            torch.use_deterministic_algorithms(False)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert error_ratio(compiled(others), before[1]) <= limit
        patched.revert()
        for images, wanted in zip((pixels, others), before, strict=True):
            assert torch.equal(model(images), wanted)


class EvaLike(nn.Module):
    """As timm's attention with rotary embedding, which its DINOv3 has."""

    def __init__(self, rotate_half: bool, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.scale = 3, 8**-0.5
        self.num_prefix_tokens, self.rotate_half = 2, rotate_half
        self.qkv, self.proj = nn.Linear(24, 72, bias=False), nn.Linear(24, 24)
        self.q_norm, self.k_norm, self.norm = nn.LayerNorm(8), nn.Identity(), nn.LayerNorm(24)
        self.q_bias = nn.Parameter(torch.zeros(24)) if bias else None

    def forward(
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            sin, cos = rope.chunk(2, -1)
            q, k = (self.turned(t, sin, cos) for t in (q, k))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.proj(self.norm(out.transpose(1, 2).reshape(b, t, d)))

    def turned(self, x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        first, rest = x[:, :, :2], x[:, :, 2:]
        if self.rotate_half:
            other = torch.cat((-rest[..., 4:], rest[..., :4]), -1)
        else:
            other = torch.stack((-rest[..., 1::2], rest[..., ::2]), -1).flatten(-2)
        return torch.cat((first, rest * cos + other * sin), 2)


@pytest.mark.parametrize(
    ("rotate_half", "bias", "swapped"),
    [(True, False, True), (False, False, False), (True, True, False)],
)
def test_dinov3_of_timm(rotate_half: bool, bias: bool, swapped: bool) -> None:
    """Halves are turned; interleaved pairs, and parameters of its own, stay with the original."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = EvaLike(rotate_half, bias)

        def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
            return x + self.attn(x, rope=rope, attn_mask=None, is_causal=False)

    torch.manual_seed(0)
    model, x, rope = Block().eval(), torch.randn(2, 7, 24), torch.randn(5, 16)
    with torch.no_grad():
        before = model(x, rope)
        patched = patch(model, (x, rope))
        assert bool(patched.changes) == swapped == isinstance(model.attn, Attention)
        assert patched.refused == ()
        torch.testing.assert_close(model(x, rope), before)
        torch.testing.assert_close(model.attn(x), EvaLike.forward(patched_original(model.attn), x))
    with_gradient = model(x, rope)  # the original's graph, dropout and all
    assert with_gradient.requires_grad
    torch.testing.assert_close(with_gradient.detach(), before)


def patched_original(module: nn.Module) -> nn.Module:
    return module._original[0] if isinstance(module, Attention) else module


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_plus_patch16_dinov3"])
def test_models_of_timm_itself(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=3, depth=2, init_values=1.0)
    pixels, others = torch.randn(2, 2, *model.default_cfg["input_size"])
    with torch.no_grad():
        before = model.eval()(others)
        patched = patch(model, (pixels,))
        assert [change.after for change in patched.changes] == ["Attention"] * 2
        assert patched.refused == ()
        torch.testing.assert_close(model(others), before)
        patched.revert()
        assert torch.equal(model(others), before)
