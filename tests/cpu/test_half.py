"""A float16 file computes what the float32 file does, within float16, and keeps its signature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from sn72engine.errors import BuildError
from sn72engine.half import to_half
from sn72engine.model import OnnxModel
from tests import tiny_models

MAKERS = {
    "convolution": tiny_models.convolution,
    "transformer": tiny_models.transformer,
    "quantised": tiny_models.quantised,
}


def run(path: Path, array: np.ndarray) -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    # Its CPU rewriting of Q/DQ keeps bias scales in float16, where they round to zero.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"pixel_values": array})[0]
    return result


@pytest.mark.parametrize("name", MAKERS)
def test_same_answers_within_half_precision(tmp_path: Path, name: str) -> None:
    model = MAKERS[name](tmp_path / "m.onnx")
    notes = to_half(model.path, tmp_path / "half.onnx")
    half = OnnxModel.open(tmp_path / "half.onnx")
    assert (half.inputs, half.outputs) == (model.inputs, model.outputs)
    assert half.preprocess == model.preprocess
    assert "float16" in notes[0]
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    want, got = run(model.path, x), run(half.path, x)
    # One rounding is 2^-11 of a value; a few dozen of them add up in these graphs.
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2 * np.abs(want).max())


@pytest.mark.parametrize("name", MAKERS)
def test_no_float32_arithmetic_is_left(tmp_path: Path, name: str) -> None:
    model = MAKERS[name](tmp_path / "m.onnx")
    to_half(model.path, tmp_path / "half.onnx")
    proto = onnx.load(tmp_path / "half.onnx")
    left = [t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert left == []
    integers = [t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert bool(integers) == (name == "quantised")


def test_a_scale_never_rounds_to_zero(tmp_path: Path) -> None:
    model = tiny_models.quantised(tmp_path / "m.onnx")
    proto = onnx.load(model.path)
    for tensor in proto.graph.initializer:
        if tensor.name == "ks":
            scales = onnx.numpy_helper.to_array(tensor).copy()
            scales[0] = 1e-12  # of a channel whose weights are all zero
            tensor.CopyFrom(onnx.numpy_helper.from_array(scales, "ks"))
    onnx.save(proto, model.path)
    to_half(model.path, tmp_path / "half.onnx")
    for tensor in onnx.load(tmp_path / "half.onnx").graph.initializer:
        if tensor.name == "ks":
            assert (onnx.numpy_helper.to_array(tensor) > 0).all()


def test_weights_beyond_the_range_are_held_and_named(tmp_path: Path) -> None:
    weights = {"w": np.full((4, 3), 1e6, np.float32)}
    graph = "big (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }"
    model = tiny_models.save(tmp_path / "m.onnx", graph, weights)
    notes = to_half(model.path, tmp_path / "half.onnx")
    assert any("exceed float16's range" in note and note.endswith("w") for note in notes)
    held = onnx.numpy_helper.to_array(onnx.load(tmp_path / "half.onnx").graph.initializer[0])
    assert np.isfinite(held).all()
    assert held.max() == 65504


def test_weights_that_stay_in_float32_are_not_said_to_be_held(tmp_path: Path) -> None:
    weights = {"w": np.full((4, 3), 1e6, np.float32)}
    graph = "big (float[4, 3] x) => (float[4, 3] y) { y = Max(x, w) }"
    model = tiny_models.save(tmp_path / "m.onnx", graph, weights)
    notes = to_half(model.path, tmp_path / "half.onnx")
    held = onnx.numpy_helper.to_array(onnx.load(tmp_path / "half.onnx").graph.initializer[0])
    np.testing.assert_array_equal(held, weights["w"])
    assert not any("exceed" in note for note in notes)


def test_old_qdq_files_are_refused(tmp_path: Path) -> None:
    model = tiny_models.quantised(tmp_path / "m.onnx", opset=17)
    with pytest.raises(BuildError, match=r"opset 17 has no float16 scales.*opset 19 or later"):
        to_half(model.path, tmp_path / "half.onnx")


def test_a_float16_file_is_refused(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 3), np.float16)}
    graph = "half (float16[N, 4] x) => (float16[N, 3] y) { y = MatMul(x, w) }"
    model = tiny_models.save(tmp_path / "m.onnx", graph, weights)
    with pytest.raises(BuildError, match="cannot be converted to float16"):
        to_half(model.path, tmp_path / "half.onnx")


def test_large_weights_are_converted_as_small_ones_are(tmp_path: Path) -> None:
    """They go past the converter, which would copy them several times."""
    weights = {
        "w": np.random.default_rng(0).standard_normal((200, 100)).astype(np.float32),
        "least": np.zeros((200, 100), np.float32),  # Max stays in float32
        "table": np.arange(20_000, dtype=np.int64),
    }
    weights["w"][0, :4] = [1e6, -1e-9, np.inf, 0]
    graph = """big (float[N, 200] x, int64[N] i)
        => (float[N, 100] y, float[N, 200, 100] z, int64[N] j) {
        y = MatMul(x, w) a = Unsqueeze(x, axis) z = Max(a, least) j = Gather(table, i) }"""
    weights["axis"] = np.array([2], np.int64)
    model = tiny_models.save(tmp_path / "m.onnx", graph, weights)
    to_half(model.path, tmp_path / "half.onnx")
    found = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "half.onnx").graph.initializer
    }
    assert found["w"].dtype == np.float16
    np.testing.assert_array_equal(found["w"][0, :4], np.float16([65504, -(2.0**-24), np.inf, 0]))
    np.testing.assert_array_equal(found["w"][1:], weights["w"][1:].astype(np.float16))
    assert found["least"].dtype == np.float32
    np.testing.assert_array_equal(found["least"], weights["least"])
    np.testing.assert_array_equal(found["table"], weights["table"])
