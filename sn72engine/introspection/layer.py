"""A layer as a library runs it, and one timed run of all layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine, or one node of an ONNX file.

    Attributes:
        name: its own, or that of its first output where it has none.
        op: type, as the library calls it.
        precision: type of its first output, by NumPy's name where that has one.
        shape: of its first output; empty where it is not known.
        weight_bytes: stored constants that it reads; 0 where the library does not tell.
        fused: names of the layers of the source that it stands for, where that is more than one.
        runs_on: execution provider or kernel; empty where the library does not tell.
    """

    name: str
    op: str
    precision: str = ""
    shape: tuple[int | str, ...] = ()
    weight_bytes: int = 0
    fused: tuple[str, ...] = ()
    runs_on: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "shape": list(self.shape), "fused": list(self.fused)}


@dataclass(frozen=True, slots=True)
class LayerRun:
    """One layer in one run; times in microseconds.

    ``start`` is from the start of the run; None where the library tells durations only.
    """

    name: str
    op: str
    duration: float
    start: float | None = None
    runs_on: str = ""


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One run: its layers in order, and the time of the whole call in microseconds."""

    layers: tuple[LayerRun, ...]
    duration: float
