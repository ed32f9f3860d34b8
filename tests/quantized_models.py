"""Quantised models for tests, made by the real exporter and quantiser once per process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

from sn72engine.calibration import CalibrationData, batches
from sn72engine.exporter import export
from sn72engine.model import OnnxModel
from sn72engine.quantizer import quantize
from sn72engine.spec import CalibrationOptions, ExportOptions, Preprocess, QuantizeOptions
from tests import tiny_modules

MODULES = {
    "residual_net": tiny_modules.residual_net,
    "transformer": tiny_modules.transformer,
}
SHAPE = (3, 16, 16)
PREPROCESS = Preprocess(height=16, width=16)


def images(count: int, seed: int = 0) -> np.ndarray:
    """Seeded normal inputs, (count, 3, 16, 16) float32."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE), dtype=np.float32)


def data(count: int = 32, batch_size: int = 8, seed: int = 0) -> CalibrationData:
    """Calibration data of such inputs."""
    options = CalibrationOptions(batch_size=batch_size, limit=None)
    return batches(images(count, seed), None, options)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sn72-tests-")


@functools.cache
def exported(name: str) -> OnnxModel:
    """The float model."""
    return export(
        MODULES[name](),
        ExportOptions(parity_batches=(2,)),
        Path(_folder().name) / f"{name}.onnx",
        example=torch.zeros(1, *SHAPE),
        preprocess=PREPROCESS,
    )


@functools.cache
def quantized(name: str, method: str = "max", precision: str = "int8") -> OnnxModel:
    """Its Q/DQ form."""
    options = QuantizeOptions(method=method, precision=precision)  # type: ignore[arg-type]
    path = Path(_folder().name) / f"{name}.{method}.{precision}.onnx"
    return quantize(exported(name), data(), options, path)
