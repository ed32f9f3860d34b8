"""Cosines and sines for :func:`sn72kernels.rope`: DINOv3 axial and Qwen3-VL interleaved."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sn72kernels.errors import ArgumentError, check_tensor


def axial(
    height: int,
    width: int,
    head_dim: int,
    *,
    base: float = 100.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables for a grid of patches, rotated by row and by column (DINOv3, arXiv:2508.10104).

    A patch's centre has coordinates in [-1, 1] along each axis; the angle of frequency f of
    ``head_dim / 4`` is ``2 pi * coordinate * base^(-4 f / head_dim)``. The first quarter of a
    head turns with the row, the second with the column, and the second half repeats the first.

    Args:
        height: rows of patches.
        width: columns of patches.
        head_dim: a multiple of 4.
        base: of the frequencies.
        dtype: of the tables; computed in float32 and rounded once.
        device: where to make them.

    Returns:
        cosines and sines, shape (height * width, head_dim).

    Raises:
        ArgumentError: ``head_dim`` is not a multiple of 4.
    """
    if head_dim % 4:
        raise ArgumentError(f"head_dim is {head_dim}; give a multiple of 4")
    steps = torch.arange(head_dim // 4, dtype=torch.float32, device=device)
    frequencies = 1.0 / base ** (steps * (4.0 / head_dim))
    rows, columns = (
        2.0 * ((torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n) - 1.0
        for n in (height, width)
    )
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2, 1)
    angles = (2.0 * math.pi * centres * frequencies).flatten(1).tile(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def interleaved(
    positions: torch.Tensor,
    head_dim: int,
    sections: Sequence[int],
    *,
    base: float = 5_000_000.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables for tokens with a time, a row and a column (Qwen3-VL, arXiv:2511.21631).

    Frequency f belongs to the row when ``f % 3 == 1`` and ``f < 3 * sections[1]``, to the column
    when ``f % 3 == 2`` and ``f < 3 * sections[2]``, and else to time. The second half of a head
    repeats the first.

    Args:
        positions: shape (3, B, T): time, row and column of every token.
        head_dim: even.
        sections: frequencies of time, row and column; their sum is ``head_dim / 2``.
        base: of the frequencies.
        dtype: of the tables; computed in float32 and rounded once.

    Returns:
        cosines and sines, shape (B, T, head_dim).

    Raises:
        ShapeError: ``positions`` has another shape.
        ArgumentError: ``sections`` do not add up.
    """
    check_tensor("positions", positions, shape=(3, None, None))
    half = head_dim // 2
    if head_dim % 2 or len(sections) != 3 or sum(sections) != half:
        raise ArgumentError(
            f"sections is {list(sections)}; give three numbers that add up to head_dim / 2 of "
            f"{head_dim}"
        )
    step = torch.arange(half, device=positions.device)
    frequencies = 1.0 / base ** (step.float() * (2.0 / head_dim))
    axis = torch.zeros_like(step)
    for kind in (1, 2):
        axis[(step % 3 == kind) & (step < 3 * sections[kind])] = kind
    angles = positions.float()[axis].permute(1, 2, 0) * frequencies
    angles = angles.tile(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)
