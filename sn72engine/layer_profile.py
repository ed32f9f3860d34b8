"""Which layers of an engine take the time: medians over runs, from the library's own profiler.

ONNX Runtime, OpenVINO and TensorRT each time their layers themselves, after their own fusions, so
what is told is what runs. Their profilers cost time too, most where layers are short: shares mean
more than sums, and :func:`sn72engine.latency.bench` measures the whole.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sn72engine.engine_folder import open_engine
from sn72engine.errors import InputError
from sn72engine.introspection import layers_of, timed_runs
from sn72engine.introspection.layer import TimedRun
from sn72engine.spec import Options, RuntimeOptions, check_int
from sn72engine.text import Column, table
from sn72engine.trace import Span, write_trace
from sn72engine.trial import random_inputs

if TYPE_CHECKING:
    from sn72engine.engine import Engine


@dataclass(frozen=True, slots=True)
class ProfileOptions(Options):
    """How the layers of an engine are timed.

    Args:
        batch: samples per call.
        warmup: runs made first and not counted.
        repeats: runs counted; each layer gets the median of its times.
        seed: of the random input, when no input is given.
    """

    batch: int = 1
    warmup: int = 5
    repeats: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("batch", self.batch, 1)
        check_int("warmup", self.warmup, 0)
        check_int("repeats", self.repeats, 1)
        check_int("seed", self.seed, 0)


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer: median time in milliseconds, and its share of the sum over all layers."""

    name: str
    op: str
    ms: float
    share: float
    runs_on: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "name": self.name,
            "op": self.op,
            "ms": self.ms,
            "share": self.share,
            "runs_on": self.runs_on,
        }


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """Where the time of an engine goes.

    Attributes:
        engine: what to call it.
        layers: in the order in which they run.
        call_ms: median time of the whole call with the profiler on.
        batch: samples per call.
        runs: how many are counted.
        threads: CPU threads; None for all cores.
        last: the last run, for the trace.
    """

    engine: str
    layers: tuple[LayerTime, ...]
    call_ms: float
    batch: int
    runs: int
    threads: int | None
    last: TimedRun = field(repr=False)

    @property
    def layers_ms(self) -> float:
        """Sum over the layers, in milliseconds."""
        return sum(layer.ms for layer in self.layers)

    @property
    def by_op(self) -> dict[str, float]:
        """Milliseconds by type of layer, most first."""
        sums: Counter[str] = Counter()
        for layer in self.layers:
            sums[layer.op] += layer.ms  # type: ignore[assignment]
        return dict(sums.most_common())

    def top(self, count: int) -> tuple[LayerTime, ...]:
        """The layers that take most, most first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.ms)[:count])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "engine": self.engine,
            "batch": self.batch,
            "runs": self.runs,
            "threads": self.threads,
            "call_ms": self.call_ms,
            "layers_ms": self.layers_ms,
            "by_op": self.by_op,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def render(self, count: int = 20) -> str:
        """The profile as text: types of layers, then the ``count`` that take most."""
        total = self.layers_ms or 1.0
        numbers = Counter(layer.op for layer in self.layers)
        lines = [
            f"{self.engine}, batch {self.batch}: {len(self.layers)} layers, "
            f"{self.layers_ms:.3f} ms of a call of {self.call_ms:.3f} ms",
            f"medians of {self.runs} runs with the profiler on",
            "",
            *table(
                [
                    Column("type", 40),
                    Column("layers", 6, right=True),
                    Column("ms", 9, right=True),
                    Column("share", 6, right=True),
                ],
                [
                    (op or "-", str(numbers[op]), f"{ms:.3f}", f"{ms / total:.1%}")
                    for op, ms in self.by_op.items()
                ],
            ),
            "",
            *table(
                [
                    Column("layer", 34),
                    Column("type", 22),
                    Column("ms", 9, right=True),
                    Column("share", 6, right=True),
                    Column("runs on", 21),
                ],
                [
                    (layer.name, layer.op, f"{layer.ms:.3f}", f"{layer.share:.1%}", layer.runs_on)
                    for layer in self.top(count)
                ],
            ),
        ]
        if len(self.layers) > count:
            lines.append(f"({len(self.layers) - count} more)")
        return "\n".join(lines)

    def save_plot(self, path: str | Path, count: int = 16) -> Path:
        """Draw the ``count`` layers that take most and the types as a PNG; returns its path.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from sn72engine.profile_plot import plot

        return plot(self, Path(path), count)

    def spans(self) -> tuple[Span, ...]:
        """The last run: the call, and its layers in it.

        Where the library tells durations only, each layer is drawn right after the one before.
        """
        at, found = 0.0, []
        for layer in self.last.layers:
            start = at if layer.start is None else layer.start
            facts = {"type": layer.op, "runs_on": layer.runs_on}
            found.append(Span(layer.name, layer.op or "layer", start, layer.duration, "run", facts))
            at = start + layer.duration
        call = Span(self.engine, "call", 0.0, max(self.last.duration, at), "run")
        return (call, *found)

    def save_trace(self, path: str | Path) -> Path:
        """Write the last run as a Chrome/Perfetto trace and return its path."""
        return write_trace(path, self.spans(), process=self.engine)


def profile(
    engine: Engine | str | Path,
    options: ProfileOptions | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    runtime: RuntimeOptions | None = None,
) -> LayerProfile:
    """Time the layers of an engine.

    Args:
        engine: an engine, or its folder, which is hash-checked.
        options: batch, runs and the seed of the random input.
        inputs: arrays by name to run on instead of random numbers, ``options.batch`` samples each.
        runtime: how the engine is run.

    Raises:
        InputError: the batch lies outside the engine's range, or an input is missing or holds
            another number of samples.
        SessionError: the engine cannot be run here.
        EngineCorruptError: a file in the folder does not match its recorded hash.
    """
    from sn72engine.engine import Engine

    options = options if options is not None else ProfileOptions()
    runtime = runtime if runtime is not None else RuntimeOptions()
    if not isinstance(engine, Engine):
        engine = open_engine(Path(engine))
    manifest = engine.manifest
    if options.batch not in manifest.batch:
        raise InputError(f"batch={options.batch} lies outside the engine's range, {manifest.batch}")
    if inputs is None:
        inputs = random_inputs(manifest.inputs, options.batch, options.seed)
    missing = [spec.name for spec in manifest.inputs if spec.name not in inputs]
    if missing:
        raise InputError(f"input {missing[0]!r} is missing; given: {', '.join(inputs) or 'none'}")
    for spec in manifest.inputs:
        shape = np.shape(inputs[spec.name])
        if spec.shape and isinstance(spec.shape[0], str) and shape[:1] != (options.batch,):
            raise InputError(
                f"input {spec.name!r} has shape {shape}, and batch={options.batch}: give as many "
                "samples"
            )
    runs = timed_runs(engine, inputs, options.warmup + options.repeats, runtime)[options.warmup :]
    return LayerProfile(
        engine=f"{manifest.key[:12]} ({manifest.backend} {manifest.precision})",
        layers=_medians(engine, runs),
        call_ms=statistics.median(run.duration for run in runs) / 1e3,
        batch=options.batch,
        runs=len(runs),
        threads=runtime.threads,
        last=runs[-1],
    )


def _medians(engine: Engine, runs: list[TimedRun]) -> tuple[LayerTime, ...]:
    """Median time of each layer, in the order of the last run.

    A layer that runs more than once in a call (in a loop) counts with the sum.
    """
    sums = []
    for run in runs:
        times: Counter[str] = Counter()
        for layer in run.layers:
            times[layer.name] += layer.duration  # type: ignore[assignment]
        sums.append(times)
    described = {layer.name: layer for layer in runs[-1].layers}
    medians = {name: statistics.median(times[name] for times in sums) / 1e3 for name in described}
    total = sum(medians.values()) or 1.0
    ops = {name: layer.op for name, layer in described.items()}
    if not all(ops.values()):  # TensorRT's profiler tells names only; its inspector the types
        ops |= {layer.name: layer.op for layer in layers_of(engine)}
    return tuple(
        LayerTime(name, ops[name], medians[name], medians[name] / total, layer.runs_on)
        for name, layer in described.items()
    )
