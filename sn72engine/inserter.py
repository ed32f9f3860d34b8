"""Writes quantised layers into a float ONNX graph: Q/DQ nodes and weights stored in their format.

What each format becomes, for a product of an activation ``x`` and a constant weight:

- ``int8``, ``fp8``: QuantizeLinear and DequantizeLinear on ``x`` with one scale; the weight stored
  as integers or e4m3 behind a DequantizeLinear with one scale per output channel.
- ``nvfp4``: ``trt::TRT_FP4DynamicQuantize`` on ``x``, which gives values and block scales, and two
  DequantizeLinear (block scales, then values); the weight likewise behind two DequantizeLinear.
- ``mxfp8``: ``trt::TRT_MXFP8DynamicQuantize`` and ``trt::TRT_MXFP8DequantizeLinear``; the weight
  behind the latter.

Blocks lie along the axis that the product sums over, which TensorRT wants last: a weight that has
it first is stored transposed, with a Transpose behind it. Where the mean of ``x`` is known and the
product has a bias, the bias makes up for the weight's rounding
(:mod:`sn72engine.bias_correction`). The nodes of domain ``trt`` are
TensorRT's; :mod:`sn72engine.emulation` writes them in standard operators for a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sn72engine import _deps, bias_correction, formats, layers, opset
from sn72engine.errors import QuantizationError
from sn72engine.graph_order import reads
from sn72engine.spec import QuantizedPrecision

#: Domain of TensorRT's own operators.
TRT = "trt"

#: First operator set that has what a format needs: int8 with any scale type, float8 zero points,
#: blocks and 4-bit floats.
_OPSET = {"int8": 19, "fp8": 19, "nvfp4": 23, "mxfp8": 19}

#: IR version in which 4-bit floats may be stored.
_FP4_IR = 11


@dataclass(frozen=True, slots=True)
class Layer:
    """How one node is quantised.

    Attributes:
        precision: number format.
        amax: largest magnitude of its input that is still exact; ``mxfp8`` does not need it.
        smooth: float32 (inputs,); the input is multiplied by it and the weight divided, before
            both are quantised (SmoothQuant, Xiao et al. 2023). ``amax`` is that of the product.
        mean: float (inputs,), mean of each input channel before ``smooth``; None leaves the bias.
    """

    precision: QuantizedPrecision
    amax: float
    smooth: np.ndarray | None = None
    mean: np.ndarray | None = None


def insert(proto: Any, plan: Mapping[str, Layer]) -> int:
    """Quantise nodes of a float32 ModelProto in place.

    Nodes that read the same tensor with the same format and range share its quantisation. Weights
    that nothing reads any more are dropped, one by one, so that memory does not grow.

    Args:
        proto: with every weight in memory; nodes have names.
        plan: node name to layer, as :func:`sn72engine.layers.choose` allows.

    Returns:
        How many biases were corrected.

    Raises:
        QuantizationError: a name is not a node of the graph with a constant weight, or the graph
            holds an operator that changed its meaning in the operator set that is needed.
    """
    onnx = _deps.require("onnx", purpose="quantise a model")
    _raise_opset(onnx, proto, {layer.precision for layer in plan.values()})
    writer = _Writer(onnx, proto, plan)
    nodes: list[Any] = []
    for node in list(proto.graph.node):
        if node.name in plan:
            nodes.extend(writer.quantise(node, plan[node.name]))
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    missing = sorted(set(plan) - {node.name for node in nodes})
    if missing:
        raise QuantizationError(f"no node is named {missing[0]!r}")
    return writer.corrected


class _Writer:
    """Makes the nodes and initializers; remembers what exists already."""

    def __init__(self, onnx: Any, proto: Any, plan: Mapping[str, Layer]) -> None:
        self._onnx = onnx
        self._graph = proto.graph
        self._weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._readers: dict[str, list[Any]] = {}
        for node in proto.graph.node:
            for name in reads(node):
                self._readers.setdefault(name, []).append(node)
        self._results = {value.name for value in proto.graph.output}
        self._names = {name for node in proto.graph.node for name in (*reads(node), *node.output)}
        self.corrected = 0
        self._activations: dict[tuple[Any, ...], str] = {}
        self._stored: dict[tuple[Any, ...], str] = {}

    def quantise(self, node: Any, layer: Layer) -> Iterator[Any]:
        """Rewire one product; yields the nodes that must stand before it."""
        weight = self._weights.get(node.input[1])
        if weight is None:
            raise QuantizationError(f"{node.name}: {node.input[1]!r} is not a constant weight")
        prefix = self._prefix(node)
        yield from self._activation(node, layer, prefix)
        yield from self._weight(node, weight, layer, prefix)

    def _prefix(self, node: Any) -> str:
        """What the names of a node's new tensors begin with: its own name, unless one is taken."""
        prefix: str = node.name
        while any(
            name == f"{prefix}_bias" or name.startswith((f"{prefix}_x_", f"{prefix}_w_"))
            for name in self._names
        ):
            prefix += "_"
        return prefix

    def _activation(self, node: Any, layer: Layer, prefix: str) -> Iterator[Any]:
        source, smooth = node.input[0], layer.smooth
        key = (source, layer.precision, layer.amax, None if smooth is None else smooth.tobytes())
        if key in self._activations:
            node.input[0] = self._activations[key]
            return
        name = f"{prefix}_x"
        if smooth is not None:
            self._store(self._onnx.numpy_helper.from_array(smooth, f"{name}_smooth"))
            yield self._node("Mul", [source, f"{name}_smooth"], [f"{name}_smoothed"])
            source = f"{name}_smoothed"
        result = f"{name}_dq"
        if layer.precision == "mxfp8":
            yield from self._dynamic_mxfp8(source, name, result)
        else:
            scale = formats.activation_scale(layer.precision, layer.amax)
            self._store(self._onnx.numpy_helper.from_array(scale, f"{name}_scale"))
            if layer.precision == "nvfp4":
                yield from self._dynamic_nvfp4(source, name, result)
            else:
                zero = self._zero(layer.precision)
                yield self._node("QuantizeLinear", [source, f"{name}_scale", zero], [f"{name}_q"])
                yield self._node("DequantizeLinear", [f"{name}_q", f"{name}_scale", zero], [result])
        self._activations[key] = node.input[0] = result

    def _dynamic_nvfp4(self, source: str, name: str, result: str) -> Iterator[Any]:
        blocks = {"axis": -1, "block_size": formats.BLOCK["nvfp4"]}
        yield self._node(
            "TRT_FP4DynamicQuantize",
            [source, f"{name}_scale"],
            [f"{name}_f4", f"{name}_f8_scales"],
            domain=TRT,
            scale_type=self._onnx.TensorProto.FLOAT8E4M3FN,
            **blocks,
        )
        yield self._node(
            "DequantizeLinear", [f"{name}_f8_scales", f"{name}_scale"], [f"{name}_scales"]
        )
        yield self._node("DequantizeLinear", [f"{name}_f4", f"{name}_scales"], [result], **blocks)

    def _dynamic_mxfp8(self, source: str, name: str, result: str) -> Iterator[Any]:
        blocks = {"axis": -1, "block_size": formats.BLOCK["mxfp8"]}
        types = self._onnx.TensorProto
        yield self._node(
            "TRT_MXFP8DynamicQuantize",
            [source],
            [f"{name}_f8", f"{name}_scales"],
            domain=TRT,
            output_dtype=types.FLOAT8E4M3FN,
            **blocks,
        )
        yield self._mxfp8_back(f"{name}_f8", f"{name}_scales", result)

    def _mxfp8_back(self, values: str, scales: str, result: str) -> Any:
        return self._node(
            "TRT_MXFP8DequantizeLinear",
            [values, scales],
            [result],
            domain=TRT,
            axis=-1,
            block_size=formats.BLOCK["mxfp8"],
            output_dtype=self._onnx.TensorProto.FLOAT,
        )

    def _weight(self, node: Any, weight: Any, layer: Layer, prefix: str) -> Iterator[Any]:
        axis = layers.channel_axis(node, len(weight.dims))
        smooth = None if layer.smooth is None else layer.smooth.tobytes()
        key = (weight.name, layer.precision, axis, smooth)
        bias = None if layer.mean is None else self._bias(node, weight.dims[axis])
        if key not in self._stored or bias is not None:
            values = self._onnx.numpy_helper.to_array(weight).astype(np.float32)
            if layer.smooth is not None:
                values = values / (layer.smooth if axis == 0 else layer.smooth[:, None])
            if bias is not None:
                self._correct(*bias, f"{prefix}_bias", values, axis, layer)
        if key not in self._stored:
            self._stored[key] = result = f"{prefix}_w_dq"
            yield from self._stored_weight(f"{prefix}_w", values, axis, layer.precision, result)
        node.input[1] = self._stored[key]
        self._release(weight.name, node)

    def _bias(self, node: Any, channels: int) -> tuple[Any, int] | None:
        """The node that adds a product's constant bias, and which of its inputs that is."""
        if node.op_type == "MatMul":
            readers = self._readers.get(node.output[0], [])
            if len(readers) != 1 or node.output[0] in self._results:
                return None
            adder = readers[0]
            if adder.op_type != "Add":
                return None
            place = 1 if adder.input[0] == node.output[0] else 0
        else:
            adder, place = node, 2
            factors = {a.f for a in node.attribute if a.name in ("alpha", "beta")}
            if len(node.input) < 3 or factors - {1.0}:
                return None
        held = self._weights.get(adder.input[place])
        # Any other shape adds something else to each row, or the same to every channel.
        dims = [] if held is None else list(held.dims)
        return (adder, place) if dims[-1:] == [channels] == [np.prod(dims)] else None

    def _correct(
        self, adder: Any, place: int, fresh: str, values: np.ndarray, axis: int, layer: Layer
    ) -> None:
        """Give a product a bias of its own, without the mean error of its rounded weight."""
        assert layer.mean is not None
        mean = layer.mean if layer.smooth is None else layer.mean * layer.smooth
        error = formats.held(layer.precision, values, axis) - values
        name = adder.input[place]
        bias = self._onnx.numpy_helper.to_array(self._weights[name])
        fixed = bias - bias_correction.shift(error, mean, axis).reshape(bias.shape)
        self._store(self._onnx.numpy_helper.from_array(fixed.astype(bias.dtype), fresh))
        adder.input[place] = fresh
        self._release(name, adder)
        self.corrected += 1

    def _stored_weight(
        self, name: str, values: np.ndarray, axis: int, precision: str, result: str
    ) -> Iterator[Any]:
        if precision in ("int8", "fp8"):
            tensors = (formats.int8 if precision == "int8" else formats.fp8)(name, values, axis)
            yield self._node("DequantizeLinear", self._store(*tensors), [result], axis=axis)
            return
        back = result
        if axis != 0:
            values, back = np.ascontiguousarray(values.T), f"{name}_rows"
        if precision == "nvfp4":
            data, scales, overall = self._store(*formats.nvfp4(name, values))
            yield self._node("DequantizeLinear", [scales, overall], [f"{name}_scales"])
            yield self._node(
                "DequantizeLinear",
                [data, f"{name}_scales"],
                [back],
                axis=-1,
                block_size=formats.BLOCK["nvfp4"],
            )
        else:
            data, scales = self._store(*formats.mxfp8(name, values))
            yield self._mxfp8_back(data, scales, back)
        if axis != 0:
            yield self._node("Transpose", [back], [result], perm=[1, 0])

    def _zero(self, precision: str) -> str:
        """Name of a scalar zero point, which says the type; made once."""
        name, types = f"sn72_zero_{precision}", self._onnx.TensorProto
        if name not in self._weights:
            kind = types.INT8 if precision == "int8" else types.FLOAT8E4M3FN
            self._store(self._onnx.helper.make_tensor(name, kind, [], b"\0", raw=True))
        return name

    def _store(self, *tensors: Any) -> list[str]:
        for tensor in tensors:
            self._graph.initializer.append(tensor)
            self._weights[tensor.name] = tensor
            self._names.add(tensor.name)
        return [tensor.name for tensor in tensors]

    def _release(self, name: str, reader: Any) -> None:
        """Drop a float weight once its last reader has another; a graph's result stays."""
        self._readers[name].remove(reader)
        if self._readers[name] or name in self._results:
            return
        del self._weights[name]
        # Old files list weights among the inputs too.
        for held in (self._graph.initializer, self._graph.input):
            for index, tensor in enumerate(held):
                if tensor.name == name:
                    del held[index]
                    break

    def _node(self, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
        self._names.update(outputs)
        return self._onnx.helper.make_node(
            operator, inputs, outputs, name=f"{outputs[0]}_{operator}", **attributes
        )


def _raise_opset(onnx: Any, proto: Any, precisions: set[str]) -> None:
    opset.lift(proto, max((_OPSET[precision] for precision in precisions), default=0))
    if precisions & set(formats.BLOCK):
        proto.opset_import.append(onnx.helper.make_opsetid(TRT, 1))
    if "nvfp4" in precisions:
        proto.ir_version = max(proto.ir_version, _FP4_IR)
    # FP8 came with IR version 9.
    proto.ir_version = max(proto.ir_version, 9)
    # Shapes recorded for tensors between nodes stay true: no node changes its result's shape.
