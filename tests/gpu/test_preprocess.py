"""Preprocessing on the card: the same bits as the CPU reference."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.testing import assert_same, poisoned
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes

TARGET = sizes((224, 225), (24, 25))


def make(count: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    return torch.randint(0, 256, (count, h, w, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("fit", ["center_crop", "squash", "pad"])
@pytest.mark.parametrize("source", sizes([(100, 77), (720, 1280), (8, 8)], [(40, 31)]))
def test_same_bits_as_the_cpu(
    source: tuple[int, int], fit: str, interpolation: str, dtype: torch.dtype
) -> None:
    images = make(2, *source)
    options = {"fit": fit, "interpolation": interpolation, "dtype": dtype}
    with poisoned():
        have = sn72kernels.preprocess(images.to(DEVICE), TARGET, **options)
    assert_same([have], [sn72kernels.preprocess(images, TARGET, **options)])


def call(images: torch.Tensor) -> tuple[torch.Tensor]:
    return (sn72kernels.preprocess(images, (64, 64)),)


def test_graph_streams_and_torch_compile() -> None:
    first, second = make(2, 90, 120).to(DEVICE), make(2, 90, 120, 1).to(DEVICE)
    check_graph_and_streams(call, (first,), (second,))
    assert_same(compiled(call)(first), call(first))
