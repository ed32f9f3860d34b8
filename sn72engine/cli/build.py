"""``sn72engine build``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from sn72engine.cli import tensorrt_flags
from sn72engine.cli.outcome import Outcome, batch_range, megabytes, table
from sn72engine.errors import OptionError
from sn72engine.spec import (
    CPU_BACKENDS,
    BackendName,
    BuildOptions,
    CalibrationOptions,
    Precision,
    Provider,
    RuntimeOptions,
    SelectOptions,
    ShapeRange,
    VerifyOptions,
)

if TYPE_CHECKING:
    from sn72engine.engine import Engine

SUMMARY = "build an engine from an ONNX file, or find it in the store"
EXAMPLES = """\
  sn72engine build model.int8.onnx                                    # ONNX Runtime, this CPU
  sn72engine build model.onnx --backend auto --quantized model.int8.onnx \\
      --data photos/                                # the fastest for this CPU that is right
  sn72engine build model.onnx --backend tensorrt --precision fp16     # TensorRT, this GPU
  sn72engine build model.pt2 --backend inductor                       # PyTorch's compiler
  sn72engine build model.onnx --backend tensorrt_rtx --target sm_89 \\
      --precision fp16 --batch 1:8:32                                  # an RTX 4090, from anywhere
  sn72engine build model.onnx --backend tensorrt_rtx --target sm_86,sm_89,sm_120 \\
      --precision fp16 --profile 1:1:1 --profile 2:16:32               # three cards, two tunings
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", type=Path, help="ONNX file, float or Q/DQ; a .pt2 program for inductor"
    )
    parser.add_argument(
        "--backend",
        choices=(*get_args(BackendName), "auto"),
        default=BuildOptions().backend,
        help="auto compares those that run here on --data and takes the fastest that is right",
    )
    parser.add_argument(
        "--target", default="", help="cpu, cuda, or sm_89 and the like; sm_86,sm_89 for both"
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of a float model; a Q/DQ file says its own; default %(default)s",
    )
    parser.add_argument(
        "--batch", type=batch_range, metavar="MIN:OPT:MAX", help="1:8:32, the default"
    )
    parser.add_argument(
        "--profile",
        type=batch_range,
        action="append",
        default=[],
        metavar="MIN:OPT:MAX",
        help="range that TensorRT tunes by itself; may be repeated, in ascending order",
    )
    parser.add_argument(
        "--provider",
        choices=get_args(Provider),
        default=BuildOptions().provider,
        help="of --backend onnxruntime on a card",
    )
    parser.add_argument("--workspace-mb", type=int, help="limit of the builder's scratch memory")
    parser.add_argument("--optimization-level", type=int, help="builder effort, 0 to 5")
    tensorrt_flags.add(parser)
    auto = parser.add_argument_group("with --backend auto")
    auto.add_argument("--data", type=Path, help="images to compare on: folder, CSV or .npz")
    auto.add_argument("--quantized", type=Path, help="Q/DQ file of the same model, to compare too")
    auto.add_argument("--limit", type=int, default=256, help="most images; default 256")
    auto.add_argument("--threads", type=int, help="CPU threads of a session; default all cores")
    auto.add_argument("--fresh", action="store_true", help="do not take the choice made before")


def execute(options: argparse.Namespace) -> Outcome:
    """Build through the store."""
    from sn72engine.builder import build
    from sn72engine.model import OnnxModel
    from sn72engine.program import TorchProgram

    if options.backend == "auto":
        return _select(options)
    if options.data or options.quantized:
        raise OptionError("--data and --quantized belong to --backend auto")
    kind = TorchProgram if options.model.suffix == ".pt2" else OnnxModel
    engine = build(
        kind.open(options.model),
        BuildOptions(
            backend=options.backend,
            batch=_batch(options),
            profiles=tuple(options.profile),
            precision=options.precision,
            target=options.target,
            provider=options.provider,
            workspace_bytes=options.workspace_mb and options.workspace_mb << 20,
            optimization_level=options.optimization_level,
            tensorrt=tensorrt_flags.read(options),
        ),
    )
    return Outcome(
        {"folder": str(engine.folder), "manifest": engine.manifest.to_dict()}, _describe(engine)
    )


def _batch(options: argparse.Namespace) -> ShapeRange:
    """What was asked for, or what the profiles reach over."""
    if options.batch or not options.profile:
        return options.batch or ShapeRange()
    low, high = options.profile[0].min, options.profile[-1].max
    return ShapeRange(low, min(max(options.profile[-1].opt, low), high), high)


def _select(options: argparse.Namespace) -> Outcome:
    """Build with each backend and take the fastest that answers as the float model does."""
    from sn72engine.builder import build
    from sn72engine.calibration import batches
    from sn72engine.model import OnnxModel
    from sn72engine.selection import backends_here, select
    from sn72engine.session import Session

    if options.data is None:
        raise OptionError(
            "--backend auto compares engines on images: give some with --data, or name a backend"
        )
    if options.target not in ("", "cpu") or options.precision != "fp32":
        raise OptionError(
            "--backend auto builds for this machine and chooses the precision: leave out --target "
            "(or give cpu) and --precision, and give an INT8 file with --quantized"
        )
    model = OnnxModel.open(options.model)
    if model.precision != "fp32":
        raise OptionError(
            f"{options.model} is {model.precision}; --backend auto compares with a float32 file: "
            "give that, and the Q/DQ file with --quantized"
        )
    if model.preprocess is None and options.data.suffix != ".npz":
        raise OptionError(f"{options.model} holds no preprocessing; give the data as .npz")
    models = {"fp32": model}
    if options.quantized is not None:
        models["int8"] = OnnxModel.open(options.quantized)
    runtime, batch = RuntimeOptions(threads=options.threads), _batch(options)
    size = min(max(CalibrationOptions().batch_size, batch.min), batch.max)
    calibration = CalibrationOptions(batch_size=size, limit=options.limit, minimum=1)
    data = batches(options.data, model.preprocess, calibration)
    bounds = VerifyOptions(min_speedup=None, batch=batch.min)
    backends = CPU_BACKENDS if options.target == "cpu" else backends_here()
    with Session(build(model, BuildOptions(batch=batch)), runtime) as reference:
        selection = select(
            models,
            reference,
            data,
            options=SelectOptions(
                backends=backends,
                batch=batch,
                verify=bounds,
                runtime=runtime,
                fresh=options.fresh,
            ),
        )
    manifest = selection.engine.manifest.to_dict()
    return Outcome(
        {
            "folder": str(selection.engine.folder),
            "manifest": manifest,
            "selection": selection.to_dict(),
        },
        f"{_describe(selection.engine)}\n{selection.render()}",
    )


def _describe(engine: Engine) -> str:
    manifest = engine.manifest
    rows: list[tuple[str, object]] = [
        ("engine", engine.folder),
        ("key", manifest.key),
        ("backend", f"{manifest.backend} {manifest.backend_version} for {manifest.target}"),
        ("precision", manifest.precision),
        ("batch", manifest.batch),
        ("size", megabytes(sum(f.bytes for f in manifest.files))),
        ("built", f"{manifest.created} in {manifest.build_seconds:.1f} s"),
        *(("note", note) for note in manifest.notes),
    ]
    return table(rows)
