"""What a measurement was made on, and the folder of ``benchmarks/results`` that it goes to."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sn72engine.doctor import cpu_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "onnxruntime",
    "flash-attn",
    "quack-kernels",
    "liger-kernel",
)


def describe() -> dict[str, Any]:
    """Date, device, driver, versions and commit, JSON-ready; a package that is absent is None."""
    gpu = torch.cuda.is_available()
    return {
        "date": today(),
        "gpu": gpu,
        "device": torch.cuda.get_device_name() if gpu else cpu_name(),
        "driver": _driver() if gpu else None,
        "processor": cpu_name(),
        "commit": _commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Python, CUDA of PyTorch, and the packages that matter."""
    return {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in PACKAGES},
    }


def today() -> str:
    """The date in UTC, as file names begin with it."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def folder() -> str:
    """Name of this machine's folder: of its GPU, or of its processor after ``cpu-``.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    if torch.cuda.is_available():
        return slug(torch.cuda.get_device_name())
    return f"cpu-{slug(cpu_name())}"


def slug(name: str) -> str:
    """Lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str | None:
    return _first_line("git", "rev-parse", "--short", "HEAD")


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None
