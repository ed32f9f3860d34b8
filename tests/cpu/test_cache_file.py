"""A cache file loses no entry, shows no half-written file, and never fails a build."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn72engine import cache_file
from sn72engine.cache_file import CacheFile


def add(cache: CacheFile, entry: bytes) -> bool:
    return cache.update(lambda stored: b"\n".join(sorted({*stored.split(), entry})))


def entries(cache: CacheFile) -> set[bytes]:
    return set(cache.read().split())


def add_many(folder: str, who: int) -> None:
    cache = CacheFile.of("timing", "tensorrt", "11.0", "sm_90", root=Path(folder))
    for number in range(20):
        assert add(cache, b"%d-%d" % (who, number))


def test_reads_what_was_written(tmp_path: Path) -> None:
    cache = CacheFile.of("timing", "tensorrt", "11.0", "sm_90", root=tmp_path)
    assert cache.read() == b""
    assert cache.update(lambda stored: stored + b"first")
    assert cache.read() == b"first"
    assert cache.update(lambda stored: stored + b" second")
    assert cache.read() == b"first second"


def test_an_empty_or_equal_result_leaves_the_file_alone(tmp_path: Path) -> None:
    cache = CacheFile.of("timing", "tensorrt", "11.0", "sm_90", root=tmp_path)
    assert not cache.update(lambda stored: b"")
    assert not cache.path.exists()
    cache.update(lambda stored: b"kept")
    before = cache.path.stat().st_ino
    assert not cache.update(lambda stored: b"")
    assert not cache.update(lambda stored: stored)
    assert cache.read() == b"kept"
    assert cache.path.stat().st_ino == before


def test_version_architecture_and_backend_do_not_mix(tmp_path: Path) -> None:
    identities = [
        ("tensorrt", "11.0", "sm_90"),
        ("tensorrt", "11.1", "sm_90"),
        ("tensorrt", "11.0", "sm_89"),
        ("tensorrt_rtx", "11.0", "sm_90"),
    ]
    paths = {CacheFile.of("timing", *identity, root=tmp_path).path for identity in identities}
    assert len(paths) == len(identities)


@given(version=st.text(max_size=20), target=st.text(max_size=20))
@settings(max_examples=50, deadline=None)
def test_the_file_stays_inside_its_folder(version: str, target: str) -> None:
    root = Path("/somewhere")
    path = CacheFile.of("timing", "tensorrt", version, target, root=root).path
    assert path.parent == root
    assert ".." not in path.parts


def test_default_folder_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path))
    assert CacheFile.of("timing", "tensorrt", "11.0", "sm_90").path.parent == tmp_path / "timing"


def test_threads_lose_nothing(tmp_path: Path) -> None:
    threads = [threading.Thread(target=add_many, args=(str(tmp_path), who)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = CacheFile.of("timing", "tensorrt", "11.0", "sm_90", root=tmp_path)
    assert entries(cache) == {b"%d-%d" % (w, n) for w in range(4) for n in range(20)}


def test_processes_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=add_many, args=(str(tmp_path), who)) for who in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    cache = CacheFile.of("timing", "tensorrt", "11.0", "sm_90", root=tmp_path)
    assert entries(cache) == {b"%d-%d" % (w, n) for w in range(2) for n in range(20)}
    assert not list(tmp_path.glob("*.partial"))


def test_a_failing_merge_leaves_the_file_and_frees_the_lock(tmp_path: Path) -> None:
    cache = CacheFile.of("timing", "tensorrt", "11.0", "sm_90", root=tmp_path)
    cache.update(lambda stored: b"kept")

    def fail(stored: bytes) -> bytes:
        raise RuntimeError("builder gone")

    with pytest.raises(RuntimeError, match="builder gone"):
        cache.update(fail)
    assert cache.read() == b"kept"
    assert cache.update(lambda stored: b"again")


def test_a_held_lock_costs_the_update_not_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(cache_file, "LOCK_TIMEOUT", 0.05)
    cache = CacheFile.of("timing", "tensorrt", "11.0", "sm_90", root=tmp_path)
    with FileLock(cache.path.with_name(cache.path.name + ".lock")):
        assert not cache.update(lambda stored: b"lost")
    assert cache.read() == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_costs_the_update_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert not add(CacheFile.of("timing", "tensorrt", "11.0", "sm_90", root=tmp_path), b"x")


def test_a_file_in_place_of_the_folder_costs_the_update_only(tmp_path: Path) -> None:
    (tmp_path / "timing").write_text("in the way")
    cache = CacheFile.of("timing", "tensorrt", "11.0", "sm_90", root=tmp_path / "timing")
    assert not add(cache, b"x")
    assert cache.read() == b""
