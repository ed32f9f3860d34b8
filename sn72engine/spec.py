"""The frozen options objects: one per step, checked when made, so no step checks them again.

Every class here has ``to_dict``/``from_dict`` for JSON and YAML. ``from_dict`` refuses unknown
keys by name, and every message says the key, the value and what would be accepted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

from sn72engine.errors import OptionError

Fit = Literal["center_crop", "squash", "pad"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]
Layout = Literal["nchw", "nhwc"]
FloatType = Literal["float32", "float16"]
WeightType = Literal["float32", "float16", "bfloat16"]
QuantizedPrecision = Literal["int8", "fp8", "nvfp4", "mxfp8"]
#: Of a model or engine as a whole; ``mixed`` holds layers of several quantised formats.
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "nvfp4", "mxfp8", "mixed"]
#: What an override may ask of a layer.
LayerPrecision = Literal["int8", "fp8", "nvfp4", "mxfp8", "float"]
CalibrationMethod = Literal["auto", "entropy", "max", "smoothquant"]
BackendName = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "inductor"]

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
Tiling = Literal["none", "fast", "moderate", "full"]
Refit = Literal["none", "identical", "any"]
ProfilingVerbosity = Literal["none", "layer_names", "detailed"]
Plugin = Literal["layernorm_gelu"]
ShapeKernels = Literal["lazy", "eager", "none"]
Provider = Literal["cuda", "tensorrt"]

#: Backends whose engines run on a CPU when no target is given.
CPU_BACKENDS: tuple[BackendName, ...] = ("onnxruntime", "openvino")

#: Backends that build from a program of torch.export; all others build from ONNX.
PROGRAM_BACKENDS: tuple[BackendName, ...] = ("inductor",)

#: Backends that share the TensorRT API.
TENSORRT_BACKENDS: tuple[BackendName, ...] = ("tensorrt", "tensorrt_rtx")


class Options:
    """Base of every options object: conversion to and from plain mappings."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """This object as JSON-ready values."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Build from a mapping, as read from JSON or YAML.

        Args:
            values: field name to value; lists are taken for tuples, nested mappings for
                nested options.
            where: what to call this mapping in messages; the class name when empty.

        Raises:
            OptionError: unknown or missing key, or a value out of range.
        """
        where = where or cls.__name__
        if not isinstance(values, Mapping):
            raise OptionError(f"{where}: expected a mapping, got {type(values).__name__}")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise OptionError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(fields)}")
        missing = [
            name
            for name, f in fields.items()
            if f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
            and name not in values
        ]
        if missing:
            raise OptionError(f"{where}: missing key {missing[0]!r}")
        arguments = {}
        for name, value in values.items():
            nested = cls._nested().get(name)
            if nested is not None and isinstance(value, Mapping):
                value = nested.from_dict(value, where=f"{where}.{name}")
            elif nested is not None and isinstance(value, list):
                value = [
                    nested.from_dict(item, where=f"{where}.{name}[{index}]")
                    for index, item in enumerate(value)
                ]
            arguments[name] = tuple(value) if isinstance(value, list) else value
        try:
            return cls(**arguments)
        except OptionError as error:
            raise OptionError(f"{where}: {error}") from None

    @classmethod
    def _nested(cls) -> Mapping[str, type[Options]]:
        """Fields that hold options objects of their own."""
        return {}


def _plain(value: Any) -> Any:
    if isinstance(value, Options):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a value outside a Literal type (or a tuple of values)."""
    allowed = get_args(choices) or tuple(choices)
    if value not in allowed:
        raise OptionError(f"{name}={value!r} is not one of {', '.join(map(str, allowed))}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse anything but an int (not a bool) in [low, high]."""
    if type(value) is not int or value < low or (high is not None and value > high):
        bound = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise OptionError(f"{name}={value!r} must be an integer {bound}")


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse anything but a finite real number (not a bool) in [low, high]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        bound = ""
        if math.isfinite(low) or math.isfinite(high):
            bound = f" >= {low}" if math.isinf(high) else f" in [{low}, {high}]"
        raise OptionError(f"{name}={value!r} must be a finite number{bound}")


@dataclass(frozen=True, slots=True)
class ShapeRange(Options):
    """Batch sizes of an optimization profile: smallest, the one tuned for, largest."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        for name in ("min", "opt", "max"):
            check_int(name, getattr(self, name), 1)
        if not self.min <= self.opt <= self.max:
            raise OptionError(
                f"batch range needs min <= opt <= max, got {self.min}, {self.opt}, {self.max}"
            )

    def __contains__(self, batch: int) -> bool:
        return self.min <= batch <= self.max

    def __str__(self) -> str:
        return f"{self.min}..{self.max} (tuned for {self.opt})"


@dataclass(frozen=True, slots=True)
class Preprocess(Options):
    """How an image becomes a tensor: one definition for calibration, verification and serving.

    An image is decoded to 8-bit RGB, turned upright by its EXIF orientation, cropped and
    resized with an antialiasing filter to ``height`` x ``width`` in 8-bit, then normalised:
    ``(pixel - mean) / std`` per channel, with ``mean`` and ``std`` in pixel units (0 to 255).

    Args:
        height, width: output size in pixels.
        fit: ``center_crop`` keeps the aspect ratio and cuts what sticks out; ``squash`` ignores
            it; ``pad`` keeps it and fills the borders with ``mean``.
        crop_fraction: share of the centred crop that is kept before resizing, in (0, 1];
            224 of 256 is 0.875. Applies to ``center_crop`` only.
        interpolation: resampling filter; all but ``nearest`` antialias when shrinking.
        mean, std: per RGB channel, in pixel units.
        layout: ``nchw`` or ``nhwc``.
        dtype: of the tensor, ``float32`` or ``float16``.
        draft: let the JPEG decoder scale by 1/2, 1/4 or 1/8 when the result is still at least
            twice the output size. Much faster for camera images; differs from a full decode by
            less than resampling noise.
    """

    height: int = 224
    width: int = 224
    fit: Fit = "center_crop"
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    layout: Layout = "nchw"
    dtype: FloatType = "float32"
    draft: bool = True

    def __post_init__(self) -> None:
        check_int("height", self.height, 1, 8192)
        check_int("width", self.width, 1, 8192)
        check_choice("fit", self.fit, Fit)
        check_number("crop_fraction", self.crop_fraction, 1e-3, 1.0)
        check_choice("interpolation", self.interpolation, Interpolation)
        for name in ("mean", "std"):
            triple = getattr(self, name)
            if not isinstance(triple, tuple) or len(triple) != 3:
                raise OptionError(f"{name}={triple!r} must hold three numbers, one per RGB channel")
            for value in triple:
                check_number(name, value, 1e-6 if name == "std" else -1e6, 1e6)
        check_choice("layout", self.layout, Layout)
        check_choice("dtype", self.dtype, FloatType)
        check_choice("draft", self.draft, (True, False))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one sample in this layout."""
        if self.layout == "nchw":
            return (3, self.height, self.width)
        return (self.height, self.width, 3)


@dataclass(frozen=True, slots=True)
class ExportOptions(Options):
    """How a module becomes an ONNX file.

    Args:
        input_names, output_names: names of the graph's inputs and outputs, in order.
        opset: ONNX operator set.
        dynamic_batch: leave axis 0 of every input and output free.
        max_batch: largest batch the dynamic axis must accept.
        parity_batches: batch sizes on which ONNX Runtime is compared with the module.
        parity_atol, parity_rtol: bounds of that comparison:
            ``|onnx - torch| <= atol + rtol * |torch|`` for every element.
        external_data_bytes: write weights to a second file when they exceed this many bytes
            (protobuf cannot hold 2 GiB).
        clean: fold constants, merge duplicates and drop dead nodes.
        seed: of the random tensors used for parity.
    """

    input_names: tuple[str, ...] = ("pixel_values",)
    output_names: tuple[str, ...] = ("logits",)
    opset: int = 20
    dynamic_batch: bool = True
    max_batch: int = 1024
    parity_batches: tuple[int, ...] = (1, 2, 5)
    parity_atol: float = 1e-4
    parity_rtol: float = 1e-3
    external_data_bytes: int = 1_500_000_000
    clean: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_names", "output_names"):
            names = getattr(self, name)
            if not names or len(set(names)) != len(names):
                raise OptionError(f"{name}={names!r} must hold at least one name, none twice")
        check_int("opset", self.opset, 18, 26)
        check_int("max_batch", self.max_batch, 2)
        if not self.parity_batches:
            raise OptionError("parity_batches=() would export without checking the result")
        for batch in self.parity_batches:
            check_int("parity_batches", batch, 1, self.max_batch)
        check_number("parity_atol", self.parity_atol, 0.0)
        check_number("parity_rtol", self.parity_rtol, 0.0)
        check_int("external_data_bytes", self.external_data_bytes, 0, 2_000_000_000)


@dataclass(frozen=True, slots=True)
class CalibrationOptions(Options):
    """Which samples a calibration reads.

    Args:
        batch_size: samples per batch; part of the quantisation record.
        limit: use at most this many samples, spread evenly over the source; None for all.
        minimum: refuse to calibrate with fewer samples than this.
    """

    batch_size: int = 8
    limit: int | None = 512
    minimum: int = 8

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size, 1)
        if self.limit is not None:
            check_int("limit", self.limit, 1)
        check_int("minimum", self.minimum, 1)


@dataclass(frozen=True, slots=True)
class QuantizeOptions(Options):
    """How an ONNX file becomes a Q/DQ ONNX file.

    Args:
        precision: of the layers that no override names. ``int8``: weights symmetric per output
            channel, activations per tensor. ``fp8``: e4m3, scales as for int8. ``nvfp4``: e2m1 in
            blocks of 16 with e4m3 scales and a float32 scale per tensor. ``mxfp8``: e4m3 in
            blocks of 32 with power-of-two scales. The last two scale activations as they come.
        method: activation ranges: ``entropy`` (KL divergence; int8 only), ``max``, or
            ``smoothquant`` (int8 matrix products; moves outliers from activations to weights;
            needs the module). ``auto`` is ``entropy`` for int8 and ``max`` for all else.
        op_types: operator types to quantise, any of Conv, Gemm and MatMul: quantised residual
            additions and normalisations degrade accuracy. None takes all three in a network
            with as many convolutions as matrix products or more; in any other, a transformer
            say, it takes the matrix products only and leaves the last of them, the head.
        exclude: names of nodes to leave in floating point.
        overrides: pattern (``*`` and ``?`` as in file names) to the precision of the nodes whose
            name, or whose module's path, it matches; ``float`` leaves them. The last pattern
            that matches a node holds, over ``precision`` and over what ``op_types`` leaves out.
        bias_correction: take the mean error of each rounded weight out of its layer's bias, where
            it has a constant one. It costs nothing when the engine runs.
    """

    precision: QuantizedPrecision = "int8"
    method: CalibrationMethod = "auto"
    op_types: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, LayerPrecision] = field(default_factory=dict)
    bias_correction: bool = True

    QUANTISABLE: ClassVar[tuple[str, ...]] = ("Conv", "Gemm", "MatMul")

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, QuantizedPrecision)
        check_choice("method", self.method, CalibrationMethod)
        if self.op_types is not None:
            if not self.op_types:
                raise OptionError("op_types=() would quantise nothing")
            for op_type in self.op_types:
                check_choice("op_types", op_type, self.QUANTISABLE)
        if not isinstance(self.overrides, Mapping):
            raise OptionError(
                f"overrides={self.overrides!r} must map patterns to a precision or 'float'"
            )
        for pattern, precision in self.overrides.items():
            check_choice(f"overrides[{pattern!r}]", precision, LayerPrecision)
        if self.method in ("entropy", "smoothquant") and "int8" not in self.precisions:
            raise OptionError(
                f"method={self.method!r} is for int8, and no layer is asked for in it "
                f"(precision={self.precision!r}); use method='max' or 'auto'"
            )

    @property
    def precisions(self) -> frozenset[str]:
        """Every quantised format that some layer may get."""
        return frozenset({self.precision, *self.overrides.values()} - {"float"})

    @property
    def resolved_method(self) -> CalibrationMethod:
        """``method`` with ``auto`` filled in."""
        if self.method != "auto":
            return self.method
        return "entropy" if "int8" in self.precisions else "max"


#: Batch sizes for DINOv3 and other large vision transformers: one image at once while few
#: arrive, tuned for 16, and no more than 32, where a card is busy and memory grows for nothing.
DINOV3_BATCH = ShapeRange(1, 16, 32)


@dataclass(frozen=True, slots=True)
class TensorRTOptions(Options):
    """What only the builders of ``tensorrt`` and ``tensorrt_rtx`` know.

    Args:
        tactic_bytes: limit of the device memory that trying kernels may take; None for the
            library's own.
        max_tactics: most kernels tried for one layer; None for the library's own.
        tactic_sources: names of ``TacticSource`` to take kernels from, such as
            ``JIT_CONVOLUTIONS``; None for the library's own, () for none.
        tiling: effort spent on keeping data in the L2 cache between layers.
        l2_tiling_bytes: share of the L2 cache that tiling may count on; None for all of it.
        aux_streams: most streams beside the main one; 0 keeps everything on the caller's stream,
            None leaves it to the library.
        hardware_compatibility: other cards that shall run the engine, for some loss of speed:
            ``ampere_plus`` all from sm_80 on, ``same_compute_capability`` all of the same
            architecture. ``tensorrt`` only: ``tensorrt_rtx`` takes several targets.
        version_compatible: later releases of the same major version shall run the engine.
        exclude_lean_runtime: leave the small runtime that does so out of the file; it is then
            named by ``RuntimeOptions.lean_runtime``. ``tensorrt_rtx`` carries none and needs this.
        weight_streaming: keep weights in host memory beyond a budget given when the engine is
            opened.
        refit: weights that may be replaced without building again: ``none``, ``identical`` (the
            ones it was built from, for ``strip_weights``) or ``any``. Needs the card at build time.
        strip_weights: leave the weights out of the file; ``refit`` puts them in before use.
        profiling: how much the engine tells of its layers to inspection and profilers.
        user_allocation: the engine takes no memory of its own while it runs, so that it can be
            captured in a CUDA graph. ``tensorrt_rtx`` only: ``tensorrt`` needs no such promise.
        plugins: kernels of sn72kernels compiled into the engine where the model has their
            pattern. ``tensorrt`` only.
    """

    tactic_bytes: int | None = None
    max_tactics: int | None = None
    tactic_sources: tuple[str, ...] | None = None
    tiling: Tiling = "none"
    l2_tiling_bytes: int | None = None
    aux_streams: int | None = None
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    exclude_lean_runtime: bool = False
    weight_streaming: bool = False
    refit: Refit = "none"
    strip_weights: bool = False
    profiling: ProfilingVerbosity = "detailed"
    user_allocation: bool = False
    plugins: tuple[Plugin, ...] = ()

    def __post_init__(self) -> None:
        for name, low in (
            ("tactic_bytes", 1 << 20),
            ("max_tactics", 1),
            ("l2_tiling_bytes", 1),
            ("aux_streams", 0),
        ):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low)
        check_choice("tiling", self.tiling, Tiling)
        check_choice("hardware_compatibility", self.hardware_compatibility, HardwareCompatibility)
        check_choice("refit", self.refit, Refit)
        check_choice("profiling", self.profiling, ProfilingVerbosity)
        for name in (
            "version_compatible",
            "exclude_lean_runtime",
            "weight_streaming",
            "strip_weights",
            "user_allocation",
        ):
            check_choice(name, getattr(self, name), (True, False))
        for plugin in self.plugins:
            check_choice("plugins", plugin, Plugin)
        if self.exclude_lean_runtime and not self.version_compatible:
            raise OptionError("exclude_lean_runtime=True needs version_compatible=True")
        if self.user_allocation and self.weight_streaming:
            raise OptionError(
                "user_allocation=True and weight_streaming=True exclude each other: weights that "
                "are streamed need memory while the engine runs"
            )
        if self.strip_weights and self.refit == "none":
            raise OptionError(
                "strip_weights=True needs refit='identical' (or 'any'): without it the weights "
                "could never be put back"
            )


@dataclass(frozen=True, slots=True)
class BuildOptions(Options):
    """How an ONNX file becomes an engine.

    Args:
        backend: ``onnxruntime``, ``openvino``, ``tensorrt`` or ``tensorrt_rtx``; ``inductor``, for
            a program of torch.export instead of an ONNX file.
        batch: batch sizes the engine must accept.
        profiles: ranges of batch sizes that TensorRT tunes separately, in ascending order and
            together covering ``batch``; () tunes ``batch`` as one. A session takes the profile
            that is tuned for the size nearest to each call's.
        precision: of a float32 model's arithmetic, ``fp32`` or ``fp16``; a float16 or bfloat16
            file says ``fp16`` or ``bf16``. A Q/DQ model says its format, such as ``int8``, and
            keeps its other layers in ``fp16`` on TensorRT and ``fp32`` on a CPU.
        target: what the engine is for: ``cpu``, ``cuda`` (the card present) or, for
            ``tensorrt_rtx``, compute capabilities such as ``sm_89`` or ``sm_86,sm_89,sm_120``,
            all of which one file serves. Empty chooses ``cuda`` for TensorRT and ``cpu`` for
            all others.
        workspace_bytes: limit of the builder's scratch memory; None for the backend's own.
        optimization_level: builder effort, 0 to 5; None for the backend's own.
        provider: of ONNX Runtime on a card: ``cuda``, or ``tensorrt``, which hands it to TensorRT
            and lets CUDA run what that leaves.
        tensorrt: what only TensorRT's builders know.
    """

    backend: BackendName = "onnxruntime"
    batch: ShapeRange = field(default_factory=ShapeRange)
    precision: Precision = "fp32"
    target: str = ""
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    profiles: tuple[ShapeRange, ...] = ()
    provider: Provider = "cuda"
    tensorrt: TensorRTOptions = field(default_factory=TensorRTOptions)

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, BackendName)
        check_choice("precision", self.precision, Precision)
        if self.workspace_bytes is not None:
            check_int("workspace_bytes", self.workspace_bytes, 1 << 20)
        if self.optimization_level is not None:
            check_int("optimization_level", self.optimization_level, 0, 5)
        target = self.target
        cards = target.split(",")
        named = all(card.startswith("sm_") and card[3:].isdigit() for card in cards)
        if target and target not in ("cpu", "cuda") and not named:
            raise OptionError(
                f"target={target!r} must be 'cpu', 'cuda', or like 'sm_89' or 'sm_86,sm_89'"
            )
        if len(set(cards)) != len(cards):
            raise OptionError(f"target={target!r} names one card twice")
        if target == "cpu" and self.backend in TENSORRT_BACKENDS:
            raise OptionError(
                "target='cpu' needs backend='onnxruntime', 'openvino' or 'inductor', not "
                f"{self.backend!r}"
            )
        if target and target != "cpu" and self.backend == "openvino":
            raise OptionError(f"target={target!r}: backend='openvino' builds for 'cpu' only")
        if named and self.backend != "tensorrt_rtx":
            raise OptionError(
                f"target={target!r} needs backend='tensorrt_rtx'; {self.backend!r} builds for the "
                "device that is present: use 'cuda' or 'cpu'"
            )
        self._check_profiles()
        check_choice("provider", self.provider, Provider)
        if self.provider != "cuda" and (self.backend, target) != ("onnxruntime", "cuda"):
            raise OptionError(
                f"provider={self.provider!r} needs backend='onnxruntime' and target='cuda', not "
                f"{self.backend!r} and {self.resolved_target!r}"
            )
        if self.backend not in TENSORRT_BACKENDS and self.tensorrt != TensorRTOptions():
            usual = TensorRTOptions().to_dict()
            asked = [f"{k}={v!r}" for k, v in self.tensorrt.to_dict().items() if v != usual[k]]
            raise OptionError(
                f"tensorrt.{', '.join(asked)} is for backend='tensorrt' or 'tensorrt_rtx', not "
                f"{self.backend!r}"
            )

    def _check_profiles(self) -> None:
        if not self.profiles:
            return
        if self.backend not in TENSORRT_BACKENDS:
            raise OptionError(
                f"profiles={', '.join(map(str, self.profiles))}: only TensorRT tunes ranges "
                "separately; give batch alone"
            )
        reach = self.batch.min - 1
        for profile in self.profiles:
            if profile.min > reach + 1 or profile.max <= reach:
                raise OptionError(
                    f"profiles: {profile} must begin at {reach + 1} or before, and end after it, "
                    "so that in ascending order they leave no gap"
                )
            reach = profile.max
        if (self.profiles[0].min, reach) != (self.batch.min, self.batch.max):
            raise OptionError(
                f"profiles reach from {self.profiles[0].min} to {reach}, but batch={self.batch}; "
                "both must be the same range"
            )

    @property
    def resolved_target(self) -> str:
        """``target`` with the empty default filled in, and several cards in ascending order."""
        if "," in self.target:
            return ",".join(sorted(self.target.split(","), key=lambda card: int(card[3:])))
        return self.target or ("cuda" if self.backend in TENSORRT_BACKENDS else "cpu")

    @classmethod
    def _nested(cls) -> Mapping[str, type[Options]]:
        return {"batch": ShapeRange, "profiles": ShapeRange, "tensorrt": TensorRTOptions}


@dataclass(frozen=True, slots=True)
class RuntimeOptions(Options):
    """How an engine is run; never part of its identity.

    Args:
        threads: CPU threads of one session; None for all cores.
        device_index: which CUDA device.
        spinning: let idle CPU threads spin. Off by default: sessions that share a process steal
            each other's cores.
        weight_streaming_bytes: device memory for the weights of an engine built with
            ``weight_streaming``; None lets TensorRT choose by what is free.
        runtime_cache: keep the kernels that ``tensorrt_rtx`` compiles when an engine is first
            run, so that opening it again takes a fraction of the time.
        cuda_graph: let ``tensorrt_rtx`` capture its launches in a CUDA graph and replay that.
        shape_kernels: when ``tensorrt_rtx`` compiles kernels for the exact shapes of a call:
            ``lazy`` in the background, ``eager`` before the call returns, ``none`` never.
        lean_runtime: library file to load ``version_compatible`` engines that carry none with;
            empty for none.
    """

    threads: int | None = None
    device_index: int = 0
    spinning: bool = False
    weight_streaming_bytes: int | None = None
    runtime_cache: bool = True
    cuda_graph: bool = False
    shape_kernels: ShapeKernels = "lazy"
    lean_runtime: str = ""

    def __post_init__(self) -> None:
        if self.threads is not None:
            check_int("threads", self.threads, 1, 4096)
        check_int("device_index", self.device_index, 0)
        if self.weight_streaming_bytes is not None:
            check_int("weight_streaming_bytes", self.weight_streaming_bytes, 0)
        for name in ("spinning", "runtime_cache", "cuda_graph"):
            check_choice(name, getattr(self, name), (True, False))
        check_choice("shape_kernels", self.shape_kernels, ShapeKernels)
        if not isinstance(self.lean_runtime, str):
            raise OptionError(f"lean_runtime={self.lean_runtime!r} must be the path of a file")


@dataclass(frozen=True, slots=True)
class BenchOptions(Options):
    """How latency is measured.

    Args:
        batch: samples per call.
        warmup: calls made first and not counted.
        repeats: calls counted.
        seed: of the random input, when no input is given.
    """

    MINIMUM_FOR_P99: ClassVar[int] = 100

    batch: int = 1
    warmup: int = 10
    repeats: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("batch", self.batch, 1)
        check_int("warmup", self.warmup, 0)
        check_int("repeats", self.repeats, 3)


@dataclass(frozen=True, slots=True)
class VerifyOptions(Options):
    """What an engine must show before it may replace another.

    Args:
        min_cosine: smallest mean over the samples of the cosine similarity between an output and
            the reference's.
        min_worst_cosine: the same for the one sample that differs most; None does not check. A
            few outliers are usual for INT8, and what matters of them is the answer.
        max_abs_error: largest difference of any output element; None does not check.
        min_agreement: share of samples on which both give the same class.
        max_top1_drop: accuracy the engine may lose against the reference, in percentage
            points; checked where labels are given.
        min_speedup: the engine's throughput over the reference's, from medians of interleaved
            runs; 1.0 refuses an engine slower than what it replaces; None does not time.
        batch: batch size of the timed runs.
        repeats: timed calls of each engine.
    """

    min_cosine: float = 0.98
    min_worst_cosine: float | None = None
    max_abs_error: float | None = None
    min_agreement: float = 0.95
    max_top1_drop: float = 0.5
    min_speedup: float | None = 1.0
    batch: int = 1
    repeats: int = 30

    def __post_init__(self) -> None:
        check_number("min_cosine", self.min_cosine, -1.0, 1.0)
        if self.min_worst_cosine is not None:
            check_number("min_worst_cosine", self.min_worst_cosine, -1.0, 1.0)
        if self.max_abs_error is not None:
            check_number("max_abs_error", self.max_abs_error, 0.0)
        check_number("min_agreement", self.min_agreement, 0.0, 1.0)
        check_number("max_top1_drop", self.max_top1_drop, -100.0, 100.0)
        if self.min_speedup is not None:
            check_number("min_speedup", self.min_speedup, 0.0)
        check_int("batch", self.batch, 1)
        check_int("repeats", self.repeats, 3)


@dataclass(frozen=True, slots=True)
class SelectOptions(Options):
    """How the fastest engine for this machine is chosen.

    Args:
        backends: those that take part; one that is not installed, or lacks its device, is
            reported as refused. Of equally fast engines the one named first wins.
        batch: batch sizes the engine must accept.
        verify: bounds that an engine must keep to take part, and batch size and repeats of the
            timed calls. ``min_speedup`` must be None: engines are timed against each other.
        runtime: how the engines are run while they are compared, so also how the chosen one
            should be run.
        fresh: choose again even where an earlier choice is remembered.
    """

    backends: tuple[BackendName, ...] = ("onnxruntime", "openvino")
    batch: ShapeRange = field(default_factory=ShapeRange)
    verify: VerifyOptions = field(default_factory=lambda: VerifyOptions(min_speedup=None))
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    fresh: bool = False

    def __post_init__(self) -> None:
        if not self.backends or len(set(self.backends)) != len(self.backends):
            raise OptionError(f"backends={self.backends!r} must hold at least one, none twice")
        for backend in self.backends:
            check_choice("backends", backend, BackendName)
        if self.verify.min_speedup is not None:
            raise OptionError(
                f"verify.min_speedup={self.verify.min_speedup!r} must be None: engines are timed "
                "against each other, not against the reference"
            )
        if self.verify.batch not in self.batch:
            raise OptionError(
                f"verify.batch={self.verify.batch!r} is to be timed, but batch={self.batch}"
            )
        check_choice("fresh", self.fresh, (True, False))

    @classmethod
    def _nested(cls) -> Mapping[str, type[Options]]:
        return {"batch": ShapeRange, "verify": VerifyOptions, "runtime": RuntimeOptions}
