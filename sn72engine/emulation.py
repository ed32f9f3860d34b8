"""FP8, NVFP4 and MXFP8 layers in standard float operators, so that a CPU computes their numbers.

CPU libraries have no kernels for these formats, or only some of them. Every rounding is written
out instead: the result is what a card would compute, but for the order of its sums, and it is
slower than float. It serves to check accuracy where there is no such card.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from sn72engine import _deps, affine, formats
from sn72engine.errors import QuantizationError
from sn72engine.graph_order import reads
from sn72engine.inserter import TRT

#: Rounds x / scale to e4m3; Cast saturates.
_TO_FP8 = """to_fp8 (x, scale) => (y) {
    v = Div(x, scale)
    code = Cast <to = 17> (v)
    y = Cast <to = 1> (code)
}"""

#: The steps of quantize_nvfp4 and dequantize_nvfp4 in sn72kernels.ops.quantize_blocks.reference.
#: e2m1 numbers lie 0.5, 1 or 2 apart from 0, 2 and 4 on; Round takes half to even, as the codes do.
_NVFP4 = """nvfp4 (x, scale) => (y) {
    shape = Shape(x)
    rows = Constant <value_ints = [-1, 16]> ()
    last = Constant <value_ints = [1]> ()
    tiny = Constant <value = float {0.001953125}> ()
    most = Constant <value = float {448.0}> ()
    half = Constant <value = float {0.5}> ()
    one = Constant <value = float {1.0}> ()
    two = Constant <value = float {2.0}> ()
    four = Constant <value = float {4.0}> ()
    six = Constant <value = float {6.0}> ()
    blocks = Reshape(x, rows)
    sizes = Abs(blocks)
    amax = ReduceMax <keepdims = 1> (sizes, last)
    unit = Mul(scale, six)
    wanted = Div(amax, unit)
    held = Clip(wanted, tiny, most)
    code = Cast <to = 17> (held)
    block_scale = Cast <to = 1> (code)
    factor = Mul(block_scale, scale)
    size = Div(sizes, factor)
    capped = Min(size, six)
    from_two = GreaterOrEqual(capped, two)
    from_four = GreaterOrEqual(capped, four)
    first = Where(from_two, one, half)
    step = Where(from_four, two, first)
    steps = Div(capped, step)
    whole = Round(steps)
    rounded = Mul(whole, step)
    sign = Sign(blocks)
    value = Mul(sign, rounded)
    result = Mul(value, factor)
    y = Reshape(result, shape)
}"""

#: As quantize_mxfp8 and dequantize_mxfp8 there. The power of two is the smallest that brings the
#: block within 448; a logarithm may miss it by one, which is put right. Blocks below 2^-92 are
#: nothing: smaller powers of two would be flushed to zero by some CPUs.
_MXFP8 = """mxfp8 (x) => (y) {
    shape = Shape(x)
    rows = Constant <value_ints = [-1, 32]> ()
    last = Constant <value_ints = [1]> ()
    least = Constant <value = float {-100.0}> ()
    greatest = Constant <value = float {120.0}> ()
    most = Constant <value = float {448.0}> ()
    half = Constant <value = float {0.5}> ()
    two = Constant <value = float {2.0}> ()
    ln2 = Constant <value = float {0.6931471805599453}> ()
    blocks = Reshape(x, rows)
    sizes = Abs(blocks)
    amax = ReduceMax <keepdims = 1> (sizes, last)
    ratio = Div(amax, most)
    log = Log(ratio)
    log2 = Div(log, ln2)
    raised = Ceil(log2)
    exponent = Clip(raised, least, greatest)
    power = Pow(two, exponent)
    limit = Mul(power, most)
    small = Greater(amax, limit)
    doubled = Mul(power, two)
    enough = Where(small, doubled, power)
    halved = Mul(enough, half)
    lower = Mul(halved, most)
    large = LessOrEqual(amax, lower)
    exact = Where(large, halved, enough)
    v = Div(blocks, exact)
    code = Cast <to = 17> (v)
    value = Cast <to = 1> (code)
    result = Mul(value, exact)
    y = Reshape(result, shape)
}"""


def emulate(proto: Any) -> int:
    """Write the FP8, NVFP4 and MXFP8 parts of a float32 ModelProto in standard operators, in place.

    INT8 parts stay. Weights become float32.

    Returns:
        How many quantisations of activations were rewritten.

    Raises:
        QuantizationError: one of them has another form than this package or ModelOpt writes.
    """
    onnx = _deps.require("onnx", purpose="emulate a quantised model on a CPU")
    _expand_weights(onnx, proto)
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[Any] = []
    gone: set[str] = set()
    count = 0
    for node in list(proto.graph.node):
        if node.output[0] in gone:
            continue
        if node.op_type == "QuantizeLinear" and _is_fp8(onnx, node, kinds):
            back = _only(node.output[0], readers, "DequantizeLinear")
            body = _instance(onnx, _TO_FP8, node.input[:2], [f"{node.output[0]}_fp8"])
            nodes += [*body, _mul(onnx, f"{node.output[0]}_fp8", node.input[1], back.output[0])]
            gone.add(back.output[0])
        elif node.domain == TRT and node.op_type == "TRT_FP4DynamicQuantize":
            scales = _only(node.output[1], readers, "DequantizeLinear")
            back = _only(node.output[0], readers, "DequantizeLinear")
            nodes += _instance(onnx, _NVFP4, node.input[:2], [back.output[0]])
            gone |= {scales.output[0], back.output[0]}
        elif node.domain == TRT and node.op_type == "TRT_MXFP8DynamicQuantize":
            back = _only(node.output[0], readers, "TRT_MXFP8DequantizeLinear")
            nodes += _instance(onnx, _MXFP8, node.input[:1], [back.output[0]])
            gone.add(back.output[0])
        else:
            nodes.append(node)
            continue
        count += 1
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    _drop_unread(proto.graph)
    kept = [entry for entry in proto.opset_import if entry.domain != TRT]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    return count


def _expand_weights(onnx: Any, proto: Any) -> None:
    """Replace what dequantises a constant of fewer than 8 integer bits by its float32 result."""
    graph = proto.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    kinds = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT4E2M1)
    kept = []
    for node in graph.node:
        constant = node.op_type in (
            "DequantizeLinear",
            "TRT_MXFP8DequantizeLinear",
        ) and all(name in held for name in node.input)
        if not constant or held[node.input[0]].data_type not in kinds:
            kept.append(node)
            continue
        values, scale = (onnx.numpy_helper.to_array(held[n]) for n in node.input[:2])
        result = onnx.numpy_helper.from_array(_dequantise(node, values, scale), node.output[0])
        graph.initializer.append(result)
        held[result.name] = result
    del graph.node[:]
    graph.node.extend(kept)
    _drop_unread(graph)


def _drop_unread(graph: Any) -> None:
    read = {name for node in graph.node for name in reads(node)}
    read |= {value.name for value in graph.output}
    unread = [i for i, tensor in enumerate(graph.initializer) if tensor.name not in read]
    for index in reversed(unread):
        del graph.initializer[index]


def _dequantise(node: Any, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    attributes = {a.name: a.i for a in node.attribute}
    axis = attributes.get("axis", 1)
    if scale.dtype == np.uint8:  # e8m0 holds the exponent
        scale = np.exp2(scale.astype(np.float64) - formats.E8M0_BIAS)
    if block := attributes.get("block_size", 0):
        factor = np.repeat(scale, block, axis=axis)
    else:
        factor = affine.along(scale, values.ndim, axis)
    result: np.ndarray = values.astype(np.float32) * factor.astype(np.float32)
    return result


def _is_fp8(onnx: Any, node: Any, kinds: dict[str, int]) -> bool:
    told = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
    zero_point = node.input[2] if len(node.input) > 2 else ""
    return bool((told or kinds.get(zero_point)) == onnx.TensorProto.FLOAT8E4M3FN)


def _only(name: str, readers: dict[str, list[Any]], operator: str) -> Any:
    found = readers.get(name, [])
    if len(found) != 1 or found[0].op_type != operator:
        names = ", ".join(node.op_type for node in found) or "nothing"
        raise QuantizationError(
            f"{name!r} is read by {names}, where one {operator} was expected; only models that "
            "sn72engine quantised can be emulated on a CPU"
        )
    return found[0]


@functools.cache
def _template(text: str) -> Any:
    onnx = _deps.require("onnx", purpose="emulate a quantised model on a CPU", submodule="parser")
    return onnx.parse_function(f'<opset_import: ["" : 20], domain: "sn72"> {text}')


def _instance(onnx: Any, text: str, inputs: list[str], outputs: list[str]) -> Iterator[Any]:
    """The nodes of a text, between the tensors given; inner tensors get names of their own."""
    template = _template(text)
    names = dict(zip(template.input, inputs, strict=True))
    names.update(zip(template.output, outputs, strict=True))
    for source in template.node:
        node = onnx.NodeProto()
        node.CopyFrom(source)
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, f"{outputs[0]}.{name}") for name in tensors]
        node.name = f"{outputs[0]}.{source.output[0]}"
        yield node


def _mul(onnx: Any, left: str, right: str, result: str) -> Any:
    return onnx.helper.make_node("Mul", [left, right], [result], name=f"{result}.scaled")
