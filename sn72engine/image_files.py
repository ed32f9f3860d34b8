"""Images on disk, with or without labels: which files there are, and in which order."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sn72engine.errors import CalibrationError

#: Files of a folder that are taken for images; others are passed over.
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def labelled(
    source: str | os.PathLike[str], split: str | None = None
) -> tuple[list[Path], NDArray[np.int64]]:
    """List labelled images.

    Args:
        source: a ``.csv`` file with the columns ``file`` (relative to the CSV file's own folder)
            and ``label`` (an integer), or a folder with one folder per class. A class folder
            named by a number has that number as its label; when any has another name, labels
            are places in natural order, from 0.
        split: only rows with this value in the ``split`` column, or only the folder of this name
            in ``source``. None takes all.

    Returns:
        Paths of the images in the order of the file, or in natural order, and their int64 labels.

    Raises:
        CalibrationError: there are no images, or a row or a label cannot be used.
    """
    path = Path(source)
    if path.suffix.lower() == ".csv":
        rows = rows_of_csv(path, split)
        return [row.path for row in rows], np.array([row.label() for row in rows], np.int64)
    root = path if split is None else path / split
    if not root.is_dir():
        raise CalibrationError(f"{root}: neither a folder of class folders nor a .csv file")
    classes = sorted(
        (entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."),
        key=_natural,
    )
    numbered = all(re.fullmatch("[0-9]+", name) for name in classes)
    paths: list[Path] = []
    labels: list[int] = []
    for place, name in enumerate(classes):
        found = images_in_folder(root / name)
        paths += found
        labels += [int(name) if numbered else place] * len(found)
    if not paths:
        raise CalibrationError(f"{root}: no images in class folders; expected <class>/<image>.jpg")
    return paths, np.array(labels, np.int64)


def images_in_folder(folder: Path) -> list[Path]:
    """Image files in and below a folder, in natural order of their relative paths."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: [_natural(p) for p in path.relative_to(folder).parts])


def rows_of_csv(path: Path, split: str | None) -> list[Row]:
    """Rows of a CSV file, of one split where asked for; every file is there."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            table = [(reader.line_num, values) for values in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{path}: cannot be read as CSV ({error})") from error
    for column in ("file",) if split is None else ("file", "split"):
        if column not in columns:
            raise CalibrationError(
                f"{path}: no {column!r} column; the first line names {', '.join(columns) or 'none'}"
            )
    if split is not None:
        known = sorted({values["split"] or "" for _, values in table})
        table = [(line, values) for line, values in table if values["split"] == split]
        if not table:
            raise CalibrationError(f"{path}: no rows of split {split!r}; it has {known}")
    if not table:
        raise CalibrationError(f"{path}: no rows")
    rows = []
    for line, values in table:
        where = f"{path}, line {line}"
        if not values["file"]:
            raise CalibrationError(f"{where}: the 'file' column is empty")
        image = path.parent / values["file"]
        if not image.is_file():
            raise CalibrationError(f"{where}: no such file: {image}")
        rows.append(Row(image, where, values))
    return rows


class Row:
    """One row of a CSV file of images."""

    def __init__(self, path: Path, where: str, values: dict[str, str]) -> None:
        self.path = path
        self._where = where
        self._values = values

    def label(self) -> int:
        """The ``label`` column as an integer."""
        if "label" not in self._values:
            raise CalibrationError(f"{self._where}: there is no 'label' column")
        try:
            return int(self._values["label"])
        except (TypeError, ValueError):
            raise CalibrationError(
                f"{self._where}: label {self._values['label']!r} is not an integer"
            ) from None


def _natural(text: str) -> tuple[list[tuple[str, int]], str]:
    """Sort key under which numbers within names compare by value, and no two names are equal."""
    pieces = re.findall(r"([^0-9]*)([0-9]*)", text.casefold())
    return [(word, int(number or -1)) for word, number in pieces], text
