"""Calibration and evaluation data: real images, one batch at a time, in a fixed order.

Calibration decides the scales of a quantised model, so whatever is wrong with its data stops it:
a file that cannot be read is never skipped, and random data never stands in for data.

However many samples there are, only one batch is in memory. Folders, CSV files and sequences are
decoded anew on every pass. A source that can be read only once (a generator, a data loader) and
an ``.npz`` file are written, ready preprocessed, to an unnamed temporary file that disappears
with the :class:`CalibrationData`, at the latest with the process. It lies in the folder that
``TMPDIR`` names; a 224 x 224 float32 sample takes 0.6 MB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sn72engine.errors import CalibrationError
from sn72engine.image_files import images_in_folder, labelled, rows_of_csv
from sn72engine.preprocessing import Floats
from sn72engine.progress import Progress
from sn72engine.samples import Decoded, Samples, check_like, check_stack, npz_items, spool
from sn72engine.spec import CalibrationOptions, Preprocess

__all__ = ["CalibrationData", "batches", "labelled"]


class CalibrationData:
    """Preprocessed samples in batches, in a fixed order; may be iterated any number of times.

    Made by :func:`batches`. Iterating yields C-contiguous float arrays (n, *sample shape), n
    being ``batch_size`` but for the last batch, which may be smaller. ``len()`` is the number of
    batches.
    """

    def __init__(self, samples: Samples, batch_size: int, *, progress: bool | None = None) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self._progress = progress
        self._sha256: str | None = None

    @property
    def samples(self) -> int:
        """Number of samples of one pass."""
        return len(self._samples)

    @property
    def batch_size(self) -> int:
        """Samples per batch."""
        return self._batch_size

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Floats]:
        """Yield the batches.

        Raises:
            CalibrationError: a sample is unreadable, is not finite or has another shape than the
                first, or the data has changed since an earlier pass.
        """
        digest = hashlib.sha256()
        first: Floats | None = None
        with Progress("calibration data", self.samples, unit="sample", shown=self._progress) as bar:
            for start in range(0, self.samples, self.batch_size):
                stop = min(start + self.batch_size, self.samples)
                arrays = [self._samples[index] for index in range(start, stop)]
                if first is None:
                    first = arrays[0]
                    digest.update(f"{first.dtype}{first.shape}".encode())
                for offset, array in enumerate(arrays):
                    check_like(array, first, start + offset)
                batch = np.stack(arrays)
                digest.update(batch.data)
                bar.step(len(batch))
                yield batch
        found = digest.hexdigest()
        if self._sha256 not in (None, found):
            raise CalibrationError(
                "the calibration data has changed since it was first read; calibrate anew with "
                "files that stay as they are"
            )
        self._sha256 = found

    def data_sha256(self) -> str:
        """Hash of the samples as the model sees them, and of their order.

        The batch size is no part of it. Reads all data once unless a complete pass was made.

        Raises:
            CalibrationError: as in iterating.
        """
        if self._sha256 is None:
            for _ in self:
                pass
        assert self._sha256 is not None
        return self._sha256


def batches(
    source: str | os.PathLike[str] | Iterable[Any],
    spec: Preprocess | None,
    options: CalibrationOptions | None = None,
    *,
    array: str | None = None,
    split: str | None = None,
    progress: bool | None = None,
) -> CalibrationData:
    """Open calibration data.

    Args:
        source: one of

            - a folder: every image in it and below, in natural order (``2.jpg`` before
              ``10.jpg``); hidden files and folders are passed over, folder links not followed;
            - a ``.csv`` file with a ``file`` column, relative to the CSV file's own folder;
            - an ``.npz`` file holding a float array (N, ...) of preprocessed samples or a uint8
              array (N, H, W, C) of images;
            - such an array itself;
            - any iterable whose items are one sample each: an image of any kind that
              :func:`sn72engine.decode.decode` takes, or a float array that is preprocessed
              already. A generator is read to its end; with ``options.limit`` it takes the disk
              space of at most twice that many samples.
        spec: how images become samples. None when all samples are preprocessed float arrays;
            these are taken as they are, float64 rounded to float32.
        options: batch size and choice of samples; None for the defaults.
        array: which array of an ``.npz`` file with several.
        split: only rows of a CSV file with this value in their ``split`` column.
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        CalibrationError: there is no data, there are fewer samples than ``options.minimum``, or
            the source cannot be read. What is wrong with a single image of a folder, a CSV file
            or a sequence shows when it is its turn in iterating.
    """
    options = options or CalibrationOptions()
    samples, name = _open(source, spec, options.limit, array, split, progress)
    if len(samples) < max(options.minimum, 1):
        found = f"only {len(samples)} samples" if len(samples) else "no samples"
        raise CalibrationError(
            f"{name}: {found}, where at least {options.minimum} must be: give more images like "
            "those the model will see (CalibrationOptions.minimum, .limit)"
        )
    return CalibrationData(samples, options.batch_size, progress=progress)


def _open(
    source: str | os.PathLike[str] | Iterable[Any],
    spec: Preprocess | None,
    limit: int | None,
    array: str | None,
    split: str | None,
    progress: bool | None,
) -> tuple[Samples, str]:
    """The samples of a source, and what to call it in messages."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        suffix = path.suffix.lower()
        if suffix == ".npz":
            return spool(npz_items(path, array, limit), spec, None, progress), str(path)
        if spec is None:
            raise CalibrationError(f"{path}: images need a Preprocess to become samples, not None")
        if suffix == ".csv":
            files = [row.path for row in rows_of_csv(path, split)]
        elif path.is_dir():
            files = images_in_folder(path)
        else:
            found = "not a folder, a .csv or a .npz file" if path.exists() else "does not exist"
            raise CalibrationError(f"calibration data {path}: {found}")
        return Decoded(files, spec, limit), str(path)
    name = f"calibration data ({type(source).__name__})"
    if isinstance(source, np.ndarray):
        check_stack(source.dtype, source.shape, name)
        return Decoded(source, spec, limit), name
    if isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray, memoryview)):
        return Decoded(source, spec, limit), name
    if isinstance(source, (bytes, bytearray, memoryview)) or not isinstance(source, Iterable):
        raise CalibrationError(
            f"{name}: pass a folder, a .csv or .npz file, an array of samples or an iterable of "
            "images"
        )
    return spool(enumerate(source), spec, limit, progress), name
