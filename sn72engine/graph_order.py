"""Which tensors of an ONNX graph depend on which: the order in which an error spreads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor, and the node that computes it: name (its output's where it has none) and type."""

    tensor: str
    layer: str
    op: str


def made_tensors(proto: Any) -> tuple[Made, ...]:
    """Tensors that depend on the graph's inputs, in topological order.

    What is computed from weights alone (a weight that is dequantised, say) is left out.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    live = {value.name for value in proto.graph.input} - stored
    found = []
    for node in proto.graph.node:
        if live.isdisjoint(reads(node)):
            continue
        live.update(node.output)
        found += [
            Made(name, node.name or node.output[0], node.op_type) for name in node.output if name
        ]
    return tuple(found)


def reads(node: Any) -> list[str]:
    """Names of the tensors that a node reads, also from inside its subgraphs."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names += reads(inner)
    return names


def feeds(proto: Any, tensors: Collection[str]) -> dict[str, frozenset[str]]:
    """For each of ``tensors``, the nearest others of them that it is computed from."""
    chosen = set(tensors)
    nearest: dict[str, frozenset[str]] = {}
    result = {}
    for node in proto.graph.node:
        sources: set[str] = set()
        for name in reads(node):
            sources |= {name} if name in chosen else nearest.get(name, frozenset())
        for name in node.output:
            nearest[name] = frozenset(sources)
            if name in chosen:
                result[name] = nearest[name]
    return result


def ancestors(tensors: Iterable[str], fed_by: Mapping[str, frozenset[str]]) -> set[str]:
    """Everything that any of ``tensors`` is computed from, without themselves."""
    found: set[str] = set()
    waiting: list[str] = list(tensors)
    while waiting:
        for name in fed_by.get(waiting.pop(), frozenset()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found
