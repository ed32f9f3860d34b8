"""``sn72engine inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sn72engine.cli.outcome import Outcome, engine_folder

SUMMARY = "show what is in an ONNX file or an engine"
EXAMPLES = """\
  sn72engine inspect model.int8.onnx
  sn72engine inspect KEY --layers             # as the backend runs it, after its fusions
  sn72engine inspect KEY --diff OTHER_KEY     # the same as: sn72engine diff KEY OTHER_KEY
  sn72engine inspect KEY --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("subject", help="ONNX file, engine folder, or the start of an engine's key")
    parser.add_argument("--layers", action="store_true", help="list every layer")
    parser.add_argument("--diff", metavar="OTHER", help="show in what it differs from this one")


def execute(options: argparse.Namespace) -> Outcome:
    """Inspect."""
    from sn72engine import inspection
    from sn72engine.inspection_diff import diff

    report = inspected(options.subject)
    if options.diff is not None:
        found = diff(report, inspected(options.diff))
        return Outcome(found.to_dict(), found.render())
    return Outcome(report, inspection.render(report, layers=options.layers))


def inspected(text: str) -> dict[str, Any]:
    """What inspection reports of an ONNX file or an engine."""
    from sn72engine import inspection

    path = subject_path(text)
    return inspection.inspect_onnx(path) if path.is_file() else inspection.inspect_engine(path)


def subject_path(text: str) -> Path:
    """The ONNX file that a path names, or the folder of an engine."""
    path = Path(text)
    return path if path.is_file() else engine_folder(text)
