"""What libraries tell of their engines: layers, fusions, and the first bytes of an engine file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sn72engine import inspection
from sn72engine.backends.tensorrt_runner import make_profiler
from sn72engine.builder import build
from sn72engine.engine import Engine
from sn72engine.errors import InputError
from sn72engine.inspection_diff import diff
from sn72engine.introspection import layers_of, plan_header, tensorrt
from sn72engine.session import load
from sn72engine.spec import BuildOptions, ShapeRange, VerifyOptions
from sn72engine.store import Store
from sn72engine.verifier import verify
from tests import tiny_models


def engine_of(folder: Path, name: str, backend: str) -> Engine:
    model = getattr(tiny_models, name)(folder / f"{name}.onnx")
    options = BuildOptions(backend=backend, batch=ShapeRange(1, 2, 4))  # type: ignore[arg-type]
    return build(model, options, store=Store(folder / "store"))


def test_onnxruntime_tells_what_it_fused(tmp_path: Path) -> None:
    layers = {
        layer.name: layer for layer in layers_of(engine_of(tmp_path, "transformer", "onnxruntime"))
    }
    (product,) = (layer for layer in layers.values() if layer.op.endswith("FusedMatMul"))
    assert product.fused == ("kt", "qk", "s")
    # Inference knows no type for it; the file does.
    assert (product.precision, product.shape) == ("float32", ("N", 16, 16))
    assert layers["q"].weight_bytes == 4 * 16 * 16
    assert layers["q"].fused == ()
    assert {layer.runs_on for layer in layers.values()} == {"CPUExecutionProvider"}
    convolution = layers_of(engine_of(tmp_path, "convolution", "onnxruntime"))
    assert ("c", "r") in {layer.fused for layer in convolution}


def test_openvino_tells_kernels_and_what_it_fused(tmp_path: Path) -> None:
    layers = {
        layer.name: layer for layer in layers_of(engine_of(tmp_path, "convolution", "openvino"))
    }
    assert layers["c"].op == "Convolution"
    assert layers["c"].fused == ("c", "r")
    assert layers["c"].precision == "float32"
    assert layers["c"].shape == ("?", 8, 8, 8)
    assert layers["c"].runs_on
    assert not {"Const", "Input", "Output"} & {layer.op for layer in layers.values()}


def test_an_engine_for_an_absent_gpu_tells_its_header(tmp_path: Path) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    for target in ("sm_75", "sm_89", "sm_120"):
        options = BuildOptions(
            backend="tensorrt_rtx", target=target, precision="fp16", batch=ShapeRange(1, 1, 2)
        )
        engine = build(model, options, store=Store(tmp_path / "store"))
        header = plan_header.read(engine.path)
        assert header["library"] == "tensorrt_rtx"
        assert header["version"] == engine.manifest.backend_version
        if header["version"].startswith("1.7."):
            assert header["targets"] == [target]
            assert header["complete"]
    report = inspection.inspect_engine(engine.folder)
    assert report["header"] == header
    if not report["layers"]:
        assert "there is no CUDA device" in report["layers_from"]
    shown = inspection.render(report)
    assert header["version"] in shown
    short = tmp_path / "short.engine"
    short.write_bytes(engine.path.read_bytes()[:-5])
    assert plan_header.read(short).get("complete", False) is False
    short.write_bytes(b"not an engine")
    with pytest.raises(InputError, match="not a TensorRT engine file"):
        plan_header.read(short)


def test_the_inspectors_json_of_both_generations() -> None:
    """Documents in the form that TensorRT 10 and 11 publish."""
    ten = {
        "Layers": [
            {
                "Name": "conv1 + relu1",
                "LayerType": "CaskConvolution",
                "ParameterType": "Convolution",
                "Outputs": [
                    {
                        "Name": "r",
                        "Dimensions": [2, 8, 8, 8],
                        "Format/Datatype": "Row major linear FP16 format",
                    }
                ],
                "Weights": {"Type": "Half", "Count": 216},
                "Bias": {"Type": "Float", "Count": 8},
                "TacticName": "sm80_xmma_fprop",
                "Metadata": "[ONNX Layer: conv1]\u001e[ONNX Layer: relu1]",
            }
        ],
        "Bindings": ["x", "y"],
    }
    (layer,) = tensorrt.parse(json.dumps(ten))
    assert (layer.name, layer.op, layer.precision) == ("conv1 + relu1", "Convolution", "float16")
    assert layer.shape == (2, 8, 8, 8)
    assert layer.fused == ("conv1", "relu1")
    assert layer.weight_bytes == 216 * 2 + 8 * 4
    assert layer.runs_on == "sm80_xmma_fprop"
    eleven = {"Layers": [{"Name": "m", "LayerType": "kgen", "Outputs": [{"DataType": "BFloat16"}]}]}
    (layer,) = tensorrt.parse(json.dumps(eleven))
    assert (layer.op, layer.precision) == ("kgen", "bfloat16")
    names_only = tensorrt.parse('{"Layers": ["a", "b"]}')
    assert [(layer.name, layer.op) for layer in names_only] == [("a", ""), ("b", "")]


def test_the_profiler_for_tensorrt_is_one_of_its_own() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    told: list[tuple[str, float]] = []
    profiler = make_profiler(trt, lambda name, ms: told.append((name, ms)))
    assert isinstance(profiler, trt.IProfiler)
    profiler.report_layer_time("conv", 0.25)
    assert told == [("conv", 0.25)]


def test_a_report_lists_layers_and_says_where_they_are_from(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, "convolution", "onnxruntime")
    report = inspection.inspect_engine(engine.folder)
    assert report["layers_from"] == "ONNX Runtime's optimised graph"
    shown = inspection.render(report, layers=True)
    assert "<- c, r" in shown
    assert "fused      2 layers of the source run as 1" in shown
    assert "<- c, r" not in inspection.render(report)
    file = inspection.inspect_onnx(engine.path)
    assert [layer["name"] for layer in file["layers"]] == ["c", "r", "g", "f", "logits"]
    assert file["layers"][0]["precision"] == "float32"
    assert file["layers"][0]["weight_bytes"] == 4 * 8 * 27
    json.dumps(report)


def test_diff_of_files_tells_what_was_added_removed_and_changed(tmp_path: Path) -> None:
    float_file = inspection.inspect_onnx(tiny_models.convolution(tmp_path / "a.onnx").path)
    int8_file = inspection.inspect_onnx(tiny_models.quantised(tmp_path / "b.onnx").path)
    found = diff(float_file, int8_file)
    assert found.added == ("q", "x", "k")
    assert found.removed == ()
    changes = {change.name: (change.a, change.b) for change in found.changed}
    assert changes == {"c: weight_bytes": (4 * 8 * 27, 0)}
    facts = {change.name: (change.a, change.b) for change in found.facts}
    assert facts["precision"] == ("fp32", "int8")
    assert facts["operators.QuantizeLinear"] == (None, 1)
    assert facts["weights.int8"] == (None, {"tensors": 3, "bytes": 8 * 27 + 8 + 1})
    assert "weights.int8: nothing -> tensors 3, bytes 225" in found.render()
    assert "path" not in facts
    assert "  + q" in found.render()
    back = diff(int8_file, float_file)
    assert back.removed == found.added
    assert {c.name for c in back.facts} == set(facts)
    same = diff(float_file, {**float_file, "path": "elsewhere"})
    assert same.same
    assert same.render().endswith("no difference")
    json.dumps(found.to_dict())


def test_diff_of_files_tells_that_weights_have_other_values(tmp_path: Path) -> None:
    graph = "g (float[N, 3] x) => (float[N, 3] y) { y = Mul (x, w) }"
    files = [
        inspection.inspect_onnx(tiny_models.save(tmp_path / name, graph, {"w": values}).path)
        for name, values in (("a", np.ones(3, np.float32)), ("b", np.zeros(3, np.float32)))
    ]
    assert [change.name for change in diff(*files).facts] == ["sha256"]
    assert diff(files[0], files[0]).same


def test_diff_tells_layers_of_one_name_apart() -> None:
    def report(*types: str) -> dict[str, object]:
        rest = {"precision": "", "shape": [], "weight_bytes": 0, "fused": [], "runs_on": ""}
        return {"path": "m", "layers": [{"name": "l", "op": op, **rest} for op in types]}

    found = diff(report("Conv", "Relu"), report("Add", "Relu", "Mul"))
    assert [(change.name, change.a, change.b) for change in found.changed] == [
        ("l: op", "Conv", "Add")
    ]
    assert (found.added, found.removed, found.layers) == (("l (3)",), (), (2, 3))


def test_diff_of_engines_tells_options_and_fingerprint(tmp_path: Path) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    store = Store(tmp_path / "store")
    small = build(model, BuildOptions(batch=ShapeRange(1, 1, 1)), store=store)
    large = build(model, BuildOptions(batch=ShapeRange(1, 2, 4)), store=store)
    reports = [inspection.inspect_engine(engine.folder) for engine in (small, large)]
    found = diff(*reports)
    facts = {change.name: (change.a, change.b) for change in found.facts}
    assert facts["batch.max"] == (1, 4)
    assert facts["batch.opt"] == (1, 2)
    assert len(facts) == 2  # each is told once, and what is incidental not at all
    assert not found.added + found.removed
    across = diff(
        reports[1], inspection.inspect_engine(engine_of(tmp_path, "convolution", "openvino").folder)
    )
    told = {c.name: (c.a, c.b) for c in across.facts}
    assert told["backend"] == ("onnxruntime", "openvino")
    assert not [name for name in told if name.startswith(("manifest", "fingerprint.backend"))]
    assert "c" in across.added


def test_diff_of_verified_engines_tells_the_outcome_and_not_the_figures(tmp_path: Path) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    store = Store(tmp_path / "store")
    reports = []
    for most in (2, 4):
        engine = build(model, BuildOptions(batch=ShapeRange(1, 2, most)), store=store)
        with load(engine) as session:
            [given] = session.inputs
            batch = np.full((most, *given.shape[1:]), most, np.float32)
            report = verify(session, session, [batch], options=VerifyOptions(min_speedup=None))
        engine = store.update_manifest(engine, verification=report.to_dict())
        reports.append(inspection.inspect_engine(engine.folder))
    assert {change.name for change in diff(*reports).facts} == {"batch.max"}
    reports[1]["manifest"]["verification"]["passed"] = False
    assert "verification.passed: True -> False" in diff(*reports).render()
