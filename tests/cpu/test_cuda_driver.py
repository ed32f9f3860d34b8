"""Finding a driver: the real one where there is one, and stand-ins for what can be wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sn72engine.cuda import driver
from sn72engine.errors import CudaUnavailableError

COMPILER = shutil.which("g++")


def stand_in(folder: Path, version: int, init: int = 0, devices: int = 1) -> str:
    """A library with the entry points of the driver that the probe calls."""
    source = folder / "driver.cpp"
    source.write_text(
        'extern "C" {\n'
        f"int cuDriverGetVersion(int* v) {{ *v = {version}; return 0; }}\n"
        f"int cuInit(unsigned) {{ return {init}; }}\n"
        f"int cuDeviceGetCount(int* n) {{ *n = {devices}; return 0; }}\n"
        "int cuGetErrorName(int status, const char** name) {\n"
        '  *name = "CUDA_ERROR_NO_DEVICE"; return status != 100; }\n'
        "}\n"
    )
    library = folder / "libstandin.so"
    command = [str(COMPILER), "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return str(library)


def test_without_a_driver_the_reason_names_the_library() -> None:
    found = driver.probe("libsn72-no-such-driver.so.1")
    assert not found.ok
    assert "no NVIDIA driver" in found.reason
    assert "libsn72-no-such-driver.so.1" in found.reason
    assert (found.version, found.devices) == (None, 0)


def test_a_library_that_is_no_driver_is_reported() -> None:
    found = driver.probe("libc.so.6" if sys.platform != "win32" else "kernel32.dll")
    assert not found.ok
    assert "has no cuDriverGetVersion" in found.reason


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize(
    ("version", "init", "devices", "reason"),
    [
        (12020, 0, 1, "serves CUDA 12.2, and 12.4 or newer is needed"),
        (13000, 100, 1, "cuInit failed with CUDA error 100 (CUDA_ERROR_NO_DEVICE)"),
        (13000, 999, 1, "cuInit failed with CUDA error 999"),
        (13000, 0, 0, "sees no GPU"),
        (13010, 0, 2, ""),
    ],
)
def test_what_a_driver_says_decides(
    tmp_path: Path, version: int, init: int, devices: int, reason: str
) -> None:
    found = driver.probe(stand_in(tmp_path, version, init, devices))
    assert found.ok == (reason == "")
    assert reason in found.reason
    if found.ok:
        assert (found.version, found.devices) == ((13, 1), 2)


def test_the_answer_for_this_machine_is_complete() -> None:
    found = driver.driver_available()
    assert found.ok == (found.reason == "")
    assert found.ok == (found.devices > 0)
    assert driver.driver_available() is found


def test_compute_capability_says_why_not() -> None:
    found = driver.driver_available()
    number = found.devices + 3
    with pytest.raises(CudaUnavailableError) as caught:
        driver.compute_capability(number)
    assert (f"device={number}" if found.ok else found.reason) in str(caught.value)
