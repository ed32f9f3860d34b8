"""Files are whole or absent, and others may read them as the umask says."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sn72kernels import atomic


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    atomic.write_text(path, "first")
    atomic.write_text(path, "second")
    assert path.read_text() == "second"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_failing_writer_leaves_the_old_file_and_no_scratch(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic.write_text(path, "old")

    def write() -> None:
        with atomic.replacing(path) as scratch:
            scratch.write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_mode_follows_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic.write_bytes(tmp_path / "file", b"x")
        assert os.umask(mask) == mask  # reading it did not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "below.txt"
    with pytest.raises(OSError, match=f"for folder {tmp_path / 'file'}") as refused:
        atomic.write_text(target, "text")
    assert refused.value.filename == str(target)
