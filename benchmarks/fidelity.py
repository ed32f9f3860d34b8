"""What each quantised format costs in accuracy, with trained weights, on the CPU.

``python -m benchmarks.fidelity`` quantises EfficientNet-Lite0 (ImageNet photographs in
``../shared/data``, which must be there) and the small vision transformer of
``sn72engine.roadscenes`` (drawn scenes), holds each against its own FP32 form, prints a table and
writes a dated JSON file into this machine's folder of ``benchmarks/results``. FP8, NVFP4 and MXFP8
are emulated: they are judged, not timed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from sn72engine import (
    BuildOptions,
    CalibrationOptions,
    ExportOptions,
    OnnxModel,
    QuantizeOptions,
    Session,
    ShapeRange,
    Store,
    VerifyOptions,
    batches,
    build,
    export,
    load,
    quantize,
    verify,
)
from sn72engine.calibration import CalibrationData, labelled
from sn72engine.demo.models import preprocess_for, pretrained
from sn72engine.preprocessing import preprocess
from sn72engine.roadscenes import dataset, trained
from sn72engine.roadscenes.models import PREPROCESS
from sn72kernels import atomic

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

#: Scenes of the test set; calibration draws from another seed.
SCENES = 1000
CALIBRATION = 64

#: Figures are wanted, not a verdict: all bounds are open.
BOUNDS = VerifyOptions(min_cosine=-1.0, min_agreement=0.0, max_top1_drop=100.0, min_speedup=None)

#: Name in the table to how it is quantised, and whether the module gives the ranges.
LITE0 = {
    "int8 entropy, file": (QuantizeOptions(method="entropy"), False),
    "int8 max, file": (QuantizeOptions(method="max"), False),
    "fp8, file": (QuantizeOptions(precision="fp8"), False),
    "fp8, biases kept, file": (QuantizeOptions(precision="fp8", bias_correction=False), False),
    # The projections, which end each block unrectified; named after the folded normalisation.
    "fp8 without projections, file": (
        QuantizeOptions(precision="fp8", overrides={"*_bn2": "float"}),
        False,
    ),
}
VIT = {
    "int8 entropy, module": (QuantizeOptions(method="entropy"), True),
    "int8 max, module": (QuantizeOptions(method="max"), True),
    "int8 smoothquant, module": (QuantizeOptions(method="smoothquant"), True),
    "int8 entropy, file": (QuantizeOptions(method="entropy"), False),
    "fp8, module": (QuantizeOptions(precision="fp8"), True),
    "nvfp4, module": (QuantizeOptions(precision="nvfp4"), True),
    "nvfp4, biases kept, module": (QuantizeOptions(precision="nvfp4", bias_correction=False), True),
    "mxfp8, module": (QuantizeOptions(precision="mxfp8"), True),
}
Rows = dict[str, tuple[QuantizeOptions, bool]]


def lite0(folder: Path) -> list[dict[str, Any]]:
    """EfficientNet-Lite0 on 650 photographs of the ILSVRC2012 validation set."""
    spec, module = preprocess_for("lite0"), pretrained("lite0")
    data = batches(
        DATA / "imagenet_calib320" / "labels.csv", spec, CalibrationOptions(limit=CALIBRATION)
    )
    files, labels = labelled(DATA / "imagenet_val650" / "labels.csv")
    held = [preprocess(files[i : i + 26], spec) for i in range(0, len(files), 26)]
    return compare("EfficientNet-Lite0", module, spec.shape, data, held, labels, LITE0, folder)


def vit(folder: Path) -> list[dict[str, Any]]:
    """The small vision transformer on drawn road scenes."""
    calibration, _ = dataset(CALIBRATION, seed=101)
    data = batches(calibration, PREPROCESS, CalibrationOptions())
    pictures, labels = dataset(SCENES, seed=202)
    held = [preprocess(list(pictures[i : i + 25]), PREPROCESS) for i in range(0, SCENES, 25)]
    module = trained("small_vit").eval()
    return compare("small ViT", module, PREPROCESS.shape, data, held, labels, VIT, folder)


def compare(
    name: str,
    module: torch.nn.Module,
    shape: tuple[int, int, int],
    data: CalibrationData,
    held: list[np.ndarray],
    labels: np.ndarray,
    rows: Rows,
    folder: Path,
) -> list[dict[str, Any]]:
    """One entry per row, measured against FP32 in ONNX Runtime."""
    exported = export(
        module, ExportOptions(), folder / f"{name}.onnx", example=torch.zeros(1, *shape)
    )
    reference = session(exported, folder)
    found = []
    for row, (options, by_module) in rows.items():
        path = folder / f"{name}.{row}.onnx"
        model = quantize(exported, data, options, path, module=module if by_module else None)
        report = verify(
            session(model, folder), reference, held, labels=labels, options=BOUNDS
        ).to_dict()
        entry = {
            "model": name,
            "quantised": row,
            "layers": model.quantization["quantised"] if model.quantization else 0,
            "samples": report["samples"],
            "top1": round(100 * report["candidate_top1"], 3),
            "fp32_top1": round(100 * report["reference_top1"], 3),
            "agreement": round(100 * report["agreement"], 3),
            "cosine_mean": round(report["outputs"][0]["cosine_mean"], 5),
            "file_mb": round(path.stat().st_size / 1e6, 3),
            "fp32_file_mb": round(exported.path.stat().st_size / 1e6, 3),
        }
        print(line(entry), flush=True)
        found.append(entry)
    return found


def session(model: OnnxModel, folder: Path) -> Session:
    """The model in ONNX Runtime."""
    options = BuildOptions(batch=ShapeRange(1, 8, 32))
    return load(build(model, options, store=Store(folder)))


def line(entry: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"{entry['model']:20} {entry['quantised']:26} top-1 {entry['top1']:6.2f} % "
        f"(FP32 {entry['fp32_top1']:.2f}), agreement {entry['agreement']:6.2f} %, cosine "
        f"{entry['cosine_mean']:.5f}, {entry['layers']} layers"
    )


def sets(names: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """All entries of the models named."""
    for name in names:
        yield from {"lite0": lite0, "vit": vit}[name](folder)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=("lite0", "vit"), default=["lite0", "vit"])
    parser.add_argument("--output", type=Path, help="JSON file; default: a dated one")
    options = parser.parse_args()
    target = options.output or (
        machine.ROOT / "benchmarks/results" / machine.folder() / f"{machine.today()}-fidelity.json"
    )
    with tempfile.TemporaryDirectory() as folder:
        entries = list(sets(options.models, Path(folder)))
    report = {**machine.describe(), "command": "python -m benchmarks.fidelity", "results": entries}
    atomic.write_bytes(target, (json.dumps(report, indent=1) + "\n").encode())
    print(target)


if __name__ == "__main__":
    main()
