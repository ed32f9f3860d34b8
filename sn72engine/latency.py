"""Latency and throughput: warmed up, timed call by call, told as percentiles.

Two things are compared fairly only in one run with their calls taking turns, because clock speed
and other load drift from one run to the next: that is :func:`interleave`.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sn72engine import drawing
from sn72engine.doctor import cpu_name
from sn72engine.errors import InputError
from sn72engine.progress import Progress
from sn72engine.spec import BenchOptions, check_int
from sn72engine.trial import random_inputs

if TYPE_CHECKING:
    from sn72engine.session import Session

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Latency:
    """Distribution of call times, in milliseconds.

    Percentiles interpolate linearly between samples. ``p99`` is None for fewer than
    ``BenchOptions.MINIMUM_FOR_P99`` calls: it would be little more than the slowest one.
    """

    n: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float | None
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Summarise call times given in seconds.

        Raises:
            InputError: there are none, or one is not finite and positive or zero.
        """
        samples = np.asarray(seconds, dtype=np.float64) * 1e3
        if samples.ndim != 1 or samples.size == 0:
            raise InputError("no call was timed: repeats must be at least 1")
        if not np.isfinite(samples).all() or (samples < 0).any():
            raise InputError("call times must be finite and not negative")
        p50, p90, p95, p99 = (float(q) for q in np.percentile(samples, (50, 90, 95, 99)))
        return cls(
            n=samples.size,
            mean=float(samples.mean()),
            min=float(samples.min()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99 if samples.size >= BenchOptions.MINIMUM_FOR_P99 else None,
            max=float(samples.max()),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        p99 = "" if self.p99 is None else f", p99 {self.p99:.2f}"
        return (
            f"p50 {self.p50:.2f} ms (mean {self.mean:.2f}, p90 {self.p90:.2f}, "
            f"p95 {self.p95:.2f}{p99}, {self.n} calls)"
        )


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What one benchmark of a session found.

    Attributes:
        latency: of one call with ``batch`` samples.
        throughput: samples per second of one caller: ``batch`` over the mean call time.
        batch: samples per call.
        warmup: calls made before the timed ones.
        first_ms: time of the very first call, which pays for what is set up lazily; None
            without warm-up.
        machine: what it ran on: processor, device, versions, threads, load.
        samples_ms: every timed call, in order.
    """

    latency: Latency
    throughput: float
    batch: int
    warmup: int
    first_ms: float | None
    machine: Mapping[str, Any]
    samples_ms: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, without the single samples."""
        return {
            "latency_ms": self.latency.to_dict(),
            "throughput": self.throughput,
            "batch": self.batch,
            "warmup": self.warmup,
            "first_ms": self.first_ms,
            "machine": dict(self.machine),
        }

    def render(self) -> str:
        """The report as text for a person."""
        latency = self.latency
        p99 = (
            f"{latency.p99:.3f}"
            if latency.p99 is not None
            else f"- (needs {BenchOptions.MINIMUM_FOR_P99} calls)"
        )
        rows = [
            ("batch", str(self.batch)),
            ("calls", f"{latency.n}, after {self.warmup} to warm up"),
            ("mean", f"{latency.mean:.3f} ms"),
            ("p50", f"{latency.p50:.3f} ms"),
            ("p90", f"{latency.p90:.3f} ms"),
            ("p95", f"{latency.p95:.3f} ms"),
            ("p99", p99 if latency.p99 is None else f"{p99} ms"),
            ("min, max", f"{latency.min:.3f}, {latency.max:.3f} ms"),
            ("throughput", f"{self.throughput:.1f} samples/s"),
            *((name, str(value)) for name, value in self.machine.items()),
        ]
        if self.first_ms is not None:
            rows.insert(2, ("first call", f"{self.first_ms:.3f} ms"))
        return "\n".join(f"{name:14} {value}" for name, value in rows)

    def save_histogram(self, path: str | Path) -> Path:
        """Draw the distribution of call times as a PNG and return its path.

        The axis ends at the 99.5th percentile, so that one stray call does not squeeze the rest;
        what lies beyond is counted in the last bar and said.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        path = Path(path)
        samples, latency = np.asarray(self.samples_ms), self.latency
        low, high = float(samples.min()), float(np.percentile(samples, 99.5))
        high = max(high, low + 1e-3)
        beyond = int((samples > high).sum())
        figure = drawing.figure("draw a latency histogram", 8, 4.2)
        axes = figure.add_subplot()
        bins = np.linspace(low, high, int(np.clip(np.sqrt(samples.size) * 2, 8, 60)) + 1)
        axes.hist(
            np.clip(samples, low, high), bins=bins, color="#7aa6d6", edgecolor="white", lw=0.6
        )
        axes.set_ylim(0, axes.get_ylim()[1] * 1.18)  # room for the labels
        axes.yaxis.get_major_locator().set_params(integer=True)  # calls are counted
        marks = [("p50", latency.p50), ("p95", latency.p95), ("p99", latency.p99)]
        # Labels of neighbouring marks stand at different heights, so that they never overlap.
        for level, (name, value) in enumerate(marks):
            if value is None or not low <= value <= high:
                continue
            axes.axvline(value, color="#1c2330", lw=1.1, ls=(0, (4, 3)))
            right = value < low + 0.75 * (high - low)
            axes.annotate(
                f"{name} {value:.2f} ms",
                (value, 0.97 - 0.075 * level),
                xycoords=("data", "axes fraction"),
                xytext=(5 if right else -5, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="top",
                fontsize=9,
                color="#1c2330",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
            )
        axes.set_xlabel(
            f"milliseconds per call of {self.batch} sample{'s' if self.batch > 1 else ''}"
        )
        axes.set_ylabel("calls")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#d9dee7", lw=0.6)
        axes.set_axisbelow(True)
        where = ", ".join(
            str(self.machine[name])
            for name in ("backend", "precision", "target")
            if name in self.machine
        )
        tail = f"; last bar holds {beyond} slower, up to {latency.max:.2f} ms" if beyond else ""
        axes.set_title(
            f"{self.throughput:.1f} samples/s, {latency.n} calls{tail}\n{where}",
            loc="left",
            fontsize=10,
            color="#1c2330",
        )
        return drawing.save(figure, path)


def measure(
    call: Call, options: BenchOptions | None = None, *, progress: bool | None = False
) -> Latency:
    """Time one call many times, after a warm-up.

    Args:
        call: takes nothing; must not return before its work is done.
        options: ``warmup`` and ``repeats`` are used.
        progress: show a progress bar; None shows it on a terminal.
    """
    options = options if options is not None else BenchOptions()
    _, seconds = _timed(call, options.warmup, options.repeats, progress)
    return Latency.of(seconds)


def interleave(calls: Mapping[str, Call], warmup: int, repeats: int) -> dict[str, Latency]:
    """Time several calls in turns, so that drift of the machine falls on all of them alike.

    Args:
        calls: name to call. Each round makes every call once; the order turns by one each round,
            so that none always runs after the same neighbour.
        warmup: rounds not counted.
        repeats: rounds counted.

    Raises:
        InputError: there are no calls.
        OptionError: ``warmup`` or ``repeats`` is out of range.
    """
    check_int("warmup", warmup, 0)
    check_int("repeats", repeats, 1)
    if not calls:
        raise InputError("calls is empty: give at least one call to time")
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            call = calls[name]
            started = time.perf_counter()
            call()
            took = time.perf_counter() - started
            if turn >= warmup:
                seconds[name].append(took)
    return {name: Latency.of(samples) for name, samples in seconds.items()}


def bench(
    session: Session,
    options: BenchOptions | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> BenchReport:
    """Measure latency and throughput of a session.

    Args:
        session: what to measure.
        options: batch size, warm-up, repeats, and the seed of the random input.
        inputs: input to use instead of random numbers, by name; must hold ``options.batch``
            samples. For most models the time does not depend on the values.
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        InputError: the batch lies outside the engine's range, or ``inputs`` does not fit.
        SessionError: the library reported failure.
    """
    options = options if options is not None else BenchOptions()
    if inputs is None:
        inputs = random_inputs(session.inputs, options.batch, options.seed)
    for spec in session.inputs:
        batch = len(inputs[spec.name]) if spec.name in inputs and spec.shape else options.batch
        if batch != options.batch:
            raise InputError(
                f"input {spec.name!r} has batch {batch}, but batch={options.batch} is to be timed"
            )
    first, seconds = _timed(lambda: session(inputs), options.warmup, options.repeats, progress)
    latency = Latency.of(seconds)
    return BenchReport(
        latency=latency,
        throughput=options.batch / latency.mean * 1e3,
        batch=options.batch,
        warmup=options.warmup,
        first_ms=first,
        machine=machine_facts(session),
        samples_ms=tuple(round(value * 1e3, 6) for value in seconds),
    )


def machine_facts(session: Session) -> dict[str, Any]:
    """What a figure was measured on, so that it can be compared with another at all."""
    manifest = session.manifest
    facts: dict[str, Any] = {
        "backend": f"{manifest.backend} {manifest.backend_version}",
        "precision": manifest.precision,
        "target": manifest.target,
        "threads": session.options.threads or os.cpu_count(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        facts["load_average"] = round(os.getloadavg()[0], 2)
    if not manifest.target.startswith("cpu"):
        import torch

        facts["gpu"] = torch.cuda.get_device_name(session.options.device_index)
    return facts


def _timed(
    call: Call, warmup: int, repeats: int, progress: bool | None
) -> tuple[float | None, list[float]]:
    """Milliseconds of the first call (None without warm-up) and seconds of each counted one."""
    first, seconds = None, []
    with Progress("measure", warmup + repeats, unit="call", shown=progress) as bar:
        for turn in range(warmup + repeats):
            started = time.perf_counter()
            call()
            took = time.perf_counter() - started
            bar.step()  # outside the timed part
            if turn >= warmup:
                seconds.append(took)
            elif turn == 0:
                first = took * 1e3
    return first, seconds
