"""Float ONNX file -> Q/DQ ONNX file, calibrated by NVIDIA ModelOpt on real data.

The result is the form that TensorRT takes: symmetric int8, weights per output channel and stored
as int8, one quantised input per product. A CPU wants another form of the same network:
:func:`sn72engine.qdq.lower_for_cpu` makes it from this file, with the tensor ranges that are
collected here and kept in the record.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sn72engine import _deps, graph_cleanup, onnx_file, ranges
from sn72engine.errors import CalibrationError, QuantizationError
from sn72engine.model import OnnxModel, read_record, write_record
from sn72engine.progress import Progress
from sn72engine.qdq import store_int8_weights
from sn72engine.quiet import quiet
from sn72engine.spec import QuantizeOptions

#: Integer matrix kernels work in tiles of this width: a narrower product gains nothing, and it
#: is mostly the last layer, where an error costs most.
NARROW = 16

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


def quantize(
    model: OnnxModel,
    data: Batches,
    options: QuantizeOptions,
    path: str | Path,
    *,
    progress: bool | None = None,
) -> OnnxModel:
    """Write the INT8 Q/DQ form of ``model``.

    Reads the data twice (ranges for the CPU form, then ModelOpt), one batch at a time: memory
    does not grow with the number of samples. The record lists every quantised node and, for
    each other node that was asked for, why it was left.

    Args:
        model: a float32 ONNX model with one input.
        data: what calibrates it.
        options: method, operator types, excluded nodes.
        path: of the Q/DQ file; written whole or not at all.
        progress: show a bar; None shows it on a terminal only.

    Raises:
        QuantizationError: the model is already quantised, is float16, has several inputs,
            nothing in it can be quantised, an excluded name does not exist, or ModelOpt failed.
        CalibrationError: no data, or data that does not fit the input or holds NaN.
        MissingDependencyError: nvidia-modelopt or onnx is absent.
    """
    _refuse_unfit(model)
    with quiet():
        tool = _deps.require(
            "modelopt", purpose="quantise a model", submodule="onnx.quantization.quantize"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    proto = onnx_file.load(model.path)
    record = read_record(proto)
    chosen, skipped = _select(proto, options)
    steps = 2 * -(-data.samples // data.batch_size)
    with (
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
        Progress(f"quantize {path.name}", steps, unit="batch", shown=progress) as bar,
    ):
        source, result = Path(folder) / "source.onnx", Path(folder) / "result.onnx"
        external = onnx_file.weight_bytes(proto) > onnx_file.EXTERNAL_DATA_BYTES
        onnx_file.write(proto, source)
        del proto  # ModelOpt loads its own copy
        bar.note("ranges")
        with quiet():  # the data has a bar of its own
            found = ranges.collect(_linked_copy(source), _feeds(model, data, bar))
            digest = data.data_sha256()
        bar.note(options.method)
        _run_modelopt(tool, source, result, _Reader(model, data, bar), chosen, options, external)
        quantised = onnx_file.load(result)
    store_int8_weights(quantised)
    done = set(_quantised_nodes(quantised))
    kept = [name for name in chosen if name in done]
    if not kept:
        raise QuantizationError(
            f"0 of {len(chosen)} nodes were quantised: ModelOpt took none of "
            f"{', '.join(chosen[:5])}; its integer kernels want at least {NARROW} channels"
        )
    asked = len(chosen) + sum(name not in options.exclude for name in skipped)
    skipped.update({n: "left in float by ModelOpt" for n in chosen if n not in done})
    quantised, _ = graph_cleanup.clean(quantised)
    record["quantization"] = {
        "precision": options.precision,
        "method": options.method,
        "op_types": list(options.op_types),
        "samples": data.samples,
        "batch_size": data.batch_size,
        "data_sha256": digest,
        "modelopt": _deps.version("modelopt"),
        "asked": asked,
        "quantised": len(kept),
        "nodes": kept,
        "skipped": skipped,
        "ranges": {name: list(pair) for name, pair in found.items()},
    }
    write_record(quantised, record)
    onnx_file.save(quantised, path)
    written = OnnxModel.open(path)
    if (written.inputs, written.outputs) != (model.inputs, model.outputs):
        raise QuantizationError(
            f"quantisation changed the signature from {_signature(model)} to {_signature(written)}"
        )
    return written


def _refuse_unfit(model: OnnxModel) -> None:
    if model.precision == "int8":
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


def _select(proto: Any, options: QuantizeOptions) -> tuple[list[str], dict[str, str]]:
    """Names of the nodes to quantise, and name to reason for the others of these types.

    Nodes without a name are given one. Products of two activations (attention) stay in float:
    ModelOpt's pattern search for them depends on the data; a weight that is constant does not.
    """
    taken = {node.name for node in proto.graph.node}
    for index, node in enumerate(proto.graph.node):
        if not node.name:
            node.name = f"{node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
    unknown = sorted(set(options.exclude) - taken)
    if unknown:
        near = difflib.get_close_matches(unknown[0], taken, 3)
        raise QuantizationError(
            f"exclude names a node that does not exist: {unknown[0]!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type not in options.op_types:
            continue
        shape = weights.get(node.input[1]) if len(node.input) > 1 else None
        if node.name in options.exclude:
            skipped[node.name] = "excluded by name"
        elif shape is None:
            skipped[node.name] = "its second input is not a constant weight"
        elif node.op_type in ("Gemm", "MatMul") and min(shape[-2:]) < NARROW:
            skipped[node.name] = f"narrower than {NARROW}: weight {shape}"
        else:
            chosen.append(node.name)
    if not chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5])
        raise QuantizationError(
            f"0 nodes to quantise: no {', '.join(options.op_types)} qualifies"
            + (f" ({reasons})" if reasons else "")
        )
    return chosen, skipped


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
    options: QuantizeOptions,
    external: bool,
) -> None:
    with quiet("modelopt.onnx") as said:
        try:
            tool.quantize(
                str(source),
                quantize_mode="int8",
                calibration_data_reader=reader,
                calibration_method=options.method,
                calibration_eps=["cpu"],
                op_types_to_quantize=list(options.op_types),
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


def _linked_copy(source: Path) -> Path:
    """A second model file beside ``source`` that may be changed; weights are shared."""
    copy = source.with_name("ranges.onnx")
    copy.write_bytes(source.read_bytes())
    return copy


def _quantised_nodes(proto: Any) -> list[str]:
    """Nodes whose first two inputs both come from DequantizeLinear."""
    made = {n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    return [n.name for n in proto.graph.node if len(n.input) > 1 and set(n.input[:2]) <= made]


def _signature(model: OnnxModel) -> str:
    return ", ".join(map(str, (*model.inputs, *model.outputs)))
