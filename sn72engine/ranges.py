"""Ranges and channel means of a graph's inner tensors over a data set, in flat memory."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sn72engine import _deps, onnx_file, opset
from sn72engine.cpu_plan import ACTIVATIONS, JOINS, MOVES, POOLS, PRODUCTS
from sn72engine.errors import CalibrationError

#: Operators whose inputs and outputs a CPU engine may hold as integers. A mean may become a pool.
INTEGER_OPS = PRODUCTS | ACTIVATIONS | JOINS | POOLS | MOVES | {"ReduceMean"}

#: The reductions are written in this operator set, which quantising asks for in any case, and this
#: IR version, in which weights need not be inputs.
_OPSET, _IR = 19, 9

_INLINE_BYTES = 16 << 20

_MIN, _MAX, _MEAN = "sn72.min.", "sn72.max.", "sn72.mean."


@dataclass(frozen=True, slots=True)
class Seen:
    """What the tensors held.

    Attributes:
        ranges: tensor name to (smallest, largest) over all batches.
        means: tensor name to the mean of each channel, float64 (channels,).
    """

    ranges: Mapping[str, tuple[float, float]]
    means: Mapping[str, np.ndarray]


def collect(
    path: Path,
    feeds: Iterable[Mapping[str, np.ndarray]],
    tensors: Collection[str] | None = None,
    folder: Path | None = None,
    *,
    means: Mapping[str, int] | None = None,
) -> Seen:
    """Range of the float tensors named, or of every one that touches one of :data:`INTEGER_OPS`.

    The reductions are made part of the graph, so only a few numbers per tensor and batch leave
    ONNX Runtime and no tensor outlives the node that reads it last.

    Args:
        path: a float32 ONNX file.
        feeds: batches, as input name to array; each is read once and let go.
        tensors: names of float tensors that a node computes or that are inputs; None as above.
        folder: for a scratch file of the size of ``path``; None for the system's own.
        means: name of each tensor whose channel means are wanted, to its number of axes if it is
            an image, whose channels are axis 1, and to 0 if its channels are the last axis. The
            first axis is the batch.

    Raises:
        CalibrationError: there is no batch, a tensor became NaN or infinite, or ONNX Runtime
            cannot run the file.
        QuantizationError: the file is of an older operator set and cannot be brought to this one.
    """
    ort = _deps.require("onnxruntime", purpose="collect activation ranges")
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(prefix=".sn72.", dir=folder) as scratch:
        names = _augment(path, Path(scratch) / path.name, tensors, means or {})
        try:
            session = ort.InferenceSession(
                str(Path(scratch) / path.name), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its own, of several types
            raise CalibrationError(
                f"ONNX Runtime, which collects ranges, cannot load {path.name}: {error}"
            ) from error
        return _watch(session, names, list(means or {}), feeds)


def _watch(
    session: Any,
    names: list[str],
    averaged: list[str],
    feeds: Iterable[Mapping[str, np.ndarray]],
) -> Seen:
    wanted = [prefix + name for prefix in (_MIN, _MAX) for name in names]
    wanted += [_MEAN + name for name in averaged]
    sums: list[Any] = [0.0] * len(averaged)
    samples = 0
    low = np.full(len(names), np.inf)
    high = np.full(len(names), -np.inf)
    batches = 0
    for batches, feed in enumerate(feeds, 1):
        try:
            given = session.run(wanted, dict(feed))
        except Exception as error:
            raise CalibrationError(
                f"ONNX Runtime, which collects ranges, failed on batch {batches - 1}: {error}"
            ) from error
        found = np.array([float(value) for value in given[: 2 * len(names)]])
        least, most = found[: len(names)], found[len(names) :]
        bad = np.flatnonzero(~(np.isfinite(least) & np.isfinite(most)))
        if bad.size:
            raise CalibrationError(
                f"batch {batches - 1} makes tensor {names[bad[0]]!r} NaN or infinite (range "
                f"{least[bad[0]]} to {most[bad[0]]}); check the model and that batch"
            )
        low, high = np.minimum(low, least), np.maximum(high, most)
        size = len(next(iter(feed.values())))
        samples += size
        sums = [
            total + size * mean.astype(np.float64)
            for total, mean in zip(sums, given[2 * len(names) :], strict=True)
        ]
    if not batches:
        raise CalibrationError("calibration data holds no batch; no range can be collected")
    return Seen(
        {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)},
        {name: total / samples for name, total in zip(averaged, sums, strict=True)},
    )


def _augment(
    path: Path, target: Path, tensors: Collection[str] | None, means: Mapping[str, int]
) -> list[str]:
    """Write the file at ``path`` with the reductions as outputs; returns the tensors with ranges.

    Every tensor with means has a range too: a NaN is found there.
    """
    onnx = _deps.require("onnx", purpose="collect activation ranges")
    proto = onnx_file.load(path)
    opset.lift(proto, _OPSET)
    proto.ir_version = max(proto.ir_version, _IR)
    names = _tensors(onnx, proto) if tensors is None else list(tensors)
    names = list(dict.fromkeys([*names, *means]))
    del proto.graph.output[:]
    for name in names:
        for prefix, operator in ((_MIN, "ReduceMin"), (_MAX, "ReduceMax")):
            proto.graph.node.append(
                onnx.helper.make_node(operator, [name], [prefix + name], keepdims=0)
            )
            proto.graph.output.append(
                onnx.helper.make_tensor_value_info(prefix + name, onnx.TensorProto.FLOAT, [])
            )
    for name, ndim in means.items():
        _add_mean(onnx, proto.graph, name, ndim)
    # Weights in a file of their own are mapped into memory, not copied.
    onnx_file.write(proto, target, _INLINE_BYTES)
    return names


def _add_mean(onnx: Any, graph: Any, name: str, ndim: int) -> None:
    """A mean over all axes but the channels, as an output."""
    source, axes = name, [0, *range(2, ndim)]
    if not ndim:
        source, axes = f"{_MEAN}rows.{name}", [0]
        graph.node.append(onnx.helper.make_node("Flatten", [name], [source], axis=-1))
    held = onnx.numpy_helper.from_array(np.array(axes, np.int64), f"{_MEAN}axes.{name}")
    graph.initializer.append(held)
    graph.node.append(
        onnx.helper.make_node("ReduceMean", [source, held.name], [_MEAN + name], keepdims=0)
    )
    graph.output.append(
        onnx.helper.make_tensor_value_info(_MEAN + name, onnx.TensorProto.FLOAT, [None])
    )


def _tensors(onnx: Any, proto: Any) -> list[str]:
    constants = {tensor.name for tensor in proto.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in [*inferred.input, *inferred.value_info, *inferred.output]
    }
    touched = [
        name
        for node in proto.graph.node
        if node.op_type in INTEGER_OPS
        for name in [*node.input, *node.output]
        if name not in constants and types.get(name) == onnx.TensorProto.FLOAT
    ]
    return list(dict.fromkeys(touched))
