"""``sn72engine demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sn72engine.cli.outcome import Outcome
from sn72engine.demo.options import DemoOptions

SUMMARY = "the whole job on pretrained models and photographs, with a report"
EXAMPLES = """\
  sn72engine demo                                  # writes demo-report/report.html
  sn72engine demo --data imagenet/labels.csv       # thresholds and accuracy from real labels
  sn72engine demo --target '' --output cpu-demo    # without the GPU engines
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    defaults = DemoOptions()
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=defaults.folder,
        metavar="FOLDER",
        help="what to write to; default %(default)s",
    )
    parser.add_argument(
        "--data", type=Path, help="CSV with file and label (ImageNet class index) columns"
    )
    parser.add_argument(
        "--target",
        default=defaults.target,
        help="card to build GPU engines for, '' for none; default %(default)s",
    )
    parser.add_argument(
        "--threads", type=int, default=defaults.threads, help="CPU threads; default %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="of crops and splits; default %(default)s"
    )


def execute(options: argparse.Namespace) -> Outcome:
    """Run the demonstration."""
    from sn72engine.demo.pipeline import run_demo

    result = run_demo(
        DemoOptions(
            folder=options.output,
            data=options.data,
            target=options.target,
            threads=options.threads,
            seed=options.seed,
        ),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return Outcome(result.figures, result.text)
