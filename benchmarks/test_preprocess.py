"""What preparing one image, or one batch, costs. Run: pytest benchmarks/test_preprocess.py"""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from sn72engine.preprocessing import preprocess
from sn72engine.spec import Preprocess

SPEC = Preprocess(224, 224)


def scene(height: int, width: int) -> Image.Image:
    """A picture whose JPEG is about as long as a photograph's: random patches, enlarged."""
    small = np.random.default_rng(0).integers(0, 256, (height // 24, width // 24, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def camera() -> Image.Image:
    return scene(3024, 4032)


def test_small_jpeg(benchmark: BenchmarkFixture) -> None:
    data = jpeg(scene(480, 640))
    assert benchmark(preprocess, data, SPEC).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("draft", [True, False], ids=["draft", "full decode"])
def test_12_megapixel_jpeg(benchmark: BenchmarkFixture, camera: Image.Image, draft: bool) -> None:
    data = jpeg(camera)
    spec = Preprocess(224, 224, draft=draft)
    assert benchmark(preprocess, data, spec).shape == (1, 3, 224, 224)


def test_12_megapixel_pil_image(benchmark: BenchmarkFixture, camera: Image.Image) -> None:
    assert benchmark(preprocess, camera, SPEC).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("size", [(224, 224), (480, 640)], ids=["same size", "640x480"])
def test_batch_of_8_arrays(benchmark: BenchmarkFixture, size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, *size, 3), np.uint8)
    assert benchmark(preprocess, images, SPEC).shape == (8, 3, 224, 224)
