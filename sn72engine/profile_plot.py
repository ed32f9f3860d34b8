"""Where the time of an engine goes, as a picture: its slowest layers, and the types' shares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72engine import drawing
from sn72engine.drawing import GRID, INK
from sn72engine.errors import InputError
from sn72engine.text import cut

if TYPE_CHECKING:
    from sn72engine.layer_profile import LayerProfile

_OTHERS, _UNNAMED = "others", "unnamed"
_COLOURS = ("#3867b5", "#d9622b", "#3d9a6c", "#8b5fbf", "#c9a227", "#4fb0c6", "#b8517f")


def plot(profile: LayerProfile, path: Path, count: int) -> Path:
    """Draw a profile; see :meth:`sn72engine.layer_profile.LayerProfile.save_plot`."""
    if not profile.layers:
        raise InputError("the profile holds no layer: there is nothing to draw")
    layers = profile.top(count)
    height = max(3.2, 1.9 + 0.27 * len(layers))
    figure = drawing.figure("draw a layer profile", 9.5, height)
    whole, single = figure.subplots(2, 1, height_ratios=[0.75, height - 1.9])
    shares = _shares(profile)
    colours = dict(zip(shares, _COLOURS, strict=False)) | {_OTHERS: "#c3c7cf"}
    _draw_shares(whole, shares, colours)
    names = [cut(layer.name, 46) for layer in layers]
    places = list(range(len(layers)))
    bars = [colours.get(layer.op or _UNNAMED, colours[_OTHERS]) for layer in layers]
    single.barh(places, [layer.ms for layer in layers], color=bars, height=0.72)
    single.set_yticks(places, names, fontsize=8, color=INK)
    single.invert_yaxis()
    longest = layers[0].ms or 1.0
    for place, layer in enumerate(layers):
        single.annotate(
            f"{layer.ms:.3f} ms  {layer.share:.1%}",
            (layer.ms, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=INK,
        )
    single.set_xlim(0, longest * 1.18)  # room for the figures
    single.set_xlabel("milliseconds, median", fontsize=9)
    single.spines[["top", "right", "left"]].set_visible(False)
    single.tick_params(axis="y", length=0)
    single.tick_params(axis="x", labelsize=8)
    single.grid(axis="x", color=GRID, linewidth=0.7)
    single.set_axisbelow(True)
    rest = len(profile.layers) - len(layers)
    which = f"the {len(layers)} slowest of {len(profile.layers)}" if rest > 0 else "all"
    single.set_title(f"Layers ({which})", loc="left", fontsize=9.5, color=INK)
    figure.suptitle(
        f"{profile.engine}: {profile.layers_ms:.2f} ms in layers, "
        f"{profile.call_ms:.2f} ms a call of {profile.batch} sample"
        f"{'s' if profile.batch > 1 else ''} (medians of {profile.runs} runs, profiler on)",
        x=0.01,
        ha="left",
        fontsize=10.5,
        color=INK,
    )
    return drawing.save(figure, path)


def _shares(profile: LayerProfile) -> dict[str, float]:
    """Share of each type, most first; those beyond the palette together."""
    total = profile.layers_ms or 1.0
    shares = {op or _UNNAMED: ms / total for op, ms in profile.by_op.items()}
    kept = dict(list(shares.items())[: len(_COLOURS)])
    rest = sum(shares.values()) - sum(kept.values())
    return kept | ({_OTHERS: rest} if len(shares) > len(kept) else {})


def _draw_shares(axes: Any, shares: dict[str, float], colours: dict[str, str]) -> None:
    """One bar across, cut into the types; labels inside where they fit, in the legend else."""
    left = 0.0
    for op, share in shares.items():
        axes.barh(0, share, left=left, color=colours[op], height=0.9, edgecolor="white", lw=1.0)
        if share > 0.07:
            axes.text(
                left + share / 2,
                0,
                f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="white",
            )
        left += share
    handles = [
        axes.barh(0, 0, color=colours[op], label=f"{op} {share:.1%}")
        for op, share in shares.items()
    ]
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, -0.02),
        ncols=4,
        fontsize=7.5,
        frameon=False,
        borderaxespad=0,
        handlelength=1,
        columnspacing=1.4,
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, 0.5)
    axes.axis("off")
    axes.set_title("Types of layers", loc="left", fontsize=9.5, color=INK)
