"""Biases without the mean error of rounded weights: the arithmetic, the graph, the whole way."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sn72engine import bias_correction, emulation, formats, layers, ranges
from sn72engine.errors import CalibrationError
from sn72engine.graph_order import reads
from sn72engine.inserter import Layer, insert
from sn72engine.quantizer import quantize
from sn72engine.spec import QuantizeOptions
from tests import tiny_modules
from tests.cpu.test_inserter import run, weights
from tests.quantized_models import data, exported

FORMATS = ["int8", "fp8", "nvfp4", "mxfp8"]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 5),
    kernel=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_the_shift_of_a_convolution_is_its_result_on_the_means(
    groups, outputs, inputs, kernel, seed
):
    rng = np.random.default_rng(seed)
    error = rng.standard_normal((groups * outputs, inputs, kernel, kernel))
    mean = rng.standard_normal(groups * inputs)
    flat = torch.from_numpy(mean)[None, :, None, None].expand(1, -1, kernel, kernel)
    wanted = functional.conv2d(flat, torch.from_numpy(error), groups=groups).flatten().numpy()
    np.testing.assert_allclose(bias_correction.shift(error, mean, 0), wanted, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_shift_of_a_matrix_product_is_its_result_on_the_means(axis):
    rng = np.random.default_rng(1)
    error = rng.standard_normal((7, 5))
    mean = rng.standard_normal(error.shape[1 - axis])
    wanted = error @ mean if axis == 0 else mean @ error
    np.testing.assert_allclose(bias_correction.shift(error, mean, axis), wanted, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("precision", FORMATS)
def test_held_weights_are_those_that_the_file_stores(precision, axis):
    weight = weights(4)
    stored = np.ascontiguousarray(weight.T) if axis == 0 else weight
    operator = "Gemm <transB = 1>" if axis == 0 else "MatMul"
    proto = graph(f"y = {operator} (x, w)", w=stored)
    insert(proto, {"p": Layer(precision, 1.0)})
    emulation.emulate(proto)
    (found,) = run(proto, np.eye(64, dtype=np.float32)[:1], "p_w_dq")
    np.testing.assert_array_equal(found, formats.held(precision, stored, axis))


BIASED = {
    "y = Gemm (x, w, b)": (32,),
    "y = Gemm <alpha = 1.0, beta = 1.0> (x, w, b) ": (1, 32),
    "a = MatMul (x, w) y = Add (a, b)": (32,),
    "a = MatMul (x, w) y = Add (b, a)": (1, 32),
}


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("body", BIASED)
def test_the_mean_error_of_the_weights_leaves_the_result(body, precision):
    """With inputs of one sign, as behind a ReLU."""
    weight, bias = weights(1), weights(2, (1, 32))[0]
    x = np.abs(weights(3, (400, 64))) + 1
    plain, fixed = (graph(body, w=weight, b=bias.reshape(BIASED[body])) for _ in ("plain", "fixed"))
    amax = float(x.max())
    assert insert(plain, {"p": Layer(precision, amax)}) == 0
    assert insert(fixed, {"p": Layer(precision, amax, mean=x.mean(0))}) == 1
    errors = []
    for proto in (plain, fixed):
        emulation.emulate(proto)
        held = formats.held(precision, weight, 1)
        biases = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        (used,) = (value for name, value in biases.items() if name in ("b", "p_bias"))
        exact = x.astype(np.float64) @ weight + bias
        errors.append((x.astype(np.float64) @ held + used.reshape(-1) - exact).mean(0))
    assert np.abs(errors[0]).max() > 1e-3
    # What is left is the rounding of the bias itself to float32.
    assert np.abs(errors[1]).max() < 1e-5


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = MatMul (x, w)", "no bias"),
        ("y = Gemm <beta = 2.0> (x, w, b)", "a bias that is scaled"),
        ("y = Gemm (x, w, s)", "one number for all channels"),
        ("a = MatMul (x, w) y = Mul (a, b)", "no addition"),
        ("a = MatMul (x, w) c = Add (a, b) y = Mul (a, c)", "read without the bias, too"),
        ("a = MatMul (x, w) y = Add (a, a)", "no constant"),
    ],
)
def test_other_layers_keep_what_they_add(body, why):
    proto = graph(body, w=weights(1), b=weights(2, (1, 32))[0], s=np.float32([0.5]))
    before = {t.name: t.SerializeToString() for t in proto.graph.initializer if t.name != "w"}
    mean = np.ones(64)
    assert insert(proto, {"p": Layer("fp8", 1.0, mean=mean)}) == 0, why
    after = {t.name: t.SerializeToString() for t in proto.graph.initializer}
    assert before.items() <= after.items()


def test_a_bias_that_two_layers_share_is_corrected_for_each():
    body = "a = Gemm (x, w, b) c = Relu (a) d = Gemm (c, v, b) y = Identity (d)"
    square = weights(5, (32, 32))
    proto = graph(body, w=weights(1), v=square, b=weights(2, (1, 32))[0])
    names = [node.name for node in proto.graph.node if node.op_type == "Gemm"]
    plan = {
        name: Layer("fp8", 4.0, mean=np.ones(n)) for name, n in zip(names, (64, 32), strict=True)
    }
    assert insert(proto, plan) == 2
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert "b" not in held
    first, second = (held[f"{name}_bias"] for name in names)
    assert np.abs(first - second).max() > 1e-3


BRANCHES = """s = ReduceSum <keepdims = 0> (x) d = Cast <to = 9> (s) e = If (d) <
    then_branch = t () => (float[N, 32] p) { p = Add (c, b) },
    else_branch = f () => (float[N, 32] q) { q = MatMul (x, w) }>"""


def test_weights_that_an_inner_graph_reads_stay():
    proto = graph(
        f"a = MatMul (x, w) c = Add (a, b) {BRANCHES} y = Identity (e)",
        w=weights(1),
        b=weights(2, (1, 32))[0],
    )
    x = weights(3, (5, 64))
    before = run(proto, x, "e")[0]
    assert insert(proto, {"p": Layer("int8", 4.0, mean=np.ones(64))}) == 1
    assert {"w", "b"} <= {tensor.name for tensor in proto.graph.initializer}
    np.testing.assert_allclose(run(proto, x, "e")[0], before, atol=0.5)
    emulation.emulate(proto)  # drops what nothing reads
    np.testing.assert_allclose(run(proto, x, "e")[0], before, atol=0.5)


@pytest.mark.parametrize("name", ["w", "b"])
def test_a_weight_that_is_a_result_of_the_graph_stays(name):
    proto = graph("a = MatMul (x, w) y = Add (a, b)", w=weights(1), b=weights(2, (1, 32))[0])
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    exact = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}[name]
    assert insert(proto, {"p": Layer("int8", 4.0, mean=np.ones(64))}) == 1
    np.testing.assert_array_equal(run(proto, weights(3, (5, 64)), name)[0], exact)


def test_weights_that_are_listed_as_inputs_go_from_there_too():
    proto = graph("a = MatMul (x, w) y = Add (a, b)", w=weights(1), b=weights(2, (1, 32))[0])
    for name, shape in (("b", [32]), ("w", [64, 32])):
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        proto.graph.input.insert(0, value)
    assert insert(proto, {"p": Layer("int8", 4.0, mean=np.ones(64))}) == 1
    assert [value.name for value in proto.graph.input] == ["x"]
    assert run(proto, weights(3, (5, 64)))[0].shape == (5, 32)


def test_names_that_the_graph_has_are_not_taken_again():
    body = "a = MatMul (x, w) c = Add (a, p_bias) d = Add (c, p_x_dq) y = Add (d, p_bias)"
    first, second = weights(2, (2, 32))
    proto = graph(body, w=weights(1), p_bias=first, p_x_dq=second)
    assert insert(proto, {"p": Layer("int8", 4.0, mean=np.ones(64))}) == 1
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert len(held) == len(proto.graph.initializer)
    np.testing.assert_array_equal(held["p_bias"], first)
    np.testing.assert_array_equal(held["p_x_dq"], second)
    x = weights(3, (5, 64))
    wanted = x @ weights(1) + 2 * first + second
    np.testing.assert_allclose(run(proto, x)[0], wanted, atol=1.0)


def graph(body: str, **constants: np.ndarray) -> onnx.ModelProto:
    """A graph of ``x`` and constants, whose first product is named ``p``."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N, 64] x) => (float[N, 32] y) '
        f"{{ {body} }}"
    )
    used = {name for node in proto.graph.node for name in reads(node)}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name)
        for name, value in constants.items()
        if name in used
    )
    proto.graph.node[0].name = "p"
    layers.name_nodes(proto)
    return proto


@pytest.mark.parametrize("opset", [9, 13, 17, 18, 20])
def test_means_of_a_file_are_those_of_its_tensors(tmp_path, opset):
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[N, 3, 4, 6] x) => '
        "(float[N, 3, 4, 32] z) { y = Relu (x) z = MatMul (y, w) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights(1, (6, 32)), "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    x = weights(2, (15, 24)).reshape(5, 3, 4, 6) + np.float32([0, 1, 2])[:, None, None]
    found = ranges.collect(
        tmp_path / "m.onnx", [{"x": x[:4]}, {"x": x[4:]}], ["y"], means={"x": 4, "y": 0}
    )
    assert found.ranges["y"] == (0.0, pytest.approx(x.max()))
    assert set(found.ranges) == {"x", "y"}
    np.testing.assert_allclose(found.means["x"], x.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found.means["y"], np.maximum(x, 0).mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("z = sn72.Unknown (x)", "cannot load m.onnx: .*Unknown"),
        ("n = Constant <value_ints = [7]> () z = Reshape (x, n)", "failed on batch 0: .*Reshape"),
    ],
)
def test_a_file_that_cannot_run_is_no_calibration(body, message, tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18, "sn72" : 1]> g (float[N, 6] x) => (float z) '
        f"{{ {body} }}"
    )
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(CalibrationError, match=message):
        ranges.collect(tmp_path / "m.onnx", [{"x": np.ones((2, 6), np.float32)}], ["x"])


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(("axes", "attributes"), [(1, ""), (2, "group = 4"), (3, "group = 2")])
def test_a_convolution_of_a_file_keeps_its_mean(axes, attributes, precision, tmp_path):
    """Of images that are even in each channel, which have no border without padding."""
    groups = int(attributes.rpartition("= ")[2] or 1)
    attributes = ", ".join(filter(None, [attributes, f"dilations = {[2] * axes}"]))
    size = ", ".join(["7"] * axes)
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 19]> g (float[N, 16, {size}] x) => (float y) '
        f"{{ y = Conv <{attributes}> (x, w, b) }}"
    )
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((32, 16 // groups, *[3] * axes)).astype(np.float32)
    bias = rng.standard_normal(32).astype(np.float32)
    for name, value in (("w", weight), ("b", bias)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    layers.name_nodes(proto)
    node = proto.graph.node[0].name
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    x = np.broadcast_to(rng.random((6, 16, *[1] * axes), np.float32), (6, 16, *[7] * axes)).copy()
    seen = ranges.collect(path, [{"x": x[:4]}, {"x": x[4:]}], ["x"], means={"x": axes + 2})
    before = run(proto, x)[0].mean(axis=(0, *range(2, axes + 2)))
    assert insert(proto, {node: Layer(precision, 1.0, mean=seen.means["x"])}) == 1
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    del proto.graph.initializer[:], proto.graph.node[:-1]
    proto.graph.node[0].input[:] = ["x", "w", f"{node}_bias"]
    for name, value in (
        ("w", formats.held(precision, weight, 0)),
        (f"{node}_bias", held[f"{node}_bias"]),
    ):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    after = run(proto, x)[0].mean(axis=(0, *range(2, axes + 2)))
    np.testing.assert_allclose(after, before, atol=2e-5)
    assert np.abs(held[f"{node}_bias"] - bias).max() > 1e-3


@pytest.mark.parametrize("by_module", [True, False])
@pytest.mark.parametrize("kind", ["transformer", "residual_net"])
def test_file_and_module_correct_the_same_biases(kind, by_module, tmp_path):
    module = getattr(tiny_modules, kind)() if by_module else None
    found = {}
    for corrected in (True, False):
        options = QuantizeOptions(precision="fp8", bias_correction=corrected)
        path = tmp_path / f"{corrected}.onnx"
        model = quantize(exported(kind), data(), options, path, module=module)
        found[corrected] = model.quantization["corrected_biases"]
    assert found[False] == 0
    assert found[True] == model.quantization["quantised"]
