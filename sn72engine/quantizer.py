"""Float ONNX file -> Q/DQ ONNX file, calibrated on real data.

Three steps: decide which nodes are quantised (:mod:`sn72engine.layers`), collect the range of
what they read, write the result (:mod:`sn72engine.inserter`). Ranges come from one of two places,
and the same inserter writes both:

- with the PyTorch module that was exported, from ModelOpt's PyTorch quantisation
  (:mod:`sn72engine.torch_ranges`), by every method;
- without it, from the ONNX file: largest magnitudes as ONNX Runtime computes them
  (:mod:`sn72engine.ranges`), and for INT8 from ModelOpt's ONNX quantisation, restricted to the
  chosen nodes, of which only the scales are kept.

The result is the form that TensorRT takes. A CPU wants another form of the same network:
:func:`sn72engine.qdq.lower_for_cpu` makes it from this file, with the tensor ranges kept in the
record.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from sn72engine import _deps, layers, onnx_file, ranges, torch_ranges
from sn72engine.errors import CalibrationError, QuantizationError
from sn72engine.inserter import Layer, insert
from sn72engine.layers import NARROW, Choice
from sn72engine.model import OnnxModel, read_record, write_record
from sn72engine.progress import Progress
from sn72engine.quiet import quiet
from sn72engine.spec import QuantizedPrecision, QuantizeOptions
from sn72engine.torch_ranges import LayerRange

if TYPE_CHECKING:
    import torch

Feed = dict[str, np.ndarray]


class Batches(Protocol):
    """Calibration data: float32 arrays with the batch on axis 0; can be iterated again."""

    @property
    def samples(self) -> int:
        """How many samples there are."""
        ...

    @property
    def batch_size(self) -> int:
        """Samples per batch; the last one may hold fewer."""
        ...

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield one batch after the other."""
        ...

    def data_sha256(self) -> str:
        """Hash of all samples."""
        ...


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the data told of the nodes to quantise.

    Attributes:
        amax: node name to the largest magnitude of its input that is to be held.
        means: node name to the mean of each input channel, for the correction of biases.
        smooth: node name to the factors of its input channels, for SmoothQuant.
        ranges: tensor name to (smallest, largest) value, for the CPU form of INT8 layers.
        record: method, source, samples and hash, for the file's record.
    """

    amax: Mapping[str, float]
    means: Mapping[str, np.ndarray] = field(default_factory=dict)
    smooth: Mapping[str, np.ndarray] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def layer(self, name: str, precision: str) -> Layer:
        """How a node is quantised to a format."""
        smooth = self.smooth.get(name) if precision == "int8" else None
        return Layer(
            cast(QuantizedPrecision, precision), self.amax[name], smooth, self.means.get(name)
        )


def quantize(
    model: OnnxModel,
    data: Batches,
    options: QuantizeOptions,
    path: str | Path,
    *,
    module: torch.nn.Module | None = None,
    progress: bool | None = None,
) -> OnnxModel:
    """Write the Q/DQ form of ``model``.

    Reads the data once or twice, one batch at a time: memory does not grow with the number of
    samples. The record lists every quantised node with its format and, for each other product,
    why it was left.

    Args:
        model: a float32 ONNX model with one input.
        data: what calibrates it.
        options: formats, method, which nodes.
        path: of the Q/DQ file; written whole or not at all.
        module: what ``model`` was exported from; it is run and is the same afterwards. Without
            it ranges come from the file, by any method but ``smoothquant``.
        progress: show a bar; None shows it on a terminal only.

    Raises:
        QuantizationError: the model is already quantised, is float16, has several inputs,
            nothing in it can be quantised, a name or pattern fits no node, ``module`` is not what
            was exported, or ModelOpt failed.
        CalibrationError: no data, or data that does not fit the input or holds NaN.
        MissingDependencyError: nvidia-modelopt or onnx is absent.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    choice = choose(model, options)
    found = calibrate(
        model, data, options, choice, module=module, folder=path.parent, progress=progress
    )
    return write(model, options, choice, found, path)


def choose(model: OnnxModel, options: QuantizeOptions) -> Choice:
    """Decide which nodes of a file get which format; see :func:`sn72engine.layers.choose`.

    Raises:
        QuantizationError: the model does not qualify, or nothing in it does.
    """
    _refuse_unfit(model)
    return layers.choose(_skeleton(model.path), options)


def calibrate(
    model: OnnxModel,
    data: Batches,
    options: QuantizeOptions,
    choice: Choice,
    *,
    module: torch.nn.Module | None = None,
    folder: Path | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Collect the range, and the means, of every input that ``choice`` quantises.

    Nodes that turn out to have none are moved to ``choice.skipped``. By the method ``max`` the
    ranges hold for any format, so that one calibration serves many assignments of formats.

    Args:
        model, data, options, module, progress: as for :func:`quantize`.
        choice: by :func:`choose`.
        folder: for scratch files of the model's size; None for the system's own.

    Raises:
        QuantizationError, CalibrationError, MissingDependencyError: as for :func:`quantize`.
    """
    method = options.resolved_method
    from_file = module is None and "int8" in choice.precisions.values()
    if module is None and method == "smoothquant":
        raise QuantizationError(
            "method='smoothquant' needs the module that was exported; give module=, or use "
            "method='entropy'"
        )
    watched = _tensors_to_watch(choice, everything=module is None)
    passes = (watched != set()) + (from_file or module is not None)
    steps = passes * -(-data.samples // data.batch_size)
    with ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=".sn72.", dir=folder))
        )
        bar = stack.enter_context(
            Progress(f"calibrate {model.path.name}", steps, unit="batch", shown=progress)
        )
        seen = ranges.Seen({}, {})
        if watched != set():
            bar.note("ranges")
            feeds = _feeds(model, data, bar)
            wanted = module is None and options.bias_correction
            averaged = _tensors_to_average(model, choice) if wanted else {}
            seen = ranges.collect(model.path, feeds, watched, scratch, means=averaged)
        bar.note(method)
        smooth: dict[str, np.ndarray] = {}
        if module is not None:
            source = "modelopt.torch"
            by_node = _ranges_by_module(model, module, data, options, choice, bar)
            amax = {name: entry.amax for name, entry in by_node.items()}
            means = {name: entry.mean for name, entry in by_node.items()}
            smooth = {n: entry.smooth for n, entry in by_node.items() if entry.smooth is not None}
        else:
            source = "onnxruntime"
            inputs = {name: choice.inputs[name] for name in choice.precisions}
            amax = {name: max(map(abs, seen.ranges[tensor])) for name, tensor in inputs.items()}
            means = {n: seen.means[tensor] for n, tensor in inputs.items() if tensor in seen.means}
            if from_file:
                source = "modelopt.onnx"
                amax.update(_ranges_by_modelopt(model, data, options, choice, scratch, bar))
        digest = data.data_sha256()
    return Calibration(
        amax,
        means if options.bias_correction else {},
        smooth,
        seen.ranges if "int8" in choice.precisions.values() else {},
        {
            "method": method,
            "source": source,
            "samples": data.samples,
            "batch_size": data.batch_size,
            "data_sha256": digest,
            "modelopt": None if source == "onnxruntime" else _deps.version("modelopt"),
        },
    )


def write(
    model: OnnxModel,
    options: QuantizeOptions,
    choice: Choice,
    calibration: Calibration,
    path: str | Path,
) -> OnnxModel:
    """Write the file that ``choice`` and ``calibration`` describe.

    Raises:
        QuantizationError: the result has another signature than ``model``.
    """
    path = Path(path)
    proto = onnx_file.load(model.path)
    layers.name_nodes(proto)
    record = read_record(proto)
    corrected = insert(proto, {n: calibration.layer(n, p) for n, p in choice.precisions.items()})
    used = set(choice.precisions.values())
    hard = [name for name in choice.skipped if name not in choice.unasked]
    record["quantization"] = {
        **calibration.record,
        "precision": used.pop() if len(used) == 1 else "mixed",
        "op_types": None if options.op_types is None else list(options.op_types),
        "overrides": dict(options.overrides),
        "asked": len(choice.precisions) + len(hard),
        "quantised": len(choice.precisions),
        "corrected_biases": corrected,
        "nodes": list(choice.precisions),
        "precisions": choice.precisions,
        "modules": {n: choice.modules[n] for n in choice.precisions if n in choice.modules},
        "skipped": choice.skipped,
        "ranges": {name: list(pair) for name, pair in calibration.ranges.items()},
    }
    write_record(proto, record)
    onnx_file.save(proto, path)
    del proto
    written = OnnxModel.open(path)
    if (written.inputs, written.outputs) != (model.inputs, model.outputs):
        raise QuantizationError(
            f"quantisation changed the signature from {_signature(model)} to {_signature(written)}"
        )
    return written


def _skeleton(path: Path) -> Any:
    """The ModelProto without external weights, and with a name for every node."""
    proto = onnx_file.skeleton(path)
    layers.name_nodes(proto)
    return proto


def _tensors_to_watch(choice: Choice, *, everything: bool) -> set[str] | None:
    """What to collect ranges of from the file: for the CPU form of INT8 layers, or for all.

    None stands for every tensor that a CPU could hold as integers: they flow on from convolutions.
    """
    integer = {name for name, precision in choice.precisions.items() if precision == "int8"}
    if any(choice.operators[name] == "Conv" for name in integer):
        return None
    return {choice.inputs[n] for n in choice.precisions if everything or n in integer}


def _tensors_to_average(model: OnnxModel, choice: Choice) -> dict[str, int]:
    """Tensors whose channel means correct biases, as :func:`ranges.collect` takes them.

    One that a convolution and a matrix product read is left out: their channels are two axes.
    """
    axes: dict[str, set[int]] = {}
    graph = _skeleton(model.path).graph
    shapes = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.name in choice.precisions:
            ndim = shapes[node.input[1]] if node.op_type == "Conv" else 0
            axes.setdefault(node.input[0], set()).add(ndim)
    return {name: found.pop() for name, found in axes.items() if len(found) == 1}


def _ranges_by_module(
    model: OnnxModel,
    module: torch.nn.Module,
    data: Batches,
    options: QuantizeOptions,
    choice: Choice,
    bar: Progress,
) -> dict[str, LayerRange]:
    """What the module's layers read, given to the nodes that they became."""
    known = torch_ranges.quantisable(module)
    wanted: dict[str, str] = {}
    for name, precision in list(choice.precisions.items()):
        path = choice.modules.get(name)
        if path is None or path not in known:
            raise QuantizationError(
                f"node {name} comes from module {path!r}, which {type(module).__name__} does not "
                "have: give the module that was exported, or none"
            )
        if not known[path]:
            part = type(module.get_submodule(path)).__name__
            choice.drop(name, f"ModelOpt has no quantised form of {part} ({path or 'the module'})")
        elif wanted.setdefault(path, precision) != precision:
            raise QuantizationError(
                f"module {path!r} is called more than once and is asked for as {wanted[path]} and "
                f"{precision}; one layer has one precision"
            )
    if not choice.precisions:
        reasons = "; ".join(list(choice.skipped.values())[:3])
        raise QuantizationError(
            f"0 quantizers enabled: {reasons}; give quantize no module, and ranges come from the "
            "file"
        )
    arrays = (feed[model.inputs[0].name] for feed in _feeds(model, data, bar))
    found = torch_ranges.collect(module, wanted, arrays, options.resolved_method)
    return {name: found[choice.modules[name]] for name in choice.precisions}


def _ranges_by_modelopt(
    model: OnnxModel,
    data: Batches,
    options: QuantizeOptions,
    choice: Choice,
    scratch: Path,
    bar: Progress,
) -> dict[str, float]:
    """Ranges of the INT8 nodes from ModelOpt's ONNX quantisation, which may leave some out."""
    with quiet():
        tool = _deps.require(
            "modelopt", purpose="quantise a model", submodule="onnx.quantization.quantize"
        )
    source, result = scratch / "source.onnx", scratch / "result.onnx"
    proto = onnx_file.load(model.path)
    layers.name_nodes(proto)
    external = onnx_file.weight_bytes(proto) > onnx_file.EXTERNAL_DATA_BYTES
    onnx_file.write(proto, source)
    del proto  # ModelOpt loads its own copy
    chosen = [name for name, precision in choice.precisions.items() if precision == "int8"]
    _run_modelopt(
        tool, source, result, _Reader(model, data, bar), chosen, choice, options, external
    )
    found = _scales(onnx_file.load(result))
    for name in chosen:
        if name not in found:
            choice.drop(name, "left in float by ModelOpt")
    if not choice.precisions:
        raise QuantizationError(
            f"0 of {len(chosen)} nodes were quantised: ModelOpt took none of "
            f"{', '.join(chosen[:5])}; its integer kernels want at least {NARROW} channels"
        )
    return {name: found[name] * 127 for name in chosen if name in found}


def _scales(proto: Any) -> dict[str, float]:
    """Node name to the scale of its first input, where both of its first two are dequantised."""
    onnx = _deps.require("onnx", purpose="read a quantised model")
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    made = {n.output[0]: n for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    found = {}
    for node in proto.graph.node:
        if len(node.input) > 1 and set(node.input[:2]) <= made.keys():
            scale = onnx.numpy_helper.to_array(held[made[node.input[0]].input[1]])
            found[node.name] = float(scale.max())
    return found


def _refuse_unfit(model: OnnxModel) -> None:
    if model.quantised:
        raise QuantizationError(f"{model.path} is already quantised; start from the float file")
    if model.precision != "fp32":
        raise QuantizationError(
            f"{model.path} is {model.precision}; export it in float32: the builder chooses the "
            "type of the layers that stay in float"
        )
    if len(model.inputs) != 1:
        names = ", ".join(spec.name for spec in model.inputs)
        raise QuantizationError(
            f"{model.path} has {len(model.inputs)} inputs ({names}); calibration data is one "
            "array per batch and feeds a model with one input"
        )


def _feeds(model: OnnxModel, data: Iterable[np.ndarray], bar: Progress) -> Iterator[Feed]:
    """Checked batches, one at a time, as ONNX Runtime takes them."""
    spec = model.inputs[0]
    for index, batch in enumerate(data):
        fits = (
            isinstance(batch, np.ndarray)
            and batch.dtype == np.float32
            and batch.ndim == len(spec.shape)
            and all(
                not isinstance(axis, int) or axis == size
                for axis, size in zip(spec.shape, batch.shape, strict=True)
            )
        )
        if not fits:
            what = f"{getattr(batch, 'dtype', type(batch).__name__)}{np.shape(batch)}"
            raise CalibrationError(f"calibration batch {index} is {what}, the model takes {spec}")
        if not batch.size:
            raise CalibrationError(f"calibration batch {index} is empty: {batch.shape}")
        if not np.isfinite(batch).all():
            raise CalibrationError(f"calibration batch {index} holds NaN or infinite values")
        yield {spec.name: batch}
        bar.step()


class _Reader:
    """Calibration data in the form that ONNX Runtime's calibrators read (``get_next``)."""

    def __init__(self, model: OnnxModel, data: Iterable[np.ndarray], bar: Progress) -> None:
        self._arguments = (model, data, bar)
        self.rewind()

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)

    def get_first(self) -> Feed | None:
        return next(_feeds(*self._arguments), None)

    def rewind(self) -> None:
        self._feeds = _feeds(*self._arguments)


def _run_modelopt(
    tool: Any,
    source: Path,
    result: Path,
    reader: _Reader,
    chosen: list[str],
    choice: Choice,
    options: QuantizeOptions,
    external: bool,
) -> None:
    with quiet("modelopt.onnx") as said:
        try:
            tool.quantize(
                str(source),
                quantize_mode="int8",
                calibration_data_reader=reader,
                calibration_method=options.resolved_method,
                calibration_eps=["cpu"],
                op_types_to_quantize=sorted({choice.operators[name] for name in chosen}),
                # Names are taken for regular expressions that match a beginning.
                nodes_to_quantize=[f"{re.escape(name)}$" for name in chosen],
                high_precision_dtype="fp32",
                disable_mha_qdq=True,
                # It judges by the shape of one batch: the choice would depend on its size.
                enable_gemv_detection_for_trt=False,
                use_external_data_format=external,
                output_path=str(result),
                log_level="ERROR",
            )
        except CalibrationError:
            raise
        except Exception as error:
            raise QuantizationError(
                f"ModelOpt failed: {type(error).__name__}: {error}; it said:\n"
                f"{said.getvalue()[-2000:]}"
            ) from error
    if not result.is_file():
        raise QuantizationError(f"ModelOpt wrote no file; it said:\n{said.getvalue()[-2000:]}")


def _signature(model: OnnxModel) -> str:
    return ", ".join(map(str, (*model.inputs, *model.outputs)))
