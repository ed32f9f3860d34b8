"""What is in an ONNX file or a stored engine, as plain data and as text."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from sn72engine import _deps
from sn72engine.model import OnnxModel


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
        count = 1
        for dim in tensor.dims:
            count *= dim
        # The name says the width where NumPy cannot: two int4 or float4 share a byte.
        width = re.search(r"\d+", dtype)
        bits = int(width.group()) if width else 8
        entry["tensors"] += 1
        entry["bytes"] += -(-count * bits // 8)
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
    }


def inspect_engine(folder: Path) -> dict[str, Any]:
    """Manifest of an engine, checked against its files, and its graph where it is ONNX.

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
    return report


def without_ranges(record: Any) -> Any:
    """A record without its per-tensor ranges, which are long and mean little to a reader."""
    if isinstance(record, dict):
        return {key: value for key, value in record.items() if key != "ranges"}
    return record


def render(report: dict[str, Any]) -> str:
    """Either report as text for a person."""
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
            f"{quantization['quantised']} layers"
        )
    verification = facts.get("verification")
    if verification:
        lines.append(f"verified   {'passed' if verification['passed'] else 'REFUSED'}")
    lines += [f"note       {note}" for note in facts.get("notes", ())]
    return "\n".join(lines)
