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

import csv
import hashlib
import os
import re
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sn72engine.decode import decode
from sn72engine.errors import CalibrationError, ImageError
from sn72engine.preprocess import Floats, required_size, transform
from sn72engine.progress import Progress
from sn72engine.spec import CalibrationOptions, Preprocess

#: Files of a folder that are taken for images; others are passed over.
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class CalibrationData:
    """Preprocessed samples in batches, in a fixed order; may be iterated any number of times.

    Made by :func:`batches`. Iterating yields C-contiguous float arrays (n, *sample shape), n
    being ``batch_size`` but for the last batch, which may be smaller. ``len()`` is the number of
    batches.
    """

    def __init__(self, samples: _Samples, batch_size: int, *, progress: bool | None = None) -> None:
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
                    _check_like(array, first, start + offset)
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
            f"{name}: {found}, but calibration needs at least {options.minimum}: give it more "
            "images like those the model will see (CalibrationOptions.minimum, .limit)"
        )
    return CalibrationData(samples, options.batch_size, progress=progress)


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
        rows = _csv_rows(path, split)
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
        found = _images(root / name)
        paths += found
        labels += [int(name) if numbered else place] * len(found)
    if not paths:
        raise CalibrationError(f"{root}: no images in class folders; expected <class>/<image>.jpg")
    return paths, np.array(labels, np.int64)


class _Samples(Protocol):
    """Preprocessed samples by place."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Floats: ...


class _Decoded:
    """Chosen items of a sequence, preprocessed when asked for."""

    def __init__(
        self, items: Sequence[Any] | NDArray[Any], spec: Preprocess | None, limit: int | None
    ) -> None:
        self._items = items
        self._spec = spec
        self._chosen = _spread(len(items), limit)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int, /) -> Floats:
        chosen = self._chosen[index]
        return _sample(self._items[chosen], self._spec, chosen)


class _Spool:
    """Samples of one shape in an unnamed temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        weakref.finalize(self, self._file.close)
        self._count = 0
        self._like: Floats | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Floats:
        assert self._like is not None
        size = self._like.nbytes
        data = os.pread(self._file.fileno(), size, index * size)
        return np.frombuffer(data, self._like.dtype).reshape(self._like.shape)

    def append(self, sample: Floats) -> None:
        """Add a sample at the end."""
        if self._like is None:
            self._like = np.empty_like(sample)
        _check_like(sample, self._like, self._count)
        self._write(self._count, sample)
        self._count += 1

    def keep(self, places: Sequence[int]) -> None:
        """Drop all samples but those at these ascending places."""
        for target, place in enumerate(places):
            if target != place:
                self._write(target, self[place])
        self._count = len(places)

    def _write(self, index: int, sample: Floats) -> None:
        try:
            self._file.seek(index * sample.nbytes)
            self._file.write(sample.tobytes())
            self._file.flush()  # reads go past Python's buffer
        except OSError as error:
            raise CalibrationError(
                f"cannot keep calibration samples in {tempfile.gettempdir()} ({error}); set "
                "TMPDIR to a folder with more space, or lower CalibrationOptions.limit"
            ) from error


def _open(
    source: str | os.PathLike[str] | Iterable[Any],
    spec: Preprocess | None,
    limit: int | None,
    array: str | None,
    split: str | None,
    progress: bool | None,
) -> tuple[_Samples, str]:
    """The samples of a source, and what to call it in messages."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        suffix = path.suffix.lower()
        if suffix == ".npz":
            return _spool(_npz_items(path, array, limit), spec, None, progress), str(path)
        if spec is None:
            raise CalibrationError(f"{path}: images need a Preprocess to become samples, not None")
        if suffix == ".csv":
            files = [row.path for row in _csv_rows(path, split)]
        elif path.is_dir():
            files = _images(path)
        else:
            found = "not a folder, a .csv or a .npz file" if path.exists() else "does not exist"
            raise CalibrationError(f"calibration data {path}: {found}")
        return _Decoded(files, spec, limit), str(path)
    name = f"calibration data ({type(source).__name__})"
    if isinstance(source, np.ndarray):
        _check_stack(source.dtype, source.shape, name)
        return _Decoded(source, spec, limit), name
    if isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray, memoryview)):
        return _Decoded(source, spec, limit), name
    if isinstance(source, (bytes, bytearray, memoryview)) or not isinstance(source, Iterable):
        raise CalibrationError(
            f"{name}: pass a folder, a .csv or .npz file, an array of samples or an iterable of "
            "images"
        )
    return _spool(enumerate(source), spec, limit, progress), name


def _spool(
    items: Iterable[tuple[int, Any]],
    spec: Preprocess | None,
    limit: int | None,
    progress: bool | None,
) -> _Spool:
    """Preprocess numbered items into a spool, evenly spread ones when there is a limit.

    How many there will be is not known, so every ``stride``-th is kept, and whenever twice the
    limit is reached every other one is dropped and the stride doubled.
    """
    spool = _Spool()
    stride = 1
    with Progress("reading calibration data", unit="sample", shown=progress) as bar:
        for index, item in items:
            if index % stride == 0:
                spool.append(_sample(item, spec, index))
                if limit is not None and len(spool) == 2 * limit:
                    spool.keep(range(0, 2 * limit, 2))
                    stride *= 2
            bar.step()
    spool.keep(_spread(len(spool), limit))
    return spool


def _sample(item: Any, spec: Preprocess | None, index: int) -> Floats:
    """One preprocessed sample from an image, or from a float array that is one already."""
    if isinstance(item, np.ndarray) and np.issubdtype(item.dtype, np.floating):
        return _ready_sample(item, spec, index)
    if spec is None:
        kind = f"{item.dtype} array" if isinstance(item, np.ndarray) else type(item).__name__
        raise CalibrationError(
            f"item {index} is a {kind}; without a Preprocess only float arrays can be samples"
        )
    try:
        return transform(decode(item, at_least=required_size(spec)), spec)
    except ImageError as error:
        raise CalibrationError(f"item {index}: {error}") from error


def _ready_sample(array: NDArray[Any], spec: Preprocess | None, index: int) -> Floats:
    if spec is None:
        dtype = array.dtype if array.dtype == np.float16 else np.dtype(np.float32)
    else:
        dtype = np.dtype(spec.dtype)
        if array.shape != spec.shape:
            batched = array.shape[1:] == spec.shape
            hint = "; this is a batch: pass its samples one by one" if batched else ""
            raise CalibrationError(
                f"item {index} has shape {array.shape}; a preprocessed sample is {spec.shape}{hint}"
            )
    with np.errstate(over="ignore"):  # becomes infinite, which is refused below
        sample = np.ascontiguousarray(array, dtype)
    if not np.isfinite(sample).all():
        raise CalibrationError(f"item {index} holds NaN or infinity as {dtype}; mend its source")
    return sample


def _check_like(sample: Floats, first: Floats, place: int) -> None:
    if sample.shape != first.shape or sample.dtype != first.dtype:
        raise CalibrationError(
            f"sample {place} is {sample.dtype}{list(sample.shape)}, but the first is "
            f"{first.dtype}{list(first.shape)}; all samples need one shape and type"
        )


def _check_stack(dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> None:
    """Refuse an array whose first axis cannot count samples."""
    images = dtype == np.uint8 and len(shape) == 4
    ready = np.issubdtype(dtype, np.floating) and len(shape) >= 2
    if not images and not ready:
        raise CalibrationError(
            f"{name}: array of {dtype}{list(shape)}; expected uint8 images (N, H, W, C) or "
            "preprocessed floats (N, ...)"
        )


def _spread(count: int, limit: int | None) -> Sequence[int]:
    """At most ``limit`` ascending places, evenly spread over ``count``."""
    if limit is None or count <= limit:
        return range(count)
    return [(2 * place + 1) * count // (2 * limit) for place in range(limit)]


def _images(folder: Path) -> list[Path]:
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


def _natural(text: str) -> tuple[list[tuple[str, int]], str]:
    """Sort key under which numbers within names compare by value, and no two names are equal."""
    pieces = re.findall(r"([^0-9]*)([0-9]*)", text.casefold())
    return [(word, int(number or -1)) for word, number in pieces], text


class _Row:
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


def _csv_rows(path: Path, split: str | None) -> list[_Row]:
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
        rows.append(_Row(image, where, values))
    return rows


def _npz_items(
    path: Path, name: str | None, limit: int | None
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Numbered samples of one array of an ``.npz`` file, which is never in memory as a whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = _npz_member(path, archive.namelist(), name)
            with archive.open(member) as file:
                shape, dtype = _npy_header(file, f"{path}, array {member.removesuffix('.npy')!r}")
                start = file.tell()
                size = dtype.itemsize * int(np.prod(shape[1:]))
                for index in _spread(shape[0], limit):
                    file.seek(start + index * size)
                    data = file.read(size)
                    yield index, np.frombuffer(data, dtype).reshape(shape[1:])
    except (
        OSError,
        ValueError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise CalibrationError(f"{path}: cannot be read as .npz ({error})") from error


def _npz_member(path: Path, members: Sequence[str], name: str | None) -> str:
    names = [member.removesuffix(".npy") for member in members if member.endswith(".npy")]
    if name is None and len(names) == 1:
        return f"{names[0]}.npy"
    if name not in names:
        asked = "several arrays" if name is None else f"no array {name!r}"
        raise CalibrationError(f"{path}: {asked}; choose by array=, one of {', '.join(names)}")
    return f"{name}.npy"


def _npy_header(file: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in NumPy's own file format, version 1 or 2."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise CalibrationError(f"{name}: .npy format {version} holds no plain numbers")
    shape, fortran, dtype = read(file)
    if fortran:
        raise CalibrationError(
            f"{name}: stored in Fortran order; save np.ascontiguousarray(...) of it"
        )
    _check_stack(dtype, shape, name)
    return shape, dtype
