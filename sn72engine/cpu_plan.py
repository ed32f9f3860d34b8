"""Decides which tensors of a network a CPU engine holds as uint8, and with which parameters.

Works on an onnx-graphsurgeon graph of float operators; changes nothing in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sn72engine import affine
from sn72engine.affine import Affine

PRODUCTS = frozenset(("Conv", "Gemm", "MatMul"))
ACTIVATIONS = frozenset(("Relu", "Clip"))
JOINS = frozenset(("Add", "Concat"))
POOLS = frozenset(("AveragePool", "GlobalAveragePool"))
#: Their output holds values of their input, so both share scale and zero point.
MOVES = frozenset(("Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))

Range = tuple[float, float]
_ANY: Range = (-math.inf, math.inf)


@dataclass(slots=True)
class Plan:
    """The decision.

    Attributes:
        tensors: parameters of each tensor that is held as uint8, by name.
        made: those of them that an integer node computes; the others are computed in float and
            quantised for the products that read them.
        products: ids of the product nodes that run on integers.
        operators: how many nodes of each operator run on integers.
        left: why quantised products stay in float, with how many.
    """

    tensors: dict[str, Affine] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    products: set[int] = field(default_factory=set)
    operators: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Unit:
    """A node, together with the activation that is the only reader of its result, if so."""

    node: Any
    activation: Any | None

    @property
    def output(self) -> str:
        last = self.activation or self.node
        return str(last.outputs[0].name)


def make(
    graph: Any, products: set[int], scales: Mapping[str, Range], ranges: Mapping[str, Range]
) -> Plan:
    """Plan the integer part of ``graph``.

    Integers start at the inputs of products and at the outputs of convolutions, and flow on
    through activations, additions, poolings and moves for as long as every input is held as
    integers and the result is read by another integer node. Matrix products give float: what
    follows them in a transformer (residual sums, normalisation) must not be rounded to 8 bits.

    Args:
        graph: float operators in topological order; weights of products come out of
            DequantizeLinear.
        products: ids of the nodes to run on integers.
        scales: range that each quantised product input was held in.
        ranges: measured range of tensors; may be empty.
    """
    plan = Plan(products=set(products))
    known = _known_ranges(graph, scales, ranges)
    for unit in _integer_units(graph, known, plan):
        plan.made.add(unit.output)
        plan.tensors[unit.output] = _parameters(unit, known, plan)
        plan.operators[unit.node.op] += 1
    for node in graph.nodes:
        if id(node) in plan.products:
            name = node.inputs[0].name
            plan.tensors.setdefault(name, affine.covering(*known[name]))
            if node.op != "Conv":  # convolutions were counted as units
                plan.operators[node.op] += 1
    return plan


def _known_ranges(
    graph: Any, scales: Mapping[str, Range], ranges: Mapping[str, Range]
) -> dict[str, Range]:
    """The narrowest range that is known of each tensor; tensors without a finite one are absent."""
    known: dict[str, Range] = {}
    for name in [tensor.name for tensor in graph.inputs]:
        _narrow(known, name, _ANY, scales, ranges)
    for node in graph.nodes:
        for tensor in node.outputs:
            _narrow(known, tensor.name, _by_structure(node, known), scales, ranges)
    return known


def _narrow(
    known: dict[str, Range],
    name: str,
    structural: Range,
    scales: Mapping[str, Range],
    ranges: Mapping[str, Range],
) -> None:
    all_of_them = (structural, scales.get(name, _ANY), ranges.get(name, _ANY))
    low, high = max(r[0] for r in all_of_them), min(r[1] for r in all_of_them)
    if math.isfinite(low) and math.isfinite(high):
        # Disjoint ranges mean that calibration never saw the allowed part: it is all clipped.
        known[name] = (min(low, high), high)


def _by_structure(node: Any, known: Mapping[str, Range]) -> Range:
    """Range that an operator's definition guarantees."""
    if node.op == "Relu":
        return (0.0, math.inf)
    if node.op == "Clip":
        return clip_bounds(node)
    if node.op in POOLS or node.op in MOVES:
        low, high = known.get(node.inputs[0].name, _ANY)
        return (min(low, 0.0), max(high, 0.0))  # padding adds zeros
    return _ANY


def clip_bounds(node: Any) -> Range:
    """Bounds of a Clip node; infinite where absent or computed."""
    found = list(_ANY)
    for index, tensor in enumerate(node.inputs[1:3]):
        values = getattr(tensor, "values", None)
        if values is not None and not tensor.is_empty():
            found[index] = float(values)
    return found[0], found[1]


def _integer_units(graph: Any, known: Mapping[str, Range], plan: Plan) -> list[_Unit]:
    """What can compute in integers and has a use for it, in topological order."""
    units: dict[str, _Unit] = {}
    for unit in _units(graph):
        node = unit.node
        starts = node.op == "Conv" and id(node) in plan.products
        if not starts and not (
            node.op in ACTIVATIONS | JOINS | POOLS | MOVES
            and all(name in units for name in _data(node))
        ):
            continue
        if unit.output in known:
            units[unit.output] = unit
        elif starts:
            plan.left["the range of the result is not known"] += 1
            plan.products.discard(id(node))
    wanted: list[_Unit] = []
    readers = {n.inputs[0].name for n in graph.nodes if id(n) in plan.products}
    for unit in reversed(units.values()):
        starts = id(unit.node) in plan.products
        if starts and unit.output not in readers and _cuts_patches(unit.node):
            plan.left["a patch embedding that float layers read"] += 1
            plan.products.discard(id(unit.node))
        elif starts or unit.output in readers:
            wanted.append(unit)
            readers.update(_data(unit.node))
    return wanted[::-1]


def _cuts_patches(node: Any) -> bool:
    """Whether a convolution cuts its input into tiles, as the first layer of a transformer does.

    It is a small part of the work there, and rounding its result would round the residual stream.
    """
    kernel = list(node.attrs.get("kernel_shape", ()))
    return bool(kernel) and max(kernel) > 1 and kernel == list(node.attrs.get("strides", ()))


def _units(graph: Any) -> Iterator[_Unit]:
    outputs = {tensor.name for tensor in graph.outputs}
    taken: set[int] = set()
    for node in graph.nodes:
        if id(node) in taken or not node.outputs:
            continue
        readers = node.outputs[0].outputs
        alone = len(readers) == 1 and node.outputs[0].name not in outputs
        activation = None
        if node.op in ("Conv", "Add") and alone and readers[0].op in ACTIVATIONS:
            activation = readers[0]
            taken.add(id(activation))
        yield _Unit(node, activation)


def _data(node: Any) -> list[str]:
    """Inputs that hold data; the others say bounds, shapes or axes."""
    tensors = node.inputs if node.op in JOINS else node.inputs[:1]
    return [str(tensor.name) for tensor in tensors]


def _parameters(unit: _Unit, known: Mapping[str, Range], plan: Plan) -> Affine:
    if unit.node.op in MOVES:
        return plan.tensors[unit.node.inputs[0].name]
    low, high = known[unit.output]
    last = unit.activation or unit.node
    if last.op == "Clip":
        least, most = clip_bounds(last)
        if least <= 0 <= most:
            return affine.inside(min(low, 0.0), max(high, 0.0))
    return affine.covering(low, high)
