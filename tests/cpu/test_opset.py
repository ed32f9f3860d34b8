"""Graphs of an older operator set compute the same in a newer one, or are refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from sn72engine import opset
from sn72engine.errors import QuantizationError

BRANCHES = """c = ReduceSum <keepdims = 0> (x) d = Cast <to = 9> (c) y = If (d) <
    then_branch = t () => (float[N] p) { p = ReduceMax <axes = [1], keepdims = 0> (x) },
    else_branch = e () => (float[N] q) { q = ReduceMin <axes = [1], keepdims = 0> (x) }>"""

BODIES = {
    "y = ReduceMean <axes = [1], keepdims = 0> (x)": 13,
    "y = ReduceSum <axes = [-1]> (x)": 11,
    "a = Unsqueeze <axes = [0]> (x) y = Squeeze <axes = [0]> (a)": 11,
    "a, b = Split <axis = 1> (x) y = Sub (a, b)": 13,
    "a = Relu (x) y = Softmax <axis = 0> (a)": 13,
    "y = Softmax (x)": 9,
    "a = Unsqueeze <axes = [0]> (x) y = LogSoftmax <axis = 2> (a)": 10,
    "n = Constant <value_ints = [0, -1, 2]> () a = Reshape (x, n) y = Hardmax <axis = -1> (a)": 12,
    BRANCHES: 17,
}


def graph(body: str, version: int) -> onnx.ModelProto:
    """A graph of ``x``, float (N, 6)."""
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {version}]> g (float[N, 6] x) => (float[] y) '
        f"{{ {body} }}".replace("float[] y", "float y")
    )


def run(proto: onnx.ModelProto) -> np.ndarray:
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(
        proto.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("needed", [19, 23])
@pytest.mark.parametrize("body", BODIES)
def test_the_same_numbers_in_a_newer_set(body, needed):
    proto = graph(body, BODIES[body])
    before = run(proto)
    opset.lift(proto, needed)
    assert proto.opset_import[0].version == needed
    proto.ir_version = 10
    np.testing.assert_array_equal(run(proto), before)


@pytest.mark.parametrize(
    ("body", "version"),
    [
        ("a = Unsqueeze <axes = [2]> (x) y = Softmax (a)", 11),  # over two axes
        ("y = Softmax <axis = 0> (x)", 11),
        ("y = Upsample <scales = [1.0, 2.0]> (x)", 7),
        ("y = Pad <pads = [0, 1, 0, 1]> (x)", 10),
        ("y = Clip <max = 1.0> (x)", 10),
        ("a, b = Split <axis = 1, split = [2, 4]> (x) y = Identity (a)", 11),
    ],
)
def test_what_means_something_else_is_refused(body, version):
    with pytest.raises(QuantizationError, match=r"has another form in opset 19; .*opset=19"):
        opset.lift(graph(body, version), 19)


def test_a_newer_graph_and_other_operators_stay_as_they_are():
    proto = graph("y = com.microsoft.Gelu <axes = [1]> (x)", 17)
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    nodes = proto.graph.SerializeToString()
    opset.lift(proto, 19)
    assert proto.graph.SerializeToString() == nodes
    newer = graph("y = Relu (x)", 21)
    opset.lift(newer, 19)
    assert newer.opset_import[0].version == 21
