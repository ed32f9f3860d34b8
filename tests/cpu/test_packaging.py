"""The wheel holds both packages, their data and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of this checkout, built without network and without touching the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "demo-report", "example-output", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_it_holds_both_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in (
        "sn72engine/__init__.py",
        "sn72engine/py.typed",
        "sn72engine/demo/imagenet_classes.txt",
        "sn72kernels/__init__.py",
        "sn72kernels/py.typed",
    ):
        assert name in names
    # The CUDA sources always travel, for machines that compile them at first use.
    assert any(name.startswith("sn72engine/cuda/") and name.endswith(".cu") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sn72engine", "sn72kernels"}


def test_one_wheel_serves_every_interpreter_and_platform(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).name.endswith("py3-none-any.whl")


def test_its_metadata_names_the_extras(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    for extra in ("quantize", "tensorrt", "rtx", "gpu", "flash", "demo", "test", "all"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "Requires-Python: >=3.11" in metadata
