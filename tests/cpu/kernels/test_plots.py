"""Table and plots from a record that the benchmarks themselves made, and from one like a GPU's."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sn72kernels.bench import Timing

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
ROOT = Path(__file__).parents[3]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("plots", ROOT / "benchmarks/kernels/plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One benchmark, run for real."""
    path = tmp_path_factory.mktemp("record") / "record.json"
    command = [
        sys.executable, "-m", "pytest", "benchmarks/kernels/test_cascade_route.py", "-q", "-k",
        "64", "--benchmark-max-time=0.05", f"--benchmark-json={path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")
def test_without_a_gpu_the_table_says_so(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plots = load()
    assert plots.main(str(record), str(tmp_path)) == 0
    text = (tmp_path / "kernels.md").read_text()
    assert text.startswith("No GPU was present: these are the reference paths")
    assert "| test_route[64] |" in text
    assert "no plots" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.md"]


def test_speed_up_only_beside_a_right_result(record: Path, tmp_path: Path) -> None:
    """The record's own entries with timings put in as the benchmarks put them in on a GPU."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plots = load()
    content = json.loads(record.read_text())
    first = content["benchmarks"][0]
    content["benchmarks"] = []
    for factor in (1, 4, 16):
        entry = copy.deepcopy(first)
        timings = [
            Timing("sn72kernels", 0.01 * factor, 2000.0, 80.0),
            Timing("eager", 0.03 * factor, 667.0, 26.7),
            Timing("torch.compile", note="wrong result"),
        ]
        entry["extra_info"] = {
            "gpu": True, "title": f"example n={factor}", "timings": [asdict(t) for t in timings],
        }  # fmt: skip
        content["benchmarks"].append(entry)
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content))
    assert plots.main(str(path), str(tmp_path / "out")) == 0
    text = (tmp_path / "out" / "kernels.md").read_text()
    assert "| example n=1 | eager | 30.00 | 667 | 27 | 3.00 |" in text
    assert "| example n=1 | torch.compile | not timed: wrong result | | | |" in text
    for name in ("speedup.png", "roofline.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
