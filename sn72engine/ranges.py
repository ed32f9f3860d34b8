"""Smallest and largest value of a graph's inner tensors over a data set, in flat memory."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sn72engine import _deps, onnx_file
from sn72engine.cpu_plan import ACTIVATIONS, JOINS, MOVES, POOLS, PRODUCTS
from sn72engine.errors import CalibrationError

#: Operators whose inputs and outputs a CPU engine may hold as integers. A mean may become a pool.
INTEGER_OPS = PRODUCTS | ACTIVATIONS | JOINS | POOLS | MOVES | {"ReduceMean"}

_INLINE_BYTES = 16 << 20

_MIN, _MAX = "sn72.min.", "sn72.max."


def collect(
    path: Path,
    feeds: Iterable[Mapping[str, np.ndarray]],
    tensors: Collection[str] | None = None,
    folder: Path | None = None,
) -> dict[str, tuple[float, float]]:
    """Range of the float tensors named, or of every one that touches one of :data:`INTEGER_OPS`.

    The reductions are made part of the graph, so only two numbers per tensor and batch leave
    ONNX Runtime and no tensor outlives the node that reads it last.

    Args:
        path: a float32 ONNX file.
        feeds: batches, as input name to array; each is read once and let go.
        tensors: names of float tensors that a node computes or that are inputs; None as above.
        folder: for a scratch file of the size of ``path``; None for the system's own.

    Returns:
        Tensor name to (smallest, largest) over all batches.

    Raises:
        CalibrationError: there is no batch, or a tensor became NaN or infinite.
    """
    ort = _deps.require("onnxruntime", purpose="collect activation ranges")
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(prefix=".sn72.", dir=folder) as scratch:
        names = _augment(path, Path(scratch) / path.name, tensors)
        session = ort.InferenceSession(
            str(Path(scratch) / path.name), settings, providers=["CPUExecutionProvider"]
        )
        return _watch(session, names, feeds)


def _watch(
    session: Any, names: list[str], feeds: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    wanted = [prefix + name for prefix in (_MIN, _MAX) for name in names]
    low = np.full(len(names), np.inf)
    high = np.full(len(names), -np.inf)
    batches = 0
    for batches, feed in enumerate(feeds, 1):
        found = np.array([float(value) for value in session.run(wanted, dict(feed))])
        least, most = found[: len(names)], found[len(names) :]
        bad = np.flatnonzero(~(np.isfinite(least) & np.isfinite(most)))
        if bad.size:
            raise CalibrationError(
                f"batch {batches - 1} makes tensor {names[bad[0]]!r} NaN or infinite (range "
                f"{least[bad[0]]} to {most[bad[0]]}); check the model and that batch"
            )
        low, high = np.minimum(low, least), np.maximum(high, most)
    if not batches:
        raise CalibrationError("calibration data holds no batch; no range can be collected")
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _augment(path: Path, target: Path, tensors: Collection[str] | None) -> list[str]:
    """Write the file at ``path`` with two scalar outputs per tensor of interest; returns these."""
    onnx = _deps.require("onnx", purpose="collect activation ranges")
    proto = onnx_file.load(path)
    names = _tensors(onnx, proto) if tensors is None else list(dict.fromkeys(tensors))
    del proto.graph.output[:]
    for name in names:
        for prefix, operator in ((_MIN, "ReduceMin"), (_MAX, "ReduceMax")):
            proto.graph.node.append(
                onnx.helper.make_node(operator, [name], [prefix + name], keepdims=0)
            )
            proto.graph.output.append(
                onnx.helper.make_tensor_value_info(prefix + name, onnx.TensorProto.FLOAT, [])
            )
    # Weights in a file of their own are mapped into memory, not copied.
    onnx_file.write(proto, target, _INLINE_BYTES)
    return names


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
