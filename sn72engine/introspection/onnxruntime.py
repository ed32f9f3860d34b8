"""ONNX Runtime: the graph that it makes of a file, and its own profiler.

Both come from a session like the one that a runner has, but for the settings that they need.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sn72engine import onnx_file
from sn72engine.backends.onnxruntime import open_session
from sn72engine.engine import Engine
from sn72engine.introspection import onnx_graph
from sn72engine.introspection.layer import Layer, LayerRun, TimedRun
from sn72engine.spec import RuntimeOptions

_KERNEL = "_kernel_time"

#: What the optimiser appends to the name of a node that it gives another memory layout.
_RELAID = "_nchwc"


def layers(engine: Engine) -> list[Layer]:
    """Nodes of the optimised graph, with the nodes of the file that each stands for."""
    with tempfile.TemporaryDirectory(prefix="sn72-inspect-") as folder:
        path = Path(folder) / "optimised.onnx"

        def adjust(settings: Any) -> None:
            settings.optimized_model_filepath = str(path)
            for name, value in (("file_name", "weights"), ("min_size_in_bytes", "1024")):
                settings.add_session_config_entry(
                    f"session.optimized_model_external_initializers_{name}", value
                )

        session = open_session(engine, RuntimeOptions(), adjust)
        proto = onnx_file.skeleton(path)
    providers = session.get_providers()
    # With one provider every node is its; with more the profiler tells.
    found = onnx_graph.layers(proto, providers[0] if len(providers) == 1 else "")
    original = onnx_file.skeleton(engine.path)
    origins = _origins(original, proto)
    types = onnx_graph.tensor_types(original)
    described = []
    for layer, tensors, names in zip(
        found, origins, onnx_graph.fused(original, origins), strict=True
    ):
        # Inference stops at operators of ONNX Runtime's own; the file knows what they compute.
        dtype, shape = types.get(next(iter(tensors), ""), ("", ()))
        described.append(
            replace(
                layer,
                precision=layer.precision or dtype,
                shape=layer.shape or shape,
                fused=names if len(names) > 1 else (),
            )
        )
    return described


def timed_runs(
    engine: Engine, inputs: Mapping[str, Any], runs: int, options: RuntimeOptions
) -> list[TimedRun]:
    """Times of ONNX Runtime's profiler, in whole microseconds."""
    with tempfile.TemporaryDirectory(prefix="sn72-profile-") as folder:

        def adjust(settings: Any) -> None:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "run")

        session = open_session(engine, options, adjust)
        for _ in range(runs):
            session.run(None, dict(inputs))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _split(events)


def _split(events: list[dict[str, Any]]) -> list[TimedRun]:
    """Events of the profiler by run: nodes come before the event of the run they belong to."""
    found: list[TimedRun] = []
    nodes: list[dict[str, Any]] = []
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            nodes.append(event)
        elif event.get("name") == "model_run":
            begin = event["ts"]
            layers = tuple(
                LayerRun(
                    node["name"].removesuffix(_KERNEL),
                    node["args"]["op_name"],
                    float(node["dur"]),
                    float(node["ts"] - begin),
                    node["args"].get("provider", ""),
                )
                for node in sorted(nodes, key=lambda node: node["ts"])
            )
            found.append(TimedRun(layers, float(event["dur"])))
            nodes = []
    return found


def _origins(original: Any, optimised: Any) -> list[tuple[str, ...]]:
    """For each optimised node the tensors of the original that it computes.

    A node whose memory layout was changed writes a tensor of a new name, and carries the original
    name with a suffix. What turns the layout back computes nothing: its result is its input's.
    """
    made = {name for node in original.graph.node for name in node.output}
    named = {node.name: node.output[0] for node in original.graph.node if node.name}
    moved = {
        node.input[0]: node.output[0] for node in optimised.graph.node if _changes_layout(node)
    }
    result: list[tuple[str, ...]] = []
    for node in optimised.graph.node:
        stem = node.name.removesuffix(_RELAID)
        told = named.get(stem) or (stem if stem in made else "")
        kept = tuple(moved.get(name, name) for name in node.output if moved.get(name, name) in made)
        if _changes_layout(node):
            result.append(())
        else:
            result.append(kept or ((told,) if told else ()))
    return result


def _changes_layout(node: Any) -> bool:
    return node.op_type in ("ReorderInput", "ReorderOutput") or (
        node.op_type == "Transpose" and node.name.startswith("Transpose_token")
    )
