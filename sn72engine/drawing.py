"""What the package's pictures have in common: colours, an empty figure, and a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sn72engine import _deps
from sn72kernels import atomic

INK, SOFT, GRID = "#2b2d33", "#8a909c", "#e4e6ea"
GOOD, BAD = "#3867b5", "#d9622b"


def figure(purpose: str, width: float, height: float) -> Any:
    """An empty Matplotlib figure, of the object interface: no global state, no window system.

    Args:
        purpose: what is to be drawn, for the message if Matplotlib is absent.
        width, height: in inches, at 150 pixels each.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    figures = _deps.require("matplotlib", purpose=purpose, submodule="figure")
    return figures.Figure(figsize=(width, height), dpi=150, layout="constrained")


def name_places(axes: Any, names: Sequence[str], rotation: float, size: float) -> None:
    """Name the places 0, 1, ... of the horizontal axis, slanting up to their marks."""
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", labelrotation=rotation, labelsize=size)
    for tick in axes.get_xticklabels():
        tick.set_ha("right")
        tick.set_rotation_mode("anchor")


def save(drawn: Any, path: Path) -> Path:
    """Write a figure as PNG, atomically, and return its path."""
    with atomic.replacing(path) as scratch:
        drawn.savefig(scratch, format="png")
    return path
