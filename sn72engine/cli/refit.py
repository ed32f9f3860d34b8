"""``sn72engine refit``."""

from __future__ import annotations

import argparse
from pathlib import Path

from sn72engine.cli.outcome import Outcome, engine_folder, table

SUMMARY = "put weights into a TensorRT engine that was built without them"
EXAMPLES = """\
  sn72engine refit 3f2a9c1d model.onnx     # an engine of build --refit identical --strip-weights
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("engine", help="folder or key of an engine built with --refit")
    parser.add_argument("model", type=Path, help="ONNX file with the weights")


def execute(options: argparse.Namespace) -> Outcome:
    """Refit through the store."""
    from sn72engine.engine_folder import open_engine
    from sn72engine.model import OnnxModel
    from sn72engine.refitter import refit

    engine = refit(open_engine(engine_folder(options.engine)), OnnxModel.open(options.model))
    manifest = engine.manifest
    rows: list[tuple[str, object]] = [
        ("engine", engine.folder),
        ("key", manifest.key),
        ("took", f"{manifest.build_seconds:.1f} s"),
        *(("note", note) for note in manifest.notes),
    ]
    return Outcome({"folder": str(engine.folder), "manifest": manifest.to_dict()}, table(rows))
