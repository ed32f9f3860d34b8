"""Images -> the tensor a model takes: one definition for calibration, checks and serving.

Geometry, for a source of ``h`` x ``w`` pixels and an output of ``H`` x ``W``:

- ``center_crop``: the centred box of ``W*s`` x ``H*s`` source pixels, with
  ``s = crop_fraction * min(h/H, w/W)``, is resized to ``H`` x ``W``. The box may begin and end
  inside a pixel.
- ``squash``: the whole source is resized to ``H`` x ``W``.
- ``pad``: the whole source is resized by ``min(H/h, W/w)``, each side rounded to whole pixels,
  and centred (an odd remainder goes right and below); the border normalises to 0, which is what
  a border of colour ``mean`` would give.

Crop and resize are one pass of Pillow's resampler on 8-bit pixels. Its filter is widened when it
shrinks (antialiasing), reaches past the edge of the box into real neighbours, and is cut off at
the edge of the image. The result is rounded to 8 bits, and then normalised in float32 as
``pixel * (1/std) + (-mean/std)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sn72engine import decode
from sn72engine.decode import DecodeLimits, Source
from sn72engine.errors import ImageError, InputError
from sn72engine.spec import Preprocess

Floats = NDArray[np.floating[Any]]
Box = tuple[float, float, float, float]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


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
    sources, single = _as_sequence(images)
    batch = np.empty((len(sources), *spec.shape), spec.dtype)
    at_least = required_size(spec)
    for index, (source, out) in enumerate(zip(sources, batch, strict=True)):
        try:
            _fill(decode.decode_image(source, limits=limits, at_least=at_least), spec, out)
        except ImageError as error:
            if single:
                raise
            raise ImageError(f"image {index} of {len(sources)}: {error}") from error
    return batch


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
    if out is None:
        out = np.empty(spec.shape, spec.dtype)
    elif out.shape != spec.shape or out.dtype != spec.dtype:
        raise InputError(
            f"out is {out.dtype}{list(out.shape)}; this preprocessing gives "
            f"{spec.dtype}{list(spec.shape)}"
        )
    _fill(decode.decode_image(rgb), spec, out)
    return out


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


def _as_sequence(images: Source | Sequence[Source]) -> tuple[Sequence[Source], bool]:
    """The sources, and whether they were one rather than a sequence."""
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return cast("Sequence[Source]", images), False
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview)):
        return images, False
    return [cast("Source", images)], True


def _fill(image: Image.Image, spec: Preprocess, out: Floats) -> None:
    """Crop, resize and normalise an RGB image into ``out``."""
    if spec.fit == "pad":
        height, width = _fitted(image.height, image.width, spec)
        top, left = (spec.height - height) // 2, (spec.width - width) // 2
        rows, columns = slice(top, top + height), slice(left, left + width)
        out[...] = 0
        inner = out[:, rows, columns] if spec.layout == "nchw" else out[rows, columns]
        box: Box = (0.0, 0.0, float(image.width), float(image.height))
    else:
        height, width, inner = spec.height, spec.width, out
        box = _box(image.height, image.width, spec)
    resized = image.resize((width, height), _FILTERS[spec.interpolation], box=box)
    _normalise(np.asarray(resized), spec, inner)


def _box(height: int, width: int, spec: Preprocess) -> Box:
    """Part of the source that is kept: left, top, right, bottom in source pixels."""
    if spec.fit != "center_crop":
        return 0.0, 0.0, float(width), float(height)
    scale = spec.crop_fraction * min(height / spec.height, width / spec.width)
    # Rounding may carry a full-size box past the edge, which Pillow refuses.
    kept_height = min(spec.height * scale, float(height))
    kept_width = min(spec.width * scale, float(width))
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, min(left + kept_width, float(width)), min(top + kept_height, float(height))


def _fitted(height: int, width: int, spec: Preprocess) -> tuple[int, int]:
    """Size of the whole source scaled to lie inside the output, at least 1 x 1."""
    scale = min(spec.height / height, spec.width / width)
    return (
        min(max(round(height * scale), 1), spec.height),
        min(max(round(width * scale), 1), spec.width),
    )


def _normalise(pixels: NDArray[np.uint8], spec: Preprocess, out: Floats) -> None:
    """Write ``(pixels - mean) / std`` into ``out``, which has ``spec.layout``."""
    std = np.array(spec.std, np.float64)
    scale = (1.0 / std).astype(np.float32)
    bias = (-np.array(spec.mean, np.float64) / std).astype(np.float32)
    target = out if spec.layout == "nhwc" else out.transpose(1, 2, 0)
    for channel in range(3):
        plane = pixels[:, :, channel] * scale[channel]
        # float16 rounds once, here; a value beyond its range becomes infinite as in any cast.
        np.add(plane, bias[channel], out=target[:, :, channel], casting="same_kind")
