"""The engine store: built engines on disk, each in a folder named by its fingerprint's key.

Layout under the root::

    engines/<key>/                      engine files and manifest.json, nothing else
    engines/.building-<key>-<pid>-*/    scratch of a build under way, or left by a dead one
    engines/.removed-<key>-<pid>-*/     an engine on its way out
    locks/<key>.lock                    held while <key> is built, opened or removed

Rules that keep it whole:

* An engine is written in a scratch folder, flushed, checked as if it were to be opened, and renamed
  into place in one step. Whatever kills a builder, no half-written engine has its final name.
* Scratch folders are removed under the lock of their key. The kernel drops the locks of a dead
  process, so a scratch folder whose lock can be had belongs to nobody.
* Every byte of an engine is checked before it is given out (see :mod:`sn72engine.engine_folder`).
* When an engine was last used is the folder's modification time: using one rewrites nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sn72engine import fingerprint
from sn72engine.engine import Engine, Manifest
from sn72engine.engine_folder import (
    describe,
    is_partial_manifest,
    mark_used,
    open_engine,
    read_manifest,
    write_manifest,
)
from sn72engine.errors import EngineCorruptError, EngineMismatchError, OptionError, StoreError
from sn72engine.fingerprint import Fingerprint, Mismatch
from sn72engine.spec import check_int
from sn72kernels import atomic, env

__all__ = ["MUTABLE_FIELDS", "Entry", "Nearest", "Store", "describe", "open_engine"]

#: Manifest fields that may change after the build: remarks, never what the engine is.
MUTABLE_FIELDS = ("verification", "notes", "build_seconds", "created")

_log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{32}")
_LEFTOVER = re.compile(r"\.(building|removed)-([0-9a-f]{32})-.*")
#: A process that waits for a lock says so after the first of these, then at every second one.
_FIRST_WORD_SECONDS = 1.0
_NEXT_WORD_SECONDS = 30.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Entry:
    """One folder of the store.

    ``manifest`` is None when it cannot be read, and ``problem`` says why. ``bytes`` counts all
    files of the folder; ``last_used`` is in seconds since the epoch.
    """

    key: str
    folder: Path
    bytes: int
    last_used: float
    manifest: Manifest | None
    problem: str = ""

    @property
    def summary(self) -> str:
        """What the engine is, or why its manifest cannot be read, in one line."""
        if self.manifest is None:
            return f"refused: {self.problem}"
        m = self.manifest
        checked = m.verification is not None and m.verification.get("passed")
        return (
            f"{m.backend} {m.backend_version} {m.target} {m.precision}, batch {m.batch}, "
            f"{'verified' if checked else 'not verified'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "key": self.key,
            "folder": str(self.folder),
            "bytes": self.bytes,
            "last_used": self.last_used,
            "manifest": self.manifest.to_dict() if self.manifest else None,
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class Nearest:
    """The stored engine of the same model that comes closest, and how it differs."""

    key: str
    mismatches: tuple[Mismatch, ...]

    def __str__(self) -> str:
        return f"engine {self.key} is nearest but " + "; ".join(map(str, self.mismatches))


class Store:
    """Engines under one root folder, shared safely between threads and processes.

    Args:
        root: folder to keep them in; created when first written to. None takes the cache folder
            (``SN72_CACHE_DIR``).
        limit_bytes: total size above which the least recently used engines are evicted after a
            build; None takes ``SN72_STORE_LIMIT_GB`` (1 GB is 10^9 bytes).

    Raises:
        OptionError: the limit is not a number >= 0.
    """

    def __init__(self, root: Path | None = None, limit_bytes: int | None = None) -> None:
        self.root = Path(root) if root is not None else env.cache_dir()
        self.limit_bytes = _default_limit() if limit_bytes is None else limit_bytes
        check_int("limit_bytes", self.limit_bytes, 0)

    def get(self, wanted: Fingerprint, *, allow_soft: bool = False) -> Engine | None:
        """The stored engine for a fingerprint, checked; None when there is none to be used.

        An engine that fails its check is left in place and the reason is logged as a warning.

        Args:
            wanted: what the engine must have been built from.
            allow_soft: when there is no exact match, also take an engine whose differences are
                all soft (see :mod:`sn72engine.fingerprint`).
        """
        engine = self._open(wanted.key)
        if engine is None and allow_soft:
            nearest = self.explain_miss(wanted)
            if nearest and all(m.kind == "soft" for m in nearest.mismatches):
                engine = self._open(nearest.key)
                if engine is not None:
                    _log.info("using %s", nearest)
        return engine

    def get_or_build(
        self,
        wanted: Fingerprint,
        make: Callable[[Path], Manifest],
        *,
        allow_soft: bool = False,
    ) -> Engine:
        """The stored engine for a fingerprint, built first when there is none to be used.

        Of several processes that ask for one engine, one builds it and the others wait. A stored
        engine that fails its check is replaced. Afterwards the least recently used engines are
        evicted as far as the limit demands.

        Args:
            wanted: what the engine must be built from.
            make: writes the engine files into the empty folder it is given and returns the
                manifest, with ``key`` and ``fingerprint`` of ``wanted`` and ``files`` from
                :func:`describe`.
            allow_soft: as for :meth:`get`.

        Raises:
            StoreError: the store cannot be written to, or ``make`` returned a manifest that does
                not fit its files or ``wanted``. What ``make`` raises passes through, and leaves
                nothing behind.
        """
        if (engine := self.get(wanted, allow_soft=allow_soft)) is not None:
            return engine
        with self._lock(wanted.key):
            # Another process may have built it while this one waited for the lock.
            engine = self._open_locked(wanted.key, refusal=logging.DEBUG)
            if engine is None:
                if nearest := self.explain_miss(wanted):
                    _log.info("building engine %s: %s", wanted.key, nearest)
                self._clean_leftovers(held=wanted.key)
                engine = self._build(wanted, make)
        self.evict(keep=(wanted.key,))
        return engine

    def check(self, key: str) -> str:
        """What is wrong with a stored engine after reading every byte of it; empty when whole.

        Raises:
            StoreError: there is none of that key.
        """
        folder = self._existing(key)
        try:
            self._checked(folder, key)
        except StoreError as error:
            return str(error)
        return ""

    def entries(self) -> tuple[Entry, ...]:
        """Every engine in the store, least recently used first.

        Manifests are checked, engine files are not read: :meth:`check` does that.
        """
        found = []
        for folder in self._engine_folders():
            # An engine that goes away while it is listed is simply not listed.
            with suppress(FileNotFoundError):
                found.append(_entry(folder))
        return tuple(sorted(found, key=lambda entry: (entry.last_used, entry.key)))

    def explain_miss(self, wanted: Fingerprint) -> Nearest | None:
        """The stored engine of the same model with the fewest hard, then soft, differences.

        None when no engine of that ONNX file is stored, apart from ``wanted`` itself.
        """
        candidates = []
        for entry in self.entries():
            if entry.manifest is None or entry.key == wanted.key:
                continue
            stored = Fingerprint.from_dict(entry.manifest.fingerprint)
            if stored.model_sha256 == wanted.model_sha256:
                candidates.append(Nearest(entry.key, fingerprint.compare(stored, wanted)))
        return min(
            reversed(candidates),  # of equals, the one used last
            key=lambda n: (sum(m.kind == "hard" for m in n.mismatches), len(n.mismatches)),
            default=None,
        )

    def remove(self, key: str) -> None:
        """Remove one engine, waiting for its lock.

        Raises:
            StoreError: there is none of that key.
        """
        with self._lock(key):
            self._discard(self._existing(key))

    def evict(self, keep: Sequence[str] = ()) -> tuple[str, ...]:
        """Remove least recently used engines until the store fits its limit; returns their keys.

        Engines in ``keep`` stay, and so do engines whose lock is held because they are being
        built or opened. A running session keeps the files that it has opened; an engine handed
        out but not opened yet is safe only by being the one used last.
        """
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        removed = []
        for entry in entries:
            if total <= self.limit_bytes:
                break
            if entry.key not in keep and self._evict_one(entry):
                total -= entry.bytes
                removed.append(entry.key)
        if removed:
            _log.info("evicted %d engine(s) to stay under %d bytes", len(removed), self.limit_bytes)
        if total > self.limit_bytes:
            _log.warning(
                "the engine store holds %d bytes, over its limit of %d, in engines just built or "
                "in use; raise SN72_STORE_LIMIT_GB",
                total,
                self.limit_bytes,
            )
        return tuple(removed)

    def update_manifest(self, engine: Engine, **changes: Any) -> Engine:
        """Replace remarks in an engine's manifest, atomically; returns the engine with them.

        Starts from the manifest on disk, so that two writers of different fields both count.

        Args:
            engine: an engine of this store.
            **changes: new values of :data:`MUTABLE_FIELDS`.

        Raises:
            OptionError: a field that identifies or describes the engine, or does not exist.
            StoreError: the engine is not in this store (any more), or a value is not JSON.
        """
        if fixed := sorted(set(changes) - set(MUTABLE_FIELDS)):
            raise OptionError(
                f"manifest field {fixed[0]!r} cannot be changed; these can: "
                + ", ".join(MUTABLE_FIELDS)
            )
        key = engine.manifest.key
        with self._lock(key):
            folder = self._existing(key)
            for path in folder.iterdir():
                if is_partial_manifest(path.name):  # of a writer that was killed
                    path.unlink()
            manifest = dataclasses.replace(read_manifest(folder), **changes)
            write_manifest(folder, manifest)
            return Engine(folder, read_manifest(folder))

    # ---- parts ------------------------------------------------------------------------------

    @property
    def _engines(self) -> Path:
        return self.root / "engines"

    def _engine_folders(self) -> list[Path]:
        if not self._engines.is_dir():
            return []
        return [path for path in self._engines.iterdir() if _KEY.fullmatch(path.name)]

    def _existing(self, key: str) -> Path:
        folder = self._engines / key
        if not _KEY.fullmatch(key) or not folder.is_dir():
            known = ", ".join(sorted(path.name for path in self._engine_folders())) or "none"
            raise StoreError(f"no engine {key!r} in {self._engines}; stored: {known}")
        return folder

    def _open(self, key: str) -> Engine | None:
        if not (self._engines / key).is_dir():
            return None
        if not os.access(self._engines, os.W_OK):
            # A store on a read-only disk: nobody can change it, and no lock could be taken.
            return self._open_locked(key)
        with self._lock(key):
            return self._open_locked(key)

    def _open_locked(self, key: str, refusal: int = logging.WARNING) -> Engine | None:
        folder = self._engines / key
        if not folder.is_dir():
            return None
        try:
            engine = self._checked(folder, key)
        except (EngineCorruptError, EngineMismatchError) as error:
            _log.log(refusal, "stored engine refused: %s", error)
            return None
        mark_used(folder)
        return engine

    def _checked(self, folder: Path, key: str) -> Engine:
        engine = open_engine(folder)
        if engine.manifest.key != key:
            raise EngineCorruptError(
                f"{folder}: holds engine {engine.manifest.key}; a folder was renamed or copied "
                "by hand; remove it"
            )
        return engine

    def _build(self, wanted: Fingerprint, make: Callable[[Path], Manifest]) -> Engine:
        scratch = self._new_hidden("building", wanted.key)
        try:
            manifest = make(scratch)
            if manifest.key != wanted.key or dict(manifest.fingerprint) != wanted.to_dict():
                raise StoreError(
                    f"the builder returned the manifest of engine {manifest.key}, not of "
                    f"{wanted.key}; its key and fingerprint must be those it was asked for"
                )
            for path in scratch.iterdir():
                atomic.fsync_path(path)
            write_manifest(scratch, manifest)
            try:
                manifest = open_engine(scratch).manifest
            except EngineCorruptError as error:
                raise StoreError(
                    f"the builder's manifest does not fit its files: {error}"
                ) from error
            folder = self._engines / wanted.key
            if folder.exists():
                self._discard(folder)
            scratch.rename(folder)
            atomic.fsync_path(self._engines)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return Engine(folder, manifest)

    def _new_hidden(self, what: str, key: str) -> Path:
        # Beside the engines, so that renaming into place never crosses file systems. The folder
        # keeps its mode when it becomes an engine, so it is made with the user's, not with the
        # private one of tempfile.
        folder = self._engines / f".{what}-{key}-{os.getpid()}-{uuid.uuid4().hex}"
        folder.mkdir()
        return folder

    def _discard(self, folder: Path) -> None:
        """Take a folder out of the store in one step, then delete it. Needs the key's lock."""
        away = self._new_hidden("removed", folder.name)
        folder.rename(away / folder.name)
        atomic.fsync_path(self._engines)
        shutil.rmtree(away, ignore_errors=True)

    def _clean_leftovers(self, held: str) -> None:
        """Delete what dead processes left; ``held`` is the key whose lock the caller has."""
        for path in list(self._engines.iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match is None:
                continue
            if match.group(2) == held:
                shutil.rmtree(path, ignore_errors=True)
                continue
            with self._try_lock(match.group(2)) as locked:
                if locked:
                    shutil.rmtree(path, ignore_errors=True)

    def _evict_one(self, entry: Entry) -> bool:
        with self._try_lock(entry.key) as locked:
            if not locked:
                return False
            try:
                used_since = entry.folder.stat().st_mtime_ns / 1e9 > entry.last_used
            except FileNotFoundError:  # another process evicted it
                return True
            if not used_since:
                self._discard(entry.folder)
            return not used_since

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Hold the lock of a key, waiting for it as long as it takes."""
        import filelock

        lock = self._file_lock(key)
        started = time.monotonic()
        timeout = _FIRST_WORD_SECONDS
        while True:
            try:
                lock.acquire(timeout=timeout, poll_interval=_POLL_SECONDS)
                break
            except filelock.Timeout:
                _log.warning(
                    "waiting for another process that builds or opens engine %s (%.0f s so far; "
                    "lock %s)",
                    key,
                    time.monotonic() - started,
                    lock.lock_file,
                )
                timeout = _NEXT_WORD_SECONDS
            except OSError as error:
                raise self._unusable(error) from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _try_lock(self, key: str) -> Iterator[bool]:
        """Hold the lock of a key if nobody else does; yields whether it was had."""
        import filelock

        lock = self._file_lock(key)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _file_lock(self, key: str) -> Any:
        import filelock

        if not _KEY.fullmatch(key):
            raise StoreError(f"engine key {key!r} must be 32 lower-case hexadecimal digits")
        folder = self.root / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._engines.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        return filelock.FileLock(folder / f"{key}.lock")

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(
            f"the engine store {self.root} cannot be written to ({error}); "
            "set SN72_CACHE_DIR to a folder that can"
        )


def _entry(folder: Path) -> Entry:
    last_used = folder.stat().st_mtime_ns / 1e9
    size = sum(path.lstat().st_size for path in folder.rglob("*"))
    try:
        return Entry(folder.name, folder, size, last_used, read_manifest(folder))
    except StoreError as error:
        return Entry(folder.name, folder, size, last_used, None, str(error))


def _default_limit() -> int:
    text = env.get("SN72_STORE_LIMIT_GB")
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise OptionError(f"SN72_STORE_LIMIT_GB={text!r} must be a number of gigabytes >= 0")
    return limit
