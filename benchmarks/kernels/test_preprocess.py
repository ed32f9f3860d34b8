"""Resize and normalise in one launch against PyTorch's antialiased interpolation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sn72kernels
from sn72kernels import bench


def ours(images: torch.Tensor) -> torch.Tensor:
    return sn72kernels.preprocess(images, (224, 224), fit="squash", dtype=DTYPE)


def interpolate(images: torch.Tensor) -> torch.Tensor:
    planes = images.permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(planes, (224, 224), mode="bicubic", antialias=True)
    mean = torch.tensor((0.485, 0.456, 0.406), device=images.device)[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225), device=images.device)[:, None, None]
    return ((small.clamp(0, 255) / 255 - mean) / std).to(DTYPE)


DTYPE = torch.float16


@pytest.mark.parametrize("source", [(480, 640), (1080, 1920)])
def test_preprocess(
    race: Callable[..., None], device: torch.device, source: tuple[int, int]
) -> None:
    count = 16 if device.type == "cuda" else 1
    smooth = torch.rand(count, 3, 30, 40, device=device) * 255
    planes = torch.nn.functional.interpolate(smooth, source, mode="bilinear")
    images = planes.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    want = interpolate(images).float()
    race(
        f"preprocess {count} x {source[1]}x{source[0]} to 224x224",
        {"sn72kernels": ours, "interpolate, normalise": interpolate},
        (images,),
        # Two pixel values: one rounding to 8 bits here and none there, twice.
        lambda out: float((out.float() - want).abs().max()) < 2.01 / 255 / 0.224,
        bench.bytes_of(images, want.to(DTYPE)),
    )
