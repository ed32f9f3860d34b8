"""``sn72engine mix``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from sn72engine.cli.judging import bound_arguments, judging_data
from sn72engine.cli.outcome import Outcome, megabytes, preprocess_argument, table
from sn72engine.mixing.cost import CARDS
from sn72engine.mixing.options import Minimise, MixOptions
from sn72engine.spec import CalibrationOptions, QuantizedPrecision, VerifyOptions

SUMMARY = "give each layer of an ONNX file the cheapest number format that accuracy allows"
EXAMPLES = """\
  sn72engine mix model.onnx --data photos/ --check labels.csv --labels -o model.mix.onnx
  sn72engine mix model.onnx --data photos/ --check other/ --card rtx5090 --min-cosine 0.995 \\
      --plot mix.png -o model.mix.onnx
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    defaults = MixOptions()
    parser.add_argument("model", type=Path, help="float ONNX file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="ONNX file to write")
    parser.add_argument(
        "--data", type=Path, required=True, help="calibration images: folder, CSV or .npz"
    )
    parser.add_argument(
        "--check",
        type=Path,
        required=True,
        help="images that the formats are judged on, other than --data",
    )
    parser.add_argument(
        "--labels", action="store_true", help="use the labels of --check for top-1 accuracy"
    )
    parser.add_argument("--split", help="rows of the CSV of --check with this split")
    parser.add_argument(
        "--format",
        action="append",
        choices=get_args(QuantizedPrecision),
        help="format that a layer may get; default: all that the card computes in",
    )
    parser.add_argument(
        "--minimise",
        choices=get_args(Minimise),
        default=defaults.minimise,
        help="modelled latency on --card, or bytes of weights; default %(default)s",
    )
    parser.add_argument(
        "--card",
        choices=tuple(CARDS),
        default=defaults.card,
        help="whose latency is modelled; default %(default)s",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=defaults.batch,
        help="samples per call in that model; default %(default)s",
    )
    parser.add_argument("--limit", type=int, default=64, help="most images of each set; default 64")
    bound_arguments(parser, defaults.verify)
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="NODE", help="leave this node in float"
    )
    parser.add_argument(
        "--preprocess", type=preprocess_argument, help="where the ONNX file holds no definition"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the layers and the choice")


def execute(options: argparse.Namespace) -> Outcome:
    """Choose and write."""
    from sn72engine.mixing import mix
    from sn72engine.model import OnnxModel

    model = OnnxModel.open(options.model)
    preprocess = options.preprocess or model.preprocess
    limits = CalibrationOptions(limit=options.limit)
    data, _ = judging_data(
        options.data, preprocess, limits, labels=False, split=None, owner=options.model
    )
    check, labels = judging_data(
        options.check,
        preprocess,
        limits,
        labels=options.labels,
        split=options.split,
        owner=options.model,
    )
    mixture = mix(
        model,
        data,
        check,
        MixOptions(
            formats=tuple(options.format or ()),
            minimise=options.minimise,
            card=options.card,
            batch=options.batch,
            verify=VerifyOptions(
                min_cosine=options.min_cosine,
                min_agreement=options.min_agreement,
                max_top1_drop=options.max_top1_drop,
                min_speedup=None,
            ),
            exclude=tuple(options.exclude),
        ),
        options.output,
        labels=labels,
    )
    if options.plot:
        mixture.save_plot(options.plot)
    sizes = [model.size(), mixture.model.size()]
    told = f"{mixture.model.path} ({megabytes(sizes[0])} -> {megabytes(sizes[1])})"
    return Outcome(mixture.to_dict(), f"{mixture.render()}\n{table([('file', told)])}")
