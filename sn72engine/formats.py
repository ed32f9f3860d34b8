"""Weights in the number formats of quantised engines, as ONNX tensors.

INT8 is symmetric with one scale per output channel; FP8 is e4m3 with the same scales. NVFP4 and
MXFP8 store blocks along the axis that a product sums over, as defined in
:mod:`sn72kernels.ops.quantize_blocks.reference`, whose bits these are.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from sn72engine import _deps, affine

#: Largest magnitudes of the element types.
E2M1_MAX, E4M3_MAX = 6.0, 448.0

#: Largest magnitude of each format that has one scale per tensor or channel.
LARGEST = {"int8": 127.0, "fp8": E4M3_MAX}

#: Elements that share a scale, in the formats that scale by block.
BLOCK = {"nvfp4": 16, "mxfp8": 32}

#: Code of e8m0 that stands for 1.
E8M0_BIAS = 127


def activation_scale(precision: str, amax: float) -> np.ndarray:
    """Scale of a whole activation tensor, float32 (), that lets ``amax`` just fit.

    For NVFP4 it is the float32 scale that its block scales are relative to.
    """
    largest = E2M1_MAX * E4M3_MAX if precision == "nvfp4" else LARGEST[precision]
    return np.array(max(amax / largest, affine.SMALLEST_SCALE), np.float32)


def int8(name: str, weight: np.ndarray, axis: int) -> list[Any]:
    """Integers, scales and zero points, with one scale per index of ``axis``.

    Args:
        name: that the names of the tensors begin with.
        weight: float32.
        axis: of the output channel.

    Returns:
        TensorProtos in the order in which DequantizeLinear takes them.
    """
    onnx = _deps.require("onnx", purpose="quantise a model")
    scales = _channel_scales(weight, axis, LARGEST["int8"])
    integers = affine.quantize_weight(weight, scales, axis)
    return [
        onnx.numpy_helper.from_array(integers, f"{name}_i8"),
        onnx.numpy_helper.from_array(scales, f"{name}_scale"),
        onnx.numpy_helper.from_array(np.zeros(scales.shape, np.int8), f"{name}_zero"),
    ]


def fp8(name: str, weight: np.ndarray, axis: int) -> list[Any]:
    """As :func:`int8`, in e4m3; values beyond the range saturate."""
    onnx = _deps.require("onnx", purpose="quantise a model")
    scales = _channel_scales(weight, axis, E4M3_MAX)
    codes = to_e4m3(weight / affine.along(scales, weight.ndim, axis))
    kind = onnx.TensorProto.FLOAT8E4M3FN
    return [
        onnx.helper.make_tensor(f"{name}_f8", kind, weight.shape, codes.tobytes(), raw=True),
        onnx.numpy_helper.from_array(scales, f"{name}_scale"),
        onnx.helper.make_tensor(f"{name}_zero", kind, scales.shape, bytes(scales.size), raw=True),
    ]


def nvfp4(name: str, weight: np.ndarray) -> list[Any]:
    """e2m1 values, e4m3 scales of blocks of 16 along the last axis, and the float32 scale.

    Args:
        name: that the names of the tensors begin with.
        weight: float32, shape (channels, inputs) with inputs a multiple of 16.

    Returns:
        TensorProtos of shapes (channels, inputs), (channels, inputs / 16) and ().
    """
    onnx = _deps.require("onnx", purpose="quantise a model")
    torch, blockwise = _torch_and_blocks()
    values = torch.from_numpy(weight)
    overall = blockwise.global_scale_of(values)
    codes, scales = blockwise.quantize_nvfp4(values, overall)
    blocks = (weight.shape[0], weight.shape[1] // BLOCK["nvfp4"])
    types = onnx.TensorProto
    return [
        onnx.helper.make_tensor(
            f"{name}_f4", types.FLOAT4E2M1, weight.shape, codes.numpy().tobytes(), raw=True
        ),
        onnx.helper.make_tensor(
            f"{name}_block_scale", types.FLOAT8E4M3FN, blocks, _bytes(torch, scales), raw=True
        ),
        onnx.numpy_helper.from_array(overall.numpy(), f"{name}_scale"),
    ]


def mxfp8(name: str, weight: np.ndarray) -> list[Any]:
    """e4m3 values and the e8m0 scales, as uint8, of blocks of 32 along the last axis.

    Args:
        name: that the names of the tensors begin with.
        weight: float32, shape (channels, inputs) with inputs a multiple of 32.

    Returns:
        TensorProtos of shapes (channels, inputs) and (channels, inputs / 32).
    """
    onnx = _deps.require("onnx", purpose="quantise a model")
    torch, blockwise = _torch_and_blocks()
    values, scales = blockwise.quantize_mxfp8(torch.from_numpy(weight))
    kind = onnx.TensorProto.FLOAT8E4M3FN
    return [
        onnx.helper.make_tensor(f"{name}_f8", kind, weight.shape, _bytes(torch, values), raw=True),
        onnx.numpy_helper.from_array(scales.view(torch.uint8).numpy(), f"{name}_block_scale"),
    ]


def held(precision: str, weight: np.ndarray, axis: int) -> np.ndarray:
    """What a weight is once it was stored: float32, in the shape of ``weight``.

    Args:
        precision: number format.
        weight: float32; with two axes for the formats that scale by block.
        axis: of the output channel; blocks lie along the other one.
    """
    torch, blockwise = _torch_and_blocks()
    if precision in BLOCK:
        values = torch.from_numpy(np.ascontiguousarray(weight if axis == 0 else weight.T))
        if precision == "nvfp4":
            overall = blockwise.global_scale_of(values)
            codes, scales = blockwise.quantize_nvfp4(values, overall)
            values = blockwise.dequantize_nvfp4(codes, scales, overall, torch.float32)
        else:
            values = blockwise.dequantize_mxfp8(*blockwise.quantize_mxfp8(values), torch.float32)
        rounded: np.ndarray = values.numpy()
        return rounded if axis == 0 else rounded.T
    scales = _channel_scales(weight, axis, LARGEST[precision])
    along = affine.along(scales, weight.ndim, axis)
    if precision == "int8":
        codes = affine.quantize_weight(weight, scales, axis)
    else:
        codes = torch.from_numpy(to_e4m3(weight / along)).view(torch.float8_e4m3fn).float().numpy()
    found: np.ndarray = codes * along
    return found


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Codes, uint8, of the nearest e4m3 numbers: half to even, saturated at 448."""
    torch = _deps.require("torch", purpose="quantise a model")
    held = torch.from_numpy(np.ascontiguousarray(values, np.float32)).clamp(-E4M3_MAX, E4M3_MAX)
    codes: np.ndarray = held.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return codes


def _channel_scales(weight: np.ndarray, axis: int, largest: float) -> np.ndarray:
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales: np.ndarray = np.maximum(np.abs(weight).max(others) / largest, affine.SMALLEST_SCALE)
    return scales.astype(np.float32)


def _torch_and_blocks() -> tuple[Any, ModuleType]:
    """PyTorch and the definition of the block formats, which imports it: seconds, so not before."""
    torch = _deps.require("torch", purpose="quantise a model")
    from sn72kernels.ops.quantize_blocks import reference

    return torch, reference


def _bytes(torch: Any, codes: Any) -> bytes:
    data: bytes = codes.contiguous().view(torch.uint8).numpy().tobytes()
    return data
