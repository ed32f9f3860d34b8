"""The error of each layer through the depth of a network, as a picture."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72engine import drawing
from sn72engine.drawing import BAD, GOOD, GRID, INK, SOFT
from sn72engine.errors import InputError
from sn72engine.text import cut

if TYPE_CHECKING:
    from sn72engine.divergence import ComparisonReport, LayerError

#: Layers labelled for what they add to the error, beside the first bad one.
_LABELLED = 4

#: Where a tensor without any difference is drawn: below the rounding of float32.
_FLOOR = 1e-8


def plot(report: ComparisonReport, path: Path) -> Path:
    """Draw a report; see :meth:`sn72engine.divergence.ComparisonReport.save_plot`."""
    if not report.layers:
        raise InputError("no layer was measured: there is nothing to draw")
    figure = drawing.figure("draw a comparison", 9.5, 4.8)
    axes = figure.add_subplot()
    heights = [_height(layer) for layer in report.layers]
    places = range(len(heights))
    colours = [BAD if layer.parted else GOOD for layer in report.layers]
    axes.plot(places, heights, color=SOFT, linewidth=0.8, zorder=1)
    size = 26 if len(heights) <= 80 else 9
    axes.scatter(places, heights, c=colours, s=size, zorder=3, linewidths=0)
    bound = report.max_relative_error
    axes.axhline(bound, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    axes.annotate(
        f"bound {bound:g}",
        (0, bound),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        ha="left",
        fontsize=8,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
    )
    axes.set_yscale("log")
    low, high = min(*heights, bound), max(*heights, bound)
    axes.set_ylim(max(low / 5, _FLOOR / 2), high * (high / low) ** 0.45 * 3)  # room for labels
    # No figures beside the labels: their lines must not be read as values.
    ticks = [tick for tick in axes.get_yticks() if low / 5 <= tick <= high * 5 and tick > _FLOOR]
    axes.set_yticks(ticks)
    if low == _FLOOR:  # a logarithmic axis has no place for none
        ends = axes.yaxis.get_major_formatter().format_ticks(ticks)
        axes.set_yticks([_FLOOR, *ticks], ["none", *ends])
    axes.minorticks_off()
    axes.set_xlim(-0.03 * len(heights) - 0.5, len(heights) * 1.03 - 0.5)
    _label(axes, report, heights)
    if len(heights) <= 24:
        names = [cut(layer.layer, 16) for layer in report.layers]
        drawing.name_places(axes, names, rotation=45, size=8)
    else:
        axes.set_xlabel("layer, in the order in which they run")
    axes.set_ylabel("relative error  |b - a| / |a|")
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{textwrap.fill(report.verdict, 125)}\na: {report.names[0]}   b: {report.names[1]}   "
        f"{report.samples} samples, the worst call counts",
        loc="left",
        fontsize=9.5,
        color=INK,
    )
    return drawing.save(figure, path)


def _label(axes: Any, report: ComparisonReport, heights: list[float]) -> None:
    """Name the first bad layer, and those that add most to the error."""
    layers = report.layers
    order = sorted(range(len(layers)), key=lambda place: -layers[place].added)
    chosen = [place for place in order[:_LABELLED] if layers[place].added > _FLOOR]
    if report.first_bad is not None:
        chosen = [layers.index(report.first_bad), *chosen]
    for row, place in enumerate(dict.fromkeys(chosen)):
        first = layers[place] is report.first_bad
        side = "right" if place > 0.7 * len(layers) else "left"
        # Each label has a row of its own above the data, so that none lies on another.
        axes.annotate(
            f" {cut(layers[place].layer, 40)} ({layers[place].op}) ",
            (place, heights[place]),
            xytext=(place, 0.97 - 0.06 * row),
            textcoords=("data", "axes fraction"),
            ha=side,
            va="top",
            fontsize=9 if first else 8,
            fontweight="bold" if first else "normal",
            color=BAD if first else INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
            arrowprops={
                "arrowstyle": "-",
                "color": BAD if first else SOFT,
                "lw": 0.8,
                "ls": ":",
                "relpos": (1.0 if side == "right" else 0.0, 0.0),
            },
            zorder=4,
        )


def _height(layer: LayerError) -> float:
    relative = layer.error.relative
    if math.isinf(relative) or math.isnan(relative):
        return 10.0  # shown at the top; the label and the title say what it is
    return max(relative, _FLOOR)
