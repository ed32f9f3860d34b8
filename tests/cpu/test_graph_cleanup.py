from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn72engine.graph_cleanup import clean
from sn72engine.model import read_record, write_record


def parse(body: str, opset: int = 20) -> onnx.ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
    g (float[N, 4] x) => (float[N, 4] y) {body}"""
    return onnx.parser.parse_model(text)


def run(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


X = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)


def check(proto: onnx.ModelProto, **counts: int) -> onnx.ModelProto:
    onnx.checker.check_model(proto)
    before = run(proto, X)
    cleaned, report = clean(proto)
    onnx.checker.check_model(cleaned)
    for one, other in zip(before, run(cleaned, X), strict=True):
        np.testing.assert_array_equal(one, other)
    found = report.to_dict()
    assert {name: found[name] for name in counts} == counts
    assert found["nodes_after"] == len(cleaned.graph.node)
    return cleaned


def test_constants_are_folded():
    proto = parse("""{
        a = Constant<value = float[1] {2.0}>()
        b = Constant<value = float[1] {3.0}>()
        c = Mul(a, b)
        d = Sqrt(c)
        y = Mul(x, d)
    }""")
    cleaned = check(proto, merged_nodes=0, merged_initializers=0)
    assert [node.op_type for node in cleaned.graph.node] == ["Mul"]


def test_dead_nodes_are_dropped():
    check(parse("{ dead = Exp(x)  deader = Log(dead)  y = Relu(x) }"), dead_nodes=2, nodes_after=1)


def test_identical_chains_are_merged():
    proto = parse("{ a = Exp(x) b = Exp(x) c = Relu(a) d = Relu(b) y = Add(c, d) }")
    check(proto, merged_nodes=2, nodes_after=3)


def test_nodes_that_differ_in_an_attribute_stay():
    proto = parse("{ a = LeakyRelu<alpha = 0.1>(x) b = LeakyRelu<alpha = 0.2>(x) y = Sub(a, b) }")
    check(proto, merged_nodes=0, nodes_after=3)


def test_random_nodes_stay():
    proto = parse("{ a = RandomNormalLike(x) b = RandomNormalLike(x) c = Sub(a, b) y = Add(c, x) }")
    cleaned, report = clean(proto)
    assert report.merged_nodes == 0
    assert not np.array_equal(run(cleaned, X)[0], X)


def test_graph_outputs_keep_their_names():
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Relu(x)  z = Relu(x) }"""
    cleaned = check(onnx.parser.parse_model(text), merged_nodes=0)
    assert [value.name for value in cleaned.graph.output] == ["y", "z"]


def test_equal_initializers_are_merged():
    proto = parse("{ a = Add(x, w)  b = Mul(a, v)  y = Sub(b, u) }")
    for name, value in (("w", 2.0), ("v", 2.0), ("u", -0.0)):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(np.full(4, value, np.float32), name)
        )
    cleaned = check(proto, merged_initializers=1)
    assert len(cleaned.graph.initializer) == 2


def test_equal_bytes_of_another_type_or_shape_are_not_merged():
    proto = parse("{ a = Reshape(x, s)  y = Add(a, w) }")
    proto.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.array([-1, 4], np.int64), "s"),
            onnx.numpy_helper.from_array(np.array([-1, 4], np.int64).view(np.float32), "w"),
        ]
    )
    check(proto, merged_initializers=0)


def test_quantize_pairs_on_weights_are_not_folded_to_float():
    proto = parse("{ w = DequantizeLinear(i, s)  y = Mul(x, w) }")
    proto.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.array([1, 2, 3, 4], np.int8), "i"),
            onnx.numpy_helper.from_array(np.float32(0.5), "s"),
        ]
    )
    cleaned = check(proto, folded_nodes=0)
    assert "DequantizeLinear" in [node.op_type for node in cleaned.graph.node]


def test_a_huge_expand_is_not_folded():
    proto = parse("{ e = Expand(one, shape)  r = ReduceSum<keepdims = 0>(e)  y = Mul(x, r) }")
    proto.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.float32([1]), "one"),
            onnx.numpy_helper.from_array(np.int64([32 << 20]), "shape"),
        ]
    )
    cleaned, _ = clean(proto)
    assert cleaned.ByteSize() < 1000


def test_metadata_signature_and_opset_are_kept():
    proto = parse("{ y = Relu(x) }", opset=18)
    write_record(proto, {"export": {"torch": "2"}})
    proto.metadata_props.add(key="author", value="someone")
    proto.doc_string = "what it is"
    cleaned, _ = clean(proto)
    assert read_record(cleaned) == {"export": {"torch": "2"}}
    assert {e.key for e in cleaned.metadata_props} == {"author", "sn72engine"}
    assert cleaned.doc_string == "what it is"
    assert [(o.domain, o.version) for o in cleaned.opset_import] == [("", 18)]
    assert cleaned.ir_version == 10
    assert cleaned.graph.input[0] == proto.graph.input[0]


def test_subgraphs_read_the_merged_tensor():
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 4] x) => (float[N, 4] y) {
        a = Exp(x)
        b = Exp(x)
        total = ReduceSum<keepdims = 0>(x)
        zero = Constant<value = float {0.0}>()
        flag = Greater(total, zero)
        c = If (flag) <
            then_branch = t () => (float[N, 4] u) { u = Relu(b) },
            else_branch = e () => (float[N, 4] v) { v = Neg(b) }
        >
        y = Add(a, c)
    }""")
    check(proto, merged_nodes=1)


NODES = st.lists(
    st.tuples(
        st.sampled_from(["Relu", "Neg", "Add", "Mul"]), st.integers(0, 99), st.integers(0, 99)
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(NODES)
def test_any_graph_computes_the_same_and_a_second_pass_finds_nothing(nodes):
    names, lines = ["x", "w"], []
    for index, (operator, first, second) in enumerate(nodes):
        inputs = [names[first % len(names)]]
        if operator in ("Add", "Mul"):
            inputs.append(names[second % len(names)])
        lines.append(f"t{index} = {operator}({', '.join(inputs)})")
        names.append(f"t{index}")
    proto = parse("{ " + " ".join(lines) + f" y = Add(x, {names[-1]}) }}")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([0.5, -1, 2, 0]), "w"))
    cleaned = check(proto)
    again, report = clean(cleaned)
    assert len(again.graph.node) == report.nodes_before
    assert (report.dead_nodes, report.folded_nodes, report.merged_nodes) == (0, 0, 0)


@pytest.mark.parametrize("count", [1, 5])
def test_counts_add_up(count):
    body = " ".join(f"a{i} = Exp(x)" for i in range(count))
    total = " ".join(f"s{i} = Add({f's{i - 1}' if i else 'x'}, a{i})" for i in range(count))
    proto = parse(f"{{ {body} {total} y = Relu(s{count - 1}) }}")
    _, report = clean(proto)
    assert report.merged_nodes == count - 1
    changed = report.dead_nodes + report.folded_nodes + report.merged_nodes
    assert report.nodes_before - changed == report.nodes_after
