"""Two small classifiers for road scenes: a cheap first stage and a better, dearer second one.

Both take normalised images of shape (batch, 3, 96, 96), float32, and give logits of shape
(batch, 1); a sigmoid makes them the probability of roadwork. This module imports torch, so import
it where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sn72engine.spec import Preprocess

#: How an image becomes the input of either model.
PREPROCESS = Preprocess(
    height=96, width=96, fit="center_crop", mean=(127.5, 127.5, 127.5), std=(64.0, 64.0, 64.0)
)


class SceneModel(nn.Module):
    """A model that looks at a scene in 12 x 12 cells and then answers for the whole of it.

    The head sees the mean and the maximum over the cells: one small object in one cell decides.
    """

    dim: int

    def features(self, pixel_values: Tensor, joint: bool = True) -> Tensor:
        """Features of shape (batch, 144, dim).

        Args:
            pixel_values: shape (batch, 3, 96, 96).
            joint: False leaves out what is not convolutional.
        """
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Logits of shape (batch, 1) for features of shape (batch, 144, dim)."""
        raise NotImplementedError

    def settled(self) -> list[nn.Module]:
        """What no longer learns once all of the model takes part."""
        return []

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of shape (batch, 1) for images of shape (batch, 3, 96, 96)."""
        return self.classify(self.features(pixel_values))


class SmallCnn(SceneModel):
    """Convolutions on the picture at half its size, and a linear head.

    Args:
        width: channels after the first convolution; later ones have twice and four times as many.
    """

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.dim = 4 * width
        self.layers = nn.Sequential(
            *_convolution(3, width, stride=2),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 4 * width, stride=1),
            *_convolution(4 * width, 4 * width, stride=1),
        )
        self.head = nn.Linear(8 * width, 1)

    def features(self, pixel_values: Tensor, joint: bool = True) -> Tensor:
        """Features of shape (batch, 144, dim); ``joint`` changes nothing."""
        half = functional.avg_pool2d(pixel_values, 2)
        maps: Tensor = self.layers(half)
        return maps.flatten(2).transpose(1, 2)

    def classify(self, features: Tensor) -> Tensor:
        """Logits of shape (batch, 1) for features of shape (batch, 144, dim)."""
        logits: Tensor = self.head(_pooled(features))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention, written out so that it exports as plain matrix products."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = _zeroed(nn.Linear(dim, dim))

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
    """Pre-norm transformer block: attention and a GELU network, each with a residual.

    The last layer of either starts at zero, so that a new block is the identity (as in Zhang et
    al. 2019, "Fixup Initialization") and can join a stem that has learned already.
    """

    def __init__(self, dim: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, expansion * dim), nn.GELU(), _zeroed(nn.Linear(expansion * dim, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of shape (batch, tokens, dim) to the same shape."""
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class SmallVit(SceneModel):
    """Vision transformer on patches of 8 x 8 pixels, cut by three strided convolutions.

    The convolutional stem (Xiao et al. 2021, "Early Convolutions Help Transformers See Better")
    lets it learn from a few thousand images; one linear patch embedding needs many more.
    """

    def __init__(
        self, dim: int = 128, depth: int = 5, heads: int = 4, expansion: int = 4, size: int = 96
    ) -> None:
        super().__init__()
        self.dim = dim
        self.stem = nn.Sequential(
            *_convolution(3, 24, stride=2),
            *_convolution(24, 48, stride=2),
            nn.Conv2d(48, dim, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.empty(1, (size // 8) ** 2, dim).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(dim, heads, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(2 * dim, 64), nn.GELU(), nn.Linear(64, 1))

    def features(self, pixel_values: Tensor, joint: bool = True) -> Tensor:
        """Normalised tokens of shape (batch, 144, dim), without the blocks if not ``joint``."""
        tokens = self.stem(pixel_values).flatten(2).transpose(1, 2) + self.position
        normalised: Tensor = self.norm(self.blocks(tokens) if joint else tokens)
        return normalised

    def settled(self) -> list[nn.Module]:
        """The stem."""
        return [self.stem]

    def classify(self, features: Tensor) -> Tensor:
        """Logits of shape (batch, 1) for features of shape (batch, 144, dim)."""
        logits: Tensor = self.head(_pooled(features))
        return logits


def small_cnn() -> nn.Module:
    """The first stage: 95 thousand parameters, random weights."""
    return SmallCnn()


def small_vit() -> nn.Module:
    """The second stage: 1.1 million parameters, random weights."""
    return SmallVit()


MODELS: dict[str, Callable[[], SceneModel]] = {"small_cnn": SmallCnn, "small_vit": SmallVit}


def _pooled(features: Tensor) -> Tensor:
    return torch.cat([features.mean(1), features.amax(1)], 1)


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _convolution(inputs: int, outputs: int, *, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.GELU(),
    )
