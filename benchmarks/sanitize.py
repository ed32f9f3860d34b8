"""Small GPU tests under compute-sanitizer: memory, races, uninitialised reads, barriers.

    python -m benchmarks.sanitize                       # all four tools
    python -m benchmarks.sanitize --tools racecheck --select route

Runs ``tests/gpu/test_sanitized_calls.py`` (one small launch of every Triton kernel) and
``tests/gpu/test_csrc.py`` (the CUDA kernels of the cascade) once per tool and keeps a summary in
``<out>/<gpu>/<date>-sanitize.json``, rewritten after every tool. PyTorch's caching allocator is
switched off, so that what lies beyond a tensor is not another tensor's memory. Exit code 0: nothing
found; 1: something found, or a test failed; 2: no GPU, or no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, processes
from sn72kernels import atomic

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TARGETS = ("tests/gpu/test_sanitized_calls.py", "tests/gpu/test_csrc.py")
FOUND_CODE = 86


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of fault in one kernel.

    Attributes:
        kind: the tool's own words, without addresses and threads.
        kernel: name of the kernel, "" where the tool gives none.
        count: times that it was printed.
    """

    kind: str
    kernel: str
    count: int


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a tool printed.

    Attributes:
        errors: of the summary line; None where there is no summary, so the tool did not finish.
        warnings: likewise; only racecheck has them.
        findings: what was printed, most frequent first.
    """

    errors: int | None
    warnings: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """One tool's run.

    Attributes:
        tool: its name.
        clean: the tool finished, found nothing, and the tests passed and were not all skipped.
        note: why it is not clean, or "".
        seconds: wall time.
        exit_code: of the process; None where the time was over.
        errors: see :class:`Parsed`.
        warnings: likewise.
        findings: likewise.
        tests: outcome -> number of tests.
    """

    tool: str
    clean: bool
    note: str
    seconds: float
    exit_code: int | None
    errors: int | None
    warnings: int
    findings: tuple[Finding, ...]
    tests: dict[str, int]


def executable() -> str | None:
    """compute-sanitizer on the path, or in the CUDA toolkit that the environment names."""
    places = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for place in (*filter(None, places), "/usr/local/cuda"):
        found = shutil.which("compute-sanitizer", path=str(Path(place) / "bin"))
        if found:
            return found
    return shutil.which("compute-sanitizer")


def command(
    sanitizer: str, tool: str, targets: Sequence[str], outcomes: Path, select: str = ""
) -> list[str]:
    """The command line of one tool over ``targets``."""
    pytest = [sys.executable, "-m", "pytest", *targets, "-q", "-p", "no:cacheprovider"]
    pytest += ["-p", "benchmarks.pytest_outcomes", f"--outcomes={outcomes}"]
    pytest += ["-k", select] if select else []
    # Triton's compiler runs in processes of its own, which are none of the tool's business.
    options = ["--target-processes", "application-only", "--print-limit", "100"]
    options += ["--error-exitcode", str(FOUND_CODE)]
    if tool == "memcheck":
        # PyTorch asks the driver for things that it may not have, and takes no for an answer.
        options += ["--report-api-errors", "no"]
    return [sanitizer, "--tool", tool, *options, *pytest]


def environment() -> dict[str, str]:
    """Every tensor its own allocation, and a fixed seed."""
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SN72_GPU_TESTS_SEED": "0"}


_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?")
_RACES = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?")
_HEADLINE = re.compile(
    r"^=+ (?:Error: |Warning: )?"
    r"((?:Invalid|Misaligned|Uninitialized|Barrier error|Race reported|\(.*?\) Potential|Potential"
    r"|Program hit|Leaked|Unused|Illegal|Target application)[^\n]*)",
    re.MULTILINE,
)
# "kernel(int *)+0x90 in file.cu:41", "at 0x90 in kernel(int *)"; arguments may hold spaces.
_AT = re.compile(r"\bat (?:0x[0-9a-f]+ in )?(?:\[clone )?(?!__shared__|0x)([\w:<>, ]+?)(?:\(|\+0x)")


def parse(text: str) -> Parsed:
    """Read a tool's output."""
    races, errors = _RACES.search(text), _SUMMARY.search(text)
    warnings = int(races[3]) if races else 0
    total = int(races[2]) if races else int(errors[1]) if errors else None
    counts: Counter[tuple[str, str]] = Counter()
    headlines = list(_HEADLINE.finditer(text))
    for place, found in enumerate(headlines):
        end = headlines[place + 1].start() if place + 1 < len(headlines) else len(text)
        at = _AT.search(text, found.start(), end)
        kind = re.split(r" at | between | detected at |\. ", found[1])[0].strip()
        counts[kind, at[1].strip() if at else ""] += 1
    ranked = counts.most_common()
    return Parsed(total, warnings, tuple(Finding(*key, count) for key, count in ranked))


def judge(parsed: Parsed, exit_code: int | None, tests: dict[str, int]) -> str:
    """Why a run is not clean; "" when it is."""
    if exit_code is None:
        return "the time was over before the tool ended"
    if parsed.errors is None:
        return f"the tool printed no summary (exit code {exit_code})"
    if parsed.errors or parsed.warnings:
        return f"{parsed.errors} errors, {parsed.warnings} warnings"
    if tests.get("failed") or tests.get("error"):
        return "tests failed"
    if not tests.get("passed"):
        return "no test was run"
    return "" if exit_code == 0 else f"exit code {exit_code}"


def run(
    sanitizer: str, tool: str, targets: Sequence[str], *, select: str = "", seconds: float = 600.0
) -> tuple[Report, str]:
    """Run one tool; the second value is what it printed."""
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch) / "outcomes.jsonl"
        begin = time.monotonic()
        ended = processes.run(
            command(sanitizer, tool, targets, outcomes, select),
            environment=environment(),
            seconds=seconds,
        )
        tests = processes.outcomes(outcomes)
    parsed = parse(ended.output)
    counts = dict(Counter(test["outcome"] for test in tests))
    note = judge(parsed, ended.exit_code, counts)
    report = Report(
        tool=tool,
        clean=not note,
        note=note,
        seconds=round(time.monotonic() - begin, 1),
        exit_code=ended.exit_code,
        errors=parsed.errors,
        warnings=parsed.warnings,
        findings=parsed.findings,
        tests=counts,
    )
    return report, ended.output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tools, print and keep what they found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=main.__doc__)
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="FILE")
    parser.add_argument("--select", default="", metavar="EXPR", help="as pytest's -k")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=12.0, help="of all tools together")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="instead of a file under --out")
    options = parser.parse_args(arguments)
    sanitizer = executable()
    if not torch.cuda.is_available():
        return _refuse(f"no CUDA device is visible to torch {torch.__version__}")
    if sanitizer is None:
        return _refuse(
            "compute-sanitizer is not on the path, nor under CUDA_HOME; it comes with"
            " the CUDA toolkit"
        )
    path = options.keep or options.out / machine.folder() / f"{machine.today()}-sanitize.json"
    reports = sanitize(sanitizer, options, path)
    print(path)
    return 0 if all(report.clean for report in reports) else 1


def sanitize(sanitizer: str, options: argparse.Namespace, path: Path) -> list[Report]:
    """Run every tool of ``options``; the file is whole after each."""
    end = time.monotonic() + 60 * options.minutes
    reports: list[Report] = []
    kept: dict[str, Any] = {"machine": machine.describe(), "targets": list(options.targets)}
    for place, tool in enumerate(options.tools):
        share = (end - time.monotonic()) / (len(options.tools) - place)
        report, output = run(
            sanitizer, tool, options.targets, select=options.select, seconds=max(1.0, share)
        )
        reports.append(report)
        kept["tools"] = [asdict(each) for each in reports]
        if not report.clean:
            kept.setdefault("output", {})[tool] = output[-6000:]
        atomic.write_text(path, json.dumps(kept, indent=1) + "\n")
        verdict = "clean" if report.clean else report.note
        print(f"{tool}: {verdict}; {report.tests} in {report.seconds} s", flush=True)
        for finding in report.findings:
            print(f"  {finding.count} x {finding.kind} in {finding.kernel or 'no kernel'}")
    return reports


def _refuse(reason: str) -> int:
    print(f"error: compute-sanitizer cannot be run here: {reason}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
