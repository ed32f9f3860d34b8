"""Runs the Triton kernels of this folder on the CPU, under Triton's interpreter.

Triton decides at import, once per process, whether ``@triton.jit`` interprets or compiles. So the
switch is set here, before any test module of this folder is imported, and taken out of the
environment again so that child processes (the compile-only checks) do compile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sn72kernels.testing import Compiled
from tests.kernel_cases import interpreter

if importlib.util.find_spec("triton") is not None:
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
        import triton

        triton.knobs.runtime.interpret = True  # kept by Triton itself, no more by the variable
        del os.environ["TRITON_INTERPRET"]
    elif not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError(
            "Triton was imported before its interpreter could be switched on; "
            "run tests/cpu/kernels in a process of its own"
        )
    interpreter.repair()


def _ops() -> Path:
    return Path(__file__).parents[3] / "sn72kernels" / "ops"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = getattr(item, "originalname", item.name)
        if item.path.parent.name == "kernels" and {item.path.stem, name} & INTERPRETED:
            for mark in interpreter.marks():
                item.add_marker(mark)


# Files, by op, and single tests, by name.
INTERPRETED = {f"test_{path.parent.name}" for path in _ops().glob("*/kernel.py")} | {
    "test_bodies_run_on_the_interpreter",
    "test_every_candidate_is_right",
    "test_far_offsets",
    "test_gelu",
    "test_launcher_agrees_with_the_reference",
    "test_launcher_gives_the_same_bits_for_every_layout",
}


@pytest.fixture(scope="session")
def compiled() -> list[Compiled]:
    """Every op's compile cases for every architecture, from a child process that compiles."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "sn72kernels.testing", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.stdout, done.stderr
    return [Compiled(**row) for row in json.loads(done.stdout)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What a kernel forgets to write is NaN (or the largest integer), not luck.

    Also lets NumPy, which does the interpreter's arithmetic, meet infinities and NaN without a
    warning, as a GPU does: kernels rely on exp overflowing and on comparisons with NaN.
    """
    from sn72kernels.testing import poisoned

    with poisoned(), np.errstate(over="ignore", invalid="ignore"):
        yield
