"""Everything that only a GPU can show, in one command and a given time.

    python -m benchmarks.gpu_evidence --minutes 25
    python -m benchmarks.gpu_evidence --only tests --minutes 9

Runs, each in a process of its own: ``tests`` (tests/gpu), ``sanitize`` (compute-sanitizer over the
small ones), ``kernels`` (benchmarks/kernels over the whole grid), ``cascade`` (the cascade's
benchmarks), ``engines`` (inductor engines of ViT-L/16 at 384 px) and ``end_to_end`` (a cascade of
them). Each leaves ``<out>/<gpu>/<date>-<step>.json``, written when the step ends or its time
is over, from lines that were kept as they came; a step that was killed altogether leaves these
lines, ``<date>-<step>.jsonl``. A step gets its share of the time that is left, so that what one
does not need goes to the next. With ``--select`` the files are named ``<date>-<step>-selected``, so
that a part never replaces the whole. ``tune`` (launch configurations) runs only when named.

Exit code 0: all steps that had something to do passed; 1: something failed or was cut off, or there
was nothing to do; 2: no GPU. ``--allow-cpu`` goes through the same motions without one, to see that
they work: kernels under Triton's interpreter or as their references, nothing that says anything
about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, processes
from benchmarks.kernels import harness
from sn72kernels import atomic, device, tuning

SLOWEST = 20
PASSED, FAILED, NOTHING = "passed", "FAILED", "had nothing that was selected"


@dataclass(frozen=True, slots=True)
class Context:
    """What a step is run with.

    Attributes:
        lines: where the step's process keeps what it knows, line by line.
        seconds: time of the step.
        select: as pytest's ``-k``; "" for everything.
        gpu: whether there is one.
    """

    lines: Path
    seconds: float
    select: str
    gpu: bool

    def pytest(self, *arguments: str) -> list[str]:
        """A pytest command line with the selection."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        return command + (["-k", self.select] if self.select else [])

    def environment(self) -> dict[str, str]:
        """Without a GPU, tests/gpu runs on the interpreter."""
        extra = {} if self.gpu else {"SN72_GPU_TESTS_ON_INTERPRETER": "1"}
        return {**os.environ, **extra}


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the evidence.

    Attributes:
        weight: of its share of the time.
        command: the process to run.
        collect: what the lines that it kept come to, JSON-ready; they may be missing.
    """

    weight: float
    command: Callable[[Context], list[str]]
    collect: Callable[[Context], dict[str, Any]]


def _tests(context: Context) -> list[str]:
    # The cascade's kernels first: of all that is here they have been run the least.
    return context.pytest(
        "tests/gpu/test_csrc.py", "tests/gpu", "-p", "benchmarks.pytest_outcomes",
        f"--outcomes={context.lines}",
    )  # fmt: skip


def _cascade(context: Context) -> list[str]:
    folder = machine.ROOT / "benchmarks"
    names = ("test_cascade*.py", "test_executor*.py", "test_device*.py")
    return _benchmarked(context, sorted(p for name in names for p in folder.glob(name)))


def _engines(context: Context) -> list[str]:
    return _benchmarked(context, [machine.ROOT / "benchmarks" / "test_inductor.py"])


def _benchmarked(context: Context, files: Sequence[Path]) -> list[str]:
    return context.pytest(
        *(str(path.relative_to(machine.ROOT)) for path in files),
        "-p", "benchmarks.pytest_outcomes", f"--outcomes={context.lines}",
        f"--benchmark-json={context.lines.with_suffix('.benchmark')}",
        # Warnings are errors, and a file with no benchmarks in it is warned of.
        "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning",
    )  # fmt: skip


def _outcomes(context: Context) -> dict[str, Any]:
    """Counts, what failed and why, why tests were skipped, the slowest."""
    tests = processes.outcomes(context.lines)
    head = context.lines.read_text().partition("\n")[0] if context.lines.exists() else ""
    slowest = sorted(tests, key=lambda test: test.get("seconds", 0.0))[: -SLOWEST - 1 : -1]
    return {
        "collected": json.loads(head).get("collected", 0) if head else 0,
        "counts": dict(Counter(test["outcome"] for test in tests)),
        "failed": [test for test in tests if test["outcome"] in ("failed", "error")],
        "skipped": dict(Counter(t.get("reason", "") for t in tests if t["outcome"] == "skipped")),
        "slowest": {test["test"]: test.get("seconds") for test in slowest},
    }


def _benchmarks(context: Context) -> dict[str, Any]:
    """:func:`_outcomes`, extra columns, and medians where the benchmarks came to their end."""
    found = _outcomes(context)
    tests = processes.outcomes(context.lines)
    found["extra"] = {t["test"].rpartition("::")[2]: t["figures"] for t in tests if "figures" in t}
    path = context.lines.with_suffix(".benchmark")
    try:
        entries = json.loads(path.read_text())["benchmarks"]
    except (OSError, ValueError):
        entries = []
    path.unlink(missing_ok=True)
    found["median_ms"] = {each["name"]: 1e3 * each["stats"]["median"] for each in entries}
    return found


def _kernels(context: Context) -> list[str]:
    minutes = max(0.1, context.seconds / 60 - 0.5)  # so that the last race can end
    return context.pytest(
        "benchmarks/kernels", "--kernel-record", str(context.lines), f"--kernel-minutes={minutes}"
    )


def _races(context: Context) -> dict[str, Any]:
    try:
        return harness.read(context.lines)
    except (OSError, ValueError):
        return {"header": None, "races": []}


def _end_to_end(context: Context) -> list[str]:
    # Engines of gigabytes: not among the results, and still there for the next visit.
    folder = Path(tempfile.gettempdir()) / "sn72-end-to-end"
    batches = "1,8,32,64" if context.gpu else "1,8"
    return [
        sys.executable, "-m", "benchmarks.end_to_end", "--batches", batches,
        "--folder", str(folder), "--record", str(context.lines),
    ]  # fmt: skip


def _end_to_end_races(context: Context) -> dict[str, Any]:
    try:
        return {"races": json.loads(context.lines.read_text())["races"]}
    except (OSError, ValueError):
        return {"races": []}


def _sanitize(context: Context) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.sanitize", "--keep", str(context.lines)]
    command += ["--minutes", str(context.seconds / 60)]
    return command + (["--select", context.select] if context.select else [])


def _reports(context: Context) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(context.lines.read_text())
    except (OSError, ValueError):
        return {"tools": []}
    return kept


def _tune(context: Context) -> list[str]:
    return [sys.executable, "-m", "sn72kernels.tune"]


def _configurations(context: Context) -> dict[str, Any]:
    arch = device.arch(torch.device("cuda" if context.gpu else "cpu"))
    path = tuning.cache_file(arch)
    return {"configurations": json.loads(path.read_text()) if path.exists() else {}}


STEPS: dict[str, Step] = {
    "tests": Step(9.0, _tests, _outcomes),
    "sanitize": Step(6.0, _sanitize, _reports),
    "kernels": Step(8.0, _kernels, _races),
    "cascade": Step(2.0, _cascade, _benchmarks),
    "engines": Step(6.0, _engines, _benchmarks),
    "end_to_end": Step(6.0, _end_to_end, _end_to_end_races),
    "tune": Step(10.0, _tune, _configurations),
}
DEFAULT = ("tests", "sanitize", "kernels", "cascade", "engines", "end_to_end")


def take(name: str, context: Context, path: Path) -> str:
    """Run one step and write its file; :data:`PASSED`, :data:`FAILED` or :data:`NOTHING`.

    The file is written whatever ends the step, an interrupt of this process included.
    """
    step = STEPS[name]
    ended: processes.Ended | None = None
    begin = time.monotonic()
    try:
        command = step.command(context)
        ended = processes.run(command, environment=context.environment(), seconds=context.seconds)
    finally:
        record = {
            "step": name,
            "machine": machine.describe(),
            "command": _shown(step.command(context), context),
            "seconds": round(time.monotonic() - begin, 1),
            "cut_off": ended is None or ended.exit_code is None,
            "exit_code": None if ended is None else ended.exit_code,
            **step.collect(context),
            "output": "" if ended is None else _placeless(ended.output, context)[-4000:],
        }
        atomic.write_text(path, json.dumps(record, indent=1) + "\n")
        context.lines.unlink(missing_ok=True)
    if context.select and ended.exit_code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return NOTHING
    return PASSED if ended.exit_code == 0 else FAILED


def _shown(command: Sequence[str], context: Context) -> list[str]:
    """A command without the places of this machine."""
    return [Path(command[0]).name, *(_placeless(word, context) for word in command[1:])]


def _placeless(text: str, context: Context) -> str:
    for place in (context.lines.parent, machine.ROOT, Path(tempfile.gettempdir())):
        text = text.replace(f"{place}{os.sep}", "")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps within the time and keep what they showed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_evidence", description=main.__doc__
    )
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=25.0, help="of everything together")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=DEFAULT, metavar="STEP")
    parser.add_argument("--select", default="", metavar="EXPR", help="as pytest's -k")
    parser.add_argument("--allow-cpu", action="store_true", help="go through the motions")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if not gpu and not options.allow_cpu:
        print(
            f"error: no CUDA device is visible to torch {torch.__version__}, and evidence about a"
            " GPU can only come from one; --allow-cpu tries the command out.",
            file=sys.stderr,
        )
        return 2
    # A time limit from outside comes as this signal; steps write what they have on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = options.out.resolve() / machine.folder()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    verdicts = {}
    for place, name in enumerate(options.only):
        left = end - time.monotonic()
        if left <= 0:
            verdicts[name] = "not begun: the time was over"
            continue
        share = STEPS[name].weight / sum(STEPS[each].weight for each in options.only[place:])
        stem = f"{machine.today()}-{name}{'-selected' if options.select else ''}"
        context = Context(
            lines=folder / f"{stem}.jsonl",
            seconds=left * share,
            select=options.select,
            gpu=gpu,
        )
        print(f"{name}: at most {context.seconds:.0f} s", flush=True)
        verdicts[name] = take(name, context, folder / f"{stem}.json")
        print(f"{name}: {verdicts[name]}; {folder / f'{stem}.json'}", flush=True)
    print("; ".join(f"{name} {verdict}" for name, verdict in verdicts.items()))
    return 0 if PASSED in verdicts.values() and set(verdicts.values()) <= {PASSED, NOTHING} else 1


if __name__ == "__main__":
    sys.exit(main())
