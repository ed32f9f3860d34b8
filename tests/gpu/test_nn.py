"""A patched model on the card: checked against the original, captured, compiled, and put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sn72kernels.nn import TOLERANCE, patch
from sn72kernels.testing import error_ratio
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes

DEPTH = 96


class SelfAttention(nn.Module):
    """As in timm: one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 3, 32**-0.5
        self.qkv, self.proj = nn.Linear(DEPTH, 3 * DEPTH), nn.Linear(DEPTH, DEPTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Classifier(nn.Module):
    """Attention, LayerNorm and GELU, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()
        self.neck = nn.Sequential(nn.LayerNorm(DEPTH), nn.GELU())
        self.head = nn.Sequential(
            nn.LayerNorm(DEPTH), nn.Linear(DEPTH, 48), nn.GELU(), nn.Linear(48, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(x + self.attention(x)).mean(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_patched_model(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Classifier().to(DEVICE, dtype).eval()
    shape = (sizes(32, 2), sizes(197, 7), DEPTH)
    one, other = (torch.randn(shape, generator=seeded(n)).to(DEVICE, dtype) for n in (0, 1))
    with torch.no_grad():
        wanted = model(other)
        patched = patch(model, (one,))
        assert sorted(change.after for change in patched.changes) == [
            "Attention", "ClassifierHead", "LayerNormGelu",
        ]  # fmt: skip
        assert patched.refused == ()
        assert error_ratio(model(other), wanted) <= TOLERANCE[dtype]
        check_graph_and_streams(lambda x: (model(x),), (one,), (other,))
        assert error_ratio(compiled(model)(other), wanted) <= TOLERANCE[dtype]
        patched.revert()
        assert type(model.attention) is SelfAttention
        assert error_ratio(model(other), wanted) <= TOLERANCE[dtype]
