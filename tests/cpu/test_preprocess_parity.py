"""The kernels' preprocessing and the engine's are one definition: within 1/255 of a pixel's range.

What is compared is the plain PyTorch reference, whose bits the kernel must give.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sn72kernels
from sn72engine.preprocessing import transform
from sn72engine.spec import Preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDES = st.integers(1, 90)
# One side far longer than the other, where the order of the two passes shows most.
EXTREME = st.sampled_from(((1, 300), (300, 1), (4, 400), (400, 4), (333, 7), (7, 333)))


def in_pixels(batch: np.ndarray) -> np.ndarray:
    """Undo the normalisation of one NCHW image: 0 to 1, and the mean where there is a border."""
    std, mean = np.array(STD)[:, None, None], np.array(MEAN)[:, None, None]
    return np.asarray(batch, np.float64) * std + mean


@given(
    source=st.one_of(st.tuples(SIDES, SIDES), EXTREME),
    size=st.one_of(st.tuples(SIDES, SIDES), st.sampled_from(((64, 64), (2, 80), (80, 2)))),
    fit=st.sampled_from(("center_crop", "squash", "pad")),
    crop_fraction=st.sampled_from((1.0, 0.875, 0.4)),
    interpolation=st.sampled_from(("bilinear", "bicubic")),
    extremes=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example((400, 4), (24, 20), "squash", 1.0, "bicubic", True, 0)
@example((4, 400), (20, 24), "pad", 1.0, "bicubic", True, 0)
@settings(max_examples=60, deadline=None)
def test_kernels_and_engine_give_the_same_pixels(
    source: tuple[int, int],
    size: tuple[int, int],
    fit: str,
    crop_fraction: float,
    interpolation: str,
    extremes: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*source, 3), np.uint8)
    if extremes:  # filters with negative lobes overshoot most on these
        image = np.where(image < 128, 0, 255).astype(np.uint8)
    spec = Preprocess(
        height=size[0], width=size[1], mean=tuple(255 * m for m in MEAN),
        std=tuple(255 * s for s in STD), fit=fit, crop_fraction=crop_fraction,
        interpolation=interpolation, dtype="float32", layout="nchw",
    )  # fmt: skip
    want = transform(image, spec)
    have = sn72kernels.preprocess(
        torch.from_numpy(image), size, mean=MEAN, std=STD, fit=fit, crop_fraction=crop_fraction,
        interpolation=interpolation, dtype=torch.float32,
    )[0].numpy()  # fmt: skip
    gap = np.abs(in_pixels(have) - in_pixels(want)).max()
    assert gap <= 1 / 255 + 1e-5, f"a pixel differs by {255 * gap:.2f} of 255"


def test_a_shifted_image_is_not_within_the_bound() -> None:
    """The measure sees a difference of two steps."""
    image = np.full((8, 8, 3), 100, np.uint8)
    have, other = (
        sn72kernels.preprocess(torch.from_numpy(pixels), (4, 4), dtype=torch.float32)[0].numpy()
        for pixels in (image, image + 2)
    )
    assert np.abs(in_pixels(have) - in_pixels(other)).max() == pytest.approx(2 / 255, abs=1e-5)
