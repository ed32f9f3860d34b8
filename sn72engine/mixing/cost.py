"""What a layer costs in each format: bytes of weights, and time by the roofline model.

The model takes a product for as long as its arithmetic lasts at the card's peak rate or as its
traffic lasts at the card's memory bandwidth, whichever is longer (Williams, Waterman and Patterson,
2009). Traffic is the weight and the input once in their format, and the output once in 16 bits.
Real kernels reach a part of the peak, so that the times are lower bounds: they rank layers and
formats. Measured times serve better where they can be had; :func:`sn72engine.mixing.mix` takes
them as ``costs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from sn72engine.errors import QuantizationError
from sn72engine.introspection.onnx_graph import tensor_types
from sn72engine.layers import channel_axis
from sn72engine.spec import QuantizedPrecision

#: Bytes per element, scales of blocks included. Float layers are computed in 16 bits.
BYTES: dict[str, float] = {
    "float": 2.0,
    "int8": 1.0,
    "fp8": 1.0,
    "mxfp8": 1.0 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
}


@dataclass(frozen=True, slots=True)
class Card:
    """Peak figures of a GPU, from its vendor's data sheets; rates without sparsity.

    Attributes:
        name: of the product.
        bandwidth: of its memory, in 10^12 bytes per second.
        rates: format to 10^12 operations per second, with float32 accumulation.
    """

    name: str
    bandwidth: float
    rates: Mapping[str, float]

    @property
    def formats(self) -> tuple[QuantizedPrecision, ...]:
        """Quantised formats that it computes in."""
        return tuple(cast(QuantizedPrecision, name) for name in self.rates if name != "float")


CARDS: dict[str, Card] = {
    "rtx4090": Card("GeForce RTX 4090", 1.008, {"float": 165.2, "int8": 660.6, "fp8": 330.3}),
    "rtx5090": Card(
        "GeForce RTX 5090",
        1.792,
        {"float": 209.5, "int8": 838.0, "fp8": 419.0, "mxfp8": 419.0, "nvfp4": 1676.0},
    ),
    "h100": Card("H100 SXM", 3.35, {"float": 989.4, "int8": 1978.9, "fp8": 1978.9}),
    "h200": Card("H200 SXM", 4.8, {"float": 989.4, "int8": 1978.9, "fp8": 1978.9}),
    "b200": Card(
        "B200",
        8.0,
        {"float": 2250.0, "int8": 4500.0, "fp8": 4500.0, "mxfp8": 4500.0, "nvfp4": 9000.0},
    ),
}


@dataclass(frozen=True, slots=True)
class Product:
    """Size of one matrix product or convolution, in elements.

    Attributes:
        weight, input, output: of the tensors, for a whole batch; None where the graph does not
            tell the shapes.
        depth: how many products each output element sums.
    """

    weight: int
    input: int | None
    output: int | None
    depth: int

    def bytes(self, precision: str) -> float:
        """Bytes of the weight in a format."""
        return self.weight * BYTES[precision]

    def seconds(self, precision: str, card: Card) -> float:
        """Modelled time in a format; see this module.

        Raises:
            QuantizationError: a shape is not known.
        """
        if self.input is None or self.output is None:
            raise QuantizationError(
                "the graph does not tell the shape of every product, so that its latency cannot "
                "be modelled; use minimise='bytes', or give costs"
            )
        operations = 2 * self.output * self.depth
        traffic = self.bytes(precision) + self.input * BYTES[precision] + 2 * self.output
        return max(operations / card.rates[precision], traffic / card.bandwidth) / 1e12


def products(proto: Any, batch: int) -> dict[str, Product]:
    """Size of every node with a constant two- or more-dimensional second input.

    Args:
        proto: with names for its nodes; weights need not be loaded. Its free first input axis is
            set to ``batch``.
        batch: samples per call.

    Returns:
        Node name to size.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        axes = value.type.tensor_type.shape.dim
        if value.name not in weights and axes and not axes[0].HasField("dim_value"):
            axes[0].dim_value = batch
    # Shapes that the exporter noted would keep the name of the free axis.
    del proto.graph.value_info[:]
    shapes = {name: shape for name, (_, shape) in tensor_types(proto).items()}
    found = {}
    for node in proto.graph.node:
        shape = weights.get(node.input[1], ()) if len(node.input) > 1 else ()
        if node.op_type in ("Conv", "Gemm", "MatMul") and len(shape) > 1:
            size = math.prod(shape)
            found[node.name] = Product(
                size,
                _elements(shapes.get(node.input[0])),
                _elements(shapes.get(node.output[0])),
                size // shape[channel_axis(node, len(shape))],
            )
    return found


def _elements(shape: tuple[int | str, ...] | None) -> int | None:
    if shape is None:
        return None
    sizes = [axis for axis in shape if isinstance(axis, int)]
    return math.prod(sizes) if len(sizes) == len(shape) else None
