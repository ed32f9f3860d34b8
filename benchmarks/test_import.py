"""How long a fresh interpreter takes to import the packages, which must not load what they wrap.

Run with ``pytest benchmarks/test_import.py``. An empty interpreter is timed in the same run: the
difference is the package's own share.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sn72engine.latency import interleave

ROOT = Path(__file__).resolve().parents[1]

CODE = {
    "empty interpreter": "pass",
    "sn72engine": "import sn72engine",
    "sn72kernels": "import sn72kernels",
    "the command line": "from sn72engine.cli import parser; parser()",
    "numpy": "import numpy",
    "torch": "import torch",
}


def fresh(code: str) -> None:
    """Run code in an interpreter of its own, from the checkout."""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["empty interpreter", "sn72engine", "sn72kernels"])
def test_import(benchmark: Any, name: str) -> None:
    benchmark.pedantic(fresh, args=(CODE[name],), rounds=10, warmup_rounds=2)


def test_interleaved(capsys: pytest.CaptureFixture[str]) -> None:
    calls = {name: partial(fresh, code) for name, code in CODE.items()}
    found = interleave(calls, warmup=1, repeats=5)
    with capsys.disabled():
        print()
        for name, latency in found.items():
            print(f"{name:18} p50 {latency.p50:7.0f} ms  min {latency.min:7.0f} ms")
