"""Where every output pixel comes from, and with which weights: the filters of Pillow's resampler.

A filter of support s is widened by the shrinking factor, centred on the output pixel, cut off at
the edge of the image, and normalised; weights are 22-bit fixed-point numbers, so that sums of
8-bit pixels are exact integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sn72kernels.errors import ArgumentError

PRECISION = 22  # 32 bits less 8 of the pixel, 1 of the sign and 1 for weights above one

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Geometry:
    """A crop and a resize.

    Attributes:
        box: left, top, right, bottom in source pixels; may begin and end inside a pixel.
        height: rows of the resized box.
        width: columns of the resized box.
        top: rows of border above it in the output.
        left: columns of border left of it.
    """

    box: tuple[float, float, float, float]
    height: int
    width: int
    top: int = 0
    left: int = 0


def check_fit(fit: str, crop_fraction: float) -> None:
    """Check what the caller says of the fit.

    Raises:
        ArgumentError: another ``fit``, or a ``crop_fraction`` outside (0, 1].
    """
    if fit not in ("center_crop", "squash", "pad"):
        raise ArgumentError(f"fit is {fit!r}; give 'center_crop', 'squash' or 'pad'")
    if not 0.0 < crop_fraction <= 1.0:
        raise ArgumentError(f"crop_fraction is {crop_fraction}; give a number in (0, 1]")


def place(
    source: tuple[int, int], size: tuple[int, int], fit: str, crop_fraction: float
) -> Geometry:
    """Geometry for an image of ``source`` (height, width) and an output of ``size``.

    Args:
        source: height and width of the image.
        size: height and width of the output.
        fit: as :func:`check_fit` takes it. ``"center_crop"``: the centred box with the output's
            aspect ratio and ``crop_fraction`` of the largest such box; ``"squash"``: the whole
            image; ``"pad"``: the whole image, scaled to lie inside the output, centred.
        crop_fraction: likewise.
    """
    (h, w), (height, width) = source, size
    if fit == "squash":
        return Geometry((0.0, 0.0, float(w), float(h)), height, width)
    if fit == "pad":
        scale = min(height / h, width / w)
        inner = min(max(round(h * scale), 1), height), min(max(round(w * scale), 1), width)
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        return Geometry((0.0, 0.0, float(w), float(h)), *inner, top, left)
    scale = crop_fraction * min(h / height, w / width)
    # Rounding may make a cut of 0 slightly negative, which would leave the image.
    across, down = max((w - width * scale) / 2, 0.0), max((h - height * scale) / 2, 0.0)
    return Geometry((across, down, w - across, h - down), height, width)


def _bilinear(x: Doubles) -> Doubles:
    size = np.abs(x)
    return np.where(size < 1.0, 1.0 - size, 0.0)


def _bicubic(x: Doubles) -> Doubles:
    """Keys 1981 with a = -1/2."""
    a, s = -0.5, np.abs(x)
    inner = ((a + 2.0) * s - (a + 3.0)) * s * s + 1.0
    outer = (((s - 5.0) * s + 8.0) * s - 4.0) * a
    return np.where(s < 1.0, inner, np.where(s < 2.0, outer, 0.0))


FILTERS: dict[str, tuple[Callable[[Doubles], Doubles], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
}


@dataclass(frozen=True, eq=False, slots=True)
class Taps:
    """Where the pixels of one axis come from; on the device of the images.

    Attributes:
        first: int32 (size,), first source pixel of every output pixel.
        weights: int32 (size, most taps), fixed point, zero past an output pixel's own taps.
    """

    first: torch.Tensor
    weights: torch.Tensor


def taps(images: torch.Tensor, where: Geometry, interpolation: str) -> tuple[Taps, Taps]:
    """Taps of the columns and of the rows, computed once for each geometry and device.

    Args:
        images: shape (N, h, w, 3).
        where: crop and resize.
        interpolation: a key of :data:`FILTERS`.
    """
    _, h, w, _ = images.shape
    left, top, right, bottom = where.box
    across = axis_taps(w, left, right, where.width, interpolation, images.device)
    down = axis_taps(h, top, bottom, where.height, interpolation, images.device)
    _keep((across.first, across.weights, down.first, down.weights))
    return across, down


# What a captured graph reads: it holds addresses, not tensors, and lives as long as it likes.
_captured: dict[int, torch.Tensor] = {}


def _keep(weights: Sequence[torch.Tensor]) -> None:
    """Let no memory of ``weights`` be used again before what is launched next is over.

    They are dropped when many other geometries came by, perhaps while another stream reads them.
    """
    if not weights[0].is_cuda:
        return
    if torch.cuda.is_current_stream_capturing():
        _captured.update((id(tensor), tensor) for tensor in weights)
        return
    stream = torch.cuda.current_stream(weights[0].device)
    for tensor in weights:
        tensor.record_stream(stream)


@functools.lru_cache(maxsize=256)
def axis_taps(
    source: int, begin: float, end: float, size: int, interpolation: str, device: torch.device
) -> Taps:
    """Taps along one axis, remembered for the next image of this geometry.

    Args:
        source: pixels of the image.
        begin: where the box begins.
        end: where it ends.
        size: pixels of the output.
        interpolation: a key of :data:`FILTERS`.
        device: where the result goes.
    """
    function, support = FILTERS[interpolation]
    # Pillow keeps the box, and its length, in float32.
    edges = np.array((begin, end), np.float32)
    scale = float(edges[1] - edges[0]) / size
    widened = max(scale, 1.0)
    support *= widened
    count = math.ceil(support) * 2 + 1
    centre = float(edges[0]) + (np.arange(size) + 0.5) * scale
    # As a C conversion to int does: towards zero, then into the image.
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), source)
    tap = np.arange(count)
    inside = tap < (last - first)[:, None]
    at = (tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / widened)
    weights = np.where(inside, function(at), 0.0)
    total = np.zeros(size)
    for column in range(count):  # in order, as the rounding of a sum depends on it
        total += weights[:, column]
    weights = np.where((total != 0.0)[:, None], weights / total[:, None], weights)
    fixed = np.trunc(weights * (1 << PRECISION) + np.where(weights < 0.0, -0.5, 0.5))
    return Taps(
        torch.from_numpy(first.astype(np.int32)).to(device),
        torch.from_numpy(fixed.astype(np.int32)).to(device),
    )
