"""``sn72engine diff``."""

from __future__ import annotations

import argparse

from sn72engine.cli.inspect import inspected
from sn72engine.cli.outcome import Outcome

SUMMARY = "show in what two engines or ONNX files differ"
EXAMPLES = """\
  sn72engine diff model.onnx model.int8.onnx
  sn72engine diff OLD_KEY NEW_KEY --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("a", help="ONNX file, engine folder, or the start of an engine's key")
    parser.add_argument("b", help="the same, to compare with it")
    parser.add_argument("--rows", type=int, default=30, help="most lines of a kind; default 30")


def execute(options: argparse.Namespace) -> Outcome:
    """Compare what inspection reports of both."""
    from sn72engine.inspection_diff import diff

    found = diff(inspected(options.a), inspected(options.b))
    return Outcome(found.to_dict(), found.render(options.rows))
