"""From labelled images to a cascade with measured thresholds: score every stage, then set them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sn72engine.cascade.spec import CascadeSpec
from sn72engine.decode import decode
from sn72engine.errors import CascadeError, InputError, OptionError
from sn72engine.progress import Progress
from sn72engine.spec import check_int
from sn72engine.stages.base import Stage
from sn72engine.thresholds import ThresholdChoice


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """What every stage says of every image.

    Attributes:
        names: of the stages, in order.
        probabilities: float32, shape (stages, n).
        labels: int64, shape (stages, n), for stages that score by ``top1``; None otherwise.
        seconds: time per image of each stage, preprocessing included: the median over batches.
    """

    names: tuple[str, ...]
    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    seconds: tuple[float, ...]


def score_stages(
    stages: Mapping[str, Stage],
    images: Sequence[Any],
    *,
    batch: int = 8,
    progress: bool | None = None,
) -> ScoreTable:
    """Run every stage on every image, timing each batch.

    The stages take turns batch by batch, so that drift of the machine falls on all of them alike.
    Images are decoded once and at full size, outside the time of the stages.

    Args:
        stages: stage name to stage, in the cascade's order.
        images: sources as :func:`sn72engine.decode.decode` takes them.
        batch: images per call.
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        CascadeError: a stage gave no usable score for an image; thresholds chosen without it
            would be wrong.
        ImageError: an image cannot be decoded.
        InputError: there are no images.
        OptionError: ``batch`` is not a positive integer.
    """
    check_int("batch", batch, 1)
    if not len(images):
        raise InputError("there are no images to score; thresholds need labelled images")
    scores: dict[str, list[NDArray[Any]]] = {name: [] for name in stages}
    labels: dict[str, list[NDArray[Any]]] = {name: [] for name in stages}
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for stage in stages.values():
        stage.prepare()
    with Progress("score", len(images), unit="image", shown=progress) as bar:
        for start in range(0, len(images), batch):
            decoded = [decode(image) for image in images[start : start + batch]]
            for name, stage in stages.items():
                begin = time.perf_counter()
                answer = stage.score(decoded)
                seconds[name].append((time.perf_counter() - begin) / len(decoded))
                bad = np.flatnonzero(~np.isfinite(answer.probabilities))
                if bad.size:
                    position = int(bad[0])
                    reason = answer.errors.get(position, "no finite score")
                    raise CascadeError(f"stage {name!r}, image {start + position}: {reason}")
                scores[name].append(answer.probabilities)
                if answer.labels is not None:
                    labels[name].append(answer.labels)
            bar.step(len(decoded))
    top1 = all(labels[name] for name in stages)
    return ScoreTable(
        names=tuple(stages),
        probabilities=np.stack([np.concatenate(scores[n]) for n in stages]).astype(np.float32),
        labels=np.stack([np.concatenate(labels[n]) for n in stages]).astype(np.int64)
        if top1
        else None,
        seconds=tuple(float(np.median(seconds[name])) for name in stages),
    )


def with_choice(spec: CascadeSpec, choice: ThresholdChoice) -> CascadeSpec:
    """The cascade with the chosen thresholds and without the stages that did not help.

    Args:
        spec: whose stages were scored, in order.
        choice: of :func:`sn72engine.thresholds.choose` on those scores.

    Raises:
        OptionError: the choice speaks of more stages than there are.
    """
    if max(choice.kept) >= len(spec.stages):
        raise OptionError(
            f"the choice keeps stage {max(choice.kept)}, but the cascade has stages 0 to "
            f"{len(spec.stages) - 1}; score the stages of this cascade"
        )
    stages = tuple(
        dataclasses.replace(spec.stages[chosen.stage], low=chosen.low, high=chosen.high)
        for chosen in choice.stages
    )
    return dataclasses.replace(spec, stages=stages, decision_threshold=choice.decision_threshold)
