"""What inspection reports is what the file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn72engine import inspection
from sn72engine.builder import build
from sn72engine.engine import Engine
from sn72engine.errors import EngineCorruptError, InputError
from sn72engine.spec import BuildOptions, ShapeRange
from sn72engine.store import Store
from tests import quantized_models, tiny_models

#: NumPy type of a weight and the bits that ONNX stores for each of its values.
WEIGHT_BITS = {
    np.dtype(np.float32): 32,
    np.dtype(np.float16): 16,
    np.dtype(np.int64): 64,
    np.dtype(np.uint8): 8,
    np.dtype(np.bool_): 8,
    np.dtype(ml_dtypes.bfloat16): 16,
    np.dtype(ml_dtypes.float8_e4m3fn): 8,
    np.dtype(ml_dtypes.float8_e5m2): 8,
    np.dtype(ml_dtypes.int4): 4,
    np.dtype(ml_dtypes.uint4): 4,
    np.dtype(ml_dtypes.float4_e2m1fn): 4,
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def engine_of(model: Any, store: Store) -> Engine:
    return build(model, BuildOptions(batch=ShapeRange(1, 2, 4)), store=store)


def test_a_float_file(tmp_path: Path) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    report = inspection.inspect_onnx(model.path)
    assert report["kind"] == "onnx"
    assert report["bytes"] == model.path.stat().st_size
    assert report["opset"] == {"ai.onnx": 20}
    assert report["inputs"] == [
        {"name": "pixel_values", "dtype": "float32", "shape": ["N", 3, 16, 16]}
    ]
    assert report["precision"] == "fp32"
    wanted = {"Conv": 1, "Relu": 1, "GlobalAveragePool": 1, "Flatten": 1, "MatMul": 1}
    assert report["operators"] == wanted
    assert report["weights"] == {"float32": {"tensors": 2, "bytes": 4 * (8 * 27 + 40)}}
    assert report["preprocess"] == tiny_models.IMAGES.to_dict()
    json.dumps(report)


def test_weights_in_a_second_file_count(tmp_path: Path) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx", external=True)
    report = inspection.inspect_onnx(model.path)
    second = tmp_path / "m.onnx.data"
    assert report["bytes"] == model.path.stat().st_size + second.stat().st_size
    assert report["weights"] == {"float32": {"tensors": 2, "bytes": 4 * 15}}
    second.unlink()
    with pytest.raises(InputError, match=r"weight file .*m\.onnx\.data is absent"):
        inspection.inspect_onnx(model.path)


@given(
    st.sampled_from(sorted(WEIGHT_BITS, key=str)),
    st.lists(st.integers(1, 6), min_size=0, max_size=3),
)
def test_every_type_of_weight_is_counted_at_its_size(
    tmp_path_factory: pytest.TempPathFactory, dtype: np.dtype[Any], shape: list[int]
) -> None:
    path = tmp_path_factory.mktemp("weights") / "m.onnx"
    tiny_models.linear(path)
    proto = onnx.load(path)
    del proto.graph.initializer[:]
    weight = onnx.numpy_helper.from_array(np.ones(shape).astype(dtype), "w")
    proto.graph.initializer.append(weight)
    path.write_bytes(proto.SerializeToString())
    (entry,) = inspection.inspect_onnx(path)["weights"].items()
    count = int(np.prod(shape))
    assert entry == (dtype.name, {"tensors": 1, "bytes": -(-count * WEIGHT_BITS[dtype] // 8)})


def test_a_quantised_file_and_its_engine(store: Store) -> None:
    model = quantized_models.quantized("residual_net")
    file = inspection.inspect_onnx(model.path)
    assert file["precision"] == "int8"
    assert file["weights"]["int8"]["tensors"] >= 3
    assert "ranges" in model.record["quantization"]
    assert "ranges" not in file["record"]["quantization"]

    engine = engine_of(model, store)
    report = inspection.inspect_engine(engine.folder)
    assert report["kind"] == "engine"
    assert report["bytes"] == sum(f.bytes for f in engine.manifest.files)
    assert report["manifest"]["key"] == engine.manifest.key
    assert "ranges" not in report["manifest"]["quantization"]
    # The graph is the engine's own, not that of the file it was built from.
    assert report["graph"]["operators"] != file["operators"]
    json.dumps(report)

    for shown in (inspection.render(file), inspection.render(report)):
        record = model.record["quantization"]
        assert f"quantized  max, 32 samples, {record['quantised']} layers" in shown
        assert "precision  int8" in shown


def test_text_of_an_engine_says_what_matters(tmp_path: Path, store: Store) -> None:
    engine = engine_of(tiny_models.convolution(tmp_path / "m.onnx"), store)
    shown = inspection.render(inspection.inspect_engine(engine.folder))
    assert str(engine.folder) in shown
    assert f"onnxruntime {engine.manifest.backend_version} for cpu" in shown
    assert "batch      1..4, tuned for 2" in shown
    assert "input      pixel_values: float32[N, 3, 16, 16]" in shown
    assert "height=16" in shown
    assert "1 Conv" in shown
    assert "verified" not in shown
    for passed, word in ((True, "passed"), (False, "REFUSED")):
        engine = store.update_manifest(engine, verification={"passed": passed})
        shown = inspection.render(inspection.inspect_engine(engine.folder))
        assert f"verified   {word}" in shown


def test_an_altered_engine_is_refused(tmp_path: Path, store: Store) -> None:
    engine = engine_of(tiny_models.linear(tmp_path / "m.onnx"), store)
    data = bytearray(engine.path.read_bytes())
    data[len(data) // 2] ^= 1
    engine.path.write_bytes(data)
    with pytest.raises(EngineCorruptError, match=r"model\.onnx"):
        inspection.inspect_engine(engine.folder)


def test_what_is_not_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not ONNX")
    with pytest.raises(InputError, match="not a readable ONNX file"):
        inspection.inspect_onnx(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="no such ONNX file"):
        inspection.inspect_onnx(tmp_path / "absent.onnx")
