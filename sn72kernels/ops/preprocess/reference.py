"""Resize and normalise in plain PyTorch: the definition that the kernel must match bit for bit.

Along the rows first, rounded to 8 bits, then along the columns, rounded to 8 bits: Pillow's
resampler. (From version 13 on Pillow takes the columns first where the height shrinks much more
than the width, which moves a few pixels by one.) Then ``pixel * scale + bias`` in float32, each
step rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sn72kernels.ops.preprocess.geometry import PRECISION


def preprocess(
    images: torch.Tensor,
    x_first: torch.Tensor,
    x_weights: torch.Tensor,
    y_first: torch.Tensor,
    y_weights: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    size: Sequence[int],
    border: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Images of one size as a batch.

    Args:
        images: uint8 (N, h, w, 3).
        x_first: int32 (width,), first source column of every output column.
        x_weights: int32 (width, taps).
        y_first: int32 (height,), likewise for rows.
        y_weights: int32 (height, taps).
        scale: float32 (3,).
        bias: float32 (3,).
        size: height and width of the output.
        border: rows above and columns left of the resized image; all around it is zero.
        dtype: of the output.

    Returns:
        Shape (N, 3, *size), contiguous.
    """
    planes = images.permute(0, 3, 1, 2).int()
    rows = _along(planes, x_first, x_weights)
    pixels = _along(rows.transpose(2, 3), y_first, y_weights).transpose(2, 3)
    values = pixels.float() * scale[:, None, None]
    values = (values + bias[:, None, None]).to(dtype)
    out = values.new_zeros((images.shape[0], 3, *size))
    height, width = values.shape[2:]
    out[:, :, border[0] : border[0] + height, border[1] : border[1] + width] = values
    return out


def _along(planes: torch.Tensor, first: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Filter the last axis; int32, 0 to 255."""
    total = torch.full((), 1 << (PRECISION - 1), dtype=torch.int32, device=planes.device)
    last = planes.shape[-1] - 1
    for tap in range(weights.shape[1]):
        # Past the image the weight is zero, whatever is read.
        at = (first + tap).clamp(max=last).long()
        total = total + planes[..., at] * weights[:, tap]
    return (total >> PRECISION).clamp(0, 255)
