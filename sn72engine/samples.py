"""Preprocessed samples by place, wherever they come from, never all in memory at once."""

from __future__ import annotations

import os
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sn72engine.errors import CalibrationError, ImageError, InputError
from sn72engine.preprocessing import Floats, preprocess_one
from sn72engine.progress import Progress
from sn72engine.spec import Preprocess


class Samples(Protocol):
    """Preprocessed samples by place."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Floats: ...


class Decoded:
    """Chosen items of a sequence, preprocessed when asked for."""

    def __init__(
        self, items: Sequence[Any] | NDArray[Any], spec: Preprocess | None, limit: int | None
    ) -> None:
        self._items = items
        self._spec = spec
        self._chosen = spread(len(items), limit)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int, /) -> Floats:
        chosen = self._chosen[index]
        return sample_of(self._items[chosen], self._spec, chosen)


class Spool:
    """Samples of one shape in an unnamed temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with this object
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
        check_like(sample, self._like, self._count)
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
            written = os.pwrite(self._file.fileno(), sample.data, index * sample.nbytes)
            if written != sample.nbytes:
                raise OSError(f"{written} of {sample.nbytes} bytes written")
        except OSError as error:
            raise CalibrationError(
                f"cannot keep calibration samples in {tempfile.gettempdir()} ({error}); set "
                "TMPDIR to a folder with more space, or lower CalibrationOptions.limit"
            ) from error


def spool(
    items: Iterable[tuple[int, Any]],
    spec: Preprocess | None,
    limit: int | None,
    progress: bool | None,
) -> Spool:
    """Preprocess numbered items into a spool, evenly spread ones when there is a limit.

    How many there will be is not known, so every ``stride``-th is kept, and whenever twice the
    limit is reached every other one is dropped and the stride doubled.
    """
    kept = Spool()
    stride = 1
    with Progress("reading calibration data", unit="sample", shown=progress) as bar:
        for index, item in items:
            if index % stride == 0:
                kept.append(sample_of(item, spec, index))
                if limit is not None and len(kept) == 2 * limit:
                    kept.keep(range(0, 2 * limit, 2))
                    stride *= 2
            bar.step()
    kept.keep(spread(len(kept), limit))
    return kept


def npz_items(
    path: Path, name: str | None, limit: int | None
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Numbered samples of one array of an ``.npz`` file, which is never in memory as a whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = _npz_member(path, archive.namelist(), name)
            with archive.open(member) as file:
                shape, dtype = _npy_header(file, f"{path}, array {member.removesuffix('.npy')!r}")
                size = dtype.itemsize * int(np.prod(shape[1:]))
                chosen = spread(shape[0], limit)
                place = 0
                # Read to the very end, skipping nothing: only then is the checksum compared.
                for index in range(shape[0]):
                    data = file.read(size)
                    if place < len(chosen) and index == chosen[place]:
                        place += 1
                        yield index, np.frombuffer(data, dtype).reshape(shape[1:])
                if file.read(1):
                    raise ValueError("there is more data than the header says")
    except (
        OSError,
        ValueError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise CalibrationError(f"{path}: cannot be read as .npz ({error})") from error


def head(batches: Iterable[NDArray[Any]], count: int) -> NDArray[Any]:
    """The first ``count`` samples of all batches, or all where there are fewer, as a copy.

    Raises:
        InputError: there is no batch.
    """
    kept: list[NDArray[Any]] = []
    for batch in batches:
        # A copy: the data source may hand out one buffer again and again.
        kept.append(np.array(batch[: count - sum(map(len, kept))]))
        if sum(map(len, kept)) == count:
            break
    if not kept:
        raise InputError("no data: there is no batch")
    return np.concatenate(kept)


def spread(count: int, limit: int | None) -> Sequence[int]:
    """At most ``limit`` ascending places, evenly spread over ``count``."""
    if limit is None or count <= limit:
        return range(count)
    return [(2 * place + 1) * count // (2 * limit) for place in range(limit)]


def check_like(sample: Floats, first: Floats, place: int) -> None:
    """Refuse a sample of another shape or type than the first."""
    if sample.shape != first.shape or sample.dtype != first.dtype:
        raise CalibrationError(
            f"sample {place} is {sample.dtype}{list(sample.shape)}, but the first is "
            f"{first.dtype}{list(first.shape)}; all samples need one shape and type"
        )


def check_stack(dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> None:
    """Refuse an array whose first axis cannot count samples."""
    images = dtype == np.uint8 and len(shape) == 4
    ready = np.issubdtype(dtype, np.floating) and len(shape) >= 2
    if not images and not ready:
        raise CalibrationError(
            f"{name}: array of {dtype}{list(shape)}; expected uint8 images (N, H, W, C) or "
            "preprocessed floats (N, ...)"
        )


def sample_of(item: Any, spec: Preprocess | None, index: int) -> Floats:
    """One preprocessed sample from an image, or from a float array that is one already."""
    if isinstance(item, np.ndarray) and np.issubdtype(item.dtype, np.floating):
        return _ready(item, spec, index)
    if spec is None:
        kind = f"{item.dtype} array" if isinstance(item, np.ndarray) else type(item).__name__
        raise CalibrationError(
            f"item {index} is a {kind}; without a Preprocess only float arrays can be samples"
        )
    try:
        return preprocess_one(item, spec)
    except ImageError as error:
        raise CalibrationError(f"item {index}: {error}") from error


def _ready(array: NDArray[Any], spec: Preprocess | None, index: int) -> Floats:
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
    check_stack(dtype, shape, name)
    return shape, dtype
