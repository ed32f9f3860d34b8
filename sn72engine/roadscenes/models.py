"""Two small classifiers for road scenes: a cheap first stage and a better, dearer second one.

Both take normalised images of shape (batch, 3, 96, 96), float32, and give logits of shape
(batch, 1); a sigmoid makes them the probability of roadwork. This module imports torch, so import
it where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sn72engine.spec import Preprocess

#: How an image becomes the input of either model.
PREPROCESS = Preprocess(
    height=96, width=96, fit="center_crop", mean=(127.5, 127.5, 127.5), std=(64.0, 64.0, 64.0)
)


class SmallCnn(nn.Module):
    """Four strided or plain convolutions and a linear head on the mean over the picture.

    Args:
        width: channels after the first convolution; later ones have twice and four times as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, width, stride=2),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 4 * width, stride=2),
            *_convolution(4 * width, 4 * width, stride=1),
        )
        self.head = nn.Linear(4 * width, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of shape (batch, 1) for images of shape (batch, 3, 96, 96)."""
        logits: Tensor = self.head(self.features(pixel_values).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention, written out so that it exports as plain matrix products."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of shape (batch, tokens, dim) to the same shape."""
        _, tokens, dim = x.shape
        split = self.qkv(x).reshape(-1, tokens, 3, self.heads, dim // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query * self.scale) @ key.transpose(-2, -1)
        mixed = weights.softmax(-1) @ value
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(-1, tokens, dim))
        return result


class Block(nn.Module):
    """Pre-norm transformer block: attention and a GELU network, each with a residual."""

    def __init__(self, dim: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of shape (batch, tokens, dim) to the same shape."""
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class SmallVit(nn.Module):
    """Vision transformer on patches of 8 x 8 pixels, cut by three strided convolutions.

    The convolutional stem (Xiao et al. 2021, "Early Convolutions Help Transformers See Better")
    lets it learn from a few thousand images; one linear patch embedding needs many more.
    """

    def __init__(
        self, dim: int = 128, depth: int = 5, heads: int = 4, expansion: int = 4, size: int = 96
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_convolution(3, 32, stride=2),
            *_convolution(32, 64, stride=2),
            nn.Conv2d(64, dim, 2, stride=2),
        )
        self.position = nn.Parameter(torch.empty(1, (size // 8) ** 2, dim).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(dim, heads, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of shape (batch, 1) for images of shape (batch, 3, 96, 96)."""
        tokens = self.stem(pixel_values).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def small_cnn() -> nn.Module:
    """The first stage: 61 thousand parameters, random weights."""
    return SmallCnn()


def small_vit() -> nn.Module:
    """The second stage: 1.1 million parameters, random weights."""
    return SmallVit()


MODELS: dict[str, Callable[[], nn.Module]] = {"small_cnn": small_cnn, "small_vit": small_vit}


def _convolution(inputs: int, outputs: int, *, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.GELU(),
    )
