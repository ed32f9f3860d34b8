"""An ONNX file's signature, record and hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sn72engine.errors import InputError
from sn72engine.model import OnnxModel, read_record, write_record
from sn72engine.spec import Preprocess


def tiny(path: Path, weight: float = 1.0, record: dict[str, Any] | None = None) -> OnnxModel:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.full(2, weight, np.float32), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if record is not None:
        write_record(proto, record)
    onnx.save(proto, path)
    return OnnxModel.open(path)


def test_the_signature_leaves_out_weights(tmp_path: Path) -> None:
    model = tiny(tmp_path / "m.onnx")
    assert [str(spec) for spec in model.inputs] == ["x: float32[batch, 2]"]
    assert [str(spec) for spec in model.outputs] == ["y: float32[batch, 2]"]
    assert model.precision == "fp32"
    assert model.preprocess is None


def test_the_record_travels_with_the_file(tmp_path: Path) -> None:
    spec = Preprocess(height=8, width=8)
    quantization = {"method": "max"}
    model = tiny(
        tmp_path / "m.onnx",
        record={"preprocess": spec.to_dict(), "quantization": quantization},
    )
    assert model.preprocess == spec
    assert model.quantization == quantization


def test_writing_a_record_keeps_other_metadata() -> None:
    proto = onnx.ModelProto()
    proto.metadata_props.add(key="author", value="someone")
    write_record(proto, {"a": 1})
    write_record(proto, {"a": 2})
    assert read_record(proto) == {"a": 2}
    assert sorted(e.key for e in proto.metadata_props) == ["author", "sn72engine"]


def test_the_hash_covers_external_weights_wherever_they_are(tmp_path: Path) -> None:
    model = tiny(tmp_path / "m.onnx")
    proto = onnx.load(model.path)
    # A constant inside the branch of an If, kept in a file of its own.
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), "inner")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="inner.bin")
    value = helper.make_tensor_value_info("v", TensorProto.FLOAT, [4])
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["v"], value=tensor)], "branch", [], [value]
    )
    proto.graph.node.append(
        helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch)
    )
    model.path.write_bytes(proto.SerializeToString())
    (tmp_path / "inner.bin").write_bytes(bytes(16))
    before = model.sha256()
    assert [p.name for p in model.external_files()] == ["inner.bin"]
    (tmp_path / "inner.bin").write_bytes(bytes(15) + b"\x01")
    assert model.sha256() != before


@pytest.mark.parametrize("content", [b"", b"not onnx at all", b"\x00" * 64])
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable ONNX file"):
        OnnxModel.open(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such ONNX file"):
        OnnxModel.open(tmp_path / "absent.onnx")


@pytest.mark.parametrize(
    ("zero_point", "precision"),
    [
        (numpy_helper.from_array(np.int8(0), "z"), "int8"),
        (numpy_helper.from_array(np.uint8(3), "z"), "int8"),
        (helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]), "fp8"),
        (None, "int8"),  # the operator then gives uint8
    ],
)
@pytest.mark.parametrize("as_node", [False, True])
def test_a_model_that_others_quantised_says_to_what(
    tmp_path: Path, zero_point: Any, precision: str, as_node: bool
) -> None:
    names = ["x", "s"] if zero_point is None else ["x", "s", "z"]
    nodes = [
        helper.make_node("QuantizeLinear", names, ["q"]),
        helper.make_node("DequantizeLinear", ["q", *names[1:]], ["y"]),
    ]
    stored = [numpy_helper.from_array(np.float32(0.1), "s")]
    if zero_point is not None and as_node:
        nodes.insert(0, helper.make_node("Constant", [], ["z"], value=zero_point))
    elif zero_point is not None:
        stored.append(zero_point)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "foreign", values[:1], values[1:], stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(proto, tmp_path / "m.onnx")
    model = OnnxModel.open(tmp_path / "m.onnx")
    assert model.precision == precision
    assert model.quantization is None


def test_weights_that_are_quantised_where_they_are_read_leave_the_model_float(
    tmp_path: Path,
) -> None:
    proto = onnx.load(tiny(tmp_path / "m.onnx").path)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "s"))
    proto.graph.node.insert(0, helper.make_node("QuantizeLinear", ["w", "s"], ["wq"]))
    proto.graph.node.insert(1, helper.make_node("DequantizeLinear", ["wq", "s"], ["wd"]))
    proto.graph.node[2].input[1] = "wd"
    onnx.save(proto, tmp_path / "m.onnx")
    assert OnnxModel.open(tmp_path / "m.onnx").precision == "fp32"
