"""``sn72engine bench``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sn72engine.cli.outcome import Outcome, engine_folder
from sn72engine.spec import BenchOptions, RuntimeOptions

SUMMARY = "measure the latency and throughput of an engine"
EXAMPLES = """\
  sn72engine bench KEY
  sn72engine bench KEY --batch 8 --threads 1 --repeats 500 --histogram latency.png --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    defaults = BenchOptions()
    parser.add_argument("engine", help="engine folder, or the start of its key")
    parser.add_argument(
        "--batch", type=int, default=defaults.batch, help="samples per call; default %(default)s"
    )
    parser.add_argument(
        "--warmup", type=int, default=defaults.warmup, help="calls not timed; default %(default)s"
    )
    parser.add_argument(
        "--repeats", type=int, default=defaults.repeats, help="calls timed; default %(default)s"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--histogram", type=Path, metavar="PNG", help="write a latency histogram")


def execute(options: argparse.Namespace) -> Outcome:
    """Measure."""
    from sn72engine.latency import bench
    from sn72engine.session import load

    with load(engine_folder(options.engine), RuntimeOptions(threads=options.threads)) as session:
        report = bench(
            session,
            BenchOptions(batch=options.batch, warmup=options.warmup, repeats=options.repeats),
        )
    if options.histogram:
        report.save_histogram(options.histogram)
    return Outcome(report.to_dict(), report.render())
