"""A command with a time limit, whose children end with it and whose output is kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

#: Time that an interrupted command has to write what it knows.
GRACE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Ended:
    """What a command left.

    Attributes:
        exit_code: None where the time was over.
        output: standard output and error together.
    """

    exit_code: int | None
    output: str


def run(command: Sequence[str], *, environment: Mapping[str, str], seconds: float) -> Ended:
    """Run a command in the root of the checkout for at most ``seconds``.

    When the time is over, or the caller is interrupted, its whole process group is interrupted,
    which lets pytest write its files, and then killed.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                _end(process)
        output.seek(0)
        return Ended(code, output.read())


def outcomes(path: Path) -> list[dict[str, Any]]:
    """The tests in a file of :mod:`benchmarks.pytest_outcomes`, without a line that was cut off."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if "outcome" in entry:
                found.append(entry)
    return found


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    for kind in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
            return
