"""The formats, the inserter that writes them and the emulation that computes them on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sn72engine import emulation, formats, layers
from sn72engine.errors import QuantizationError
from sn72engine.inserter import Layer, insert
from sn72kernels.ops.quantize_blocks import reference

INPUTS, CHANNELS = 64, 32


def product(weight: np.ndarray, operator: str = "MatMul", attributes: str = "") -> onnx.ModelProto:
    """``y = x @ weight``, whose node is named ``p``."""
    rows, columns = weight.shape
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[N, {INPUTS}] x) => '
        f"(float[N, {CHANNELS}] y) <float[{rows}, {columns}] w> "
        f"{{ y = {operator} {attributes} (x, w) }}"
    )
    proto.graph.node[0].name = "p"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return proto


def weights(seed: int, shape: tuple[int, int] = (INPUTS, CHANNELS)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(proto: onnx.ModelProto, x: np.ndarray, *names: str) -> list[np.ndarray]:
    """Outputs, or inner tensors, of a model in ONNX Runtime."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    held = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in held)
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), quiet, providers=["CPUExecutionProvider"]
    )
    return session.run(list(names) or None, {"x": x})


def activation(precision: str, x: np.ndarray, amax: float) -> np.ndarray:
    """What a quantised activation is by the formats' definitions in PyTorch."""
    values = torch.from_numpy(x)
    scale = torch.from_numpy(formats.activation_scale(precision, amax)) if amax else None
    if precision == "nvfp4":
        codes = reference.quantize_nvfp4(values, scale)
        return reference.dequantize_nvfp4(*codes, scale, torch.float32).numpy()
    if precision == "mxfp8":
        codes = reference.quantize_mxfp8(values)
        return reference.dequantize_mxfp8(*codes, torch.float32).numpy()
    held = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (held.float() * scale).numpy()


magnitudes = st.sampled_from([0.0, 1e-20, 1e-6, 0.01, 1.0, 6.0, 448.0, 3e4])


@settings(max_examples=30, deadline=None)
@given(st.lists(magnitudes, min_size=4, max_size=4), st.integers(0, 1000))
@pytest.mark.parametrize("precision", ["fp8", "nvfp4", "mxfp8"])
def test_emulated_activations_are_those_of_the_definition(precision, sizes, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 4, INPUTS // 4)).astype(np.float32) * np.float32(sizes)[:, None]
    # Ties between neighbouring numbers, which must go to the even one.
    x[0, 3] = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, *[0.5, 1.5, 7, 0, -5, -1, 3, 4]])
    x = x.reshape(3, INPUTS)
    amax = 0.0 if precision == "mxfp8" else float(np.abs(x).max())
    proto = product(weights(0))
    insert(proto, {"p": Layer(precision, amax)})
    assert emulation.emulate(proto) == 1
    (found,) = run(proto, x, "p_x_dq")
    np.testing.assert_array_equal(found, activation(precision, x, amax))


@pytest.mark.parametrize("precision", ["int8", "fp8", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("form", ["MatMul", "Gemm", "Gemm <transB = 1>"])
def test_every_product_stays_close_in_every_format(precision, form):
    weight = weights(1)
    operator, _, attributes = form.partition(" ")
    stored = np.ascontiguousarray(weight.T) if attributes else weight
    proto = product(stored, operator, attributes)
    x = weights(2, (5, INPUTS))
    insert(proto, {"p": Layer(precision, float(np.abs(x).max()))})
    onnx.checker.check_model(proto) if precision in ("int8", "fp8") else None
    assert "w" not in {tensor.name for tensor in proto.graph.initializer}
    emulation.emulate(proto)
    (found,) = run(proto, x)
    wanted = x @ weight
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < {"int8": 0.01, "fp8": 0.04, "mxfp8": 0.06, "nvfp4": 0.2}[precision]
    assert error > 0


@pytest.mark.parametrize(
    ("precision", "types"),
    [
        ("int8", {"INT8": INPUTS * CHANNELS + CHANNELS + 1}),
        ("fp8", {"FLOAT8E4M3FN": INPUTS * CHANNELS + CHANNELS + 1}),
        (
            "nvfp4",
            {"FLOAT4E2M1": INPUTS * CHANNELS, "FLOAT8E4M3FN": INPUTS * CHANNELS // 16},
        ),
        ("mxfp8", {"FLOAT8E4M3FN": INPUTS * CHANNELS, "UINT8": INPUTS * CHANNELS // 32}),
    ],
)
def test_weights_are_stored_in_their_format(precision, types):
    proto = product(weights(3))
    insert(proto, {"p": Layer(precision, 1.0)})
    found: dict[str, int] = {}
    for tensor in proto.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        found[kind] = found.get(kind, 0) + int(np.prod(tensor.dims))
    # What is left in float32 are scales.
    assert found.pop("FLOAT", 0) <= CHANNELS + 1
    assert found == types


def test_the_formats_numbers_are_those_of_the_kernels():
    """Written again, because their module imports PyTorch."""
    assert (formats.E2M1_MAX, formats.E4M3_MAX) == (reference.E2M1_MAX, reference.E4M3_MAX)
    assert formats.BLOCK == {"nvfp4": reference.NVFP4_BLOCK, "mxfp8": reference.MXFP8_BLOCK}


def test_weights_in_blocks_are_those_of_the_kernels_reference():
    weight = weights(4)
    rows = torch.from_numpy(np.ascontiguousarray(weight.T))
    overall = reference.global_scale_of(rows)
    wanted = {
        "nvfp4": reference.dequantize_nvfp4(
            *reference.quantize_nvfp4(rows, overall), overall, torch.float32
        ),
        "mxfp8": reference.dequantize_mxfp8(*reference.quantize_mxfp8(rows), torch.float32),
    }
    for precision, values in wanted.items():
        proto = product(weight)
        insert(proto, {"p": Layer(precision, 1.0)})
        emulation.emulate(proto)
        held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        np.testing.assert_array_equal(held["p_w_rows"], values.numpy())


def test_smoothing_moves_outliers_without_changing_the_product():
    weight, x = weights(5), weights(6, (5, INPUTS))
    x[:, 7] *= 300  # one channel dwarfs the others
    smooth = np.ones(INPUTS, np.float32)
    smooth[7] = 1 / 64
    errors = []
    for factors in (None, smooth):
        proto = product(weight)
        amax = float(np.abs(x if factors is None else x * factors).max())
        insert(proto, {"p": Layer("int8", amax, factors)})
        (found,) = run(proto, x)
        errors.append(np.abs(found - x @ weight).mean())
    assert errors[1] < errors[0] / 3


def test_layers_that_read_one_tensor_alike_share_its_quantisation():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N, 64] x) => (float[N, 32] y) {'
        "a = MatMul(x, w) b = MatMul(x, w) c = MatMul(x, v) d = Add(a, b) y = Add(c, d) }"
    )
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(weights(i), name) for i, name in enumerate("wv")
    )
    layers.name_nodes(proto)
    names = [node.name for node in proto.graph.node[:3]]
    plan = {name: Layer("fp8", 3.0) for name in names[:2]} | {names[2]: Layer("fp8", 2.0)}
    insert(proto, plan)
    operators = [node.op_type for node in proto.graph.node]
    assert operators.count("QuantizeLinear") == 2  # one per range
    assert operators.count("DequantizeLinear") == 4  # two weights besides
    emulation.emulate(proto)
    assert run(proto, weights(9, (2, INPUTS)))[0].shape == (2, 32)


def test_a_node_that_is_not_there_is_refused():
    with pytest.raises(QuantizationError, match="no node is named 'q'"):
        insert(product(weights(0)), {"q": Layer("int8", 1.0)})


def test_group_normalisation_that_would_change_its_meaning_is_refused():
    proto = product(weights(0))
    node = onnx.helper.make_node("GroupNormalization", ["y", "s", "b"], ["z"], name="gn")
    proto.graph.node.append(node)
    with pytest.raises(QuantizationError, match=r"gn: GroupNormalization.*opset=23"):
        insert(proto, {"p": Layer("nvfp4", 1.0)})


def test_other_forms_cannot_be_emulated(tmp_path: Path):
    proto = product(weights(0))
    insert(proto, {"p": Layer("nvfp4", 1.0)})
    proto.graph.output.append(onnx.ValueInfoProto(name="p_x_f4"))
    extra = onnx.helper.make_node("Identity", ["p_x_f4"], ["more"], name="more")
    proto.graph.node.append(extra)
    with pytest.raises(QuantizationError, match="read by DequantizeLinear, Identity"):
        emulation.emulate(proto)
