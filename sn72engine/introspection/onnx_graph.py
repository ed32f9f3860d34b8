"""Nodes of an ONNX file as layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from sn72engine import _deps
from sn72engine.introspection.layer import Layer


def layers(proto: Any, runs_on: str = "") -> list[Layer]:
    """Every node of the main graph, in order, with types and shapes as far as they are known.

    Args:
        proto: a ModelProto; its large weights need not be loaded.
        runs_on: what to say of every node.
    """
    onnx = _deps.require("onnx", purpose="inspect an ONNX file")
    graph = proto.graph
    types = tensor_types(proto)
    stored = {tensor.name: tensor_bytes(onnx, tensor) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        first = next(iter(node.output), "")
        dtype, shape = types.get(first, ("", ()))
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        found.append(
            Layer(
                name=node.name or first or op,
                op=op.removeprefix("ai.onnx."),
                precision=dtype,
                shape=shape,
                weight_bytes=sum(stored.get(name, 0) for name in set(node.input)),
                runs_on=runs_on,
            )
        )
    return found


def tensor_types(proto: Any) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """NumPy's name of the type, and shape, of each tensor of which the file or inference tells."""
    onnx = _deps.require("onnx", purpose="inspect an ONNX file")
    graph = onnx.shape_inference.infer_shapes(proto).graph
    return {
        value.name: (_dtype(onnx, value.type.tensor_type.elem_type), _shape(value.type.tensor_type))
        for value in (*graph.value_info, *graph.output, *graph.input)
    }


def tensor_bytes(onnx: Any, tensor: Any) -> int:
    """Size of a stored tensor, from its type and shape: the values may lie in another file."""
    # The name says the width where NumPy cannot: two int4 or float4 share a byte.
    width = re.search(r"\d+", _dtype(onnx, tensor.data_type))
    bits: int = math.prod(tensor.dims) * (int(width.group()) if width else 8)
    return -(-bits // 8)


def fused(original: Any, node_outputs: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Which nodes of a graph each node of its optimised form stands for.

    Args:
        original: ModelProto before optimisation.
        node_outputs: for each optimised node the tensors of ``original`` that it computes.

    Returns:
        For each of them the names of the original nodes between its outputs and the tensors that
        other optimised nodes compute.
    """
    makers = {name: node for node in original.graph.node for name in node.output}
    groups = list(node_outputs)
    kept = {name for group in groups for name in group}
    result = []
    for group in groups:
        names: dict[str, None] = {}
        waiting = list(group)
        while waiting:
            node = makers.get(waiting.pop())
            if node is None:
                continue
            names[node.name or node.output[0]] = None
            waiting += [name for name in node.input if name not in kept and name in makers]
        result.append(tuple(reversed(names)))
    return result


def _dtype(onnx: Any, element: int) -> str:
    if not element:
        return ""
    name: str = onnx.helper.tensor_dtype_to_np_dtype(element).name
    return name


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in value.shape.dim
    )
