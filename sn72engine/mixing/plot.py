"""What each layer would cost in accuracy, and the way to the result, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72engine import drawing
from sn72engine.drawing import BAD, GOOD, GRID, INK, SOFT
from sn72engine.mixing.mixture import FLOAT
from sn72engine.text import cut

if TYPE_CHECKING:
    from sn72engine.mixing.mixture import Mixture

_COLOURS = {"int8": "#3867b5", "fp8": "#2f9e8f", "mxfp8": "#b58a2a", "nvfp4": "#a8489b"}

#: Where a damage of nothing is drawn on the logarithmic axis: below the rounding of float32.
_FLOOR = 1e-14

#: Layers that still fit their names below the axis, and letters of a name.
_NAMED, _WIDTH = 24, 30


def plot(mixture: Mixture, path: Path) -> Path:
    """Draw a mixture; see :meth:`sn72engine.mixing.Mixture.save_plot`."""
    figure = drawing.figure("draw a mix of formats", 11.5, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_layers(left, mixture)
    _draw_way(right, mixture)
    for axes in (left, right):
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return drawing.save(figure, path)


def _draw_layers(axes: Any, mixture: Mixture) -> None:
    """Damage of every layer alone in every format; a ring around what was chosen."""
    layers = mixture.layers
    for precision in mixture.options.resolved_formats:
        places, heights, rings = [], [], []
        for place, layer in enumerate(layers):
            point = next((p for p in layer.points if p.precision == precision), None)
            if point is None:
                continue
            places.append(place)
            heights.append(max(point.damage, _FLOOR))
            rings.append(layer.chosen == precision)
        colour = _COLOURS[precision]
        axes.scatter(places, heights, s=22, color=colour, label=precision, linewidths=0, zorder=3)
        ringed = [(x, y) for x, y, ring in zip(places, heights, rings, strict=True) if ring]
        if ringed:
            x, y = zip(*ringed, strict=True)
            axes.scatter(x, y, s=95, facecolors="none", edgecolors=INK, linewidths=1.1, zorder=4)
    kept = [place for place, layer in enumerate(layers) if layer.chosen == FLOAT]
    for place in kept:
        axes.axvspan(place - 0.5, place + 0.5, color="#eef0f3", linewidth=0, zorder=0)
    axes.scatter([], [], s=95, facecolors="none", edgecolors=INK, linewidths=1.1, label="chosen")
    if kept:
        axes.scatter([], [], s=95, marker="s", color="#dfe2e7", label="stays in float")
    axes.set_yscale("log")
    axes.set_xlim(-0.7, len(layers) - 0.3)
    if len(layers) <= _NAMED:
        names = [cut(layer.label, _WIDTH) for layer in layers]
        drawing.name_places(axes, names, rotation=50, size=7.5)
    else:
        axes.set_xlabel("layer, in the order in which they run")
    axes.set_ylabel("damage of the layer alone  (mean |q - y|² / mean |y|²)")
    axes.set_title("Each layer alone in each format", loc="left", fontsize=10, color=INK)
    axes.legend(fontsize=8, frameon=True, edgecolor="none", framealpha=0.9)


def _draw_way(axes: Any, mixture: Mixture) -> None:
    """Cost against the sum of damages after each step; what was measured on the way."""
    names = {layer.name: layer.point(FLOAT) for layer in mixture.layers}
    if mixture.unit == "bytes":
        scale, told = 1e-6, "weights of these layers, MB"
    else:
        origin = "given" if mixture.record["given_costs"] else f"modelled on {mixture.options.card}"
        scale, told = 1e6, f"time of these layers, µs ({origin})"
    points = [(sum(point.cost for point in names.values()), 0.0)]
    for step in mixture.steps:
        names[step.layer] = step.point
        after = names.values()
        points.append((sum(p.cost for p in after), sum(p.damage for p in after)))
    line = [(cost * scale, max(damage, _FLOOR)) for cost, damage in points]
    axes.plot(*zip(*line, strict=True), "-", color=SOFT, linewidth=1.1, zorder=1)
    for trial in mixture.trials:
        good = trial.report.passed
        axes.scatter(
            *line[trial.steps],
            s=34,
            marker="o" if good else "X",
            color=GOOD if good else BAD,
            linewidths=0,
            zorder=3,
        )
    axes.scatter([], [], s=34, color=GOOD, label="measured: keeps the bound")
    axes.scatter([], [], s=34, marker="X", color=BAD, label="measured: breaks it")
    end = line[mixture.taken]
    axes.scatter(*end, s=130, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=4)
    axes.annotate(
        f"chosen\n{mixture.cost / mixture.float_cost:.0%} of float16",
        end,
        xytext=(12, 0),
        textcoords="offset points",
        fontsize=8.5,
        va="center",
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )
    axes.set_yscale("symlog", linthresh=max(line[min(1, len(line) - 1)][1], _FLOOR))
    axes.set_ylim(0, line[-1][1] * 8)
    axes.set_xlabel(told)
    axes.set_ylabel("sum of the layers' damages")
    axes.set_title(
        "From float16 (right) to the cheapest (left)", loc="left", fontsize=10, color=INK
    )
    axes.legend(fontsize=8, frameon=True, edgecolor="none", framealpha=0.9, loc="upper right")
