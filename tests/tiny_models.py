"""Small ONNX files for tests, written out in ONNX's own text form, with seeded weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from sn72engine.model import OnnxModel, write_record
from sn72engine.spec import Preprocess

IMAGES = Preprocess(height=16, width=16)


def save(
    path: Path,
    graph: str,
    weights: Mapping[str, np.ndarray],
    *,
    opset: int = 20,
    record: Mapping[str, Any] | None = None,
    external: bool = False,
) -> OnnxModel:
    """Write a graph in text form with its weights to ``path`` and open it."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {graph}')
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in weights.items()
    )
    write_record(proto, record or {})
    if external:
        onnx.save(
            proto,
            path,
            save_as_external_data=True,
            location=f"{path.name}.data",
            size_threshold=0,
        )
    else:
        onnx.save(proto, path)
    return OnnxModel.open(path)


def linear(path: Path, *, batch: int | str = "N", **options: Any) -> OnnxModel:
    """``y = x @ w + b`` from 4 to 3 numbers."""
    rng = np.random.default_rng(1)
    weights = {
        "w": rng.standard_normal((4, 3)).astype(np.float32),
        "b": rng.standard_normal(3).astype(np.float32),
    }
    graph = f"linear (float[{batch}, 4] x) => (float[{batch}, 3] y) {{ y = Gemm(x, w, b) }}"
    return save(path, graph, weights, **options)


def linear_weights(model: OnnxModel) -> tuple[np.ndarray, np.ndarray]:
    """``w`` and ``b`` of :func:`linear`."""
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(model.path).graph.initializer}
    return held["w"], held["b"]


def two_by_two(path: Path) -> OnnxModel:
    """Two inputs that share a batch, two outputs: their sum and their difference."""
    graph = """two (float[N, 4] a, float[N, 4] b) => (float[N, 4] sum, float[N, 4] difference) {
        sum = Add(a, b)
        difference = Sub(a, b)
    }"""
    return save(path, graph, {})


def convolution(path: Path, **options: Any) -> OnnxModel:
    """An image classifier: convolution, ReLU, mean over the image, 5 classes."""
    rng = np.random.default_rng(2)
    weights = {
        "k": (rng.standard_normal((8, 3, 3, 3)) / 5).astype(np.float32),
        "w": rng.standard_normal((8, 5)).astype(np.float32),
    }
    graph = """convolution (float[N, 3, 16, 16] pixel_values) => (float[N, 5] logits) {
        c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (pixel_values, k)
        r = Relu(c)
        g = GlobalAveragePool(r)
        f = Flatten(g)
        logits = MatMul(f, w)
    }"""
    options.setdefault("record", {"preprocess": IMAGES.to_dict()})
    return save(path, graph, weights, **options)


def transformer(path: Path) -> OnnxModel:
    """One pre-norm attention block over 16 patches of 4 x 4 pixels, mean, 5 classes."""
    rng = np.random.default_rng(3)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    weights = {
        "patch": weight(16, 3, 4, 4) / 2,
        "tokens": np.array([0, 16, 16], np.int64),
        "one": np.ones(16, np.float32),
        "zero": np.zeros(16, np.float32),
        "quarter": np.float32(0.25),
        "wq": weight(16, 16),
        "wk": weight(16, 16),
        "wv": weight(16, 16),
        "axis": np.array([1], np.int64),
        "head": weight(16, 5),
    }
    graph = """transformer (float[N, 3, 16, 16] pixel_values) => (float[N, 5] logits) {
        p = Conv <strides = [4, 4]> (pixel_values, patch)
        r = Reshape(p, tokens)
        t = Transpose <perm = [0, 2, 1]> (r)
        n = LayerNormalization(t, one, zero)
        q = MatMul(n, wq)
        k = MatMul(n, wk)
        v = MatMul(n, wv)
        kt = Transpose <perm = [0, 2, 1]> (k)
        qk = MatMul(q, kt)
        s = Mul(qk, quarter)
        a = Softmax(s)
        o = MatMul(a, v)
        h = Add(t, o)
        m = ReduceMean <keepdims = 0> (h, axis)
        logits = MatMul(m, head)
    }"""
    return save(path, graph, weights)


def quantised(path: Path, *, opset: int = 20) -> OnnxModel:
    """The convolution of :func:`convolution` with Q/DQ around it, weights stored as int8."""
    rng = np.random.default_rng(2)
    kernel = (rng.standard_normal((8, 3, 3, 3)) / 5).astype(np.float32)
    scale = np.abs(kernel).max(axis=(1, 2, 3)) / 127
    weights = {
        "k8": np.rint(kernel / scale[:, None, None, None]).astype(np.int8),
        "ks": scale.astype(np.float32),
        "kz": np.zeros(8, np.int8),
        "xs": np.float32(4 / 127),
        "xz": np.int8(0),
        "w": rng.standard_normal((8, 5)).astype(np.float32),
    }
    graph = """quantised (float[N, 3, 16, 16] pixel_values) => (float[N, 5] logits) {
        q = QuantizeLinear(pixel_values, xs, xz)
        x = DequantizeLinear(q, xs, xz)
        k = DequantizeLinear <axis = 0> (k8, ks, kz)
        c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, k)
        r = Relu(c)
        g = GlobalAveragePool(r)
        f = Flatten(g)
        logits = MatMul(f, w)
    }"""
    record = {
        "preprocess": IMAGES.to_dict(),
        "quantization": {
            "method": "max",
            "samples": 1,
            "layers_quantized": 1,
            "ranges": {"pixel_values": [-4.0, 4.0], "c": [-6.0, 6.0], "r": [0.0, 6.0]},
        },
    }
    return save(path, graph, weights, opset=opset, record=record)
