"""An engine folder: engine files and a manifest that together account for every byte.

``manifest.json`` is plain JSON and must be, byte for byte, the text that this module writes for
its values, which include a SHA-256 of themselves. Together with the size and SHA-256 that it
records of each engine file, this covers every byte of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sn72engine.engine import MANIFEST_FORMAT, Engine, EngineFile, Manifest
from sn72engine.errors import EngineCorruptError, EngineMismatchError, StoreError
from sn72engine.fingerprint import Fingerprint
from sn72engine.model import file_sha256
from sn72kernels import atomic

MANIFEST_NAME = "manifest.json"


def describe(folder: Path, names: Sequence[str]) -> tuple[EngineFile, ...]:
    """Size and SHA-256 of files of ``folder``, in the order given.

    Raises:
        StoreError: a name is not plain, or is not a regular file of the folder.
    """
    described = []
    for name in names:
        path = folder / name
        if problem := _name_problem(name) or _kind_problem(path):
            raise StoreError(f"{folder}: engine file {name!r} {problem}")
        described.append(EngineFile(name, path.stat().st_size, file_sha256(path)))
    return tuple(described)


def open_engine(folder: str | Path) -> Engine:
    """Open an engine folder after checking every byte of it.

    The folder may lie anywhere; it need not be part of a store.

    Raises:
        EngineCorruptError: the manifest or an engine file is absent, altered or unexpected;
            the message names the file and what is wrong with it.
        EngineMismatchError: the manifest's layout is of another version.
        StoreError: a file cannot be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest.files:
        raise EngineCorruptError(f"{folder}: the manifest lists no engine file; build again")
    for file in manifest.files:
        _check_file(folder, file)
    expected = {MANIFEST_NAME, *(file.name for file in manifest.files)}
    for path in sorted(folder.iterdir()):
        if path.name not in expected and not is_partial_manifest(path.name):
            raise EngineCorruptError(
                f"{path}: the manifest does not list this file; remove it or build again"
            )
    return Engine(folder, manifest)


def mark_used(folder: Path) -> None:
    """Note that an engine is used now, which is when its folder was last modified."""
    with suppress(OSError):  # on a read-only disk nothing is ever evicted
        os.utime(folder)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an engine folder, atomically.

    Raises:
        StoreError: the manifest holds a value that is not plain JSON.
    """
    atomic.write_text(folder / MANIFEST_NAME, _render(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of an engine folder; engine files are not read.

    Raises:
        EngineCorruptError: it is absent, altered, or does not fit its own fingerprint.
        EngineMismatchError: its layout is of another version.
        StoreError: it cannot be read.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise EngineCorruptError(f"{folder}: no such engine folder; correct the path or build it")
    if problem := _kind_problem(path):
        raise EngineCorruptError(f"{path}: {problem}; build again")
    try:
        text = path.read_bytes().decode()
        values = json.loads(text)
        recorded = values.pop("sha256")
        actual = hashlib.sha256(_dump(values).encode()).hexdigest()
        # Comparing the whole text covers spaces and line ends, which JSON values do not.
        intact = recorded == actual and _dump({**values, "sha256": recorded}) == text
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineCorruptError(f"{path}: not a manifest ({error!r}); build again") from error
    if not intact:
        raise EngineCorruptError(
            f"{path}: altered since it was written (its text does not give the SHA-256 that it "
            "records); build again"
        )
    if values.get("format") != MANIFEST_FORMAT:
        raise EngineMismatchError(
            f"{path}: layout {values.get('format')!r}, this version reads {MANIFEST_FORMAT}; "
            "build again"
        )
    try:
        manifest = Manifest.from_dict(values)
        key = Fingerprint.from_dict(manifest.fingerprint).key
    except (KeyError, TypeError, ValueError) as error:
        raise EngineCorruptError(f"{path}: a field is missing or wrong ({error!r})") from error
    if manifest.key != key:
        raise EngineCorruptError(
            f"{path}: key {manifest.key} is not that of its fingerprint, {key}; build again"
        )
    return manifest


def is_partial_manifest(name: str) -> bool:
    """Whether this is what atomic.write_text leaves when killed, or has while it writes."""
    return name.startswith(f".{MANIFEST_NAME}.") and name.endswith(".partial")


def _render(manifest: Manifest) -> str:
    """The exact text of a manifest file: its values and, last, a hash of their text."""
    values = manifest.to_dict()
    try:
        body = _dump(values)
    except (TypeError, ValueError) as error:
        raise StoreError(f"the manifest holds a value that is not plain JSON: {error}") from error
    return _dump({**values, "sha256": hashlib.sha256(body.encode()).hexdigest()})


def _dump(values: Any) -> str:
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def _check_file(folder: Path, file: EngineFile) -> None:
    problem = _name_problem(file.name) or _kind_problem(folder / file.name)
    try:
        if not problem and (size := (folder / file.name).stat().st_size) != file.bytes:
            problem = f"has {size} bytes where the manifest says {file.bytes}"
        if not problem and (actual := file_sha256(folder / file.name)) != file.sha256:
            problem = f"has SHA-256 {actual} where the manifest says {file.sha256}"
    except OSError as error:
        raise StoreError(f"{folder / file.name}: cannot be read ({error})") from error
    if problem:
        raise EngineCorruptError(f"{folder}: engine file {file.name!r} {problem}; build again")


def _name_problem(name: object) -> str:
    """What is wrong with an engine file's name; empty when it is plain and free."""
    plain = (
        isinstance(name, str)
        and name not in ("", MANIFEST_NAME)
        and not name.startswith(".")
        and not any(sign in name for sign in "/\\:\0")
    )
    return "" if plain else "does not have a plain file name of its own"


def _kind_problem(path: Path) -> str:
    """What keeps a path from being a regular file of its folder; empty when it is one."""
    if path.is_symlink():
        return "is a symbolic link"
    if not path.exists():
        return "is missing"
    return "" if path.is_file() else "is not a regular file"
