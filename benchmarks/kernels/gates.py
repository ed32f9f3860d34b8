"""Whether a result is right: predicates over what a candidate returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sn72kernels.testing import error_ratio

# Root mean square of the rounding of a result, relative, with room for two roundings on the way.
RATIO = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def close(*wanted: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> Callable[[Any], bool]:
    """Every output within the rounding of ``dtype``: in the mean, and no element far off.

    Args:
        wanted: the outputs, in float64.
        dtype: whose rounding is allowed.
        roundings: how many times as much, for one who rounds on the way.
    """
    bound = roundings * RATIO[dtype]

    def passes(out: Any) -> bool:
        return all(
            have.shape == want.shape
            and error_ratio(have, want) <= bound
            and _worst(have, want) <= 8 * bound
            for have, want in zip(_listed(out), wanted, strict=True)
        )

    return passes


def same_bits(*wanted: torch.Tensor) -> Callable[[Any], bool]:
    """Every output equal to the last bit, but for the sign and payload of a NaN."""
    return share_equal(*wanted, share=1.0)


def share_equal(*wanted: torch.Tensor, share: float) -> Callable[[Any], bool]:
    """At least ``share`` of the elements of every output equal."""

    def passes(out: Any) -> bool:
        return all(
            have.shape == want.shape and have.dtype == want.dtype and _equal(have, want) >= share
            for have, want in zip(_listed(out), wanted, strict=True)
        )

    return passes


def _equal(have: torch.Tensor, want: torch.Tensor) -> float:
    if want.numel() == 0:
        return 1.0
    if want.element_size() == 1:  # not every dtype of one byte can be compared
        return float((have.view(torch.uint8) == want.view(torch.uint8)).double().mean())
    same = (have == want) | (have.isnan() & want.isnan())
    return float(same.double().mean())


def _worst(have: torch.Tensor, want: torch.Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    gap = (have.double() - want.double()).abs().max()
    return float(gap / want.double().abs().max().clamp_min(1e-30))


def _listed(out: Any) -> Sequence[torch.Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]
