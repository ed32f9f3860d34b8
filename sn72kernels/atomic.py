"""Files that are either whole or absent: write aside, fsync, rename.

A reader never sees a half-written file under its final name, whatever kills the writer.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Between the two calls of _umask another thread would read the wrong mask.
_UMASK_LOCK = threading.Lock()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a scratch path in the same folder; on success fsync it and rename it to ``path``.

    If the body raises, the scratch file is removed and ``path`` is untouched. The folder is
    created when absent. The rename is atomic on POSIX because both names share a file system.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        # The caller knows the file by its own name, not by the scratch file's or a folder's.
        reason = f"{error.strerror}, for folder {path.parent}"
        raise OSError(error.errno, reason, str(path)) from error
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o666 & ~_umask())  # mkstemp lets nobody else read
        fsync_path(scratch)
        scratch.replace(path)
        fsync_path(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically and durably."""
    with replacing(path) as scratch:
        scratch.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically and durably."""
    write_bytes(path, text.encode())


def fsync_path(path: Path) -> None:
    """Flush a file or folder to stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's file mode mask; the only portable way to read it is to set it."""
    with _UMASK_LOCK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask
