"""Images -> the tensor a model takes: one definition for calibration, checks and serving.

Geometry, for a source of ``h`` x ``w`` pixels and an output of ``H`` x ``W``:

- ``center_crop``: the centred box of ``W*s`` x ``H*s`` source pixels, with
  ``s = crop_fraction * min(h/H, w/W)``, is resized to ``H`` x ``W``. The box may begin and end
  inside a pixel.
- ``squash``: the whole source is resized to ``H`` x ``W``.
- ``pad``: the whole source is resized by ``min(H/h, W/w)``, each side rounded to whole pixels,
  and centred (an odd remainder goes right and below); the border normalises to 0, which is what
  a border of colour ``mean`` would give.

Crop and resize are Pillow's resampler on 8-bit pixels: a horizontal pass, then a vertical one, each
rounded to 8 bits. Its filter is widened when it shrinks (antialiasing), reaches past the edge of
the box into real neighbours, and is cut off at the edge of the image. The result is normalised in
float32 as ``pixel * (1/std) + (-mean/std)``.

The passes are two calls because one call takes them in an order that depends on Pillow's version
(13 does the cheaper one first), and where a filter overshoots the order shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sn72engine import decode
from sn72engine.decode import Box, Decoded, DecodeLimits, Source
from sn72engine.errors import ImageError, InputError
from sn72engine.spec import Interpolation, Preprocess

Floats = NDArray[np.floating[Any]]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}

#: How far each filter reaches, in pixels of the source, or of the output where that is coarser.
_REACH = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0, "box": 0.5}


def preprocess(
    images: Source | Sequence[Source],
    spec: Preprocess,
    *,
    limits: DecodeLimits = decode.DEFAULT,
) -> Floats:
    """Decode, crop, resize and normalise images into one batch.

    Args:
        images: one source as :func:`sn72engine.decode.decode` takes it, a sequence of them (kinds
            and sizes may differ), or a uint8 array (N, H, W, C).
        spec: what to make of them.
        limits: what to refuse as too large.

    Returns:
        C-contiguous array (N, *spec.shape) of ``spec.dtype``; N is 0 for an empty sequence.

    Raises:
        ImageError: an image is refused; in a sequence the message begins with its index.
    """
    sources, single = as_sequence(images)
    batch = np.empty((len(sources), *spec.shape), spec.dtype)
    for index, (source, out) in enumerate(zip(sources, batch, strict=True)):
        try:
            preprocess_one(source, spec, out, limits=limits)
        except ImageError as error:
            if single:
                raise
            raise ImageError(f"image {index} of {len(sources)}: {error}") from error
    return batch


def preprocess_one(
    source: Source,
    spec: Preprocess,
    out: Floats | None = None,
    *,
    limits: DecodeLimits = decode.DEFAULT,
) -> Floats:
    """Decode, crop, resize and normalise one image into one sample.

    Args:
        source: what :func:`sn72engine.decode.decode` takes.
        spec: what to make of it.
        out: array of ``spec.shape`` and ``spec.dtype`` to write into; a new one when None.
        limits: what to refuse as too large.

    Returns:
        ``out``, or a new C-contiguous array of ``spec.shape`` and ``spec.dtype``.

    Raises:
        ImageError: the image is refused.
        InputError: ``out`` does not fit ``spec``.
    """
    out = _checked(out, spec)
    _fill(decode.decode_image(source, limits=limits, at_least=required_size(spec)), spec, out)
    return out


def transform(rgb: NDArray[np.uint8], spec: Preprocess, out: Floats | None = None) -> Floats:
    """Crop, resize and normalise one decoded image.

    Args:
        rgb: uint8 array (H, W, 3), upright, of any size.
        spec: what to make of it.
        out: array of ``spec.shape`` and ``spec.dtype`` to write into; a new one when None.

    Returns:
        ``out``, or a new C-contiguous array of ``spec.shape`` and ``spec.dtype``.

    Raises:
        ImageError: ``rgb`` is not a uint8 RGB image.
        InputError: ``out`` does not fit ``spec``.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ImageError(f"rgb has shape {rgb.shape}; expected (H, W, 3)")
    return preprocess_one(rgb, spec, out)


def required_size(spec: Preprocess) -> tuple[int, int] | None:
    """Smallest (height, width) of a source that is not enlarged, for ``decode(at_least=...)``.

    A centre crop with ``crop_fraction`` f keeps f of the source, so the source must be 1/f as
    large as the output. None, for decoding at full size, when ``spec.draft`` is off and for
    ``nearest``: that picks single pixels, and a decoder that scales would average them.
    """
    if not spec.draft or spec.interpolation == "nearest":
        return None
    kept = spec.crop_fraction if spec.fit == "center_crop" else 1.0
    return math.ceil(spec.height / kept), math.ceil(spec.width / kept)


def as_sequence(images: Source | Sequence[Source]) -> tuple[Sequence[Source], bool]:
    """The sources, and whether they were one rather than a sequence."""
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return cast("Sequence[Source]", images), False
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview)):
        return images, False
    return [cast("Source", images)], True


def scale_and_bias(spec: Preprocess) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``1/std`` and ``-mean/std`` per channel, for ``pixel * scale + bias`` in float32."""
    std = np.array(spec.std, np.float64)
    bias = -np.array(spec.mean, np.float64) / std
    return (1.0 / std).astype(np.float32), bias.astype(np.float32)


def _checked(out: Floats | None, spec: Preprocess) -> Floats:
    if out is None:
        return np.empty(spec.shape, spec.dtype)
    if out.shape != spec.shape or out.dtype != spec.dtype:
        raise InputError(
            f"out is {out.dtype}{list(out.shape)}; this preprocessing gives "
            f"{spec.dtype}{list(spec.shape)}"
        )
    return out


def _fill(decoded: Decoded, spec: Preprocess, out: Floats) -> None:
    """Crop, resize and normalise a decoded image into ``out``."""
    box, height, width, inner = decoded.area, spec.height, spec.width, out
    if spec.fit == "center_crop":
        box = _cropped(box, spec)
    elif spec.fit == "pad":
        height, width = _fitted(box, spec)
        top, left = (spec.height - height) // 2, (spec.width - width) // 2
        rows, columns = slice(top, top + height), slice(left, left + width)
        out[...] = 0
        inner = out[:, rows, columns] if spec.layout == "nchw" else out[rows, columns]
    resized = _resized(decoded.image, box, height, width, spec.interpolation)
    _normalise(np.asarray(resized), spec, inner)


def _resized(
    image: Image.Image, box: Box, height: int, width: int, interpolation: Interpolation
) -> Image.Image:
    """The box of an image at another size: across first, then down."""
    resample = _FILTERS[interpolation]
    if interpolation == "nearest":
        return image.resize((width, height), resample, box=box)
    left, top, right, bottom = box
    # Only the rows that the second pass reads; one more for the rounding of the box.
    reach = _REACH[interpolation] * max((bottom - top) / height, 1.0) + 1.0
    first, last = max(math.floor(top - reach), 0), min(math.ceil(bottom + reach), image.height)
    if last - first < image.height:
        image = image.crop((0, first, image.width, last))
    across = image.resize((width, last - first), resample, box=(left, 0, right, last - first))
    return across.resize((width, height), resample, box=(0, top - first, width, bottom - first))


def _cropped(area: Box, spec: Preprocess) -> Box:
    """The centred box that keeps the output's aspect ratio and ``crop_fraction`` of ``area``."""
    left, top, right, bottom = area
    scale = spec.crop_fraction * min((bottom - top) / spec.height, (right - left) / spec.width)
    cut_across = (right - left - spec.width * scale) / 2
    cut_down = (bottom - top - spec.height * scale) / 2
    # Rounding may make a cut of 0 slightly negative, and Pillow refuses to leave the image.
    cut_across, cut_down = max(cut_across, 0.0), max(cut_down, 0.0)
    return left + cut_across, top + cut_down, right - cut_across, bottom - cut_down


def _fitted(area: Box, spec: Preprocess) -> tuple[int, int]:
    """Height and width of ``area`` scaled to lie inside the output, at least 1 x 1."""
    left, top, right, bottom = area
    scale = min(spec.height / (bottom - top), spec.width / (right - left))
    return (
        min(max(round((bottom - top) * scale), 1), spec.height),
        min(max(round((right - left) * scale), 1), spec.width),
    )


def _normalise(pixels: NDArray[np.uint8], spec: Preprocess, out: Floats) -> None:
    """Write ``(pixels - mean) / std`` into ``out``, which has ``spec.layout``."""
    scale, bias = scale_and_bias(spec)
    target = out if spec.layout == "nhwc" else out.transpose(1, 2, 0)
    for channel in range(3):
        plane = pixels[:, :, channel] * scale[channel]
        # float16 rounds once, here; a value beyond its range becomes infinite as in any cast.
        np.add(plane, bias[channel], out=target[:, :, channel], casting="same_kind")
