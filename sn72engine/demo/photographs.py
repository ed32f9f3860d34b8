"""Photographs that the demo's dependencies carry, what they show, and seeded views of them.

A handful of photographs is too few to calibrate or to choose thresholds on, so each is looked at
through many random crops. Views of one photograph resemble each other: enough to show the method
at work, not to certify a threshold. Give the demo your own labelled data for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from sn72engine import _deps

#: Photographs in scikit-image and scikit-learn -> ImageNet classes that a person would accept.
_SCIKIT_IMAGE = {
    "camera.png": (872, 759, 732),  # tripod, reflex camera, instant camera
    "chelsea.png": (285, 281, 282),  # Egyptian cat, tabby, tiger cat
    "coffee.png": (967, 968, 504),  # espresso, cup, coffee mug
    "motorcycle_left.png": (665, 670),  # moped, motor scooter
    "rocket.jpg": (657, 744),  # missile, projectile
}
_SCIKIT_LEARN = {"china.jpg": (698,)}  # palace
_MATPLOTLIB = {"grace_hopper.jpg": (652, 834, 906, 457)}  # uniform, suit, tie, bow tie


@dataclass(frozen=True, slots=True)
class Photograph:
    """A file and the ImageNet classes that name what it shows, the best one first."""

    path: Path
    classes: tuple[int, ...]


def photographs() -> list[Photograph]:
    """The photographs, sorted by file name.

    Raises:
        MissingDependencyError: a package that carries some is not installed.
    """
    purpose = "supply the demo's photographs"
    skimage = _deps.require("skimage", purpose=purpose)
    sklearn = _deps.require("sklearn", purpose=purpose)
    matplotlib = _deps.require("matplotlib", purpose=purpose)
    folders = (
        (Path(skimage.__file__).parent / "data", _SCIKIT_IMAGE),
        (Path(sklearn.__file__).parent / "datasets" / "images", _SCIKIT_LEARN),
        (Path(matplotlib.get_data_path()) / "sample_data", _MATPLOTLIB),
    )
    found = [
        Photograph(folder / name, classes)
        for folder, names in folders
        for name, classes in names.items()
    ]
    return sorted(found, key=lambda photograph: photograph.path.name)


def synonyms(pictures: Sequence[Photograph]) -> dict[int, int]:
    """Class -> the best class of the photograph that accepts it."""
    return {other: p.classes[0] for p in pictures for other in p.classes}


def views(
    pictures: Sequence[Photograph], count: int, *, seed: int, side: int = 320
) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    """Random crops, flips and exposures of photographs.

    Args:
        pictures: the photographs; each gives about ``count / len(pictures)`` views.
        count: number of views.
        seed: of the crops; the same seed gives the same views.
        side: height and width of each view in pixels.

    Returns:
        ``count`` uint8 arrays of shape (side, side, 3), and the best class of each.
    """
    random = np.random.default_rng(seed)
    images = [Image.open(picture.path).convert("RGB") for picture in pictures]
    out, labels = [], []
    for index in range(count):
        chosen = index % len(images)
        image = images[chosen]
        crop = min(image.size) * random.uniform(0.6, 1.0)
        left = random.uniform(0, image.width - crop)
        top = random.uniform(0, image.height - crop)
        view = image.resize(
            (side, side), Image.Resampling.BICUBIC, box=(left, top, left + crop, top + crop)
        )
        if random.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        view = ImageEnhance.Brightness(view).enhance(random.uniform(0.6, 1.4))
        out.append(np.asarray(view))
        labels.append(pictures[chosen].classes[0])
    return out, np.array(labels, np.int64)
