"""Table and pictures from a record of the kernel benchmarks.

    python -m pytest benchmarks/kernels --kernel-record record.jsonl
    python -m benchmarks.kernels.report record.jsonl --save FILE.json --page docs/performance.md

``--save`` keeps the record as one dated JSON file, ``--page`` rewrites the part ``kernels`` of a
Markdown page, ``--pictures`` draws into a folder (default: ``images`` beside the page). Nothing is
computed that the record does not hold: a candidate whose result was wrong has no time and no
speed-up, and a record that was made without a GPU says so and has no speed-up picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.kernels import harness
from sn72kernels import atomic

PART = "kernels"
#: Bytes from which an input counts as large: above any L2 cache of today.
LARGE = 128 << 20
RIVALS = (harness.COMPILED, harness.EAGER)


def body(record: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    """The Markdown of a record: on what and when, goals, tables, pictures.

    Args:
        record: from :func:`benchmarks.kernels.harness.read`.
        pictures: paths as the page links them.
    """
    parts = [_preamble(record["header"])]
    races = record["races"]
    if not record["header"]["gpu"]:
        parts += [_cpu_table(races)]
    else:
        grid, rest = _split(races)
        parts += [_goals(grid)] if grid else []
        for dtype in sorted({race["dtype"] for race in grid}):
            parts += [
                f"`layernorm_gelu`, {dtype}: percent of the copy bandwidth; speed-up over "
                "`torch.compile`; over PyTorch eager; over the best peer, where one took part.",
                _grid_table([race for race in grid if race["dtype"] == dtype]),
            ]
        parts += [_op_table(rest)] if rest else []
    parts += [f"![{_caption(path)}]({path})" for path in pictures]
    return "\n\n".join(parts)


def _preamble(header: dict[str, Any]) -> str:
    peaks = header["peaks"]
    versions = ", ".join(
        f"{name} {number}" for name, number in header["versions"].items() if number is not None
    )
    products = ", ".join(f"{name} {_rate(rate)}" for name, rate in sorted(peaks["tflop_s"].items()))
    measured = (
        f"Measured in the same run: copy {peaks['copy_gb_s']:.0f} GB/s (read plus written), "
        f"matrix product in TFLOP/s: {products}."
    )
    if not header["gpu"]:
        return (
            f"{header['date']}, {header['processor']}, {header['device']}, {versions}. **No GPU was"
            " present: these are the reference paths on the CPU, warm, and say nothing about the"
            f" kernels.** {measured}"
        )
    return (
        f"{header['date']}, {header['device']}, {versions}. Medians of replayed CUDA graphs with a"
        f" cold L2 cache; every figure passed its check of the result. {measured}"
    )


def _cpu_table(races: Sequence[dict[str, Any]]) -> str:
    rows = []
    for race in races:
        times = _milliseconds(race)
        rows.append(
            [
                f"`{race['op']}` {race['label']}",
                race["dtype"],
                *(_us(times.get(name)) for name in (harness.OURS, harness.EAGER)),
                f"{race['work']['flops'] / race['work']['bytes']:.2g}",
            ]
        )
    head = ["case", "dtype", "reference path, us", "PyTorch eager, us", "FLOP/byte"]
    return markdown.table(head, rows, text_columns=2)


def _goals(grid: Sequence[dict[str, Any]]) -> str:
    """The stated goals, each with how many shapes meet it and which one is furthest from it."""
    large = [race for race in grid if race["work"]["bytes"] >= LARGE]
    lines = [
        _goal(
            f"at least 92% of the copy bandwidth at {LARGE >> 20} MiB and more",
            [(race, _ours(race)["copy_percent"]) for race in large],
            92.0,
            "%",
        ),
        _goal(
            "at least as fast as `torch.compile`",
            [(race, race["speedups"].get(harness.COMPILED)) for race in grid],
            1.0,
            "×",
        ),
        _goal(
            "at least 3 times as fast as PyTorch eager",
            [(race, race["speedups"].get(harness.EAGER)) for race in grid],
            3.0,
            "×",
        ),
    ]
    return "`layernorm_gelu` against its goals:\n\n" + "\n".join(f"- {line}" for line in lines)


def _goal(
    text: str, found: Sequence[tuple[dict[str, Any], float | None]], bound: float, unit: str
) -> str:
    known = [(value, race) for race, value in found if value is not None]
    if not known:
        return f"{text}: not measured."
    met = sum(value >= bound for value, _ in known)
    value, race = min(known, key=lambda pair: pair[0])
    missing = len(found) - len(known)
    unknown = f", {missing} not measured" if missing else ""
    return (
        f"{text}: {met} of {len(known)} shapes{unknown}; the least is {value:.3g}{unit} at"
        f" {race['label']} {race['dtype']}."
    )


def _grid_table(races: Sequence[dict[str, Any]]) -> str:
    cells = {tuple(race["shape"]): _cell(race) for race in races}
    heights = sorted({shape[0] for shape in cells})
    widths = sorted({shape[1] for shape in cells})
    rows = [
        [str(height), *(cells.get((height, width), "not run") for width in widths)]
        for height in heights
    ]
    return markdown.table(["rows \\ columns", *map(str, widths)], rows)


def _cell(race: dict[str, Any]) -> str:
    ours = _ours(race)
    if ours["ms"] is None:
        return f"wrong: {ours['note']}"
    parts = [f"{ours['copy_percent']:.0f}%"]
    parts += [_times(race["speedups"].get(name)) for name in RIVALS]
    return "; ".join([*parts, *_best_peer(race)])


def _op_table(races: Sequence[dict[str, Any]]) -> str:
    rows = []
    for race in races:
        ours = _ours(race)
        name = f"`{race['op']}` {race['label']}"
        if ours["ms"] is None:
            rows.append([name, race["dtype"], f"not timed: {ours['note']}", *[""] * 7])
            continue
        rows.append(
            [
                name + ("" if race["cold"] else " (in the L2 cache)"),
                race["dtype"],
                _us(ours["ms"]),
                f"{ours['gb_s']:.0f}",
                f"{ours['copy_percent']:.0f}",
                _rate(ours["tflop_s"]),
                "" if ours["gemm_percent"] is None else f"{ours['gemm_percent']:.0f}",
                *(_times(race["speedups"].get(rival)) for rival in RIVALS),
                "; ".join(_best_peer(race) or _absent(race)),
            ]
        )
    head = ["case", "dtype", "us", "GB/s", "% of copy", "TFLOP/s", "% of product"]
    head += ["over `torch.compile`", "over eager", "over the best peer"]
    return markdown.table(head, rows, text_columns=2)


def _best_peer(race: dict[str, Any]) -> list[str]:
    """The speed-up over the fastest of the other packages; empty where none took part."""
    ratios = {
        name: ratio
        for name, ratio in race["speedups"].items()
        if name not in RIVALS and not name.startswith(harness.OURS)
    }
    if not ratios:
        return []
    name = min(ratios, key=lambda key: ratios[key])
    return [f"{_times(ratios[name])} ({name})"]


def _absent(race: dict[str, Any]) -> list[str]:
    return [f"{name}: {why}" for name, why in race["absent"].items()]


def _split(races: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Plain forward of LayerNorm+GELU, which has a grid of its own, and all else."""
    grid = [r for r in races if r["op"] == "layernorm_gelu" and "," not in r["label"]]
    return grid, [race for race in races if race not in grid]


def _ours(race: dict[str, Any]) -> dict[str, Any]:
    ours: dict[str, Any] = race["timings"][0]
    return ours


def _milliseconds(race: dict[str, Any]) -> dict[str, float]:
    return {t["name"]: t["ms"] for t in race["timings"] if t["ms"] is not None}


def _us(ms: float | None) -> str:
    return "wrong" if ms is None else f"{ms * 1e3:.1f}"


def _times(ratio: float | None) -> str:
    return "not timed" if ratio is None else f"{ratio:.2f}×"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _caption(path: str) -> str:
    return Path(path).stem.replace("-", " ")


# --- pictures ------------------------------------------------------------------------------


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the roofline and, of a GPU, the speed-ups; returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    where = "gpu" if record["header"]["gpu"] else "cpu"
    paths = [folder / f"kernels-{where}-roofline.png"]
    _roofline(record, paths[0])
    if record["header"]["gpu"]:
        grid, rest = _split(record["races"])
        grid = [race for race in grid if race["speedups"]]
        rest = [race for race in rest if race["speedups"]]
        if grid:
            paths.append(folder / "kernels-gpu-layernorm-gelu-speedup.png")
            _heat_maps(record["header"], grid, paths[-1])
        if rest:
            paths.append(folder / "kernels-gpu-speedup.png")
            _dots(record["header"], rest, paths[-1])
    return paths


def _roofline(record: dict[str, Any], path: Path) -> None:
    """FLOP/s against FLOP/byte of every case, under both roofs of the same run."""
    from matplotlib import pyplot

    header, peaks = record["header"], record["header"]["peaks"]
    shown = [race for race in record["races"] if _ours(race)["ms"] is not None]
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [race["work"]["flops"] / race["work"]["bytes"] for race in shown] or [1.0]
    # As far as where the copy's roof meets the highest product's.
    tops = list(peaks["tflop_s"].values()) or [1.0]
    left = min(intensities) / 2
    right = 2 * max(*intensities, max(tops) * 1e3 / peaks["copy_gb_s"])
    axes.plot(
        [left, right],
        [peaks["copy_gb_s"] * 1e9 * x for x in (left, right)],
        color="black",
        label=f"copy, {peaks['copy_gb_s']:.0f} GB/s",
    )
    for style, (name, rate) in zip(
        ("--", "-.", ":"), sorted(peaks["tflop_s"].items()), strict=False
    ):
        axes.axhline(
            rate * 1e12,
            color="black",
            linestyle=style,
            label=f"{name} matrix product, {_rate(rate)} TFLOP/s",
        )
    for place, op in enumerate(dict.fromkeys(race["op"] for race in shown)):
        mine = [race for race in shown if race["op"] == op]
        axes.plot(
            [race["work"]["flops"] / race["work"]["bytes"] for race in mine],
            [_ours(race)["tflop_s"] * 1e12 for race in mine],
            "osD^vP*Xhp"[place % 10],
            color=f"C{place % 10}",
            markersize=6,
            alpha=0.8,
            label=op,
        )
    lowest = min((_ours(race)["tflop_s"] for race in shown), default=1e-3) * 1e12
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        ylim=(lowest / 2, 2 * max(tops) * 1e12),
        xlabel="operations per byte of the least traffic",
        ylabel="operations per second",
        title=_title(header),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _heat_maps(header: dict[str, Any], grid: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up of LayerNorm+GELU over each rival by rows and columns, a map per dtype."""
    from matplotlib import colors, pyplot

    dtypes = sorted({race["dtype"] for race in grid})
    heights = sorted({race["shape"][0] for race in grid})
    widths = sorted({race["shape"][1] for race in grid})
    figure, maps = pyplot.subplots(
        len(dtypes),
        len(RIVALS),
        figsize=(6 * len(RIVALS), 1.2 + 0.42 * len(heights) * len(dtypes)),
        layout="constrained",
        squeeze=False,
    )
    for row, dtype in enumerate(dtypes):
        for column, rival in enumerate(RIVALS):
            axes = maps[row][column]
            values = [[float("nan")] * len(widths) for _ in heights]
            for race in grid:
                if race["dtype"] == dtype and rival in race["speedups"]:
                    at = (heights.index(race["shape"][0]), widths.index(race["shape"][1]))
                    values[at[0]][at[1]] = race["speedups"][rival]
            image = axes.imshow(
                values,
                cmap="RdYlGn",
                norm=colors.TwoSlopeNorm(1.0, 0.5, 4.0),
                aspect="auto",
                origin="lower",
            )
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    text = "not\ntimed" if value != value else f"{value:.2f}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=8)
            axes.set_xticks(range(len(widths)), map(str, widths))
            axes.set_yticks(range(len(heights)), map(str, heights))
            axes.set(title=f"{dtype}, over {rival}", xlabel="columns", ylabel="rows")
            if column == len(RIVALS) - 1:
                figure.colorbar(image, ax=axes, label="speed-up")
    figure.suptitle(f"layernorm_gelu, {_title(header)}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _dots(header: dict[str, Any], races: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up of every other case over each of its rivals."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.27 * len(races)), layout="constrained")
    names = list(dict.fromkeys(name for race in races for name in race["speedups"]))
    for place, name in enumerate(names):
        points = [(r["speedups"][name], i) for i, r in enumerate(races) if name in r["speedups"]]
        axes.plot(
            *zip(*points, strict=True), "osD^vP*Xhp"[place % 10], label=f"over {name}", alpha=0.8
        )
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.set_ylim(-0.5, len(races) - 0.5)
    labels = [f"{race['op']} {race['label']} {race['dtype']}" for race in races]
    axes.set_yticks(range(len(races)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="speed-up of sn72kernels, cold L2 cache", title=_title(header))
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _title(header: dict[str, Any]) -> str:
    if header["gpu"]:
        return f"{header['device']}, {header['date']}"
    return f"no GPU: reference paths on the CPU, {header['date']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Save, tabulate and draw a record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.report", description=main.__doc__
    )
    parser.add_argument("record", type=Path, help="JSON lines of --kernel-record, or a saved file")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the record as one file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown page to rewrite")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        record = harness.read(options.record)
        if options.page is not None:
            markdown.part(options.page.read_text(), PART)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.save is not None:
        atomic.write_text(options.save, json.dumps(record, indent=1) + "\n")
    page = options.page
    folder = options.pictures or (None if page is None else page.parent / "images")
    drawn = [] if folder is None else draw(record, folder)
    if page is None:
        print(body(record, [str(path) for path in drawn]))
        return 0
    source = (options.save or options.record).as_posix()
    links = [path.resolve().relative_to(page.resolve().parent).as_posix() for path in drawn]
    markdown.rewrite(page, PART, body(record, links), source)
    print("\n".join(map(str, [page, *drawn])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
