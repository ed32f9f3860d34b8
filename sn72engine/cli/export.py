"""``sn72engine export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sn72engine.cli.outcome import (
    Outcome,
    key_values,
    make_module,
    megabytes,
    preprocess_argument,
    table,
)
from sn72engine.errors import OptionError
from sn72engine.spec import ExportOptions

SUMMARY = "export a PyTorch module to a checked ONNX file"
EXAMPLES = """\
  sn72engine export sn72engine.roadscenes:trained --arg name=small_cnn \\
      --input 3x96x96 --preprocess height=96,width=96 -o cnn.onnx
  sn72engine export my_model.py:make_model --input 3x224x224 -o model.onnx --json
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "factory", help="function that returns the module: package.module:name or file.py:name"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="ONNX file to write")
    parser.add_argument(
        "--input",
        dest="shapes",
        action="append",
        required=True,
        metavar="CxHxW",
        help="shape of one sample of an input, without the batch; repeat for more inputs",
    )
    parser.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="argument of the factory"
    )
    parser.add_argument(
        "--preprocess",
        type=preprocess_argument,
        help="how images become the input: a JSON/YAML file or key=value,...; kept in the file",
    )
    parser.add_argument(
        "--opset",
        type=int,
        default=ExportOptions().opset,
        help="version of ONNX's operators; default %(default)s",
    )
    parser.add_argument("--input-name", action="append", help="of each input; default pixel_values")
    parser.add_argument("--output-name", action="append", help="of each output; default logits")
    parser.add_argument("--half", action="store_true", help="export in float16")


def execute(options: argparse.Namespace) -> Outcome:
    """Make the module, export it and compare the file with it."""
    import torch

    from sn72engine.exporter import export

    module = make_module(options.factory, key_values(options.arg))
    if options.half:
        module = module.half()
    dtype = torch.float16 if options.half else torch.float32
    example = tuple(torch.zeros(1, *sample_shape(text), dtype=dtype) for text in options.shapes)
    defaults = ExportOptions()
    names = tuple(options.input_name or defaults.input_names)
    model = export(
        module,
        ExportOptions(
            opset=options.opset,
            input_names=names,
            output_names=tuple(options.output_name or defaults.output_names),
        ),
        options.output,
        example=example,
        preprocess=options.preprocess,
    )
    record = model.record["export"]
    size = model.size()
    rows: list[tuple[str, object]] = [
        ("file", f"{model.path} ({megabytes(size)})"),
        ("inputs", "; ".join(map(str, model.inputs))),
        ("outputs", "; ".join(map(str, model.outputs))),
        (
            "largest error",
            f"{max(p['max_abs_error'] for p in record['parity']):.2e} against PyTorch",
        ),
    ]
    data = {
        "path": str(model.path),
        "bytes": size,
        "inputs": [spec.to_dict() for spec in model.inputs],
        "outputs": [spec.to_dict() for spec in model.outputs],
        "export": record,
    }
    return Outcome(data, table(rows))


def sample_shape(text: str) -> tuple[int, ...]:
    """``3x224x224`` as a tuple."""
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"--input {text!r} is not of the form 3x224x224")
    return tuple(int(part) for part in parts)
