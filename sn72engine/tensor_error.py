"""How far one tensor lies from another, as figures that mean the same for every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

_Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True, slots=True)
class TensorError:
    """Distance of tensor b from tensor a, over all elements.

    Attributes:
        relative: ``|b - a| / |a|`` in the Euclidean norm; infinite where ``problem`` says why.
        cosine: of the two as vectors; NaN where that cannot be had.
        rms: root mean square of ``b - a``.
        largest: largest absolute difference of any element.
        problem: why they cannot be compared, or which values only one of them lacks; else empty.
    """

    relative: float
    cosine: float
    rms: float
    largest: float
    problem: str = ""

    @classmethod
    def between(cls, a: _Array, b: _Array) -> TensorError:
        """Measure. Elements that are not finite and alike in both (masks) do not count."""
        if a.shape != b.shape:
            return cls._broken(f"shape {b.shape} against {a.shape}")
        x, y = a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.all():
            odd, even = x[~finite], y[~finite]
            alike = (odd == even) | (np.isnan(odd) & np.isnan(even))
            if not alike.all():
                mine, theirs = odd[~alike], even[~alike]
                where = "both, not alike"
                if np.isfinite(mine).all():
                    where = "b only"
                elif np.isfinite(theirs).all():
                    where = "a only"
                return cls._broken(f"NaN or infinity in {where}, {mine.size} values")
            x, y = x[finite], y[finite]
        if x.size == 0:
            return cls(0.0, 1.0, 0.0, 0.0)
        difference = y - x
        # Scaled to a largest element of 1, so that no square over- or underflows.
        scale = max(float(np.abs(x).max()), float(np.abs(y).max())) or 1.0
        p, q, d = x / scale, y / scale, difference / scale
        length, other = math.sqrt(float(p @ p)), math.sqrt(float(q @ q))
        gap = math.sqrt(float(d @ d))
        if gap == 0:
            return cls(0.0, 1.0, 0.0, 0.0)
        return cls(
            relative=gap / length if length else math.inf,
            cosine=float(p @ q) / (length * other) if length and other else 0.0,
            rms=gap * scale / math.sqrt(x.size),
            largest=float(np.abs(difference).max()),
        )

    @classmethod
    def _broken(cls, problem: str) -> TensorError:
        return cls(math.inf, math.nan, math.inf, math.inf, problem)

    def worse(self, other: TensorError) -> TensorError:
        """The one of the two that lies further off."""
        return other if other.relative > self.relative else self
