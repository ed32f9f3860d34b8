"""The cascade against its own stages: one half of the samples chooses, the other measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sn72engine.cascade import Cascade
from sn72engine.cascade.result import Result
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.cascade.tuning import score_stages, with_choice
from sn72engine.latency import Latency, interleave
from sn72engine.session import Session
from sn72engine.spec import RuntimeOptions
from sn72engine.stages.engine import EngineStage
from sn72engine.thresholds import ThresholdChoice, ThresholdOptions, choose
from sn72kernels import atomic

#: Samples per timed call.
_BATCH = 8
_ROUNDS = 25

#: Escalated images that the report shows.
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Labelled samples.

    Attributes:
        images: sources as :func:`sn72engine.decode.decode` takes them.
        labels: int64 class indices, one per image.
        meaning: where the labels are from, in words.
        synonyms: class -> class that it counts as; classes not in it count as themselves.
    """

    images: Sequence[Any]
    labels: NDArray[np.int64]
    meaning: str
    synonyms: Mapping[int, int]

    def merged(self, classes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Classes with synonyms replaced."""
        return np.array([self.synonyms.get(int(c), int(c)) for c in classes], np.int64)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tuned cascade, how its thresholds were chosen, and how it did.

    ``escalated`` holds a few measured images that the first stage was not sure of, with answers.
    """

    spec: CascadeSpec
    choice: ThresholdChoice
    names: tuple[str, ...]
    figures: Mapping[str, Any]
    escalated: tuple[tuple[Any, Result], ...]

    def run(self, images: Sequence[Any], runtime: RuntimeOptions) -> list[Result]:
        """Run the tuned cascade."""
        with Cascade(self.spec, runtime=runtime) as cascade:
            return cascade(images)


def compare(
    sessions: Mapping[str, Session],
    evaluation: Evaluation,
    folder: Path,
    runtime: RuntimeOptions,
) -> Comparison:
    """Choose thresholds, write cascade.yaml, and measure the cascade beside each stage alone.

    Args:
        sessions: stage name to engine, cheapest first.
        evaluation: samples; the first half chooses, the second half measures.
        folder: receives cascade.yaml.
        runtime: how engines are run.
    """
    labels = evaluation.labels
    half = len(labels) // 2
    choosing, measuring = evaluation.images[:half], evaluation.images[half:]

    full = CascadeSpec(
        tuple(
            StageSpec(name, engine=str(session.engine.folder), score="top1")
            for name, session in sessions.items()
        )
    )
    stages = {name: EngineStage(session, "top1") for name, session in sessions.items()}
    table = score_stages(stages, choosing, batch=_BATCH)
    assert table.labels is not None  # every stage scores by top1
    choice = choose(
        list(table.probabilities),
        labels[:half],
        table.seconds,
        ThresholdOptions(task="top1", reference="last"),
        stage_labels=[evaluation.merged(classes) for classes in table.labels],
        names=table.names,
    )
    tuned = with_choice(full, choice)
    atomic.write_text(folder / "cascade.yaml", tuned.to_yaml(folder))

    specs = {"cascade": tuned}
    both = fullest(full, choice)
    if len(tuned.stages) < len(full.stages) and both is not None:
        specs["all stages"] = both
    specs |= {stage.name: CascadeSpec((stage,)) for stage in full.stages}
    held_out = dataclasses.replace(evaluation, images=measuring, labels=labels[half:])
    figures, results = measure(specs, held_out, runtime)
    later = [
        (image, result)
        for image, result in zip(measuring, results, strict=True)
        if result.stage != table.names[0]
    ]
    return Comparison(
        tuned,
        choice,
        table.names,
        {
            "labels": evaluation.meaning,
            "samples": {"choosing": half, "measuring": len(labels) - half},
            "thresholds": choice.to_dict(),
            "comparison": figures,
        },
        tuple(later[:_SHOWN]),
    )


def fullest(spec: CascadeSpec, choice: ThresholdChoice) -> CascadeSpec | None:
    """The best cascade of the frontier that keeps every stage; None when none does.

    Shown beside a choice that drops a stage, so that one sees what the stage would have done.
    """
    points = [point for point in choice.pareto if len(point.kept) == len(spec.stages)]
    if not points:
        return None
    best = max(points, key=lambda point: (point.value, -point.cost))
    stages = tuple(
        dataclasses.replace(stage, low=low, high=high)
        for stage, low, high in zip(spec.stages, best.low, best.high, strict=True)
    )
    return dataclasses.replace(spec, stages=stages, decision_threshold=best.decision_threshold)


def measure(
    specs: Mapping[str, CascadeSpec], evaluation: Evaluation, runtime: RuntimeOptions
) -> tuple[dict[str, Any], list[Result]]:
    """Accuracy and interleaved throughput of several cascades on the same images.

    Returns the figures, and what the one named ``cascade`` answered.

    A stage alone runs as a cascade of one stage, so that all pay for the same preprocessing.
    """
    images = evaluation.images
    cascades = {name: Cascade(spec, runtime=runtime) for name, spec in specs.items()}
    try:
        results = {name: cascade(images) for name, cascade in cascades.items()}
        chunks = [images[i : i + _BATCH] for i in range(0, len(images) - _BATCH + 1, _BATCH)]
        calls = {name: Turns(cascade, chunks) for name, cascade in cascades.items()}
        times: dict[str, Latency] = interleave(
            {name: partial(turns.next) for name, turns in calls.items()}, warmup=2, repeats=_ROUNDS
        )
        report = cascades["cascade"].report()
    finally:
        for cascade in cascades.values():
            cascade.close()
    last = results["cascade"]
    stage_names = [stage.name for stage in specs["cascade"].stages]
    figures = {
        "batch": _BATCH,
        "systems": {
            name: {
                "accuracy": accuracy(results[name], evaluation),
                "ms_per_image": times[name].mean / _BATCH,
                "images_per_second": 1e3 * _BATCH / times[name].mean,
            }
            for name in specs
        },
        "answered_by": {
            name: sum(result.stage == name for result in last) / len(last) for name in stage_names
        },
        "own_share": report.own_seconds / sum(stage.counts.seconds for stage in report.stages),
        "report": report.to_dict(),
    }
    return figures, last


class Turns:
    """Calls a cascade on one chunk of images after the other, round and round."""

    def __init__(self, cascade: Cascade, chunks: Sequence[Sequence[Any]]) -> None:
        self._cascade = cascade
        self._chunks = chunks
        self._turn = 0

    def next(self) -> list[Result]:
        """Answer the next chunk."""
        chunk = self._chunks[self._turn % len(self._chunks)]
        self._turn += 1
        return self._cascade(chunk)


def accuracy(results: Sequence[Result], evaluation: Evaluation) -> float:
    """Share of results with the right class."""
    given = evaluation.merged(np.array([result.label for result in results], np.int64))
    return float(np.mean(given == evaluation.labels))
