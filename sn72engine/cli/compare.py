"""``sn72engine compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sn72engine.cli.inspect import subject_path
from sn72engine.cli.outcome import Outcome
from sn72engine.divergence import BACKENDS, CompareOptions
from sn72engine.errors import OptionError
from sn72engine.spec import CalibrationOptions, Preprocess, RuntimeOptions

SUMMARY = "find the first layer where two engines or ONNX files part, given the same inputs"
EXAMPLES = """\
  sn72engine compare model.onnx model.int8.onnx --data photos/ --plot error.png
  sn72engine compare FP32_KEY INT8_KEY --data photos/
  sn72engine compare model.onnx model.onnx --other-backend openvino --search bisect
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    defaults = CompareOptions()
    parser.add_argument("a", help="what is right: ONNX file, engine folder, or start of a key")
    parser.add_argument("b", help="what is compared with it")
    parser.add_argument(
        "--data", type=Path, help="images: folder, CSV or .npz; default: random numbers"
    )
    parser.add_argument("--samples", type=int, default=defaults.samples, help="most to compare on")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="samples per call")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=defaults.backend,
        help=f"what runs a, where it is an ONNX file; default {defaults.backend}",
    )
    parser.add_argument(
        "--other-backend",
        choices=BACKENDS,
        default=defaults.other_backend,
        help="the same for b",
    )
    parser.add_argument(
        "--search",
        choices=("all", "bisect"),
        default=defaults.search,
        help="all measures every layer; bisect reads as few as find the first bad one",
    )
    parser.add_argument(
        "--max-relative-error",
        type=float,
        help="bound of a layer; default: by precision, 0.001 fp32, 0.02 fp16, 0.3 below",
    )
    parser.add_argument("--min-cosine", type=float, help="bound; default: follows from the other")
    parser.add_argument(
        "--memory-mb", type=int, default=defaults.memory_bytes >> 20, help="held at once"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--rows", type=int, default=40, help="most layers to list; default 40")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the error through the depth")


def execute(options: argparse.Namespace) -> Outcome:
    """Compare; exit code 5 when they part."""
    from sn72engine.divergence import compare

    a, b = subject_path(options.a), subject_path(options.b)
    asked = CompareOptions(
        backend=options.backend,
        other_backend=options.other_backend,
        search=options.search,
        max_relative_error=options.max_relative_error,
        min_cosine=options.min_cosine,
        batch=options.batch,
        samples=options.samples,
        memory_bytes=options.memory_mb << 20,
    )
    report = compare(
        a,
        b,
        None if options.data is None else _inputs(options.data, a, asked),
        asked,
        runtime=RuntimeOptions(threads=options.threads),
    )
    if options.plot:
        report.save_plot(options.plot)
    return Outcome(report.to_dict(), report.render(options.rows), 5 if report.parted else 0)


def _inputs(data: Path, subject: Path, options: CompareOptions) -> Any:
    from sn72engine.calibration import batches

    preprocess = _preprocess(subject)
    if preprocess is None and data.suffix != ".npz":
        raise OptionError(f"{subject} holds no preprocessing; give the data as .npz")
    return batches(
        data,
        preprocess,
        CalibrationOptions(batch_size=options.batch, limit=options.needed, minimum=1),
    )


def _preprocess(subject: Path) -> Preprocess | None:
    from sn72engine.engine_folder import read_manifest
    from sn72engine.model import OnnxModel

    if subject.is_file():
        return OnnxModel.open(subject).preprocess
    return read_manifest(subject).preprocess
