"""The demo's pictures, its HTML report, and the few lines printed at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from PIL import Image

from sn72engine import drawing
from sn72engine.cascade.result import Result, Status
from sn72engine.decode import decode
from sn72engine.demo.comparison import Comparison
from sn72engine.demo.models import class_names
from sn72engine.report import Card, Report
from sn72kernels import atomic

_INK = "#1c2330"
_FILLS = {"fp32": "#b9c3d0", "int8": "#2f6db3"}


def write(
    folder: Path,
    figures: Mapping[str, Any],
    comparison: Comparison,
    pictures: Sequence[Path],
    results: Sequence[Result],
) -> Path:
    """Draw the pictures and write report.html; returns its path."""
    pareto, bars = folder / "pareto.png", folder / "latency.png"
    comparison.choice.plot(pareto, names=comparison.names)
    latency_bars(figures, bars)

    machine = figures["machine"]
    report = Report(
        "EfficientNet-Lite0 → Lite2: an early-exit cascade",
        f"Measured on {machine['cpu']}; threads per engine: {machine['threads']}; "
        f"ONNX Runtime {machine['onnxruntime']}, Python {machine['python']}; {date.today()}.",
    )
    report.heading("What the cascade answered")
    report.paragraph(
        "Each photograph goes to Lite0 first. When its confidence is above the threshold its "
        "answer stands; otherwise Lite2 is asked. The percentage is the answering model's "
        "confidence in its class."
    )
    report.cards(
        [
            card(folder, picture.stem, Image.open(picture), result)
            for picture, result in zip(pictures, results, strict=True)
        ]
    )
    if comparison.escalated:
        first = comparison.names[0]
        report.paragraph(f"Some of the samples that {first} was not sure of:")
        report.cards(
            [
                card(folder, f"escalated-{number}", Image.fromarray(decode(image)), result)
                for number, (image, result) in enumerate(comparison.escalated)
            ]
        )

    report.heading("Accuracy against time")
    report.paragraph(
        f"Labels: {figures['labels']}. Thresholds were chosen on "
        f"{figures['samples']['choosing']} samples and the table was measured on "
        f"{figures['samples']['measuring']} others, {figures['comparison']['batch']} per call, "
        "the systems taking turns."
    )
    report.table(
        ("system", "accuracy", "ms per image", "images per second"),
        [
            (
                name,
                f"{system['accuracy']:.1%}",
                f"{system['ms_per_image']:.2f}",
                f"{system['images_per_second']:.0f}",
            )
            for name, system in figures["comparison"]["systems"].items()
        ],
    )
    shares = figures["comparison"]["answered_by"]
    report.paragraph(
        "Answered by: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + "."
    )
    report.paragraph(comparison.choice.statement)
    report.picture(pareto, "accuracy against expected time per image for every threshold")

    report.heading("INT8 against FP32")
    report.table(
        ("model", "mean cosine", "agreement", "exact top-1 FP32 → INT8", "speed-up", "gate"),
        [verification_row(name, entry) for name, entry in figures["verification"].items()],
    )
    report.picture(bars, "latency of each engine in milliseconds")

    if figures["gpu_engines"]:
        report.heading("TensorRT engines built here for a GPU that is not here")
        report.paragraph("Built, not run: a build does not prove that an engine runs.")
        report.table(
            ("model", "precision", "target", "size", "build time"),
            [gpu_row(engine) for engine in figures["gpu_engines"]],
        )
    report.heading("Export")
    report.table(
        ("model", "largest difference from PyTorch"),
        [(name, f"{error:.1e}") for name, error in figures["export"].items()],
    )
    page = folder / "report.html"
    report.write(page)
    return page


def card(folder: Path, name: str, image: Image.Image, result: Result) -> Card:
    """One image, kept as a thumbnail under ``name``, with the cascade's answer below it."""
    thumbnail = folder / "photographs" / f"{name}.jpg"
    image = image.convert("RGB")
    image.thumbnail((480, 480))
    with atomic.replacing(thumbnail) as scratch:
        image.save(scratch, format="JPEG", quality=85)
    done = result.status is Status.DONE
    lines = [f"{result.probability:.0%} by {result.stage}"]
    if not done:
        lines.append(f"{result.status.value}: best answer so far")
    return Card(thumbnail, class_names()[result.label], tuple(lines), good=done or None)


def verification_row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table of INT8 engines."""
    gate = "passed" if entry["passed"] else "refused: " + "; ".join(entry["failures"])
    return (
        name,
        f"{entry['outputs'][0]['cosine_mean']:.4f}",
        f"{entry['agreement']:.1%}",
        f"{entry['reference_top1']:.1%} → {entry['candidate_top1']:.1%}",
        f"{entry['speed'][0]['speedup']:.2f}×",
        gate,
    )


def gpu_row(engine: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table of GPU engines."""
    if "error" in engine:
        return (engine["model"], engine["precision"], "not built", engine["error"], "")
    return (
        engine["model"],
        engine["precision"],
        engine["target"],
        f"{engine['bytes'] / 1e6:.1f} MB",
        f"{engine['build_seconds']:.1f} s",
    )


def latency_bars(figures: Mapping[str, Any], path: Path) -> None:
    """Median latency of the FP32 and INT8 engine of each model at batch 1, as bars."""
    figure = drawing.figure("draw the demo's pictures", 8, 3.2)
    axes = figure.add_subplot()
    rows: list[tuple[str, str, float]] = []
    for name, entry in figures["verification"].items():
        speed = entry["speed"][0]
        rows.append((f"{name} FP32", "fp32", speed["reference_ms"]))
        rows.append((f"{name} INT8", "int8", speed["candidate_ms"]))
    places = range(len(rows), 0, -1)
    bars = axes.barh(
        places, [ms for _, _, ms in rows], color=[_FILLS[fill] for _, fill, _ in rows], height=0.62
    )
    axes.bar_label(bars, [f"{ms:.1f} ms" for _, _, ms in rows], padding=4, color=_INK, fontsize=9)
    axes.set_yticks(places, [label for label, _, _ in rows])
    axes.set_xlabel("median milliseconds per image, batch 1, calls taking turns")
    axes.set_xlim(0, max(ms for _, _, ms in rows) * 1.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#d9dee7", lw=0.6)
    axes.set_axisbelow(True)
    drawing.save(figure, path)


def summary(figures: Mapping[str, Any], page: Path) -> str:
    """The figures that matter, for the terminal."""
    lines = []
    for name, entry in figures["verification"].items():
        row = verification_row(name, entry)
        lines.append(
            f"{name:8} INT8 {row[4]} as fast as FP32, exact top-1 {row[3]}, agreement {row[2]}, "
            f"gate {row[5]}"
        )
    for name, system in figures["comparison"]["systems"].items():
        lines.append(
            f"{name:8} accuracy {system['accuracy']:.1%}, "
            f"{system['ms_per_image']:.2f} ms per image, "
            f"{system['images_per_second']:.0f} images/s"
        )
    lines.append(f"cascade  own work {figures['comparison']['own_share']:.2%} of its stages' time")
    engines = [" ".join(("engine  ", *gpu_row(entry))).rstrip() for entry in figures["gpu_engines"]]
    return "\n".join([*lines, *engines, f"report   {page}"])
