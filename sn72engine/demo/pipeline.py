"""EfficientNet-Lite0 -> Lite2, from PyTorch to a report, one step after the other.

Read :func:`run_demo` from top to bottom: it is the whole way of a model through the library.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sn72engine import _deps
from sn72engine.builder import build
from sn72engine.calibration import batches
from sn72engine.demo import pages
from sn72engine.demo.comparison import Evaluation, compare
from sn72engine.demo.models import preprocess_for, pretrained
from sn72engine.demo.options import DemoOptions
from sn72engine.demo.photographs import Photograph, photographs, synonyms, views
from sn72engine.doctor import cpu_name
from sn72engine.engine import Engine
from sn72engine.errors import BuildError
from sn72engine.exporter import export
from sn72engine.image_files import labelled
from sn72engine.model import OnnxModel
from sn72engine.quantizer import quantize
from sn72engine.session import Session
from sn72engine.spec import (
    BuildOptions,
    CalibrationOptions,
    ExportOptions,
    Precision,
    QuantizeOptions,
    RuntimeOptions,
    ShapeRange,
    VerifyOptions,
)
from sn72engine.store import Store
from sn72engine.verifier import VerifyReport, verify
from sn72kernels import atomic

if TYPE_CHECKING:
    from sn72engine.cascade.result import Result

#: The stages, cheapest first.
MODELS = ("lite0", "lite2")

_BATCH = ShapeRange(1, 8, 32)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found; ``figures`` is what figures.json holds."""

    report: Path
    figures: Mapping[str, Any]
    text: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """The FP32 and INT8 engines of one model and the gate's word on the INT8 one."""

    name: str
    fp32: Session
    int8: Session
    verification: VerifyReport

    @property
    def shipped(self) -> Session:
        """The engine that goes into the cascade: INT8 only where it passed."""
        return self.int8 if self.verification.passed else self.fp32


def run_demo(options: DemoOptions, say: Callable[[str], None] = print) -> DemoResult:
    """Export, calibrate, build, verify, choose thresholds, run, and write the report.

    An INT8 engine that the gate refuses is replaced by FP32, and the report says why.

    Args:
        options: see :class:`~sn72engine.demo.options.DemoOptions`.
        say: receives one line at the start of each step.

    Raises:
        MissingDependencyError: a package of the ``demo`` extra is absent.
        Sn72Error: a step failed.
    """
    _deps.require("efficientnet_lite_pytorch", purpose="run the demo")
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    pictures = photographs()
    calibration, evaluation = samples(options, pictures)

    say("[1/7] export: PyTorch -> ONNX, compared with PyTorch")
    exported = {name: export_model(name, folder) for name in MODELS}

    say(f"[2/7] calibrate on {len(calibration)} images and quantize to INT8")
    quantized = {
        name: quantize_model(model, calibration, folder) for name, model in exported.items()
    }

    with ExitStack() as opened:
        say("[3/7] build FP32 and INT8 engines for this CPU")
        runtime = RuntimeOptions(threads=options.threads)
        sessions = [
            [
                opened.enter_context(Session(build(model, BuildOptions(batch=_BATCH)), runtime))
                for model in (exported[name], quantized[name])
            ]
            for name in MODELS
        ]

        say("[4/7] verify INT8 against FP32: accuracy and speed in one run")
        candidates = [
            Candidate(name, fp32, int8, verify_int8(int8, fp32, evaluation))
            for name, (fp32, int8) in zip(MODELS, sessions, strict=True)
        ]

        gpu: list[dict[str, Any]] = []
        if options.target:
            say(f"[5/7] build TensorRT engines for {options.target} on this machine")
            for name in MODELS:
                gpu.append(build_for_gpu(exported[name], "fp16", options.target))
                gpu.append(build_for_gpu(quantized[name], "int8", options.target))
        else:
            say("[5/7] no GPU engines asked for")

        say(f"[6/7] choose thresholds on {len(evaluation.images)} images")
        comparison = compare(
            {candidate.name: candidate.shipped for candidate in candidates},
            evaluation,
            folder,
            runtime,
        )

        say(f"[7/7] run the cascade on {len(pictures)} photographs and write the report")
        paths = [picture.path for picture in pictures]
        results = comparison.run(paths, runtime)

    write_results(folder / "results.jsonl", paths, results)
    figures = {
        "machine": {
            "cpu": cpu_name(),
            "threads": options.threads,
            "python": platform.python_version(),
            "onnxruntime": _deps.version("onnxruntime"),
        },
        "export": {
            name: max(entry["max_abs_error"] for entry in model.record["export"]["parity"])
            for name, model in exported.items()
        },
        "verification": {c.name: c.verification.to_dict() for c in candidates},
        "shipped": {c.name: c.shipped.manifest.precision for c in candidates},
        "gpu_engines": gpu,
        **comparison.figures,
    }
    atomic.write_text(folder / "figures.json", json.dumps(figures, indent=2) + "\n")
    page = pages.write(folder, figures, comparison, paths, results)
    return DemoResult(page, figures, pages.summary(figures, page))


def samples(
    options: DemoOptions, pictures: Sequence[Photograph]
) -> tuple[Sequence[Any], Evaluation]:
    """Calibration images, and other images with labels."""
    if options.data is None:
        calibration, _ = views(pictures, options.calibration, seed=options.seed)
        images, labels = views(pictures, options.evaluation, seed=options.seed + 1)
        meaning = f"what each of {len(pictures)} photographs shows, near-synonyms counted alike"
        return calibration, Evaluation(images, labels, meaning, synonyms(pictures))
    paths, labels = labelled(options.data)
    order = np.random.default_rng(options.seed).permutation(len(paths))
    taken = min(options.calibration, len(paths) // 4)
    rest = order[taken:]
    evaluation = Evaluation([paths[i] for i in rest], labels[rest], options.data.name, {})
    return [paths[i] for i in order[:taken]], evaluation


def export_model(name: str, folder: Path) -> OnnxModel:
    """PyTorch -> ONNX with the preprocessing inside, held against PyTorch."""
    import torch

    preprocess = preprocess_for(name)
    return export(
        pretrained(name),
        ExportOptions(parity_batches=(1, 3)),
        folder / f"{name}.onnx",
        example=torch.zeros(1, *preprocess.shape),
        preprocess=preprocess,
    )


def quantize_model(model: OnnxModel, calibration: Sequence[Any], folder: Path) -> OnnxModel:
    """ONNX -> INT8 Q/DQ ONNX."""
    data = batches(calibration, model.preprocess, CalibrationOptions())
    return quantize(model, data, QuantizeOptions(), folder / f"{model.path.stem}.int8.onnx")


def verify_int8(int8: Session, fp32: Session, evaluation: Evaluation) -> VerifyReport:
    """Hold an INT8 engine against the FP32 one that it would replace, and keep the verdict."""
    report = verify(
        int8,
        fp32,
        batches(evaluation.images, int8.preprocess, CalibrationOptions(limit=None)),
        labels=evaluation.labels,
        options=VerifyOptions(repeats=40),
    )
    Store().update_manifest(int8.engine, verification=report.to_dict())
    return report


def build_for_gpu(model: OnnxModel, precision: Precision, target: str) -> dict[str, Any]:
    """Build a TensorRT-RTX engine for a card that is not here; what it is, or why it is not."""
    try:
        engine: Engine = build(
            model,
            BuildOptions(
                backend="tensorrt_rtx",
                target=target,
                batch=_BATCH,
                precision=precision,
            ),
        )
    except (BuildError, ImportError) as error:
        return {"model": model.path.name, "precision": precision, "error": str(error)}
    return {
        "model": model.path.name,
        "precision": engine.manifest.precision,
        "target": engine.manifest.target,
        "backend": f"{engine.manifest.backend} {engine.manifest.backend_version}",
        "bytes": sum(file.bytes for file in engine.manifest.files),
        "build_seconds": engine.manifest.build_seconds,
        "key": engine.manifest.key,
    }


def write_results(path: Path, pictures: Sequence[Path], results: Sequence[Result]) -> None:
    """One JSON line per photograph."""
    lines = [
        json.dumps({"file": picture.name, **result.to_dict()})
        for picture, result in zip(pictures, results, strict=True)
    ]
    atomic.write_text(path, "\n".join(lines) + "\n")
