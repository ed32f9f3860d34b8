"""Which nodes of an ONNX graph get which number format, and why the others stay in float."""

from __future__ import annotations

import ast
import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from sn72engine import formats
from sn72engine.errors import QuantizationError
from sn72engine.spec import QuantizeOptions

#: Matrix kernels work in tiles of this width: a narrower product gains nothing, and it is mostly
#: the last layer, where an error costs most.
NARROW = 16

#: Metadata of a node, written by PyTorch's exporter: the path of the modules that made it.
SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True)
class Choice:
    """The decision about a graph.

    Attributes:
        precisions: node name to format, for the nodes to quantise, in graph order.
        skipped: node name to reason, for all other products.
        unasked: those of the skipped that the options leave out.
        modules: node name to the path of the module that made it, where the file tells.
        inputs: node name to the tensor that it reads, for the nodes to quantise.
        operators: node name to operator type, for the nodes to quantise.
    """

    precisions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unasked: set[str] = field(default_factory=set)
    modules: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    operators: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, reason: str) -> None:
        """Leave a node that was chosen in float after all."""
        del self.precisions[name]
        self.skipped[name] = reason


def name_nodes(proto: Any) -> None:
    """Give nodes without a name one; the same graph always gets the same names."""
    taken = {node.name for node in proto.graph.node}
    for index, node in enumerate(proto.graph.node):
        if not node.name:
            node.name = f"{node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)


def choose(proto: Any, options: QuantizeOptions) -> Choice:
    """Decide for every convolution and matrix product; all nodes must have names.

    Weights need not be loaded: their shapes are enough. Products of two activations (attention)
    stay in float.

    Raises:
        QuantizationError: nothing qualifies, or ``exclude`` or ``overrides`` name no node.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    products = [n for n in proto.graph.node if n.op_type in options.QUANTISABLE]
    choice = Choice(modules={n.name: path for n in products if (path := module_of(n))})
    _refuse_unknown(proto, products, choice, options)
    usual = _usual(proto, products, weights, options)
    for node in products:
        name, asked = node.name, _override(node.name, choice, options)
        precision = asked or options.precision
        shape = weights.get(node.input[1]) if len(node.input) > 1 else None
        if name in options.exclude or precision == "float":
            choice.skipped[name] = "excluded by name"
            choice.unasked.add(name)
        elif asked is None and usual.get(name, ""):
            choice.skipped[name] = usual[name]
            choice.unasked.add(name)
        elif reason := _unfit(node, shape, precision, forced=asked is not None):
            choice.skipped[name] = reason
        else:
            choice.precisions[name] = precision
            choice.inputs[name] = node.input[0]
            choice.operators[name] = node.op_type
    if not choice.precisions:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(choice.skipped.items())[:5])
        raise QuantizationError(
            f"0 nodes to quantise: no {', '.join(options.op_types or options.QUANTISABLE)} "
            f"qualifies" + (f" ({reasons})" if reasons else "")
        )
    return choice


def is_convolutional(proto: Any) -> bool:
    """Whether a graph has at least as many convolutions as matrix products."""
    counts = Counter(node.op_type for node in proto.graph.node)
    return counts["Conv"] >= counts["MatMul"] + counts["Gemm"]


def module_of(node: Any) -> str:
    """Path of the module whose forward method made a node; empty where the file does not tell."""
    scopes = next((e.value for e in node.metadata_props if e.key == SCOPES), "[]")
    try:
        names = ast.literal_eval(scopes)
    except (SyntaxError, ValueError):
        return ""
    return str(names[-2]) if isinstance(names, list) and len(names) > 1 else ""


def channel_axis(node: Any, ndim: int) -> int:
    """Axis of a product's weight that counts its output channels."""
    return 0 if node.op_type == "Conv" or _attribute(node, "transB") else ndim - 1


def _usual(
    proto: Any, products: list[Any], weights: dict[str, tuple[int, ...]], options: QuantizeOptions
) -> dict[str, str]:
    """Why a product is not quantised unless an override names it; see ``op_types``."""
    if options.op_types is not None:
        return {n.name: "not in op_types" for n in products if n.op_type not in options.op_types}
    if is_convolutional(proto):
        return {}
    reasons = {n.name: "a convolution of a transformer" for n in products if n.op_type == "Conv"}
    heads = set(_last(proto, weights))
    others = [n for n in products if n.name not in heads | reasons.keys()]
    if any(n.input[1] in weights for n in others):
        reasons.update(dict.fromkeys(heads, "the head"))
    return reasons


def _last(proto: Any, weights: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Names of the products with a weight from which no other one lies on the way to a result."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    names = [value.name for value in proto.graph.output]
    seen: set[str] = set()
    while names:
        node = makers.get(names.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in weights:
            yield node.name
        else:
            names.extend(node.input)


def _override(name: str, choice: Choice, options: QuantizeOptions) -> str | None:
    found = None
    for pattern, precision in options.overrides.items():
        if _matches(name, pattern, choice):
            found = precision
    return found


def _matches(name: str, pattern: str, choice: Choice) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(choice.modules.get(name, ""), pattern)


def _unfit(node: Any, shape: tuple[int, ...] | None, precision: str, *, forced: bool) -> str:
    """Why a product cannot be, or is not worth being, of this format; empty when it can."""
    if shape is None:
        return "its second input is not a constant weight"
    if node.op_type == "Conv":
        if precision in formats.BLOCK:
            return f"{precision} has no convolution"
        if precision == "fp8" and shape[1] < NARROW and not forced:
            # Its matrix kernels have nothing to gain from so short sums (depthwise, first layers),
            # in which the 3 bits of an e4m3 fraction cost most.
            return f"sums over {shape[1]} channels only: too few for fp8"
        channels = shape[1] * (_attribute(node, "group") or 1)
        narrow = max(shape[0], channels) < NARROW
    elif len(shape) != 2:
        return f"its weight has {len(shape)} axes: {shape}"
    elif _attribute(node, "transA"):
        return "its first input is transposed"
    else:
        narrow = min(shape) < NARROW
        inputs, block = shape[1 - channel_axis(node, 2)], formats.BLOCK.get(precision, 1)
        if inputs % block:
            return f"{inputs} inputs are no multiple of {precision}'s block of {block}"
    return f"narrower than {NARROW}: weight {shape}" if narrow and not forced else ""


def _refuse_unknown(
    proto: Any, products: list[Any], choice: Choice, options: QuantizeOptions
) -> None:
    taken = {node.name for node in proto.graph.node}
    unknown = sorted(set(options.exclude) - taken)
    if unknown:
        raise QuantizationError(
            f"exclude names a node that does not exist: {unknown[0]!r}{_near(unknown[0], taken)}"
        )
    for pattern in options.overrides:
        if not any(_matches(node.name, pattern, choice) for node in products):
            names = {node.name for node in products} | set(choice.modules.values())
            raise QuantizationError(
                f"overrides: {pattern!r} matches no matrix product or convolution, neither by "
                f"name nor by module{_near(pattern, names)}"
            )


def _near(name: str, names: set[str]) -> str:
    near = difflib.get_close_matches(name, names, 3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _attribute(node: Any, name: str) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), 0)
