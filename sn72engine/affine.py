"""The arithmetic of 8-bit quantisation: real = scale * (integer - zero)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: Steps between the smallest and the largest 8-bit integer.
STEPS = 255

#: A tensor that is 0 (or nearly) throughout gets this scale; a smaller one would make the int32
#: biases of the layers that read it overflow.
SMALLEST_SCALE = 1e-8

#: Largest int32 magnitude a bias may take, with room for the sum of products on top of it.
BIAS_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Affine:
    """Scale and zero point of a uint8 tensor."""

    scale: np.float32
    zero: int

    @property
    def low(self) -> float:
        """Smallest real value that can be held."""
        return float(self.scale) * (0 - self.zero)

    @property
    def high(self) -> float:
        """Largest real value that can be held."""
        return float(self.scale) * (STEPS - self.zero)


def covering(low: float, high: float) -> Affine:
    """uint8 parameters whose values cover [low, high] to within half a step, and hold 0 exactly.

    A range on one side of 0 is stretched to 0: padding and ReLU need it.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / STEPS, SMALLEST_SCALE)
    zero = int(np.clip(np.rint(-low / scale), 0, STEPS))
    return Affine(np.float32(scale), zero)


def inside(low: float, high: float) -> Affine:
    """uint8 parameters none of whose values lies outside [low, high]; low <= 0 <= high.

    Quantising then clips at least as much as ``Clip(low, high)`` does, which lets ONNX Runtime
    drop the Clip. At most two steps are lost, at one end.
    """
    if high - low <= SMALLEST_SCALE * STEPS:
        return covering(low, high)
    exact = STEPS * -low / (high - low)
    scale, zero = max((_widest(low, high, z), z) for z in {math.floor(exact), math.ceil(exact)})
    while float(scale) * (STEPS - zero) > high or float(scale) * -zero < low:
        scale = np.nextafter(scale, np.float32(0))
    return Affine(scale, zero)


def _widest(low: float, high: float, zero: int) -> np.float32:
    """Largest scale with which a zero point stays inside [low, high]."""
    ends = [-low / zero] if zero > 0 else []
    if zero < STEPS:
        ends.append(high / (STEPS - zero))
    return np.float32(min(ends))


def quantize_weight(
    weight: np.ndarray, scale: np.ndarray, axis: int, zero: np.ndarray | None = None
) -> np.ndarray:
    """Integers of a weight: rounded half to even and saturated, as QuantizeLinear does.

    Args:
        weight: float array.
        scale: a scalar, or one value per index of ``axis``.
        axis: the output channel's.
        zero: zero points of the integer type wanted, shaped like ``scale``; None for int8 0.
    """
    zero = np.zeros(scale.shape, np.int8) if zero is None else zero
    limits = np.iinfo(zero.dtype)
    integers = np.rint(weight / along(scale, weight.ndim, axis)) + along(zero, weight.ndim, axis)
    clipped: np.ndarray = np.clip(integers, limits.min, limits.max)
    return clipped.astype(zero.dtype)


def quantize_bias(
    bias: np.ndarray, input_scale: np.float32, weight_scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """int32 bias in units of ``input_scale * weight_scale``, and the weight scale it needs.

    A channel whose bias is too large for int32 in these units (its weights are next to nothing
    beside it) gets a larger weight scale; the caller requantises the weight where it differs.

    Args:
        bias: float, one value per output channel.
        input_scale: of the activation.
        weight_scale: scalar or one value per output channel.

    Returns:
        The bias, int32, and the weight scales, float32, one per channel.
    """
    scales = np.broadcast_to(weight_scale, bias.shape).astype(np.float32)
    least = np.abs(bias.astype(np.float64)) / (float(input_scale) * BIAS_LIMIT)
    scales = np.where(scales < least, least, scales).astype(np.float32)
    units = float(input_scale) * scales.astype(np.float64)
    return np.rint(bias.astype(np.float64) / units).astype(np.int32), scales


def along(values: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    """Reshape per-channel values so that they broadcast along ``axis``; a scalar stays."""
    if values.ndim == 0:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
