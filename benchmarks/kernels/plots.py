"""Table and plots from a record of ``pytest benchmarks/kernels --benchmark-json=record.json``.

``python benchmarks/kernels/plots.py record.json folder`` writes ``kernels.md`` and, where the
record was made on a GPU, ``speedup.png`` (time of each other candidate over ours, by case) and
``roofline.png`` (bandwidth against the time of a call, under the roof that the same run measured
for a copy; every op but ``linear`` and ``attention`` is bound by memory). Times on a CPU are those
of the reference paths, so nothing is plotted of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS = "sn72kernels"


def races(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, seconds of the plain call and ``extra_info`` of every benchmark of this folder."""
    return [
        {"name": each["name"], "seconds": each["stats"]["median"], **each["extra_info"]}
        for each in record["benchmarks"]
        if "gpu" in each["extra_info"]
    ]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row per candidate that was timed, and a speed-up only beside a right result."""
    if not any(race["gpu"] for race in found):
        lines = [
            "No GPU was present: these are the reference paths on the CPU, and say nothing about",
            "the kernels.",
            "",
            "| case | reference, us |",
            "|---|--:|",
        ]
        return "\n".join(lines + [f"| {r['name']} | {r['seconds'] * 1e6:.1f} |" for r in found])
    lines = [
        "| case | candidate | us | GB/s | % of copy | speed-up of ours |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for race in found:
        times = timed(race)
        for each in race.get("timings", []):
            head = f"| {race['title']} | {each['name']} |"
            if each["ms"] is None:
                lines.append(f"{head} not timed: {each['note']} | | | |")
                continue
            ratio = f"{each['ms'] / times[OURS]:.2f}" if OURS in times else ""
            lines.append(
                f"{head} {each['ms'] * 1e3:.2f} | {each['gb_s']:.0f} | {each['percent']:.0f} |"
                f" {ratio} |"
            )
    return "\n".join(lines)


def timed(race: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of every candidate whose result was right."""
    return {t["name"]: t["ms"] for t in race.get("timings", []) if t["ms"] is not None}


def plot(found: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the two plots; none where nothing was timed on a GPU."""
    shown = [race for race in found if race["gpu"] and OURS in timed(race)]
    if not shown:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speedup, axes = pyplot.subplots(figsize=(9, 1.5 + 0.3 * len(shown)), layout="constrained")
    for name in sorted({n for race in shown for n in timed(race)} - {OURS}):
        points = [
            (timed(r)[name] / timed(r)[OURS], i) for i, r in enumerate(shown) if name in timed(r)
        ]
        axes.plot(*zip(*points, strict=True), "o", label=f"against {name}")
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.set_ylim(-0.5, len(shown) - 0.5)
    axes.set_yticks(range(len(shown)), [race["title"] for race in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="speed-up of sn72kernels (cold L2)")
    axes.legend()
    roofline, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in sorted({n for race in shown for n in timed(race)}):
        rows = [t for r in shown for t in r["timings"] if t["name"] == name and t["ms"] is not None]
        axes.plot([1e3 * t["ms"] for t in rows], [t["gb_s"] for t in rows], "o", label=name)
    copies = [100 * t["gb_s"] / t["percent"] for r in shown for t in r["timings"] if t["percent"]]
    axes.axhline(max(copies), color="grey", linestyle="--", label="copy, measured in the same run")
    axes.set(xscale="log", yscale="log", xlabel="time of a call, us", ylabel="GB/s")
    axes.legend()
    paths = [folder / "speedup.png", folder / "roofline.png"]
    for figure, path in zip((speedup, roofline), paths, strict=True):
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
    return paths


def main(record: str, folder: str) -> int:
    """Write the table and the plots, and say where."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    found = races(json.loads(Path(record).read_text()))
    page = target / "kernels.md"
    page.write_text(table(found) + "\n")
    plots = plot(found, target)
    print("\n".join(map(str, [page, *plots])))
    if not plots:
        print("no plots: nothing was timed on a GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
