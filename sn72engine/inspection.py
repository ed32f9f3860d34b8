"""What is in an ONNX file or a stored engine, as plain data and as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sn72engine import _deps
from sn72engine.engine import Engine
from sn72engine.errors import InputError, MissingDependencyError, SessionError
from sn72engine.introspection import layers_of, onnx_graph, plan_header
from sn72engine.introspection.layer import Layer
from sn72engine.model import OnnxModel

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
        InputError: the file is absent or is not ONNX.
    """
    onnx = _deps.require("onnx", purpose="inspect an ONNX file")
    model = OnnxModel.open(path)
    proto = onnx.load(path, load_external_data=False)
    weights: dict[str, dict[str, int]] = {}
    for tensor in proto.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        entry = weights.setdefault(dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += onnx_graph.tensor_bytes(onnx, tensor)
    files = (model.path, *model.external_files())
    return {
        "kind": "onnx",
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in files),
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
    lines = [f"{report['kind']:10} {report['path']}  ({report['bytes'] / 1e6:.2f} MB)"]
    if report["kind"] == "engine":
        lines += [
            f"backend    {facts['backend']} {facts['backend_version']} for {facts['target']}",
            f"batch      {facts['batch']['min']}..{facts['batch']['max']}, "
            f"tuned for {facts['batch']['opt']}",
            f"built      {facts['created']} in {facts['build_seconds']:.1f} s",
        ]
    lines.append(f"precision  {facts['precision']}")
    for side in ("inputs", "outputs"):
        for spec in facts[side]:
            shape = ", ".join(map(str, spec["shape"]))
            lines.append(f"{side[:-1]:10} {spec['name']}: {spec['dtype']}[{shape}]")
    preprocess = facts.get("preprocess")
    if preprocess:
        shown = ", ".join(f"{key}={value}" for key, value in preprocess.items())
        lines.append(f"preprocess {shown}")
    if graph:
        lines.append("operators  " + ", ".join(f"{n} {op}" for op, n in graph["operators"].items()))
        for dtype, entry in graph["weights"].items():
            lines.append(
                f"weights    {dtype}: {entry['tensors']} tensors, {entry['bytes'] / 1e6:.3f} MB"
            )
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
        lines.append("header     " + ", ".join(f"{name} {told}" for name, told in header.items()))
    lines += [f"note       {note}" for note in facts.get("notes", ())]
    lines += _layer_lines(report, listed=layers)
    return "\n".join(lines)


def _layer_lines(report: dict[str, Any], *, listed: bool) -> list[str]:
    """A summary of the layers and, if asked for, a line for each."""
    layers = report["layers"]
    if not layers:
        return [f"layers     {report['layers_from']}"]
    precisions = Counter(layer["precision"] or "?" for layer in layers).most_common()
    lines = [
        f"layers     {len(layers)}, from {report['layers_from']}; results in "
        + ", ".join(f"{count} {name}" for name, count in precisions)
    ]
    fused = [layer["fused"] for layer in layers if layer["fused"]]
    if fused:
        lines.append(f"fused      {sum(map(len, fused))} layers of the source run as {len(fused)}")
    if listed:
        width = max(min(max(len(layer["name"]) for layer in layers), 48), 5)
        lines += [
            "",
            f"{'layer':{width}}  {'type':24} {'result':9} {'shape':22} {'weights':>10}  runs on",
        ]
        for layer in layers:
            shape = "x".join(map(str, layer["shape"]))
            weights = f"{layer['weight_bytes'] / 1e3:.1f} kB" if layer["weight_bytes"] else ""
            also = f"  <- {', '.join(layer['fused'])}" if layer["fused"] else ""
            lines.append(
                f"{layer['name']:{width}.{width}}  {layer['op'].rpartition('.')[2]:24.24} "
                f"{layer['precision']:9.9} {shape:22.22} {weights:>10}  {layer['runs_on']}{also}"
            )
    return lines
