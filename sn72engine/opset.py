"""Raises the operator set of an ONNX graph, where only the form of its nodes changes by that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sn72engine import _deps
from sn72engine.errors import QuantizationError
from sn72engine.introspection.onnx_graph import tensor_types

#: Operators whose nodes look the same before and after, but compute something else, and the
#: operator set that changed them.
_REDEFINED = {
    "DFT": 20,
    "GridSample": 20,
    "GroupNormalization": 21,
    "Resize": 11,
    "RoiAlign": 16,
}

#: Before 13 these took all axes from the one given on together, 1 where none is given.
_OVER_AXES = ("Hardmax", "LogSoftmax", "Softmax")


def lift(proto: Any, needed: int) -> None:
    """Bring a ModelProto to operator set ``needed`` in place, if it has an older one.

    Axes that became an input (of reductions, in 13 and 18) become one. Nodes keep their names.

    Raises:
        QuantizationError: an operator has another form or meaning there, and is not rewritten.
    """
    onnx = _deps.require("onnx", purpose="raise the operator set of a model")
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version < needed:
            types = tensor_types(proto) if entry.version < 13 else {}
            ranks = {name: len(shape) for name, (_, shape) in types.items()}
            for node in list(_nodes(proto.graph)):
                if node.domain in ("", "ai.onnx"):
                    _adapt(onnx, proto.graph, node, ranks, entry.version, needed)
            entry.version = needed


def _nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _adapt(
    onnx: Any, graph: Any, node: Any, ranks: Mapping[str, int], old: int, needed: int
) -> None:
    try:
        before, after = (onnx.defs.get_schema(node.op_type, v, "") for v in (old, needed))
    except onnx.defs.SchemaError:  # an operator that ONNX does not define
        return
    if before.since_version == after.since_version:
        return
    changed = old < _REDEFINED.get(node.op_type, 0) <= needed
    if node.op_type in _OVER_AXES and old < 13 <= needed:
        changed = not _is_over_last(node, ranks.get(node.input[0], 0))
        del node.attribute[:]  # the last axis is the new default
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


def _is_over_last(node: Any, rank: int) -> bool:
    """Whether one of :data:`_OVER_AXES` takes the last axis alone; a rank of 0 is not known."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    return axis in (-1, rank - 1)
