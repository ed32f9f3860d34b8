"""How ops over rows see their input."""

from __future__ import annotations

import torch

from sn72kernels.errors import ShapeError


def check_rows(name: str, x: torch.Tensor) -> None:
    """Check that ``x`` has a last axis with at least one element.

    Raises:
        ShapeError: it has not; the message names the argument.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(
            f"Invalid shape of {name}: expected (..., N) with N >= 1, got {tuple(x.shape)}"
        )


def as_vector(x: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter of shape (N,) with its elements side by side, as kernels read it; None stays."""
    return None if x is None else x.contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` of shape (..., N) as (rows, N) with contiguous columns.

    A view where the strides allow one, so that strided rows cost nothing; else a copy.
    """
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
