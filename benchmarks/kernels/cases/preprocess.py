"""Resize and normalise in one launch against PyTorch's antialiased interpolation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import sn72kernels
from benchmarks.kernels import peers, work
from benchmarks.kernels.harness import Case

TARGET = (224, 224)
DTYPE = torch.float16
# Of a pixel value in the normalised output: 1/255 over the smallest standard deviation.
STEP = 1 / 255 / 0.224


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Images of a phone's preview and of a video."""
    gpu = device.type == "cuda"
    count = 16 if gpu else 1
    for source in ((1080, 1920), (480, 640)) if gpu else ((480, 640),):
        yield f"{source[1]}x{source[0]}", partial(build, device, count, source)


def ours(images: torch.Tensor) -> torch.Tensor:
    return sn72kernels.preprocess(images, TARGET, fit="squash", dtype=DTYPE)


def build(device: torch.device, count: int, source: tuple[int, int]) -> Case:
    """Smooth images, for which the definitions of the filter differ by rounding alone."""
    smooth = torch.rand(count, 3, 30, 40, device=device) * 255
    planes = torch.nn.functional.interpolate(smooth, source, mode="bilinear")
    images = planes.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def interpolate(images: torch.Tensor) -> torch.Tensor:
        planes = images.permute(0, 3, 1, 2).float()
        small = torch.nn.functional.interpolate(planes, TARGET, mode="bicubic", antialias=True)
        return ((small.clamp(0, 255) / 255 - mean) / std).to(DTYPE)

    wanted = interpolate(images).float()
    others, absent = peers.others(device, interpolate)
    return Case(
        op="preprocess",
        label=f"{count} x {source[1]}x{source[0]} to {TARGET[1]}x{TARGET[0]}",
        dtype="float16",
        shape=(count, *source),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(images,),
        # Two pixel values: one rounding to 8 bits here and none there, twice.
        correct=lambda out: float((out.float() - wanted).abs().max()) < 2.01 * STEP,
        work=work.preprocess(count, source, TARGET, 2, taps=4.0),
    )
