"""Resize and normalise in plain PyTorch: the definition that the kernel must match bit for bit.

Along the rows first, rounded to 8 bits, then along the columns, rounded to 8 bits: Pillow's
resampler. (From version 13 on Pillow takes the columns first where the height shrinks much more
than the width, which moves a few pixels by one.) Then ``pixel * scale + bias`` in float32, each
step rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sn72kernels.ops.preprocess import geometry


def preprocess(
    images: torch.Tensor,
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    fit: str,
    crop_fraction: float,
    interpolation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Images of one size as a batch.

    Args:
        images: uint8 (N, h, w, 3).
        size: height and width of the output.
        mean: per channel, for pixels in [0, 1].
        std: likewise.
        fit: as :func:`geometry.place` takes it.
        crop_fraction: likewise.
        interpolation: a key of :data:`geometry.FILTERS`.
        dtype: of the output.

    Returns:
        Shape (N, 3, *size), contiguous; zero around the resized images.
    """
    height, width = size
    where = geometry.place((images.shape[1], images.shape[2]), (height, width), fit, crop_fraction)
    across, down = geometry.taps(images, where, interpolation)
    planes = images.permute(0, 3, 1, 2).int()
    rows = _along(planes, across)
    pixels = _along(rows.transpose(2, 3), down).transpose(2, 3).float()
    # A Python number enters float32 arithmetic rounded to float32, and nothing is copied for it.
    values = [
        pixels[:, channel] * scale + bias
        for channel, (scale, bias) in enumerate(scale_and_bias(mean, std))
    ]
    out = pixels.new_zeros((images.shape[0], 3, height, width), dtype=dtype)
    inner_rows = slice(where.top, where.top + where.height)
    inner_cols = slice(where.left, where.left + where.width)
    out[:, :, inner_rows, inner_cols] = torch.stack(values, 1).to(dtype)
    return out


def scale_and_bias(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Scale and bias of each channel for pixels in [0, 255], to be rounded to float32."""
    return tuple((1.0 / (255.0 * s), -m / s) for m, s in zip(mean, std, strict=True))


def _along(planes: torch.Tensor, taps: geometry.Taps) -> torch.Tensor:
    """Filter the last axis; int32, 0 to 255."""
    total = torch.full((), 1 << (geometry.PRECISION - 1), dtype=torch.int32, device=planes.device)
    last = planes.shape[-1] - 1
    for tap in range(taps.weights.shape[1]):
        # Past the image the weight is zero, whatever is read.
        at = (taps.first + tap).clamp(max=last).long()
        total = total + planes[..., at] * taps.weights[:, tap]
    return (total >> geometry.PRECISION).clamp(0, 255)
