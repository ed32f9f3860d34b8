"""Small PyTorch modules with seeded weights: the shapes of real image models, in milliseconds."""

from __future__ import annotations

import torch
from torch import nn


def residual_net(seed: int = 0) -> nn.Module:
    """Inverted residual block of a mobile network: takes (N, 3, 16, 16), gives (N, 20)."""
    torch.manual_seed(seed)
    return _ResidualNet().eval()


def transformer(seed: int = 0) -> nn.Module:
    """One-block vision transformer: takes (N, 3, 16, 16), gives (N, 1)."""
    torch.manual_seed(seed)
    return _Transformer().eval()


class _ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.ReLU())
        self.project = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 20)
        with torch.no_grad():  # make both ends of ReLU6 matter
            self.stem[0].weight.mul_(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(x.mean((2, 3)))


class _Transformer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))
