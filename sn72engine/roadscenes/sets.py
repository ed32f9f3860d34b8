"""Balanced sets of road scenes, in memory or as a folder of files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sn72engine.errors import OptionError
from sn72engine.progress import track
from sn72engine.roadscenes.dice import Dice
from sn72engine.roadscenes.scenes import Scene, SceneOptions, render
from sn72engine.spec import check_choice, check_int, check_number
from sn72kernels import atomic

Difficulty = float | tuple[float, float]

#: Seeds of neighbouring sets are this far apart, so that sets of different seeds share no scene.
_STRIDE = 1_000_000


def dataset(
    count: int,
    seed: int,
    *,
    difficulty: Difficulty = 0.5,
    size: int = 96,
    shown: bool | None = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``count`` scenes, half of them with roadwork, in random order.

    Args:
        count: number of scenes, up to 1,000,000; an odd one goes to label 0.
        seed: of the set; sets with different seeds share no scene.
        difficulty: one value, or a range from which each scene draws its own.
        size: side of the pictures in pixels.
        shown: show a progress bar; None only on a terminal.

    Returns:
        Images, uint8 of shape (count, size, size, 3), and labels, int64 of shape (count,).

    Raises:
        OptionError: an argument is out of range.
    """
    check_int("count", count, 1, _STRIDE)
    check_int("size", size, 1)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    drawn = scenes(count, seed, difficulty=difficulty, size=size)
    for index, (scene, label) in enumerate(
        track(drawn, "drawing scenes", total=count, unit="img", shown=shown)
    ):
        images[index], labels[index] = scene.picture, label
    return images, labels


def scenes(
    count: int, seed: int, *, difficulty: Difficulty = 0.5, size: int = 96
) -> Iterator[tuple[Scene, int]]:
    """The scenes and labels of :func:`dataset` one at a time, with the places of roadwork.

    Raises:
        OptionError: an argument is out of range.
    """
    check_int("count", count, 1, _STRIDE)
    check_int("seed", seed, 0)
    low, high = difficulty if isinstance(difficulty, tuple) else (difficulty, difficulty)
    check_number("difficulty", low, 0.0, 1.0)
    check_number("difficulty", high, low, 1.0)
    dice = Dice(seed, "set")
    for index, label in enumerate(dice.shuffled([i % 2 for i in range(count)])):
        options = SceneOptions(difficulty=dice.uniform(low, high), size=size)
        yield render(seed * _STRIDE + index, label, options), label


def write_dataset(
    folder: str | Path,
    count: int,
    seed: int,
    *,
    difficulty: Difficulty = 0.5,
    size: int = 224,
    train_share: float = 0.5,
    suffix: str = ".jpg",
    shown: bool | None = None,
) -> Path:
    """Write a set as ``images/*`` and ``labels.csv`` with the columns file, label, split.

    Args:
        folder: where to; created when absent, files of the same name are replaced.
        count, seed, difficulty, size: as for :func:`dataset`.
        train_share: share of the scenes whose split is ``train``; the others are ``test``.
        suffix: ``.jpg`` (quality 92) or ``.png``.
        shown: show a progress bar; None only on a terminal.

    Returns:
        The path of ``labels.csv``, which is written last.

    Raises:
        OptionError: an argument is out of range.
    """
    check_choice("suffix", suffix, (".jpg", ".png"))
    check_number("train_share", train_share, 0.0, 1.0)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"folder={str(folder)!r} is a file; name a folder")
    images, labels = dataset(count, seed, difficulty=difficulty, size=size, shown=shown)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    train = round(train_share * count)
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("file", "label", "split"))
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"images/{index:05d}{suffix}"
        Image.fromarray(image).save(folder / name, quality=92)
        writer.writerow((name, int(label), "train" if index < train else "test"))
    atomic.write_text(folder / "labels.csv", table.getvalue())
    return folder / "labels.csv"
