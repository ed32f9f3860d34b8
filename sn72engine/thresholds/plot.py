"""The frontier of expected latency and objective, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72engine import drawing
from sn72engine.drawing import GRID, INK
from sn72engine.errors import OptionError

if TYPE_CHECKING:
    from sn72engine.thresholds.choice import ThresholdChoice

_LABELS = {"accuracy": "Accuracy", "mcc": "MCC", "reward": "Expected subnet reward"}
_CURVE, _STAGE, _CHOSEN = "#3867b5", "#7a7f8a", "#d9622b"


def plot(choice: ThresholdChoice, path: Path, names: Sequence[str] = ()) -> Path:
    """Draw the frontier, the single stages and the chosen cascade.

    Args:
        choice: from :func:`sn72engine.thresholds.choose`.
        path: PNG file to write, atomically.
        names: of the given stages, in order; "stage 0" and so on when empty.

    Returns:
        ``path``.

    Raises:
        OptionError: the number of names is not that of the stages.
        MissingDependencyError: Matplotlib is not installed.
    """
    if names and len(names) != len(choice.singles):
        raise OptionError(f"names={list(names)!r} must name all {len(choice.singles)} stages")
    titles = list(names) or [f"stage {k}" for k in range(len(choice.singles))]
    figure = drawing.figure("draw a threshold plot", 7.2, 4.6)
    axes = figure.add_subplot()
    points = [(1e3 * p.cost, p.value) for p in choice.pareto]
    axes.plot(
        *zip(*points, strict=True),
        "o-",
        color=_CURVE,
        markersize=3.5,
        linewidth=1.2,
        label="frontier of the half that was fitted",
        zorder=2,
    )
    for title, single in zip(titles, choice.singles, strict=True):
        _mark(axes, title, 1e3 * single.cost, single.value)
    axes.plot([], [], "s", color=_STAGE, label="one stage alone")
    axes.axhline(
        choice.target,
        color=INK,
        linewidth=0.9,
        linestyle=(0, (4, 3)),
        zorder=1,
        label=f"target {choice.target:.3f}",
    )
    chosen = choice.figures
    sure = "certified" if choice.certified else "not certified"
    axes.plot(
        [1e3 * chosen.cost],
        [chosen.value],
        "*",
        color=_CHOSEN,
        markersize=15,
        zorder=4,
        label=f"chosen: {chosen.value:.3f} at {1e3 * chosen.cost:.3g} ms ({sure})",
    )
    axes.set_xlabel("Expected latency (ms per sample)")
    axes.set_ylabel(
        f"{_LABELS[choice.options.objective]} on {choice.certified_on} held-out samples"
    )
    axes.set_title("Expected latency against quality", color=INK, fontsize=11, loc="left")
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.08, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")
    return drawing.save(figure, path)


def _mark(axes: Any, title: str, cost: float, value: float) -> None:
    axes.plot([cost], [value], "s", color=_STAGE, markersize=7, zorder=3)
    axes.annotate(
        title,
        (cost, value),
        textcoords="offset points",
        xytext=(0, -16),
        ha="center",
        fontsize=8,
        color=INK,
    )
