"""The compute-sanitizer target without a GPU: its command lines, and what it reads in the output.

The outputs are in the form that NVIDIA's guide to the tools shows.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import sanitize
from benchmarks.sanitize import Finding

CLEAN = """\
========= COMPUTE-SANITIZER
.........                                                            [100%]
9 passed in 31.07s
========= ERROR SUMMARY: 0 errors
"""
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at compact_blocks+0x2d0 in kernel.py:97
=========     by thread (31,0,0) in block (4,0,0)
=========     Access to 0x7f51c2000640 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f51c2000000 of size 1600 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: _launch [0x1a2b] in __triton_launcher.so
=========
========= Invalid __global__ write of size 4 bytes
=========     at compact_blocks+0x2d0 in kernel.py:97
=========     by thread (30,0,0) in block (4,0,0)
=========     Access to 0x7f51c200063c is out of bounds
=========
========= Invalid __global__ read of size 16 bytes
=========     at sn72_gather(sn72::GatherArgs)+0x110 in move_core.h:31
=========     by thread (0,0,0) in block (1,0,0)
=========     Access to 0x7f51c2400001 is misaligned
=========
========= Leaked 1,024 bytes at 0x7879c0800000
=========     Saved host backtrace up to driver entry point at allocation time
=========
========= ERROR SUMMARY: 4 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sn72_route(sn72::RouteArgs)+0x90 in r.h:41
=========     and Read access at sn72_route(sn72::RouteArgs)+0x100 in r.h:51 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
HAZARD = """\
========= Warning: (Warp Level Programming) Potential RAW hazard detected at __shared__ 0x8c in \
block (0,0,0) :
=========     Write Thread (35,0,0) at finish+0x90 in kernel.py:44
=========     Read Thread (32,0,0) at finish+0x120 in kernel.py:56
=========     Current Value : 35
=========
========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x70 in vote(float *, float *)
=========     by thread (31,0,0) in block (1,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= ERROR SUMMARY: 1 error
"""
SYNCCHECK = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at [clone hidden(int *, int *)] outlineSync()+0x11f0 in test.cu:42
=========     by thread (32,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""


def test_clean() -> None:
    assert sanitize.parse(CLEAN) == sanitize.Parsed(0, 0, ())
    races = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert sanitize.parse(races) == sanitize.Parsed(0, 0, ())


@pytest.mark.parametrize(
    ("text", "errors", "warnings", "findings"),
    [
        (
            MEMCHECK,
            4,
            0,
            [
                Finding("Invalid __global__ write of size 4 bytes", "compact_blocks", 2),
                Finding("Invalid __global__ read of size 16 bytes", "sn72_gather", 1),
                Finding("Leaked 1,024 bytes", "", 1),
            ],
        ),
        (RACECHECK, 1, 0, [Finding("Race reported", "sn72_route", 1)]),
        (
            HAZARD,
            0,
            2,
            [Finding("(Warp Level Programming) Potential RAW hazard", "finish", 1)],
        ),
        (
            INITCHECK,
            1,
            0,
            [Finding("Uninitialized __global__ memory read of size 4 bytes", "vote", 1)],
        ),
        (SYNCCHECK, 1, 0, [Finding("Barrier error detected", "hidden", 1)]),
    ],
    ids=["memcheck", "racecheck", "hazard", "initcheck", "synccheck"],
)
def test_findings(text: str, errors: int, warnings: int, findings: list[Finding]) -> None:
    parsed = sanitize.parse(text)
    assert (parsed.errors, parsed.warnings) == (errors, warnings)
    assert list(parsed.findings) == findings
    assert sanitize.judge(parsed, sanitize.FOUND_CODE, {"passed": 3}).startswith(f"{errors} errors")


@pytest.mark.parametrize(
    ("text", "code", "tests", "reason"),
    [
        (CLEAN, 0, {"passed": 9}, ""),
        (CLEAN, 0, {"skipped": 9}, "no test was run"),
        (CLEAN, 0, {}, "no test was run"),
        (CLEAN, 1, {"passed": 8, "failed": 1}, "tests failed"),
        (CLEAN, 3, {"passed": 9}, "exit code 3"),
        (CLEAN, None, {"passed": 9}, "the time was over"),
        ("Device not supported", 1, {}, "no summary (exit code 1)"),
    ],
)
def test_only_a_finished_run_of_passing_tests_is_clean(
    text: str, code: int | None, tests: dict[str, int], reason: str
) -> None:
    found = sanitize.judge(sanitize.parse(text), code, tests)
    assert reason in found
    assert bool(found) == bool(reason)


def test_command_line() -> None:
    words = sanitize.command("cs", "memcheck", sanitize.TARGETS, Path("o.jsonl"), "route")
    cut = words.index(sys.executable)
    assert words[:3] == ["cs", "--tool", "memcheck"]
    assert words[words.index("--error-exitcode") + 1] == str(sanitize.FOUND_CODE)
    assert words.index("--report-api-errors") < cut, "an option of the tool, not of pytest"
    assert words[cut + 1 :][:4] == ["-m", "pytest", *sanitize.TARGETS]
    assert words[-2:] == ["-k", "route"]
    assert "--report-api-errors" not in sanitize.command("cs", "racecheck", ["t"], Path("o"))
    assert sanitize.environment()["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_targets_exist_and_hold_the_cascades_kernels() -> None:
    root = Path(__file__).parents[2]
    assert all((root / target).is_file() for target in sanitize.TARGETS)
    assert "tests/gpu/test_csrc.py" in sanitize.TARGETS


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main([]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err


def test_without_the_tool_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "executable", lambda: None)
    assert sanitize.main([]) == 2
    assert "compute-sanitizer is not on the path" in capsys.readouterr().err


def test_found_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.executable() == str(tool)


def test_a_whole_run_with_a_stand_in_for_the_tool(tmp_path: Path) -> None:
    """The stand-in starts the tests as the tool does, and prints what it prints."""
    tool, test = tmp_path / "tool", tmp_path / "test_one.py"
    test.write_text("def test_one():\n    pass\n")
    tool.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        "words = sys.argv[1:]\n"
        f"subprocess.run(words[words.index({sys.executable!r}):])\n"
        "if 'racecheck' in words:\n"
        f"    print({RACECHECK!r}); sys.exit({sanitize.FOUND_CODE})\n"
        "print('========= ERROR SUMMARY: 0 errors')\n"
    )
    tool.chmod(0o755)
    options = Namespace(tools=["memcheck", "racecheck"], targets=[str(test)], select="", minutes=1)
    path = tmp_path / "out" / "sanitize.json"
    reports = sanitize.sanitize(str(tool), options, path)
    assert [report.clean for report in reports] == [True, False]
    kept = json.loads(path.read_text())
    assert [entry["tests"] for entry in kept["tools"]] == [{"passed": 1}, {"passed": 1}]
    assert kept["tools"][1]["findings"] == [
        {"kind": "Race reported", "kernel": "sn72_route", "count": 1}
    ]
    assert list(kept["output"]) == ["racecheck"]
    assert os.sep + "tmp" not in json.dumps(kept["machine"])
