"""``sn72engine inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sn72engine.cli.outcome import Outcome, engine_folder

SUMMARY = "show what is in an ONNX file or an engine"
EXAMPLES = """\
  sn72engine inspect model.int8.onnx
  sn72engine inspect KEY --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("subject", help="ONNX file, engine folder, or the start of an engine's key")


def subject_path(text: str) -> Path:
    """The ONNX file that a path names, or the folder of an engine."""
    path = Path(text)
    return path if path.is_file() else engine_folder(text)


def execute(options: argparse.Namespace) -> Outcome:
    """Inspect."""
    from sn72engine import inspection

    path = Path(options.subject)
    if path.is_file():
        report = inspection.inspect_onnx(path)
    else:
        report = inspection.inspect_engine(engine_folder(options.subject))
    return Outcome(report, inspection.render(report))
