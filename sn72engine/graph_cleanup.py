"""Clean-up of an exported ONNX graph: fewer nodes, same function."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sn72engine import _deps
from sn72engine.quiet import quiet

#: A folded tensor larger than this stays computed: an Expand of a constant could otherwise
#: turn a few bytes into gigabytes.
FOLD_LIMIT_BYTES = 64 << 20

#: Metadata of a node that survives: the path of the module that made it, to which ranges
#: collected in PyTorch are given. Stack traces, which hold paths of this machine, do not.
KEPT_METADATA = ("pkg.torch.onnx.name_scopes",)

#: Operators that give another answer on each run: two of them are never the same value.
_RANDOM = frozenset(
    (
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    )
)


@dataclass(frozen=True, slots=True)
class CleanupReport:
    """What a clean-up changed, as counts of nodes and initializers."""

    nodes_before: int
    nodes_after: int
    dead_nodes: int
    folded_nodes: int
    merged_nodes: int
    merged_initializers: int

    def to_dict(self) -> dict[str, int]:
        """JSON-ready values."""
        return asdict(self)


def clean(proto: Any) -> tuple[Any, CleanupReport]:
    """Fold constants, merge duplicates and drop what no output needs.

    Identical nodes are merged when operator, attributes and inputs agree (common
    subexpression elimination); random operators and nodes with subgraphs are left alone. Names
    and shapes of inputs and outputs, opsets, IR version and the model's metadata are kept. Of the
    metadata of single nodes :data:`KEPT_METADATA` is.

    Args:
        proto: a ModelProto with every weight in memory.

    Returns:
        The cleaned ModelProto, and the counts.
    """
    gs = _deps.require("onnx_graphsurgeon", purpose="clean up an exported graph")
    metadata = _node_metadata(proto)
    graph = gs.import_onnx(proto)
    before = len(graph.nodes)
    with quiet():
        graph.cleanup().toposort()
        alive = len(graph.nodes)
        graph.fold_constants(size_threshold=FOLD_LIMIT_BYTES).cleanup()
        folded = alive - len(graph.nodes)
        merged_initializers = _merge_constants(gs, graph)
        merged_nodes = _merge_nodes(gs, graph)
        graph.cleanup().toposort()
        cleaned = gs.export_onnx(graph)
    for node in cleaned.graph.node:
        for key, value in metadata.get(node.name, ()):
            node.metadata_props.add(key=key, value=value)
    cleaned.metadata_props.extend(proto.metadata_props)
    cleaned.doc_string = proto.doc_string
    return cleaned, CleanupReport(
        nodes_before=before,
        nodes_after=len(graph.nodes),
        dead_nodes=before - alive,
        folded_nodes=folded,
        merged_nodes=merged_nodes,
        merged_initializers=merged_initializers,
    )


def _node_metadata(proto: Any) -> dict[str, list[tuple[str, str]]]:
    """Node name to what is kept of its metadata; names that two nodes share are left out."""
    counts = Counter(node.name for node in proto.graph.node)
    return {
        node.name: [(e.key, e.value) for e in node.metadata_props if e.key in KEPT_METADATA]
        for node in proto.graph.node
        if node.name and counts[node.name] == 1
    }


def _merge_constants(gs: Any, graph: Any) -> int:
    """Let equal constants be one tensor; returns how many went away."""
    alike: dict[Hashable, list[Any]] = defaultdict(list)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            alike[str(tensor.dtype), tuple(tensor.shape)].append(tensor)
    merged = 0
    for group in alike.values():
        if len(group) == 1:  # nothing to compare with: spare the reading of its bytes
            continue
        kept: dict[Hashable, Any] = {}
        for tensor in group:
            first = kept.setdefault(_digest(tensor.values), tensor)
            if first is not tensor and not _is_output(graph, tensor):
                _replace(tensor, first)
                merged += 1
    return merged


def _merge_nodes(gs: Any, graph: Any) -> int:
    """Let identical nodes be one; the graph is in topological order, so one pass is enough."""
    kept: dict[Hashable, Any] = {}
    merged = 0
    for node in graph.nodes:
        key = _node_key(gs, node)
        if key is None:
            continue
        first = kept.setdefault(key, node)
        if first is node or any(_is_output(graph, tensor) for tensor in node.outputs):
            continue
        for old, new in zip(list(node.outputs), first.outputs, strict=True):
            _replace(old, new)
        merged += 1
    return merged


def _node_key(gs: Any, node: Any) -> Hashable | None:
    """Equal for nodes that compute the same; None for a node that must stay as it is."""
    if node.op in _RANDOM or any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return None
    return (
        node.op,
        node.domain,
        len(node.outputs),
        tuple(sorted((name, _attribute(gs, value)) for name, value in node.attrs.items())),
        tuple(None if tensor.is_empty() else id(tensor) for tensor in node.inputs),
    )


def _attribute(gs: Any, value: Any) -> str:
    if isinstance(value, gs.Tensor):
        value = value.values
    if hasattr(value, "tobytes"):
        return f"{value.dtype}{value.shape}{_digest(value)}"
    return repr(value)


def _digest(array: Any) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _is_output(graph: Any, tensor: Any) -> bool:
    return any(output is tensor for output in graph.outputs)


def _replace(old: Any, new: Any) -> None:
    for node in _distinct(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def _distinct(nodes: Iterable[Any]) -> list[Any]:
    return list({id(node): node for node in nodes}.values())
