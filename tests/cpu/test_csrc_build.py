"""The build: with nvcc one fatbin for every architecture, without it the sources alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
KERNELS = 8

needs_cmake = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("ninja") is None, reason="needs cmake and ninja"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def cmake(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | environment
    )


def install(folder: Path, *options: str, **environment: str) -> tuple[str, set[str]]:
    """Configure, build and install as the wheel does; messages and installed files."""
    build, target = folder / "build", folder / "installed"
    configured = cmake("-S", ROOT, "-B", build, "-G", "Ninja", *options, **environment)
    assert configured.returncode == 0, configured.stderr
    for words in (("--build", build), ("--install", build, "--prefix", target)):
        done = cmake(*words, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
    files = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    return configured.stdout, files


def sources() -> set[str]:
    return {f"sn72engine/cuda/src/{p.name}" for p in (*CSRC.glob("*.cu"), *CSRC.glob("*.h"))}


def fake_nvcc(folder: Path, body: str) -> str:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return f"-DSN72_NVCC={path}"


@needs_cmake
def test_without_nvcc_the_sources_are_installed(tmp_path: Path) -> None:
    messages, files = install(tmp_path, "-DSN72_NVCC=SN72_NVCC-NOTFOUND", "-DSN72_CUDA=OFF")
    assert files == sources()
    assert "compiled at first use" in messages


@needs_cmake
def test_nvcc_is_looked_for_in_the_path(tmp_path: Path) -> None:
    """With an empty search path there is none, and the build still succeeds."""
    needed = tmp_path / "bin"
    needed.mkdir()
    for tool in ("cmake", "ninja"):
        (needed / tool).symlink_to(str(shutil.which(tool)))
    messages, files = install(
        tmp_path,
        "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF",
        PATH=str(needed),
        CUDA_HOME="",
        CUDA_PATH="",
    )
    assert "nvcc was not found" in messages
    assert files == sources()


@needs_cmake
def test_an_nvcc_that_cannot_compile_is_left_out_with_its_complaint(tmp_path: Path) -> None:
    body = 'case "$1" in --list-gpu-code) echo sm_90;; *) echo no host compiler >&2; exit 1;; esac'
    messages, files = install(tmp_path, fake_nvcc(tmp_path, body))
    assert "no host compiler" in messages
    assert files == sources()


@needs_cmake
def test_cuda_on_demands_nvcc(tmp_path: Path) -> None:
    option = fake_nvcc(tmp_path, "exit 1")
    done = cmake("-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", option, "-DSN72_CUDA=ON")
    assert done.returncode != 0
    assert "SN72_CUDA=ON, but" in done.stderr


@needs_cmake
def test_an_older_nvcc_leaves_out_what_it_does_not_know(tmp_path: Path) -> None:
    body = (
        'case "$1" in --list-gpu-code) printf "sm_80\\nsm_90\\n"; exit;; esac\n'
        'for w in "$@"; do last="$w"; done; echo "$@" > "$last"'
    )
    messages, files = install(tmp_path, fake_nvcc(tmp_path, body))
    assert "does not know sm_120" in messages
    assert files == sources() | {"sn72engine/cuda/sn72_kernels.fatbin"}
    command = (tmp_path / "installed/sn72engine/cuda/sn72_kernels.fatbin").read_text()
    assert re.findall(r",code=(\w+)", command) == ["compute_80", "sm_80", "sm_90"]


@needs_cmake
@needs_nvcc
def test_with_nvcc_one_fatbin_is_installed(tmp_path: Path) -> None:
    messages, files = install(tmp_path, "-DSN72_CUDA=ON")
    assert files == sources() | {"sn72engine/cuda/sn72_kernels.fatbin"}
    fatbin = (tmp_path / "installed/sn72engine/cuda/sn72_kernels.fatbin").read_bytes()
    assert fatbin[:4] == bytes.fromhex("50ed55ba")
    assert len(fatbin) < 400_000
    known = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True).stdout
    for architecture in ARCHITECTURES:
        left_out = f"does not know sm_{architecture};" in messages
        assert left_out == (f"sm_{architecture}\n" not in known)


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_or_uses_local_memory(tmp_path: Path, architecture: str) -> None:
    known = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True).stdout
    if f"sm_{architecture}\n" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    source, target = CSRC / "sn72_kernels.cu", tmp_path / "kernels.cubin"
    command = [str(NVCC), "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"]
    command += ["-Werror=all-warnings", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert frames == [("0", "0", "0")] * KERNELS, done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == KERNELS
    assert max(registers) <= 64  # 1024 threads of a route block share 65,536
