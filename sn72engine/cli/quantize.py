"""``sn72engine quantize``."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import get_args

from sn72engine.cli.outcome import Outcome, megabytes, preprocess_argument, table
from sn72engine.errors import OptionError
from sn72engine.spec import (
    CalibrationOptions,
    LayerPrecision,
    QuantizedPrecision,
    QuantizeOptions,
)

SUMMARY = "calibrate an ONNX file on your images and write it with INT8, FP8 or FP4 Q/DQ nodes"
EXAMPLES = """\
  sn72engine quantize model.onnx --data photos/ -o model.int8.onnx
  sn72engine quantize model.onnx --data labels.csv --method max --limit 256 -o model.int8.onnx
  sn72engine quantize model.onnx --data photos/ --precision fp8 -o model.fp8.onnx
  sn72engine quantize model.onnx --data photos/ --precision nvfp4 --override 'head*=float' \\
      --override '*attention*=fp8' -o model.mixed.onnx                      # the last match holds
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, help="float ONNX file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="ONNX file to write")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="calibration images: a folder, a CSV with a file column, or an .npz",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(QuantizedPrecision),
        default=QuantizeOptions().precision,
        help="of the layers that no --override names; default %(default)s",
    )
    parser.add_argument(
        "--method",
        choices=("auto", "entropy", "max"),
        default=QuantizeOptions().method,
        help="of activation ranges; auto is entropy for int8 and max for the others",
    )
    parser.add_argument(
        "--op-type",
        action="append",
        choices=QuantizeOptions.QUANTISABLE,
        help="quantise this operator; default: by the kind of network",
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        type=_override,
        metavar="PATTERN=PRECISION",
        help="precision, or float, of the nodes whose name or module matches",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=CalibrationOptions().limit,
        help="most samples; default %(default)s",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=CalibrationOptions().batch_size,
        help="samples per call while calibrating; default %(default)s",
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="NODE", help="leave this node in float"
    )
    parser.add_argument(
        "--keep-biases",
        action="store_true",
        help="do not take the mean error of rounded weights out of biases",
    )
    parser.add_argument(
        "--preprocess", type=preprocess_argument, help="where the ONNX file holds no definition"
    )


def execute(options: argparse.Namespace) -> Outcome:
    """Calibrate and quantise."""
    from sn72engine.calibration import batches
    from sn72engine.model import OnnxModel
    from sn72engine.quantizer import quantize

    model = OnnxModel.open(options.model)
    preprocess = options.preprocess or model.preprocess
    if preprocess is None and options.data.suffix != ".npz":
        raise OptionError(f"{options.model} holds no preprocessing; give --preprocess")
    calibration = CalibrationOptions(batch_size=options.batch, limit=options.limit)
    quantized = quantize(
        model,
        batches(options.data, preprocess, calibration),
        QuantizeOptions(
            precision=options.precision,
            method=options.method,
            op_types=tuple(options.op_type) if options.op_type else None,
            exclude=tuple(options.exclude),
            overrides=dict(options.override),
            bias_correction=not options.keep_biases,
        ),
        options.output,
    )
    record = dict(quantized.quantization or {})
    sizes = [model.size(), quantized.size()]
    products = record["quantised"] + len(record["skipped"])
    rows: list[tuple[str, object]] = [
        ("file", f"{quantized.path} ({megabytes(sizes[0])} -> {megabytes(sizes[1])})"),
        ("precision", record["precision"]),
        ("method", f"{record['method']}, {record['samples']} samples"),
        (
            "layers",
            f"{record['quantised']} of {products} matrix products and convolutions quantised",
        ),
        ("biases", f"{record['corrected_biases']} corrected"),
    ]
    record.pop("ranges", None)
    reasons = Counter(record["skipped"].values())
    rows += [("in float", f"{count}: {reason}") for reason, count in reasons.most_common()]
    return Outcome({"path": str(quantized.path), "quantization": record}, table(rows))


def _override(text: str) -> tuple[str, str]:
    """``PATTERN=PRECISION``."""
    pattern, equals, precision = text.rpartition("=")
    if not equals or precision not in get_args(LayerPrecision):
        known = ", ".join(get_args(LayerPrecision))
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=PRECISION with one of {known}")
    return pattern, precision
