"""Raises the operator set of an ONNX graph, where only the form of its nodes changes by that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sn72engine import _deps
from sn72engine.errors import QuantizationError

#: Operators whose nodes look the same before and after, but compute something else, and the
#: operator set that changed them.
_REDEFINED = {
    "DFT": 20,
    "GridSample": 20,
    "GroupNormalization": 21,
    "Hardmax": 13,
    "LogSoftmax": 13,
    "Resize": 11,
    "RoiAlign": 16,
    "Softmax": 13,
}


def lift(proto: Any, needed: int) -> None:
    """Bring a ModelProto to operator set ``needed`` in place, if it has an older one.

    Axes that became an input (of reductions, in 13 and 18) become one.

    Raises:
        QuantizationError: an operator has another form or meaning there, and is not rewritten.
    """
    onnx = _deps.require("onnx", purpose="raise the operator set of a model")
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version < needed:
            for node in list(_nodes(proto.graph)):
                if node.domain in ("", "ai.onnx"):
                    _adapt(onnx, proto.graph, node, entry.version, needed)
            entry.version = needed


def _nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _adapt(onnx: Any, graph: Any, node: Any, old: int, needed: int) -> None:
    try:
        before, after = (onnx.defs.get_schema(node.op_type, v, "") for v in (old, needed))
    except onnx.defs.SchemaError:  # an operator that ONNX does not define
        return
    if before.since_version == after.since_version:
        return
    changed = old < _REDEFINED.get(node.op_type, 0) <= needed
    for attribute in list(node.attribute):
        if attribute.name in after.attributes:
            continue
        place = len(node.input)
        if attribute.name != "axes" or "axes" not in [i.name for i in after.inputs[place:]]:
            changed = True
            break
        name = f"{node.output[0]}_axes"
        axes = np.array(attribute.ints, np.int64)
        graph.initializer.append(onnx.numpy_helper.from_array(axes, name))
        node.input.append(name)
        node.attribute.remove(attribute)
    if changed or after.deprecated:
        raise QuantizationError(
            f"{node.name or node.output[0]}: {node.op_type} has another form in opset {needed}; "
            f"export with opset={needed}"
        )
    # From 18 on it must be told how many equal parts it makes.
    if node.op_type == "Split" and old < 18 <= needed and len(node.input) == 1:
        node.attribute.append(onnx.helper.make_attribute("num_outputs", len(node.output)))
