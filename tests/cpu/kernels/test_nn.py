"""Modules and patching: the same numbers, the same state dict, and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sn72kernels.errors import ArgumentError, PatchError
from sn72kernels.nn import Attention, ClassifierHead, LayerNormGelu, RotaryAttention, patch


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

    model.attention = Odd(24, 3)
    patched = patch(model, {"x": X})
    assert [change.name for change in patched.refused] == ["attention"]
    assert patched.refused[0].error > 0.1
    assert "refused attention: Odd -> Attention" in str(patched)
    assert isinstance(model.attention, Odd)


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
