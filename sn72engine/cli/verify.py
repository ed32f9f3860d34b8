"""``sn72engine verify``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sn72engine.cli.judging import bound_arguments, judging_data
from sn72engine.cli.outcome import Outcome, engine_folder
from sn72engine.spec import CalibrationOptions, VerifyOptions

SUMMARY = "compare an engine with the one it replaces: accuracy and speed, in one run"
EXAMPLES = """\
  sn72engine verify INT8_KEY --reference FP32_KEY --data photos/
  sn72engine verify INT8_KEY --reference FP32_KEY --data labels.csv --labels --max-top1-drop 0.5
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    defaults = VerifyOptions()
    parser.add_argument("engine", help="engine folder, or the start of its key")
    parser.add_argument("--reference", required=True, help="engine to compare with")
    parser.add_argument("--data", type=Path, required=True, help="images: folder, CSV or .npz")
    parser.add_argument(
        "--labels", action="store_true", help="use the label column of the CSV for top-1 accuracy"
    )
    parser.add_argument("--split", help="rows of the CSV with this value in the split column")
    parser.add_argument("--limit", type=int, default=256, help="most images; default 256")
    bound_arguments(parser, defaults)
    parser.add_argument(
        "--min-speedup",
        type=float,
        default=defaults.min_speedup,
        help="throughput over the reference's; default %(default)s",
    )
    parser.add_argument("--no-speed", action="store_true", help="compare accuracy only")
    parser.add_argument(
        "--batch", type=int, default=defaults.batch, help="of the timed runs; default %(default)s"
    )


def execute(options: argparse.Namespace) -> Outcome:
    """Verify and record the outcome in the manifest; exit code 5 when refused."""
    from sn72engine.session import load
    from sn72engine.store import Store
    from sn72engine.verifier import verify

    folder = engine_folder(options.engine)
    with load(folder) as candidate, load(engine_folder(options.reference)) as reference:
        data, labels = judging_data(
            options.data,
            candidate.preprocess,
            CalibrationOptions(limit=options.limit, minimum=1),
            labels=options.labels,
            split=options.split,
            owner=folder,
        )
        report = verify(
            candidate,
            reference,
            data,
            labels=labels,
            options=VerifyOptions(
                min_cosine=options.min_cosine,
                min_agreement=options.min_agreement,
                max_top1_drop=options.max_top1_drop,
                min_speedup=None if options.no_speed else options.min_speedup,
                batch=options.batch,
            ),
        )
        engine = candidate.engine
    store = Store()
    if engine.folder.resolve().parent.parent == store.root.resolve():
        store.update_manifest(engine, verification=report.to_dict())
    return Outcome(report.to_dict(), report.render(), 0 if report.passed else 5)
