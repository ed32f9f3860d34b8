"""Vision transformers with random weights for benchmarks, and what one image costs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Size:
    """A plain vision transformer: square images, one class token, a linear head."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    @property
    def flops(self) -> float:
        """Of one image: 2 for each multiply-add of the linear layers and of attention."""
        linear = 12 * self.width**2 * self.tokens
        attention = 2 * self.width * self.tokens**2
        patches = 3 * self.patch**2 * self.width * (self.tokens - 1)
        return 2.0 * (self.depth * (linear + attention) + patches)


LARGE = Size(384, 16, 1024, 24, 16)  # ViT-L/16 at 384 px
SMALL = Size(96, 16, 192, 6, 3)
TINY = Size(96, 16, 128, 3, 2)


def vit(size: Size, seed: int = 0, outputs: int = 1) -> Vit:
    """The model, in evaluation mode on the CPU; images (N, 3, H, H) to logits (N, outputs).

    Random weights give all images nearly the same features, so that a single logit is small beside
    what rounding does to it. Many of them show how near the features are.
    """
    torch.manual_seed(seed)
    return Vit(size, outputs).eval().requires_grad_(False)


class Vit(nn.Module):
    def __init__(self, size: Size, outputs: int) -> None:
        super().__init__()
        width = size.width
        self.patches = nn.Conv2d(3, width, size.patch, size.patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, size.tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, size.heads) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(width)
        self.head: nn.Module = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x)[:, 0]))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))
