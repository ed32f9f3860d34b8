"""Inference core for early-exit image cascades: export, calibrate, build, verify, run.

The steps, in order, each one function that takes one frozen options object::

    model   = export(module, ExportOptions(), "model.onnx", example=x, preprocess=p)
    data    = batches("photos/", p, CalibrationOptions())
    model   = quantize(model, data, QuantizeOptions(), "model.int8.onnx")
    engine  = build(model, BuildOptions())
    report  = verify(load(engine), reference, batches)
    cascade = Cascade(CascadeSpec.from_yaml("road.yaml"))
    results = cascade(images)

Importing this package loads none of the libraries that the steps need; each step loads its own.

"Cascade" here means an early-exit cascade of models: sure answers leave, the rest escalate. It has
nothing to do with cascade attention over shared prefixes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sn72engine.batching import BatchingOptions as BatchingOptions
    from sn72engine.batching import MicroBatcher as MicroBatcher
    from sn72engine.builder import build as build
    from sn72engine.calibration import batches as batches
    from sn72engine.calibration import labelled as labelled
    from sn72engine.cascade import Cascade as Cascade
    from sn72engine.cascade.result import Result as Result
    from sn72engine.cascade.result import Status as Status
    from sn72engine.cascade.spec import CascadeSpec as CascadeSpec
    from sn72engine.cascade.spec import StageSpec as StageSpec
    from sn72engine.checkpoint import Checkpoint as Checkpoint
    from sn72engine.checkpoint import CheckpointOptions as CheckpointOptions
    from sn72engine.checkpoint import export_checkpoint as export_checkpoint
    from sn72engine.divergence import CompareOptions as CompareOptions
    from sn72engine.divergence import compare as compare
    from sn72engine.engine import Engine as Engine
    from sn72engine.engine import Manifest as Manifest
    from sn72engine.exporter import export as export
    from sn72engine.exporter import export_program as export_program
    from sn72engine.latency import bench as bench
    from sn72engine.latency import interleave as interleave
    from sn72engine.layer_profile import ProfileOptions as ProfileOptions
    from sn72engine.layer_profile import profile as profile
    from sn72engine.metrics import Metrics as Metrics
    from sn72engine.miner import RoadworkDetector as RoadworkDetector
    from sn72engine.mixing import MixOptions as MixOptions
    from sn72engine.mixing import Mixture as Mixture
    from sn72engine.mixing import mix as mix
    from sn72engine.model import OnnxModel as OnnxModel
    from sn72engine.pool import SessionPool as SessionPool
    from sn72engine.preprocessing import preprocess as preprocess
    from sn72engine.program import ProgramOptions as ProgramOptions
    from sn72engine.program import TorchProgram as TorchProgram
    from sn72engine.quantizer import quantize as quantize
    from sn72engine.refitter import refit as refit
    from sn72engine.selection import Selection as Selection
    from sn72engine.selection import select as select
    from sn72engine.session import Session as Session
    from sn72engine.session import load as load
    from sn72engine.shadow import ShadowOptions as ShadowOptions
    from sn72engine.spec import BenchOptions as BenchOptions
    from sn72engine.spec import BuildOptions as BuildOptions
    from sn72engine.spec import CalibrationOptions as CalibrationOptions
    from sn72engine.spec import ExportOptions as ExportOptions
    from sn72engine.spec import Preprocess as Preprocess
    from sn72engine.spec import QuantizeOptions as QuantizeOptions
    from sn72engine.spec import RuntimeOptions as RuntimeOptions
    from sn72engine.spec import SelectOptions as SelectOptions
    from sn72engine.spec import ShapeRange as ShapeRange
    from sn72engine.spec import TensorRTOptions as TensorRTOptions
    from sn72engine.spec import VerifyOptions as VerifyOptions
    from sn72engine.store import Store as Store
    from sn72engine.swap import Swappable as Swappable
    from sn72engine.thresholds import ThresholdOptions as ThresholdOptions
    from sn72engine.thresholds import choose as choose
    from sn72engine.trace import TraceRecorder as TraceRecorder
    from sn72engine.verifier import verify as verify

__version__ = "0.1.0"

#: Public name -> module that defines it. Resolved on first use.
_EXPORTS = {
    "BatchingOptions": "batching",
    "BenchOptions": "spec",
    "BuildOptions": "spec",
    "CalibrationOptions": "spec",
    "Cascade": "cascade",
    "CascadeSpec": "cascade.spec",
    "CompareOptions": "divergence",
    "Checkpoint": "checkpoint",
    "CheckpointOptions": "checkpoint",
    "Engine": "engine",
    "ExportOptions": "spec",
    "Manifest": "engine",
    "Metrics": "metrics",
    "MicroBatcher": "batching",
    "MixOptions": "mixing.options",
    "Mixture": "mixing.mixture",
    "OnnxModel": "model",
    "Preprocess": "spec",
    "ProfileOptions": "layer_profile",
    "ProgramOptions": "program",
    "QuantizeOptions": "spec",
    "Result": "cascade.result",
    "RoadworkDetector": "miner",
    "RuntimeOptions": "spec",
    "SelectOptions": "spec",
    "Selection": "selection",
    "Session": "session",
    "SessionPool": "pool",
    "ShadowOptions": "shadow",
    "ShapeRange": "spec",
    "StageSpec": "cascade.spec",
    "Status": "cascade.result",
    "Store": "store",
    "Swappable": "swap",
    "TensorRTOptions": "spec",
    "ThresholdOptions": "thresholds",
    "TraceRecorder": "trace",
    "TorchProgram": "program",
    "VerifyOptions": "spec",
    "batches": "calibration",
    "bench": "latency",
    "build": "builder",
    "choose": "thresholds",
    "compare": "divergence",
    "export": "exporter",
    "export_checkpoint": "checkpoint",
    "export_program": "exporter",
    "interleave": "latency",
    "labelled": "calibration",
    "load": "session",
    "mix": "mixing.mixer",
    "preprocess": "preprocessing",
    "profile": "layer_profile",
    "quantize": "quantizer",
    "refit": "refitter",
    "select": "selection",
    "verify": "verifier",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"sn72engine.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'sn72engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
