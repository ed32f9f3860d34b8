"""Photographs that the demo's dependencies carry, and seeded views of them.

A handful of photographs is too few to calibrate or to choose thresholds on, so each is looked at
through many random crops. Views of one photograph resemble each other: enough to show the method
at work, not to certify a threshold. Give the demo your own labelled data for that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from sn72engine import _deps

#: Files in scikit-image's data folder that are photographs.
_SCIKIT_IMAGE = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "moon.png",
    "motorcycle_left.png",
    "rocket.jpg",
)


def photographs() -> list[Path]:
    """Paths of the photographs, sorted by name.

    Raises:
        MissingDependencyError: scikit-image is not installed.
    """
    skimage = _deps.require("skimage", purpose="supply the demo's photographs")
    matplotlib = _deps.require("matplotlib", purpose="supply the demo's photographs")
    found = [Path(skimage.__file__).parent / "data" / name for name in _SCIKIT_IMAGE]
    found.append(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    return sorted((path for path in found if path.is_file()), key=lambda path: path.name)


def views(paths: list[Path], count: int, *, seed: int, side: int = 320) -> list[NDArray[np.uint8]]:
    """Random crops, flips and exposures of photographs.

    Args:
        paths: the photographs; each gives about ``count / len(paths)`` views.
        count: number of views.
        seed: of the crops; the same seed gives the same views.
        side: height and width of each view in pixels.

    Returns:
        ``count`` uint8 arrays of shape (side, side, 3).
    """
    random = np.random.default_rng(seed)
    images = [Image.open(path).convert("RGB") for path in paths]
    out = []
    for index in range(count):
        image = images[index % len(images)]
        crop = min(image.size) * random.uniform(0.35, 1.0)
        left = random.uniform(0, image.width - crop)
        top = random.uniform(0, image.height - crop)
        view = image.resize(
            (side, side), Image.Resampling.BICUBIC, box=(left, top, left + crop, top + crop)
        )
        if random.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        view = ImageEnhance.Brightness(view).enhance(random.uniform(0.6, 1.4))
        out.append(np.asarray(view))
    return out
