"""The command for a visit to a GPU, gone through without one: what it keeps, also when cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_evidence, machine, processes

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")

ROOT = Path(__file__).parents[2]


def records(out: Path) -> dict[str, Any]:
    return {
        json.loads(path.read_text())["step"]: json.loads(path.read_text())
        for path in (out / machine.folder()).glob("*.json")
    }


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_evidence.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_motions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests on the interpreter, benchmarks on the CPU, and no sanitizer, which is said."""
    # The steps are pytest runs of their own; a worker's variables would switch benchmarks off.
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    command = ["--allow-cpu", "--out", str(tmp_path), "--minutes", "5", "--select", "vote"]
    assert gpu_evidence.main([*command, "--only", "tests", "kernels", "sanitize"]) == 1
    assert "tests passed; kernels passed; sanitize FAILED" in capsys.readouterr().out
    assert gpu_evidence.main([*command, "--only", "cascade"]) == 1, "nothing at all"
    assert "cascade had nothing that was selected" in capsys.readouterr().out
    found = records(tmp_path)
    assert set(found) == {"tests", "kernels", "sanitize", "cascade"}
    assert found["tests"]["counts"] == {"passed": found["tests"]["collected"]}
    assert not found["tests"]["cut_off"]
    assert [race["op"] for race in found["kernels"]["races"]] == ["ensemble_vote"] * 2
    assert found["kernels"]["header"]["gpu"] is False
    assert found["sanitize"]["exit_code"] == 2
    assert "no CUDA device is visible" in found["sanitize"]["output"]
    folder = tmp_path / machine.folder()
    assert all(path.name.startswith(machine.today()) for path in folder.iterdir())
    assert all(path.name.endswith("-selected.json") for path in folder.iterdir()), "no leftovers"
    for record in found.values():
        assert str(tmp_path) not in json.dumps(record["command"])


@pytest.mark.parametrize("name", gpu_evidence.STEPS)
def test_records_hold_no_place_of_this_machine(name: str, tmp_path: Path) -> None:
    context = gpu_evidence.Context(tmp_path / "x.jsonl", 60.0, "", gpu=True)
    command = gpu_evidence.STEPS[name].command(context)
    assert not any(Path(word).is_absolute() for word in gpu_evidence._shown(command, context))


def slow_step(seconds: float) -> gpu_evidence.Step:
    """Keeps one outcome at once and sleeps before the next."""
    code = (
        "import json, sys, time\n"
        "for n in range(9):\n"
        "    line = json.dumps({'test': f'test_{n}', 'outcome': 'passed', 'seconds': n})\n"
        "    print(line, file=open(sys.argv[1], 'a'), flush=True)\n"
        f"    time.sleep({seconds} * n)\n"
    )
    return gpu_evidence.Step(
        1.0,
        lambda context: [sys.executable, "-c", code, str(context.lines)],
        gpu_evidence.STEPS["tests"].collect,
    )


def test_a_step_whose_time_is_over_keeps_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_evidence.STEPS, "tests", slow_step(60.0))
    monkeypatch.setattr(processes, "GRACE_SECONDS", 2.0)
    options = ["--allow-cpu", "--out", str(tmp_path), "--only", "tests", "--minutes", "0.05"]
    assert gpu_evidence.main(options) == 1
    record = records(tmp_path)["tests"]
    assert record["cut_off"]
    assert record["counts"] == {"passed": 2}


def test_what_is_left_of_the_time_goes_to_the_next_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_evidence, "take", lambda *_: gpu_evidence.PASSED)
    names = ["tests", "sanitize", "kernels", "cascade"]
    options = ["--allow-cpu", "--out", str(tmp_path), "--minutes", "25", "--only", *names]
    assert gpu_evidence.main(options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "at most" in line]
    seconds = [int(line.split()[-2]) for line in lines]
    # Nobody needed any time, so each gets its share of all of it.
    assert seconds == [540, 562, 1200, 1500]


def test_interrupted_from_outside(tmp_path: Path) -> None:
    """SIGTERM, as a time limit sends it: the step in progress still writes its file."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from benchmarks import gpu_evidence, processes\n"
        "from tests.cpu.test_gpu_evidence import slow_step\n"
        "processes.GRACE_SECONDS = 2.0\n"
        "gpu_evidence.STEPS['tests'] = slow_step(60.0)\n"
        "sys.exit(gpu_evidence.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, str(program), "--allow-cpu", "--out", str(out), "--only", "tests"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lines = out / machine.folder() / f"{machine.today()}-tests.jsonl"
    end = time.monotonic() + 60
    while not lines.exists() or lines.read_text().count("\n") < 2:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    record = records(out)["tests"]
    assert record["cut_off"]
    assert record["counts"] == {"passed": 2}


def test_every_benchmark_of_a_gpu_is_collected() -> None:
    """One visit brings all figures: of kernels, cascades, engines, and a cascade of engines."""
    context = gpu_evidence.Context(Path("lines"), 60.0, "", True)
    commands = {name: gpu_evidence.STEPS[name].command(context) for name in gpu_evidence.DEFAULT}
    assert "benchmarks/test_inductor.py" in commands["engines"]
    assert "benchmarks.end_to_end" in commands["end_to_end"]
    assert "1,8,32,64" in commands["end_to_end"]
    for command in commands.values():
        for word in command:
            assert not word.endswith(".py") or (ROOT / word).is_file()


def test_figures_are_kept_as_each_benchmark_ends(tmp_path: Path) -> None:
    """pytest-benchmark's own file comes at the very end, which a cut-off run does not reach."""
    (tmp_path / "test_figures.py").write_text(
        "def test_one(benchmark):\n"
        "    benchmark.extra_info['p50_ms'] = 2.5\n"
        "    benchmark.pedantic(lambda: None, rounds=1)\n"
        "def test_two(): pass\n"
    )
    lines = tmp_path / "lines.jsonl"
    context = gpu_evidence.Context(lines, 60.0, "", False)
    command = context.pytest(str(tmp_path), "-p", "benchmarks.pytest_outcomes")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    ended = processes.run([*command, f"--outcomes={lines}"], environment=environment, seconds=60)
    assert ended.exit_code == 0, ended.output
    found = gpu_evidence.STEPS["engines"].collect(context)
    assert found["extra"] == {"test_one": {"p50_ms": 2.5}}
    assert found["median_ms"] == {}


def test_the_plugin_keeps_failures_and_what_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no card')\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('broken fixture')\n"
        "def test_error(broken): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import nothing_of_this_name\n")
    lines = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-q", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.pytest_outcomes", f"--outcomes={lines}"]
    command += ["--continue-on-collection-errors"]
    ended = processes.run(command, environment=os.environ, seconds=60)
    assert ended.exit_code == 1, ended.output
    tests = processes.outcomes(lines)
    assert {Path(t["test"]).name.rpartition(":")[2]: t["outcome"] for t in tests} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_error": "error",
        "test_b.py": "error",
    }
    reasons = {t["outcome"]: t.get("reason", "") for t in tests}
    assert reasons["skipped"] == "no card"
    assert "assert 1 == 2" in reasons["failed"]
