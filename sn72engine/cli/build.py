"""``sn72engine build``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sn72engine.cli.outcome import Outcome, batch_range, megabytes, table
from sn72engine.spec import BuildOptions, ShapeRange

SUMMARY = "build an engine from an ONNX file, or find it in the store"
EXAMPLES = """\
  sn72engine build model.int8.onnx                                    # ONNX Runtime, this CPU
  sn72engine build model.onnx --backend tensorrt --precision fp16     # TensorRT, this GPU
  sn72engine build model.onnx --backend tensorrt_rtx --target sm_89 \\
      --precision fp16 --batch 1:8:32                                  # an RTX 4090, from anywhere
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, help="ONNX file, float or Q/DQ")
    parser.add_argument(
        "--backend",
        choices=("onnxruntime", "tensorrt", "tensorrt_rtx"),
        default=BuildOptions().backend,
    )
    parser.add_argument("--target", default="", help="cpu, cuda, or sm_89 and the like")
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32")
    parser.add_argument(
        "--batch", type=batch_range, default=ShapeRange(), metavar="MIN:OPT:MAX", help="1:8:32"
    )
    parser.add_argument("--workspace-mb", type=int, help="limit of the builder's scratch memory")
    parser.add_argument("--optimization-level", type=int, help="builder effort, 0 to 5")


def execute(options: argparse.Namespace) -> Outcome:
    """Build through the store."""
    from sn72engine.builder import build
    from sn72engine.model import OnnxModel

    engine = build(
        OnnxModel.open(options.model),
        BuildOptions(
            backend=options.backend,
            batch=options.batch,
            precision=options.precision,
            target=options.target,
            workspace_bytes=options.workspace_mb and options.workspace_mb << 20,
            optimization_level=options.optimization_level,
        ),
    )
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
    return Outcome({"folder": str(engine.folder), "manifest": manifest.to_dict()}, table(rows))
