"""Rewrite a float32 ONNX file to compute in float16, for runtimes that take types as written."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sn72engine import _deps, onnx_file
from sn72engine.errors import BuildError

#: Largest finite float16, and the smallest positive one: a scale must not round to zero.
_LARGEST = 65504.0
_SMALLEST = 2.0**-24

#: Weights from this size on are converted apart from the graph.
_LARGE_BYTES = 1 << 16

#: First operator set whose QuantizeLinear and DequantizeLinear take float16 scales.
_QDQ_OPSET = 19


def to_half(source: Path, target: Path) -> tuple[str, ...]:
    """Write ``source`` to ``target`` with float16 arithmetic and float32 inputs and outputs.

    Weights and scales are rounded to float16, held within its finite range and away from zero.
    Operators that ONNX defines on float32 only (resizing scales, for one) keep float32 between
    casts. In a Q/DQ file the part that is not quantised turns to float16; the 8-bit values keep
    their scales, rounded.

    Args:
        source: float32 ONNX file, with any external weights beside it.
        target: file to write; large weights go to a second file beside it.

    Returns:
        Remarks for the manifest.

    Raises:
        BuildError: the file cannot be converted, or its types do not check afterwards.
    """
    onnx = _deps.require("onnx", purpose="convert a model to float16")
    float16 = _deps.require(
        "onnxconverter_common", purpose="convert a model to float16", submodule="float16"
    )
    proto = onnx_file.load(source)
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    quantised = any(node.op_type == "DequantizeLinear" for node in proto.graph.node)
    if quantised and opset < _QDQ_OPSET:
        raise BuildError(
            f"{source.name}: opset {opset} has no float16 scales for Q/DQ nodes; export with "
            f"opset {_QDQ_OPSET} or later"
        )
    # The converter tells casts apart by the names of the nodes they feed.
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_unnamed_{index}"
    beyond = _beyond_range(onnx, proto)
    # The converter copies the whole model several times; only the types matter to it.
    large = _set_aside(proto)
    with warnings.catch_warnings():
        # It warns of every tensor with a tiny value, of which trained weights are full.
        warnings.simplefilter("ignore")
        try:
            proto = float16.convert_float_to_float16(
                proto,
                keep_io_types=True,
                min_positive_val=_SMALLEST,
                max_finite_val=_LARGEST,
            )
            _put_back(onnx, float16, proto, large)
            _dequantise_to_half(onnx, proto)
            beyond &= _stored_as(onnx.TensorProto.FLOAT16, proto)
            # Shapes recorded for float32 tensors are stale now; readers infer them again.
            del proto.graph.value_info[:]
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise BuildError(
                f"{source.name}: cannot be converted to float16 ({error}); export the module in "
                "float16 (module.half()) or build with precision='fp32'"
            ) from error
    onnx_file.write(proto, target)
    del proto
    checked = target.with_suffix(".checked")
    try:
        onnx.shape_inference.infer_shapes_path(target, checked, check_type=True, strict_mode=True)
    except Exception as error:  # onnx raises several unrelated types here
        raise BuildError(
            f"{source.name}: its float16 form does not type-check ({error}); export the module "
            "in float16 (module.half()) or build with precision='fp32'"
        ) from error
    finally:
        checked.unlink(missing_ok=True)
    notes = ["weights and arithmetic converted to float16; inputs and outputs stay float32"]
    if beyond:
        notes.append(
            f"{len(beyond)} weight tensors exceed float16's range and were held at 65504: "
            f"{', '.join(sorted(beyond)[:3])}"
        )
    return tuple(notes)


def _set_aside(proto: Any) -> dict[str, bytes]:
    """Take the data of large weights out of the graph, which keeps their types and shapes."""
    large = {}
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) >= _LARGE_BYTES:
            large[tensor.name] = tensor.raw_data
            tensor.ClearField("raw_data")
    return large


def _put_back(onnx: Any, float16: Any, proto: Any, large: dict[str, bytes]) -> None:
    """Fill in what :func:`_set_aside` took, one by one, as the type that each has become."""
    for tensor in proto.graph.initializer:
        data = large.pop(tensor.name, None)
        if data is None:
            continue
        if tensor.data_type == onnx.TensorProto.FLOAT16 and len(data) == 4 * math.prod(tensor.dims):
            values = np.frombuffer(data, np.float32)
            data = float16.convert_np_to_float16(values, _SMALLEST, _LARGEST).tobytes()
        tensor.raw_data = data


def _dequantise_to_half(onnx: Any, proto: Any) -> None:
    """Let TensorRT's own operators that name the type of their result name float16."""
    for node in proto.graph.node:
        if node.op_type == "TRT_MXFP8DequantizeLinear":
            for attribute in node.attribute:
                if attribute.name == "output_dtype":
                    attribute.i = onnx.TensorProto.FLOAT16


def _stored_as(kind: int, proto: Any) -> set[str]:
    """Names of the weights of a type."""
    return {tensor.name for tensor in proto.graph.initializer if tensor.data_type == kind}


def _beyond_range(onnx: Any, proto: Any) -> set[str]:
    """Names of float32 weights that hold a finite value larger than float16 can."""
    names = set()
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if (np.isfinite(values) & (np.abs(values) > _LARGEST)).any():
            names.add(tensor.name)
    return names
