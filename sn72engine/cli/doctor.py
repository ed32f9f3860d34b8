"""``sn72engine doctor``."""

from __future__ import annotations

import argparse

from sn72engine import doctor
from sn72engine.cli.outcome import Outcome

SUMMARY = "report on this machine and installation; works when the installation is broken"
EXAMPLES = """\
  sn72engine doctor
  sn72engine doctor --json > report.json
  python sn72engine/doctor.py        # when not even this command starts
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def execute(options: argparse.Namespace) -> Outcome:
    """Diagnose; exit code 1 when something installed is broken."""
    report = doctor.diagnose()
    return Outcome(report.to_dict(), doctor.render(report), 0 if report.healthy else 1)
