from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from sn72engine import ranges
from sn72engine.calibration import batches
from sn72engine.errors import CalibrationError, QuantizationError
from sn72engine.exporter import export
from sn72engine.model import OnnxModel
from sn72engine.quantizer import quantize
from sn72engine.spec import ExportOptions, QuantizeOptions
from tests import quantized_models, tiny_models
from tests.quantized_models import data, exported, images, quantized


def run(path: Path, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(float), b.ravel().astype(float)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("method", ["max", "entropy"])
@pytest.mark.parametrize("name", list(quantized_models.MODULES))
def test_int8_answers_stay_close_at_any_batch(name, method):
    model = quantized(name, method)
    assert (model.inputs, model.outputs) == (exported(name).inputs, exported(name).outputs)
    assert model.precision == "int8"
    for batch in (1, 5):
        x = images(batch, seed=3)
        assert cosine(run(model.path, x), run(exported(name).path, x)) > 0.98


def test_record_tells_what_was_done_and_keeps_the_export():
    model, source = quantized("residual_net"), exported("residual_net")
    assert OnnxModel.open(model.path) == model
    assert model.preprocess == source.preprocess == quantized_models.PREPROCESS
    assert model.record["export"] == source.record["export"]
    record = model.quantization
    assert record is not None
    assert (record["method"], record["samples"], record["batch_size"]) == ("max", 32, 8)
    assert record["data_sha256"] == data().data_sha256()
    assert record["modelopt"].startswith("0.")
    assert record["asked"] == record["quantised"] == len(record["nodes"]) == 5
    assert record["skipped"] == {}


def test_every_listed_node_really_has_quantised_operands():
    for name, counts in (
        ("residual_net", {"Conv": 4, "Gemm": 1}),
        ("transformer", {"MatMul": 4}),
    ):
        model = quantized(name)
        proto = onnx.load(model.path)
        makers = {output: node for node in proto.graph.node for output in node.output}
        listed = [node for node in proto.graph.node if node.name in model.quantization["nodes"]]
        assert Counter(node.op_type for node in listed) == counts
        for node in listed:
            assert {makers[tensor].op_type for tensor in node.input[:2]} == {"DequantizeLinear"}


def test_weights_are_stored_as_int8_symmetric_per_channel():
    model = quantized("residual_net")
    proto = onnx.load(model.path)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    weights = [
        node
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in held
    ]
    assert len(weights) == 5
    for node in weights:
        assert held[node.input[0]].dtype == np.int8
        assert not held[node.input[2]].any()
        if held[node.input[0]].ndim == 4:
            assert held[node.input[1]].shape == held[node.input[0]].shape[:1]
    assert model.path.stat().st_size < exported("residual_net").path.stat().st_size * 2


def test_what_is_left_in_float_is_listed_with_the_reason():
    record = quantized("transformer").quantization
    assert (record["asked"], record["quantised"], len(record["skipped"])) == (6, 4, 4)
    assert Counter(record["skipped"].values()) == {
        "its second input is not a constant weight": 2,
        "a convolution of a transformer": 1,
        "the head": 1,
    }


def test_excluded_nodes_stay_in_float(tmp_path):
    source = exported("residual_net")
    convolutions = [n.name for n in onnx.load(source.path).graph.node if n.op_type == "Conv"]
    options = QuantizeOptions(method="max", exclude=(convolutions[0],))
    model = quantize(source, data(16), options, tmp_path / "q.onnx")
    record = model.quantization
    assert record["skipped"] == {convolutions[0]: "excluded by name"}
    assert record["asked"] == record["quantised"] == 4
    assert convolutions[0] not in record["nodes"]


def test_ranges_are_those_of_the_data(tmp_path):
    record = quantized("residual_net").quantization
    assert record["ranges"]["pixel_values"] == [
        pytest.approx(images(32).min()),
        pytest.approx(images(32).max()),
    ]
    source = onnx.load(exported("residual_net").path)
    names = [n.output[0] for n in source.graph.node if n.op_type in ("Conv", "Add", "Clip")]
    outputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names]
    source.graph.output.extend(outputs)
    session = ort.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"])
    for name, values in zip(names, session.run(names, {"pixel_values": images(32)}), strict=True):
        assert record["ranges"][name] == pytest.approx([values.min(), values.max()], abs=1e-5)


def test_more_or_other_batches_of_the_same_data_change_no_range(tmp_path):
    found = []
    for size in (3, 32):
        path = tmp_path / f"{size}.onnx"
        path.write_bytes(exported("residual_net").path.read_bytes())
        feeds = ({"pixel_values": batch} for batch in data(32, size))
        found.append(ranges.collect(path, feeds).ranges)
    assert found[0].keys() == found[1].keys()
    for name, pair in found[0].items():
        assert pair == pytest.approx(found[1][name], abs=1e-5)


class Watched:
    """Data made on the fly that counts how many of its batches are alive at once."""

    batch_size = 8

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.alive: list[weakref.ref[np.ndarray]] = []
        self.most = 0

    def __iter__(self):
        for index in range(self.samples // self.batch_size):
            rng = np.random.default_rng(index)
            batch = rng.standard_normal((self.batch_size, 3, 64, 64), dtype=np.float32)
            self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(batch)]
            self.most = max(self.most, len(self.alive))
            yield batch

    def data_sha256(self) -> str:
        return "0" * 64


class Wide(nn.Module):
    """1.6 MB of inner tensors a sample at 64 x 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *[nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU()],
            *[layer for _ in range(2) for layer in (nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU())],
        )

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def peak_growth(call) -> int:
    """Bytes by which resident memory grows at most while ``call`` runs."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    gc.collect()
    start = most = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return most - start


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory use from /proc")
@pytest.mark.parametrize("method", ["max", "entropy"])
def test_memory_does_not_grow_with_the_data(method, tmp_path):
    options = ExportOptions(parity_batches=(1,))
    model = export(Wide(), options, tmp_path / "m.onnx", example=torch.zeros(1, 3, 64, 64))
    options = QuantizeOptions(method=method)

    def calibrate(samples: int) -> None:
        watched = Watched(samples)
        quantize(model, watched, options, tmp_path / f"{samples}.onnx")
        assert watched.most <= 2

    calibrate(16)  # everything is imported and allocated once
    inner = 128 * 1.6e6
    assert peak_growth(lambda: calibrate(128)) < inner / 3


def test_says_nothing(capfd, tmp_path):
    quantize(exported("residual_net"), data(16), QuantizeOptions(), tmp_path / "q.onnx")
    assert capfd.readouterr() == ("", "")


def refused(model, source, options, path, kind, message):
    with pytest.raises(kind, match=message):
        quantize(model, source, options, path)
    assert list(path.parent.iterdir()) == []


def test_unknown_exclusion_suggests_names(tmp_path):
    name = onnx.load(exported("residual_net").path).graph.node[0].name
    options = QuantizeOptions(exclude=(name + "x",))
    refused(
        exported("residual_net"),
        data(8),
        options,
        tmp_path / "q.onnx",
        QuantizationError,
        f"does not exist: '{name}x'; did you mean .*{name}",
    )


def test_nothing_to_quantise_is_an_error(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "out").mkdir()
    model = tiny_models.linear(tmp_path / "src" / "m.onnx")
    folder, source = tmp_path / "out", np.zeros((8, 4), np.float32)
    refused(
        model,
        batches(source, None),
        QuantizeOptions(),
        folder / "q.onnx",
        QuantizationError,
        r"0 nodes to quantise.*narrower than 16: weight \(4, 3\)",
    )
    refused(
        model,
        batches(source, None),
        QuantizeOptions(op_types=("Conv",)),
        folder / "q.onnx",
        QuantizationError,
        "no Conv qualifies",
    )


def test_narrow_convolutions_are_left_and_an_error_when_they_are_all(tmp_path):
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.first(x)

    (tmp_path / "src").mkdir()
    (tmp_path / "out").mkdir()
    options = ExportOptions(parity_batches=(1,))
    model = export(
        Narrow(), options, tmp_path / "src" / "m.onnx", example=torch.zeros(1, 3, 16, 16)
    )
    refused(
        model,
        data(8),
        QuantizeOptions(method="max"),
        tmp_path / "out" / "q.onnx",
        QuantizationError,
        r"narrower than 16: weight \(3, 3, 1, 1\)",
    )


def test_wrong_models_are_refused(tmp_path):
    refused(
        quantized("residual_net"),
        data(8),
        QuantizeOptions(),
        tmp_path / "q.onnx",
        QuantizationError,
        "already quantised",
    )


def test_half_precision_models_are_refused(tmp_path):
    module = nn.Linear(16, 16).half()
    options = ExportOptions(parity_batches=(1,))
    model = export(
        module, options, tmp_path / "m.onnx", example=torch.zeros(1, 16, dtype=torch.half)
    )
    with pytest.raises(QuantizationError, match=r"is fp16; export it in float32"):
        quantize(model, data(8), QuantizeOptions(), tmp_path / "q.onnx")


def test_several_inputs_are_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    options = ExportOptions(input_names=("a", "b"), parity_batches=(1,))
    zeros = torch.zeros(1, 4)
    model = export(Two(), options, tmp_path / "m.onnx", example=(zeros, zeros))
    with pytest.raises(QuantizationError, match=r"2 inputs \(a, b\)"):
        quantize(model, data(8), QuantizeOptions(), tmp_path / "q.onnx")


class Listed:
    """Data given as a plain list of batches."""

    def __init__(self, *given: np.ndarray) -> None:
        self.given = given
        self.samples, self.batch_size = len(given), 1

    def __iter__(self):
        return iter(self.given)

    def data_sha256(self) -> str:
        return "0" * 64


def spoilt(value: float) -> np.ndarray:
    batch = images(2)
    batch[1, 0, 3, 3] = value
    return batch


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((images(1), images(1)[:, :2]), r"batch 1 is float32\(1, 2, 16, 16\), the model takes"),
        ((images(1).astype(np.float64),), r"batch 0 is float64"),
        ((images(2), images(2)[:0]), r"batch 1 is empty: \(0, 3, 16, 16\)"),
        ((spoilt(np.nan),), "batch 0 holds NaN"),
        ((images(1), spoilt(np.inf)), "batch 1 holds NaN or infinite"),
        (
            (np.full((2, 3, 16, 16), 3e38, np.float32),),
            r"batch 0 makes tensor '\w+' NaN or infinite",
        ),
        ((), "holds no batch"),
    ],
)
def test_bad_data_is_refused(given, message, tmp_path):
    refused(
        exported("residual_net"),
        Listed(*given),
        QuantizeOptions(),
        tmp_path / "q.onnx",
        CalibrationError,
        message,
    )
