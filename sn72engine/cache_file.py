"""Caches that a library fills on disk: what was measured or compiled once is not done again.

TensorRT keeps kernel timings of a build, TensorRT-RTX the kernels that it compiles when an engine
runs. One file per library version and architecture, because entries of one mean nothing to
another. Several processes share it: an update takes a lock, reads what the others added meanwhile,
merges, and replaces the file in one step, so no entry is lost and no reader ever sees half a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from sn72kernels import atomic, env

#: Seconds to wait for another process that is merging, which takes milliseconds.
LOCK_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class CacheFile:
    """One cache file."""

    path: Path

    @classmethod
    def of(
        cls,
        kind: Literal["timing", "runtime"],
        *identity: str,
        root: Path | None = None,
    ) -> CacheFile:
        """The file of what ``identity`` names, under ``root`` or the cache folder.

        Args:
            kind: ``timing`` of a builder, or ``runtime`` kernels.
            identity: backend, version of its library, architecture such as ``sm_90``, and what
                else entries depend on.
            root: folder to use instead of ``kind`` in the cache folder.
        """
        folder = root if root is not None else env.cache_dir() / kind
        name = re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(identity))
        return cls(folder / f"{name}.{kind}")

    def read(self) -> bytes:
        """The stored entries; empty when there are none or they cannot be read."""
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def update(self, merge: Callable[[bytes], bytes]) -> bool:
        """Replace the stored entries by ``merge(stored)``, one process at a time.

        Args:
            merge: takes what is stored now and gives what shall be stored; an empty result
                leaves the file as it is.

        Returns:
            Whether the file was written. False as well when the folder cannot be written or
            another process holds the lock for too long: a cache saves time, and its loss must not
            fail work that succeeded.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(self.path.name + ".lock"), timeout=LOCK_TIMEOUT):
                stored = self.read()
                merged = merge(stored)
                if not merged or merged == stored:
                    return False
                atomic.write_bytes(self.path, merged)
                return True
        except (OSError, Timeout):
            return False
