"""ONNX Runtime's execution providers: which are asked for, and whether they were really taken.

ONNX Runtime falls back to the CPU with no more than a line in its log when a provider's libraries
do not load. An engine that was asked to run on a card must not run elsewhere without a word, so
the providers of an opened session are read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sn72engine.errors import BuildError, SessionError
from sn72engine.model import OnnxModel, TensorSpec
from sn72engine.spec import Precision, Provider, RuntimeOptions, ShapeRange
from sn72kernels import env

CPU = "CPUExecutionProvider"
_NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

Kind = Literal["cpu"] | Provider
Failure = type[BuildError] | type[SessionError]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a session is for, as far as providers depend on it.

    ``kind`` is ``cpu``, ``cuda`` or ``tensorrt``; the limits are those of the build options.
    """

    kind: Kind
    precision: Precision
    batch: ShapeRange
    workspace_bytes: int | None = None
    optimization_level: int | None = None

    @classmethod
    def of(
        cls,
        target: str,
        precision: Precision,
        batch: ShapeRange,
        options: Mapping[str, Any],
    ) -> Setting:
        """From a target and build options, as a mapping: those on record in a manifest, say."""
        return cls(
            "cpu" if target == "cpu" else options.get("provider", "cuda"),
            precision,
            batch,
            options.get("workspace_bytes"),
            options.get("optimization_level"),
        )


def check(ort: Any, kind: Kind, error: Failure) -> None:
    """Refuse a provider that the installed ONNX Runtime does not have.

    Raises:
        BuildError, SessionError: as given; it says what to install.
    """
    if kind == "cpu" or _NAMES[kind] in ort.get_available_providers():
        return
    if kind == "cuda":
        raise error(
            "target='cuda': the installed ONNX Runtime has no CUDA provider; install "
            "onnxruntime-gpu in place of onnxruntime, or use target='cpu'"
        )
    raise error(
        "provider='tensorrt': the installed ONNX Runtime has no TensorRT provider; install "
        "onnxruntime-gpu in place of onnxruntime and the TensorRT release that it names, or use "
        "backend='tensorrt', which needs neither"
    )


def listed(
    setting: Setting, model: OnnxModel, options: RuntimeOptions
) -> list[tuple[str, dict[str, str]]]:
    """The providers to ask for, in order, each with its options."""
    device = {"device_id": str(options.device_index)}
    providers: list[tuple[str, dict[str, str]]] = [(CPU, {})]
    if setting.kind != "cpu":
        providers.insert(0, (_NAMES["cuda"], device))
    if setting.kind == "tensorrt":
        providers.insert(0, (_NAMES["tensorrt"], {**device, **_tensorrt(setting, model)}))
    return providers


def confirm(session: Any, setting: Setting, options: RuntimeOptions, error: Failure) -> None:
    """Refuse a session that did not get the provider that was asked for.

    Raises:
        BuildError, SessionError: as given.
    """
    if setting.kind == "cpu" or session.get_providers()[0] == _NAMES[setting.kind]:
        return
    raise error(
        f"ONNX Runtime could not use {_NAMES[setting.kind]} on CUDA device {options.device_index} "
        f"and offers {', '.join(session.get_providers())} instead: check the driver and the "
        "versions of CUDA, cuDNN and TensorRT with 'sn72engine doctor', or use target='cpu'"
    )


def _tensorrt(setting: Setting, model: OnnxModel) -> dict[str, str]:
    # The library names what it keeps by the graph, not by the weights, hence a folder per model.
    folder = env.cache_dir() / "onnxruntime-tensorrt" / model.sha256()[:32]
    batch = setting.batch
    found = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        # On a card the float layers of a quantised model compute in float16, as in our engines.
        "trt_fp16_enable": "0" if setting.precision == "fp32" else "1",
        "trt_int8_enable": "1" if setting.precision == "int8" else "0",
    }
    for name, size in (("min", batch.min), ("opt", batch.opt), ("max", batch.max)):
        if shapes := _shapes(model.inputs, size):
            found[f"trt_profile_{name}_shapes"] = shapes
    if setting.workspace_bytes is not None:
        found["trt_max_workspace_size"] = str(setting.workspace_bytes)
    if setting.optimization_level is not None:
        found["trt_builder_optimization_level"] = str(setting.optimization_level)
    return found


def _shapes(inputs: Sequence[TensorSpec], batch: int) -> str:
    """Shapes in the provider's notation, "x:1x3x224x224"; empty where another axis is free."""
    if any(isinstance(size, str) for spec in inputs for size in spec.shape[1:]):
        return ""
    return ",".join(
        f"{spec.name}:{'x'.join(str(batch if isinstance(s, str) else s) for s in spec.shape)}"
        for spec in inputs
        if spec.shape and isinstance(spec.shape[0], str)
    )
