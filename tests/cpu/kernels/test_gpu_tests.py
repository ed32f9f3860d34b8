"""The tests for a card, as far as they can be run without one.

In a process of their own, on the CPU, kernels under Triton's interpreter, at small sizes. That
finds in CI what would otherwise be found when a card is there: typing errors and wrong arguments.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sn72kernels import OPS

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[3]
# Files that use these run on the interpreter; all others are there for the card only.
SUPPORT = "from tests.gpu.support import"


def gpu_tests(what: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SN72_GPU_TESTS_SEED": "0", **variables}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", what, "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_bodies_run_on_the_interpreter(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    done = gpu_tests(
        "tests/gpu", "--show-capture=no",
        "-p", "benchmarks.pytest_outcomes", f"--outcomes={record}",
        SN72_GPU_TESTS_ON_INTERPRETER="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert lines.pop(0)["collected"] == len(lines)
    ran = [line["test"] for line in lines if line["outcome"] == "passed"]
    skipped = [line for line in lines if line["outcome"] == "skipped"]
    assert not skipped, skipped
    for path in (ROOT / "tests" / "gpu").glob("test_*.py"):
        if SUPPORT in path.read_text():
            assert any(path.name in name for name in ran), f"nothing of {path.name} ran"
    for op in set(OPS.values()):
        assert any(f"test_{op}.py" in name for name in ran), op


def test_without_a_card_they_are_skipped_with_the_reason() -> None:
    file = "tests/gpu/test_ensemble_vote.py"
    done = gpu_tests(file, "-rs", SN72_GPU_TESTS_ON_INTERPRETER="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"no CUDA device is visible to torch [\d.]+", done.stdout)
    assert re.search(r"\d+ skipped", done.stdout)
    assert "passed" not in done.stdout


def test_advice_of_torch_compile_on_float32_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors, and only where there is a card does it give this one."""
    from torch._inductor import compile_fx

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    advise: Any = compile_fx._warn_tf32_disabled
    advise.__wrapped__()
