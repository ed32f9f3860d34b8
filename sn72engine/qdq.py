"""Rewrites a Q/DQ model from the form that TensorRT fuses to the form that a CPU fuses.

Both hold the same network with the same int8 weights. TensorRT wants symmetric int8 on the inputs
of products and fuses the rest by itself. ONNX Runtime fuses a node only where *all* its inputs and
outputs carry Q/DQ, is fast on x86 with uint8 activations and int8 weights, and drops a ReLU or Clip
only where the zero point and scale make it redundant. So, for a CPU:

- activations become uint8 with a zero point, 0 for what cannot be negative;
- convolution outputs, residual additions of them, poolings and concatenations are quantised too,
  with the ranges that :mod:`sn72engine.quantizer` kept in the record;
- biases become int32 in units of input scale times weight scale;
- a mean over both image axes becomes a GlobalAveragePool, which has an integer kernel.

Nothing else is quantised: products that stood in float stay in float, and the residual stream of a
transformer, which loses accuracy in 8 bits, is left alone because it does not come out of
convolutions.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sn72engine import _deps, affine, cpu_plan, emulation, onnx_file
from sn72engine.cpu_plan import Plan, Range
from sn72engine.errors import QuantizationError
from sn72engine.model import read_record
from sn72engine.quiet import quiet


def lower_for_cpu(source: Path, target: Path) -> tuple[str, ...]:
    """Write the CPU form of the Q/DQ model at ``source`` to ``target``.

    FP8, NVFP4 and MXFP8 layers are emulated (see :mod:`sn72engine.emulation`), INT8 layers run on
    integers.

    A file that this package did not quantise has no tensor ranges in its record. What its own
    scales tell is used then (signed activations become uint8 with zero point 128, the same
    numbers); convolutions whose result range they do not tell, and additions, stay in float.
    A file with uint8 activations, or with scales that are not float32, is copied as it is.

    Returns:
        Remarks for the engine's manifest: how many nodes run on integers, and what does not.

    Raises:
        QuantizationError: ``source`` holds no QuantizeLinear node.
    """
    gs = _deps.require("onnx_graphsurgeon", purpose="prepare a quantised model for a CPU")
    proto = onnx_file.load(source)
    emulated = _emulation_notes(emulation.emulate(proto))
    if not any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
        if not emulated:
            raise QuantizationError(f"{source} holds no QuantizeLinear node; quantise it first")
        onnx_file.save(proto, target)
        return emulated
    store_int8_weights(proto)
    ranges = (read_record(proto).get("quantization") or {}).get("ranges", {})
    with quiet():  # it tells of each type that NumPy lacks
        graph = gs.import_onnx(proto).toposort()
    if reason := _reason_to_keep(graph):
        onnx_file.save(proto, target)
        return (*emulated, f"the model has {reason}; it is used as it is")
    scales = _strip(gs, graph)
    products = {id(node) for node in graph.nodes if _is_product(gs, node, scales)}
    _means_to_pools(gs, graph)
    graph.cleanup().toposort()
    plan = cpu_plan.make(graph, products, scales, {k: (v[0], v[1]) for k, v in ranges.items()})
    _insert(gs, graph, plan)
    graph.cleanup().toposort()
    lowered = gs.export_onnx(graph)
    lowered.metadata_props.extend(proto.metadata_props)
    onnx_file.save(lowered, target)
    return emulated + _notes(plan, len(products), bool(ranges))


def _emulation_notes(count: int) -> tuple[str, ...]:
    if not count:
        return ()
    return (
        f"{count} quantised tensors of FP8, NVFP4 or MXFP8 are emulated: the numbers are those of "
        "a card, the speed and size are not",
    )


def store_int8_weights(proto: Any) -> None:
    """Replace float weight -> QuantizeLinear by the integer weight: a quarter of the size."""
    onnx = _deps.require("onnx", purpose="read a quantised model")
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    kept = []
    for node in proto.graph.node:
        inputs = list(node.input)
        constant = len(inputs) == 3 and all(name in constants for name in inputs)
        # Scales in blocks have as many axes as the weight; they stay as they are.
        if node.op_type != "QuantizeLinear" or not constant or len(constants[inputs[1]].dims) > 1:
            kept.append(node)
            continue
        weight, scale, zero = (onnx.numpy_helper.to_array(constants[name]) for name in inputs)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        integers = affine.quantize_weight(weight, scale, axis, zero)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(integers, node.output[0]))
    del proto.graph.node[:]
    proto.graph.node.extend(kept)


def _reason_to_keep(graph: Any) -> str:
    """Why a Q/DQ graph of another tool is not rewritten; empty when it can be."""
    quantizers = [node for node in graph.nodes if node.op == "QuantizeLinear"]
    if any(len(node.inputs) > 2 and node.inputs[2].dtype == np.uint8 for node in quantizers):
        return "uint8 activations already"
    if any(node.inputs[1].dtype != np.float32 for node in quantizers):
        return "scales that are not float32"
    return ""


def _strip(gs: Any, graph: Any) -> dict[str, Range]:
    """Take the Q/DQ pairs off all activations; returns the range that each was held in.

    A pair that is not one scale per tensor, or whose integers something else reads, stays.
    """
    scales: dict[str, Range] = {}
    results = {id(tensor) for tensor in graph.outputs}
    for node in [node for node in graph.nodes if node.op == "QuantizeLinear"]:
        data, integers = node.inputs[0], node.outputs[0]
        scale, zero = _scalar(gs, node, 1), _scalar(gs, node, 2)
        readers = list(integers.outputs)
        whole = all(
            reader.op == "DequantizeLinear" and id(reader.outputs[0]) not in results
            for reader in readers
        )
        if isinstance(data, gs.Constant) or scale is None or zero is None or not whole:
            continue
        limits = np.iinfo(node.inputs[2].dtype if len(node.inputs) > 2 else np.uint8)
        scales[data.name] = (scale * (limits.min - zero), scale * (limits.max - zero))
        for reader in readers:
            _redirect(reader.outputs[0], data)
    return scales


def _scalar(gs: Any, node: Any, index: int) -> float | None:
    """Constant scalar input; 0 for an absent zero point; None for anything else."""
    if index >= len(node.inputs):
        return 0.0
    tensor = node.inputs[index]
    if not isinstance(tensor, gs.Constant) or tensor.values.size != 1:
        return None
    return float(tensor.values.reshape(()))


def _redirect(old: Any, new: Any) -> None:
    """Let every reader of ``old`` read ``new``."""
    for node in list({id(node): node for node in old.outputs}.values()):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def _is_product(gs: Any, node: Any, scales: Mapping[str, Range]) -> bool:
    """Whether a node had both operands quantised, in a way that ONNX Runtime has a kernel for."""
    if node.op not in cpu_plan.PRODUCTS or node.inputs[0].name not in scales:
        return False
    attributes = node.attrs
    plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
    weight = _weight(gs, node)
    if weight is None or not plain or attributes.get("transA", 0):
        return False
    integers, scale, *zero = (tensor.values for tensor in weight.inputs)
    channel = _channel_axis(node, integers.ndim)
    per_channel = scale.ndim == 1 and weight.attrs.get("axis", 1) % integers.ndim == channel
    symmetric = integers.dtype == np.int8 and not any(np.any(z) for z in zero)
    if not symmetric or not (scale.size == 1 or per_channel):
        return False
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return True
    bias = node.inputs[2]
    return isinstance(bias, gs.Constant) and bias.values.size in (1, integers.shape[channel])


def _channel_axis(node: Any, ndim: int) -> int:
    """Axis of a product's weight that counts its output channels."""
    if node.op == "Conv" or node.attrs.get("transB", 0):
        return 0
    return ndim - 1


def _weight(gs: Any, node: Any) -> Any:
    """The DequantizeLinear that gives a node its constant weight, or None."""
    makers = node.inputs[1].inputs
    if len(makers) != 1 or makers[0].op != "DequantizeLinear":
        return None
    return makers[0] if all(isinstance(t, gs.Constant) for t in makers[0].inputs) else None


def _means_to_pools(gs: Any, graph: Any) -> None:
    """Write a mean over both image axes as GlobalAveragePool, which has an integer kernel."""
    for node in list(graph.nodes):
        if node.op != "ReduceMean" or len(node.inputs) != 2 or len(node.inputs[0].shape or ()) != 4:
            continue
        axes = getattr(node.inputs[1], "values", None)
        if axes is None or sorted(int(axis) % 4 for axis in np.ravel(axes)) != [2, 3]:
            continue
        (data, result) = (node.inputs[0], node.outputs[0])
        node.inputs.clear()
        node.outputs.clear()
        name = f"{node.name}_pool"
        pool = gs.Node("GlobalAveragePool", name, inputs=[data], outputs=[result])
        graph.nodes.append(pool)
        if not node.attrs.get("keepdims", 1):
            pool.outputs = [gs.Variable(f"{result.name}_pooled", result.dtype)]
            graph.nodes.append(
                gs.Node("Flatten", f"{name}_flat", {"axis": 1}, [pool.outputs[0]], [result])
            )


def _insert(gs: Any, graph: Any, plan: Plan) -> None:
    """Write the plan's Q/DQ pairs and int32 biases into the graph."""
    tensors = graph.tensors()
    for node in [n for n in graph.nodes if n.op in cpu_plan.PRODUCTS]:
        if id(node) in plan.products:
            _set_bias(gs, graph, node, plan)
        elif _weight(gs, node) is not None:
            _dequantize_weight(gs, node)
    for name, parameters in plan.tensors.items():
        tensor = tensors[name]
        scale = gs.Constant(f"{name}_scale_u8", np.array(parameters.scale, np.float32))
        zero = gs.Constant(f"{name}_zero_u8", np.array(parameters.zero, np.uint8))
        integers = gs.Variable(f"{name}_u8", np.uint8, tensor.shape)
        if name in plan.made:
            # The name stays with what everyone reads, graph outputs included.
            data, back = gs.Variable(f"{name}_exact", tensor.dtype, tensor.shape), tensor
            maker = tensor.inputs[0]
            maker.outputs[maker.outputs.index(tensor)] = data
        else:
            data, back = tensor, gs.Variable(f"{name}_rounded", tensor.dtype, tensor.shape)
            for reader in [n for n in tensor.outputs if id(n) in plan.products]:
                reader.inputs[0] = back
        graph.nodes += [
            gs.Node("QuantizeLinear", f"{name}_q", {}, [data, scale, zero], [integers]),
            gs.Node("DequantizeLinear", f"{name}_dq", {}, [integers, scale, zero], [back]),
        ]


def _set_bias(gs: Any, graph: Any, node: Any, plan: Plan) -> None:
    """Give a product an int32 bias in units of input scale times weight scale."""
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return
    weight = _weight(gs, node)
    axis = _channel_axis(node, len(weight.inputs[0].shape))
    bias = np.broadcast_to(np.ravel(node.inputs[2].values), weight.inputs[0].shape[axis])
    unit, old = plan.tensors[node.inputs[0].name].scale, weight.inputs[1].values
    old = old.reshape(()) if old.size == 1 else old
    integers, scales = affine.quantize_bias(bias, unit, old)
    if np.array_equal(scales, np.broadcast_to(old, scales.shape)):
        scales = old
    else:
        exact = _weight_values(weight)
        name = f"{node.name}_weight"
        node.inputs[1] = gs.Variable(f"{name}_float", np.float32, exact.shape)
        graph.nodes.append(
            gs.Node(
                "DequantizeLinear",
                f"{name}_dq",
                {"axis": axis},
                [
                    gs.Constant(f"{name}_i8", affine.quantize_weight(exact, scales, axis)),
                    gs.Constant(f"{name}_scales", scales),
                    gs.Constant(f"{name}_zeros", np.zeros(scales.shape, np.int8)),
                ],
                [node.inputs[1]],
            )
        )
    name = f"{node.name}_bias"
    units = np.asarray(unit * scales, np.float32)
    node.inputs[2] = gs.Variable(f"{name}_float", np.float32, integers.shape)
    graph.nodes.append(
        gs.Node(
            "DequantizeLinear",
            f"{name}_dq",
            {"axis": 0} if units.ndim else {},
            [
                gs.Constant(f"{name}_i32", integers),
                gs.Constant(f"{name}_units", units),
                gs.Constant(f"{name}_zeros", np.zeros(units.shape, np.int32)),
            ],
            [node.inputs[2]],
        )
    )


def _dequantize_weight(gs: Any, node: Any) -> None:
    """Store the weight of a product that stays in float as float: no conversion on each run."""
    values = _weight_values(_weight(gs, node))
    node.inputs[1] = gs.Constant(f"{node.name}_weight_float", values)


def _weight_values(dequantize: Any) -> np.ndarray:
    integers, scale = dequantize.inputs[0].values, dequantize.inputs[1].values
    axis = dequantize.attrs.get("axis", 1)
    difference = integers.astype(np.float32)
    if len(dequantize.inputs) > 2:
        zero = dequantize.inputs[2].values.astype(np.float32)
        difference -= affine.along(zero, integers.ndim, axis)
    values: np.ndarray = difference * affine.along(scale, integers.ndim, axis)
    return values


def _notes(plan: Plan, products: int, ranged: bool) -> tuple[str, ...]:
    counts = ", ".join(f"{count} {name}" for name, count in sorted(plan.operators.items()))
    notes = [f"INT8 for a CPU: on integers {counts or 'nothing'}"]
    notes += [f"{n} of {products} products stay in float: {why}" for why, n in plan.left.items()]
    if not ranged:
        notes.append(
            "the model's record holds no tensor ranges, so additions stay in float; quantise it "
            "with sn72engine for the fastest CPU engine"
        )
    if _saturates():
        notes.append(
            "this CPU has no VNNI instructions: sums of uint8 x int8 products saturate at 16 "
            "bits, so check the accuracy"
        )
    return tuple(notes)


def _saturates() -> bool:
    """Whether this is an x86 CPU that adds pairs of uint8 x int8 products in 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "vnni" not in facts.read_text()
