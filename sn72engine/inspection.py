"""What is in an ONNX file or a stored engine, as plain data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sn72engine import _deps, onnx_file
from sn72engine.engine import Engine
from sn72engine.errors import InputError, MissingDependencyError, SessionError
from sn72engine.introspection import layers_of, onnx_graph, plan_header
from sn72engine.introspection.layer import Layer
from sn72engine.model import OnnxModel
from sn72engine.spec import BuildOptions, TensorRTOptions
from sn72engine.text import Column, table, wrapped

#: Backend -> where its layers come from.
_SOURCES = {
    "onnxruntime": "ONNX Runtime's optimised graph",
    "openvino": "OpenVINO's compiled model",
    "tensorrt": "TensorRT's engine inspector",
    "tensorrt_rtx": "TensorRT-RTX's engine inspector",
}


def inspect_onnx(path: Path) -> dict[str, Any]:
    """Signature, operators, weights by type and the record of an ONNX file.

    Returns:
        JSON-ready values; ``weights`` maps a NumPy dtype name to ``{"tensors", "bytes"}``.

    Raises:
        InputError: the file or its weight file is absent, or it is not ONNX.
    """
    onnx = _deps.require("onnx", purpose="inspect an ONNX file")
    model = OnnxModel.open(path)
    proto = onnx_file.skeleton(path)
    weights: dict[str, dict[str, int]] = {}
    for tensor in proto.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        entry = weights.setdefault(dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += onnx_graph.tensor_bytes(onnx, tensor)
    return {
        "kind": "onnx",
        "path": str(path),
        "bytes": model.size(),
        "sha256": model.sha256(),
        "opset": {o.domain or "ai.onnx": o.version for o in proto.opset_import},
        "inputs": [spec.to_dict() for spec in model.inputs],
        "outputs": [spec.to_dict() for spec in model.outputs],
        "precision": model.precision,
        "operators": dict(Counter(node.op_type for node in proto.graph.node).most_common()),
        "weights": weights,
        "preprocess": model.preprocess.to_dict() if model.preprocess else None,
        "record": {k: without_ranges(v) for k, v in model.record.items()},
        "layers": [layer.to_dict() for layer in onnx_graph.layers(proto)],
        "layers_from": "the file, as written",
    }


def inspect_engine(folder: Path) -> dict[str, Any]:
    """Manifest of an engine, checked against its files, its layers, and its graph where ONNX.

    The layers are what the backend makes of the engine: ONNX Runtime's optimised graph, OpenVINO's
    compiled model, TensorRT's engine inspector. Where the engine cannot be opened here, as one
    for a GPU that is absent, ``layers`` is empty and ``layers_from`` says why. A TensorRT file's
    ``header`` tells the release that wrote it.

    Raises:
        EngineCorruptError: a file or the manifest does not match its hash.
    """
    from sn72engine.store import open_engine

    engine = open_engine(folder)
    manifest = engine.manifest.to_dict()
    if manifest["quantization"]:
        manifest["quantization"] = without_ranges(manifest["quantization"])
    report: dict[str, Any] = {
        "kind": "engine",
        "path": str(folder),
        "bytes": sum(file.bytes for file in engine.manifest.files),
        "manifest": manifest,
        "options": engine.manifest.build_options,
    }
    if engine.path.suffix == ".onnx":
        graph = inspect_onnx(engine.path)
        report["graph"] = {key: graph[key] for key in ("opset", "operators", "weights")}
    elif engine.manifest.backend.startswith("tensorrt"):
        report["header"] = _header(engine)
    layers, report["layers_from"] = _layers(engine)
    report["layers"] = [layer.to_dict() for layer in layers]
    return report


def _layers(engine: Engine) -> tuple[tuple[Layer, ...], str]:
    """The layers as they run, and where that is known from; or none, and why."""
    try:
        return layers_of(engine), _SOURCES.get(engine.manifest.backend, engine.manifest.backend)
    except (SessionError, MissingDependencyError) as error:
        return (), f"not available: {error}"


def _header(engine: Engine) -> dict[str, Any]:
    try:
        return plan_header.read(engine.path)
    except InputError as error:
        return {"problem": str(error)}


def without_ranges(record: Any) -> Any:
    """A record without its per-tensor ranges, which are long and mean little to a reader."""
    if isinstance(record, dict):
        return {key: value for key, value in record.items() if key != "ranges"}
    return record


def render(report: dict[str, Any], *, layers: bool = False) -> str:
    """Either report as text for a person; ``layers`` lists every layer."""
    facts = report.get("manifest") or report
    graph = report.get("graph") or (report if "operators" in report else None)
    lines = [f"{report['kind']:10} {report['path']}  ({_size(report['bytes'])})"]
    if report["kind"] == "engine":
        lines += [
            f"backend    {facts['backend']} {facts['backend_version']} for {facts['target']}",
            f"batch      {_range(facts['batch'])}",
            *(f"profile    {_range(profile)}" for profile in report["options"].get("profiles", ())),
            f"built      {facts['created']} in {facts['build_seconds']:.1f} s",
        ]
        if chosen := _chosen_options(report["options"]):
            lines.append(wrapped("options", ", ".join(chosen)))
    lines.append(f"precision  {facts['precision']}")
    for side in ("inputs", "outputs"):
        for spec in facts[side]:
            shape = ", ".join(map(str, spec["shape"]))
            lines.append(f"{side[:-1]:10} {spec['name']}: {spec['dtype']}[{shape}]")
    preprocess = facts.get("preprocess")
    if preprocess:
        shown = ", ".join(f"{key}={value}" for key, value in preprocess.items())
        lines.append(wrapped("preprocess", shown))
    if graph:
        counts = (f"{n}\N{NO-BREAK SPACE}{op}" for op, n in graph["operators"].items())
        lines.append(wrapped("operators", ", ".join(counts)).replace("\N{NO-BREAK SPACE}", " "))
        for dtype, entry in graph["weights"].items():
            lines.append(f"weights    {dtype}: {entry['tensors']} tensors, {_size(entry['bytes'])}")
    quantization = facts.get("quantization") or facts.get("record", {}).get("quantization")
    if quantization:
        lines.append(
            f"quantized  {quantization['method']}, {quantization['samples']} samples, "
            f"{quantization.get('quantised', '?')} layers"
        )
    verification = facts.get("verification")
    if verification:
        lines.append(f"verified   {'passed' if verification['passed'] else 'REFUSED'}")
    if header := report.get("header"):
        told = {k: ", ".join(v) if isinstance(v, list) else v for k, v in header.items()}
        lines.append(wrapped("header", "; ".join(f"{k} {v}" for k, v in told.items())))
    lines += [wrapped("note", note) for note in facts.get("notes", ())]
    lines += _layer_lines(report, listed=layers)
    return "\n".join(lines)


def _layer_lines(report: dict[str, Any], *, listed: bool) -> list[str]:
    """A summary of the layers and, if asked for, a line for each."""
    layers = report["layers"]
    if not layers:
        return [wrapped("layers", report["layers_from"])]
    precisions = Counter(layer["precision"] or "?" for layer in layers).most_common()
    types = ", ".join(f"{count} {name}" for name, count in precisions)
    lines = [wrapped("layers", f"{len(layers)}, from {report['layers_from']}; results in {types}")]
    fused = [layer["fused"] for layer in layers if layer["fused"]]
    if fused:
        lines.append(f"fused      {sum(map(len, fused))} layers of the source run as {len(fused)}")
    runners = {_runner(layer) for layer in layers}
    if len(runners) == 1 and "" not in runners:
        lines.append(f"runs on    {runners.pop()}")
    if not listed:
        return lines
    head, *rows = table(
        [
            Column("layer", 30),
            Column("type", 18),
            Column("result", 24),
            Column("weights", 9, right=True),
            Column("runs on", 20 if not any(layer["weight_bytes"] for layer in layers) else 12),
        ],
        [
            (
                layer["name"],
                layer["op"].rpartition(".")[2],
                f"{layer['precision']}[{','.join(map(str, layer['shape']))}]",
                _size(layer["weight_bytes"]) if layer["weight_bytes"] else "",
                _runner(layer) if len(runners) > 1 else "",
            )
            for layer in layers
        ],
    )
    lines += ["", head]
    for row, layer in zip(rows, layers, strict=True):
        lines.append(row)
        if layer["fused"]:
            lines.append(wrapped("    <-", ", ".join(layer["fused"]), 7))
    return lines


def _runner(layer: dict[str, Any]) -> str:
    """Execution provider or kernel of a layer, without the part that all providers' names share."""
    name: str = layer["runs_on"]
    return name.removesuffix("ExecutionProvider")


def _range(batch: dict[str, int]) -> str:
    return f"{batch['min']}..{batch['max']}, tuned for {batch['opt']}"


def _size(count: int) -> str:
    """A byte count in the unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _chosen_options(options: Mapping[str, Any]) -> list[str]:
    """Build options that are not at their default, beside those that have lines of their own."""
    given = {**options, **options.get("tensorrt", {})}
    usual = {**BuildOptions().to_dict(), **TensorRTOptions().to_dict()}
    told = ("batch", "precision", "profiles", "tensorrt", "backend", "target")
    return [
        f"{name}={value}"
        for name, value in given.items()
        if name not in told and value != usual.get(name)
    ]
