"""The OpenVINO backend computes what the model does, or says why not; nothing is reported home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sn72engine import _deps, doctor
from sn72engine.backends import get_backend, openvino
from sn72engine.backends.openvino import OpenVinoBackend
from sn72engine.builder import build
from sn72engine.engine import Engine
from sn72engine.errors import BuildError, MissingDependencyError, OptionError, SessionError
from sn72engine.model import OnnxModel
from sn72engine.session import Session, load
from sn72engine.spec import BuildOptions, RuntimeOptions, ShapeRange
from sn72engine.store import Store
from tests import quantized_models, tiny_models

pytestmark = pytest.mark.skipif(
    not _deps.available("openvino"), reason="openvino is not installed; extra 'openvino'"
)

ROOT = Path(__file__).resolve().parents[2]
ONE = RuntimeOptions(threads=1)
BACKEND = OpenVinoBackend()
SMALL = BuildOptions(backend="openvino", batch=ShapeRange(1, 2, 4))


def made(tmp_path: Path, model: OnnxModel, options: BuildOptions = SMALL) -> Engine:
    return build(model, options, store=Store(tmp_path / "store"))


def test_chosen_by_name_with_its_version() -> None:
    assert isinstance(get_backend("openvino"), OpenVinoBackend)
    assert BACKEND.version() == _deps.version("openvino")
    assert BACKEND.target(SMALL) == "cpu"


def test_only_for_a_cpu() -> None:
    assert BuildOptions(backend="openvino", target="cpu").resolved_target == "cpu"
    with pytest.raises(OptionError, match="target='cuda': backend='openvino' builds for 'cpu'"):
        BuildOptions(backend="openvino", target="cuda")


def test_an_absent_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = _deps.Dependency("openvino", ("no-such-package",), "2026.0", "openvino")
    monkeypatch.setitem(_deps.DEPENDENCIES, "openvino", absent)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sn72engine\[openvino\]'"):
        BACKEND.version()


@pytest.mark.parametrize("external", [False, True])
def test_computes_what_the_model_does(tmp_path: Path, external: bool) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx", external=external)
    engine = made(tmp_path, model)
    assert [f.name for f in engine.manifest.files] == (
        ["model.onnx", "m.onnx.data"] if external else ["model.onnx"]
    )
    w, b = tiny_models.linear_weights(model)
    model.path.unlink()  # the engine must not need the source any more
    (tmp_path / "m.onnx.data").unlink(missing_ok=True)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    with load(engine, ONE) as session:
        np.testing.assert_allclose(session(x), x @ w + b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["residual_net", "transformer"])
def test_float_models_agree_with_onnx_runtime_to_float32_rounding(
    tmp_path: Path, form: str
) -> None:
    # bfloat16, which OpenVINO would take by itself on some CPUs, is off by a hundred times this.
    model = quantized_models.exported(form)
    x = quantized_models.images(4)
    with load(made(tmp_path, model), ONE) as mine:
        other = made(tmp_path, model, BuildOptions(batch=SMALL.batch))
        with load(other, ONE) as theirs:
            np.testing.assert_allclose(mine(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["residual_net", "transformer"])
def test_quantised_models_stay_close_to_the_float_model(tmp_path: Path, form: str) -> None:
    x = quantized_models.images(4, seed=1)
    engine = made(tmp_path, quantized_models.quantized(form))
    assert engine.manifest.precision == "int8"
    with load(engine, ONE) as int8, load(made(tmp_path, quantized_models.exported(form))) as fp32:
        got, want = int8(x).ravel(), fp32(x).ravel()
    assert got @ want / np.linalg.norm(got) / np.linalg.norm(want) > 0.98
    assert not np.array_equal(got, want)


@pytest.mark.parametrize("reduction", ["ReduceMax", "ReduceMin", "ReduceMean"])
@pytest.mark.parametrize("joined", [False, True])
def test_quantised_reductions_are_right(tmp_path: Path, reduction: str, joined: bool) -> None:
    # OpenVINO 2026.4 is off by a tenth where it may round a maximum as part of finding it.
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "axis": np.array([1], np.int64),
        "s": np.float32(5 / 127),
        "z": np.int8(0),
        "w8": rng.integers(1, 127, (64 if joined else 32, 8)).astype(np.int8),
        "ws": np.full(8, 0.01, np.float32),
        "wz": np.zeros(8, np.int8),
    }
    join = "j = Concat <axis = 1> (r, m)" if joined else "j = Identity(r)"
    graph = f"""reduced (float[N, 16, 32] x) => (float[N, 8] y) {{
        r = {reduction} <keepdims = 0> (x, axis)
        m = ReduceMean <keepdims = 0> (x, axis)
        {join}
        q = QuantizeLinear(j, s, z)
        d = DequantizeLinear(q, s, z)
        w = DequantizeLinear <axis = 1> (w8, ws, wz)
        y = MatMul(d, w)
    }}"""
    model = tiny_models.save(tmp_path / "m.onnx", graph, weights)
    x = (rng.standard_normal((2, 16, 32)) * 1.5).astype(np.float32)
    reduced = {"ReduceMax": x.max, "ReduceMin": x.min, "ReduceMean": x.mean}[reduction](1)
    values = np.concatenate([reduced, x.mean(1)], 1) if joined else reduced
    want = values @ (weights["w8"] * np.float32(0.01))
    with load(made(tmp_path, model), ONE) as session:
        error = np.linalg.norm(session(x) - want) / np.linalg.norm(want)
    in_float = reduction != "ReduceMean"
    # Float layers round to bfloat16 where the CPU has it; small means differ by int8's rounding.
    assert error < (0.005 if in_float else 0.05)
    engine = made(tmp_path, model)
    assert any("maxima and minima" in note for note in engine.manifest.notes) == in_float
    stored = onnx.load(engine.path).graph
    unread = {t.name for t in stored.initializer} - {n for node in stored.node for n in node.input}
    assert not unread


@pytest.mark.parametrize("batch", [SMALL.batch, ShapeRange(2, 2, 2)], ids=str)
@pytest.mark.parametrize("form", ["residual_net", "transformer"])
def test_quantised_products_run_on_integers(tmp_path: Path, form: str, batch: ShapeRange) -> None:
    # With its shapes known ahead, OpenVINO 2026.4 runs half of a transformer's products in float.
    options = BuildOptions(backend="openvino", batch=batch)
    model = quantized_models.quantized(form)
    with load(made(tmp_path, model, options), ONE) as session:
        operators = session._runner._compiled.get_runtime_model().get_ordered_ops()
    types = [
        fact["runtimePrecision"].astype(str)
        for fact in (operator.get_rt_info() for operator in operators)
        if fact["layerType"].astype(str) in ("Convolution", "FullyConnected")
    ]
    assert model.quantization is not None
    assert sum(kind in ("u8", "i8") for kind in types) == model.quantization["quantised"], types


def float_layers(engine: Engine) -> str:
    """The type that OpenVINO computes an engine's float layers in."""
    with load(engine, ONE) as session:
        hint = session._runner._compiled.get_property("INFERENCE_PRECISION_HINT")
    return str(hint.get_type_name())


def test_float_layers_of_a_quantised_transformer_are_bfloat16_where_the_cpu_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has = openvino._has_bfloat16(_deps.require("openvino", purpose="ask for its devices").Core())
    model = quantized_models.quantized("transformer")
    engine = made(tmp_path / "here", model)
    assert float_layers(engine) == ("bf16" if has else "f32")
    assert ("layers that are not quantised compute in bf16" in engine.manifest.notes) == has
    assert float_layers(made(tmp_path, quantized_models.exported("transformer"))) == "f32"
    assert float_layers(made(tmp_path, quantized_models.quantized("residual_net"))) == "f32"

    # An engine from a CPU with bfloat16 runs on one without, and stays as it was verified there.
    monkeypatch.setattr(openvino, "_has_bfloat16", lambda core: False)
    assert float_layers(engine) == "f32"
    elsewhere = made(tmp_path / "elsewhere", model)
    monkeypatch.undo()
    assert float_layers(elsewhere) == "f32"


def test_only_a_convolutional_model_takes_the_form_for_cpus(tmp_path: Path) -> None:
    for form, lowered in (("residual_net", True), ("transformer", False)):
        model = quantized_models.quantized(form)
        engine = made(tmp_path, model)
        assert (onnx.load(engine.path).graph != onnx.load(model.path).graph) == lowered
        assert any("INT8 for a CPU" in note for note in engine.manifest.notes) == lowered


def test_several_inputs_and_outputs_by_name(tmp_path: Path) -> None:
    a, b = np.full((2, 4), 3, np.float32), np.ones((2, 4), np.float32)
    with load(made(tmp_path, tiny_models.two_by_two(tmp_path / "m.onnx")), ONE) as session:
        found = session({"b": b, "a": a})
        np.testing.assert_array_equal(found["sum"], a + b)
        np.testing.assert_array_equal(found["difference"], a - b)
        np.testing.assert_array_equal(session(a, b)[1], a - b)


def test_results_belong_to_the_caller(tmp_path: Path) -> None:
    session = load(made(tmp_path, tiny_models.linear(tmp_path / "m.onnx")), ONE)
    x = np.zeros((2, 4), np.float32)
    x.flags.writeable = False
    first = session(x)
    kept = first.copy()
    for value in range(1, 5):
        session(np.full((2, 4), value, np.float32))
    np.testing.assert_array_equal(first, kept)
    session.close()
    del session
    np.testing.assert_array_equal(first, kept)
    first += 1  # and may be written to


def test_one_batch_size_is_compiled_for(tmp_path: Path) -> None:
    options = BuildOptions(backend="openvino", batch=ShapeRange(2, 2, 2))
    model = tiny_models.convolution(tmp_path / "m.onnx")
    with load(made(tmp_path, model, options), ONE) as fixed, load(made(tmp_path, model)) as free:
        x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
        np.testing.assert_allclose(fixed(x), free(x), rtol=1e-5, atol=1e-6)
        assert fixed._runner._compiled.inputs[0].partial_shape.is_static
        assert free._runner._compiled.inputs[0].partial_shape.is_dynamic


def test_settings_reach_the_library(tmp_path: Path) -> None:
    engine = made(tmp_path, tiny_models.linear(tmp_path / "m.onnx"))
    with load(engine, ONE) as session:
        compiled = session._runner._compiled
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert "float32" in str(compiled.get_property("INFERENCE_PRECISION_HINT"))
        assert "LATENCY" in str(compiled.get_property("PERFORMANCE_HINT"))
        assert compiled.get_property("ENABLE_CPU_PINNING") is False


def test_fp16_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    options = BuildOptions(backend="openvino", precision="fp16")
    with pytest.raises(BuildError, match=r"precision='fp16' .* 'int8'"):
        BACKEND.build(model, options, tmp_path)


def test_an_unknown_operator_is_refused_with_its_name(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Frobnicate", ["x"], ["y"], domain="nowhere", name="bad")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["N", 4])],
        [value("y", onnx.TensorProto.FLOAT, ["N", 4])],
    )
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nowhere", 1)]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"refuses model.onnx: .*Frobnicate.*another backend"):
        made(tmp_path, OnnxModel.open(tmp_path / "m.onnx"))


def test_absent_weights_are_named(tmp_path: Path) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx", external=True)
    (tmp_path / "m.onnx.data").unlink()
    (tmp_path / "engine").mkdir()
    with pytest.raises(BuildError, match=r"weight file 'm\.onnx\.data' is absent"):
        BACKEND.build(model, SMALL, tmp_path / "engine")


def test_a_broken_file_cannot_be_opened(tmp_path: Path) -> None:
    engine = made(tmp_path, tiny_models.linear(tmp_path / "m.onnx"))
    engine.path.write_bytes(b"no model")
    with pytest.raises(SessionError, match=r"OpenVINO refuses model\.onnx: .*export it again") as e:
        Session(engine)
    assert "Exception from" not in str(e.value)


def test_a_failing_run_is_translated(tmp_path: Path) -> None:
    engine = made(tmp_path, tiny_models.linear(tmp_path / "m.onnx"))
    runner = BACKEND.open(engine, ONE)
    with pytest.raises(SessionError, match="OpenVINO failed while running"):
        runner.run({"x": np.zeros((2, 7), np.float32)})


def test_close_twice_then_refuse_to_run(tmp_path: Path) -> None:
    runner = BACKEND.open(made(tmp_path, tiny_models.linear(tmp_path / "m.onnx")), ONE)
    runner.close()
    runner.close()
    with pytest.raises(SessionError, match="closed"):
        runner.run({"x": np.zeros((1, 4), np.float32)})


def test_using_it_never_loads_its_telemetry(tmp_path: Path) -> None:
    code = """
import sys
import numpy as np
from sn72engine import BuildOptions, OnnxModel, Session, Store, build
store, model = sys.argv[1:]
engine = build(OnnxModel.open(model), BuildOptions(backend="openvino"), store=Store(store))
Session(engine)(np.zeros((1, 4), np.float32))
assert "openvino" in sys.modules
loaded = [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert not loaded, loaded
import openvino.tools.ovc.telemetry_utils as used
assert used.tm.__name__ == "openvino.tools.ovc.telemetry_stub", used.tm
"""
    model = tiny_models.linear(tmp_path / "m.onnx")
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store"), str(model.path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path / "home")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Before it sends anything the telemetry makes a folder for its client's number there.
    assert not list((tmp_path / "home").iterdir())


def test_the_doctor_imports_it_without_its_telemetry() -> None:
    assert doctor.probe("openvino", "openvino").status == "ok"
    assert doctor.probe("openvino_telemetry", "").status != "ok"


def test_what_an_inner_graph_reads_stays(tmp_path: Path) -> None:
    """A weight that only a branch reads, and a rounded maximum that it reads too."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[N, 4, 8] x) => (float[N, 8] y, float[N, 8] z)
        <int64[1] axis = {1}, float s = {0.1}, int8 z8 = {0}, bool c = {1}> {
            m = ReduceMax <keepdims = 0> (x, axis)
            q = QuantizeLinear(m, s, z8)
            d = DequantizeLinear(q, s, z8)
            n = ReduceMax <keepdims = 0> (x, axis)
            r = QuantizeLinear(n, s, z8)
            e = DequantizeLinear(r, s, z8)
            z = Neg(e)
            y = If (c) <then_branch = a () => (float[N, 8] t) { t = Add(d, w) },
                        else_branch = b () => (float[N, 8] u) { u = Identity(d) }>
        }"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    (note,) = openvino._leave_extremes_in_float(path)
    assert note.endswith(": 1")
    left = onnx.load(path)
    assert {"w", "s", "z8"} <= {tensor.name for tensor in left.graph.initializer}
    onnx.checker.check_model(left, full_check=True)
