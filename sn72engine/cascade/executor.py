"""The CPU executor: runs samples through the stages. Other executors must answer as it does.

Stage by stage: the samples that are still open, and that the stage's trigger marks, are scored in
batches of at most ``max_batch``; the scores are combined (see ``tally.py``) and routed (see
``route.py``); what is sure leaves, and the rest goes on to the next stage. A batch larger than
``max_batch`` therefore has a first answer for every sample before any sample reaches the second
stage, which is what a deadline wants.

What ends a sample:

========================================================  ============  ===========================
Event                                                     Status        Probability
========================================================  ============  ===========================
a stage was sure                                          DONE          combined
no stage was sure                                         UNDECIDED     combined
a stage could not score it and nothing after it counted   STAGE_FAILED  combined without that stage
the image could not be decoded                            STAGE_FAILED  0.5
no stage scored it                                        STAGE_FAILED  0.5
time ran out before or during a stage that it waited for  DEADLINE      combined so far, or 0.5
========================================================  ============  ===========================

A stage fails for a whole batch when it raises or returns something malformed, and for one sample
when it gives it NaN or a number outside [0, 1]. Those samples go on to the next stage. Failures
are logged as warnings on the logger ``sn72engine.cascade``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sn72engine.cascade.report import StageCounts
from sn72engine.cascade.result import Result
from sn72engine.cascade.route import ESCALATE, NEGATIVE, POSITIVE, as_float32, route
from sn72engine.cascade.spec import ALWAYS, CascadeSpec
from sn72engine.cascade.tally import Floats, Indices, Tally
from sn72engine.cascade.worker import Overrun, Worker
from sn72engine.errors import CascadeError, ImageError
from sn72engine.stages.base import Stage, StageScores

log = logging.getLogger("sn72engine.cascade")

Progress = Callable[[list[Result], list[bool]], None]
"""Gets what is known of each sample between two stages, and which samples are settled."""

Bounds = tuple[Floats, Floats]
"""Thresholds of a stage: float32, each a scalar (shape ()) or one per sample (shape (n,))."""


class Samples:
    """The images of one call, each decoded when a stage first asks for it and then kept.

    Args:
        sources: what the caller passed.
        decode: makes an image of a source, or raises ImageError.
    """

    def __init__(self, sources: Sequence[Any], decode: Callable[[Any], Any]) -> None:
        self._sources: list[Any] = list(sources)
        self._images: list[Any] = [None] * len(self._sources)
        self._decode = decode

    def __len__(self) -> int:
        return len(self._sources)

    def get(self, position: int) -> Any:
        """The decoded image.

        Raises:
            ImageError: it cannot be decoded.
        """
        image = self._images[position]
        if image is None:
            image = self._images[position] = self._decode(self._sources[position])
        return image

    def drop(self, positions: Indices) -> None:
        """Forget images that no stage will ask for again."""
        for position in positions.tolist():
            self._images[position] = self._sources[position] = None


@dataclass(frozen=True, slots=True)
class Request:
    """One call: its samples, when it must end, and what holds for each sample.

    ``until`` is a time of ``time.monotonic()``, infinite for no limit; ``flags`` has the marked
    samples by trigger, ``bounds`` the thresholds by stage number. ``progress`` is called after
    every stage but the last; an executor that runs all stages in one go does not call it.
    """

    samples: Samples
    until: float
    flags: Mapping[str, NDArray[np.bool_]]
    bounds: Sequence[Bounds]
    progress: Progress | None = None


@dataclass(slots=True)
class _Answer:
    """What came out of one batch in one stage: everything that the worker thread hands over."""

    kept: list[int]
    unreadable: dict[int, str]
    scores: Any = None
    error: Exception | None = None
    seconds: float = 0.0
    decode_seconds: float = 0.0


class CpuExecutor:
    """Runs requests, from any number of threads; one thread at a time in each stage.

    Args:
        spec: of the cascade.
        stages: one per stage of ``spec``, in order.
    """

    def __init__(self, spec: CascadeSpec, stages: Sequence[Stage]) -> None:
        self._spec = spec
        self._stages = tuple(stages)
        self._names = tuple(stage.name for stage in spec.stages)
        self._workers = tuple(Worker(f"sn72-stage-{name}") for name in self._names)

    def run(self, request: Request) -> tuple[list[Result], list[StageCounts]]:
        """Answer every sample of a request.

        Returns:
            One result per sample, in order, and the counts of this run for each stage.

        Raises:
            CascadeError: a sample was left without a status, which is a bug.
        """
        spec = self._spec
        tally = Tally(len(request.samples))
        counts = [StageCounts() for _ in self._stages]
        for number, stage in enumerate(self._spec.stages):
            flagged = None if stage.when == ALWAYS else request.flags[stage.when]
            waiting = tally.open(flagged)
            for start in range(0, len(waiting), self._spec.max_batch):
                batch = waiting[start : start + self._spec.max_batch]
                self._run_batch(number, batch, request, tally, counts[number])
            if request.progress is not None and number + 1 < len(self._stages):
                known = tally.snapshot(self._names, spec.decision_threshold, top1=spec.top1)
                request.progress(*known)
        return tally.results(self._names, spec.decision_threshold, top1=spec.top1), counts

    def close(self, patience: float) -> tuple[bool, ...]:
        """Take no more work; for each stage, whether it is idle and so may be closed."""
        return tuple(worker.close(patience) for worker in self._workers)

    def _run_batch(
        self, number: int, batch: Indices, request: Request, tally: Tally, counts: StageCounts
    ) -> None:
        counts.asked += len(batch)
        try:
            answer = self._ask(number, batch, request, counts)
        except Overrun:
            log.warning("stage %s: time ran out for %d samples", self._names[number], len(batch))
            tally.late(batch)
            counts.late += len(batch)
            return
        counts.calls += 1
        counts.seconds += answer.seconds
        counts.decode_seconds += answer.decode_seconds
        for position, error in answer.unreadable.items():
            tally.fail(position, error, final=True)
            log.warning("sample %d: %s", position, error)
        scored = self._take_scores(number, answer, tally)
        counts.failed += len(batch) - scored.index.size
        self._route(number, scored, request, tally, counts)

    def _ask(self, number: int, batch: Indices, request: Request, counts: StageCounts) -> _Answer:
        """Decode and score a batch on the stage's worker.

        Raises:
            Overrun: time ran out.
        """
        worker, stage, until = self._workers[number], self._stages[number], request.until
        begin = time.monotonic()
        try:
            worker.acquire(until)
        finally:
            start = time.monotonic()
            counts.waited_seconds += start - begin
        try:
            return worker.run(lambda: _score(stage, request.samples, batch.tolist()), until)
        except Overrun:
            counts.seconds += time.monotonic() - start
            raise

    def _take_scores(self, number: int, answer: _Answer, tally: Tally) -> _Scored:
        """Check what a stage returned; note a failure for each sample that it did not score."""
        name, top1 = self._names[number], self._spec.top1
        index = np.array(answer.kept, np.intp)
        if not answer.kept:
            return _Scored(index, np.empty(0, np.float32), None)
        try:
            scores, labels = _checked(answer, top1=top1)
        except Exception as error:
            log.warning("stage %s failed on %d samples", name, len(index), exc_info=error)
            for position in answer.kept:
                tally.fail(position, f"{name}: {type(error).__name__}: {error}")
            return _Scored(index[:0], np.empty(0, np.float32), None)
        good = (scores >= 0) & (scores <= 1)
        if not good.all():
            for at in np.flatnonzero(~good).tolist():
                reason = answer.scores.errors.get(at) or f"score {scores[at]} is no probability"
                tally.fail(answer.kept[at], f"{name}: {reason}")
                log.warning("stage %s: sample %d: %s", name, answer.kept[at], reason)
            index, scores = index[good], scores[good]
            labels = None if labels is None else labels[good]
        return _Scored(index, scores, labels)

    def _route(
        self, number: int, scored: _Scored, request: Request, tally: Tally, counts: StageCounts
    ) -> None:
        """Combine scores with what is known, and let sure samples leave."""
        stage = self._spec.stages[number]
        changed, probability = tally.add(
            scored.index, scored.scores, number, stage.combine, stage.weight
        )
        if scored.labels is not None:
            tally.label(scored.index, scored.labels)
        low, high = (b if b.ndim == 0 else b[changed] for b in request.bounds[number])
        routes = route(probability, low, high)
        if not stage.negative_exit:
            routes[routes == NEGATIVE] = ESCALATE
        gone = tally.leave(changed, routes)
        request.samples.drop(gone)
        counts.negative += int(np.count_nonzero(routes == NEGATIVE))
        counts.positive += int(np.count_nonzero(routes == POSITIVE))
        counts.escalated += scored.index.size - gone.size


@dataclass(frozen=True, slots=True)
class _Scored:
    """Samples that a stage scored, with scores in [0, 1]."""

    index: Indices
    scores: Floats
    labels: NDArray[Any] | None


def _score(stage: Stage, samples: Samples, batch: list[int]) -> _Answer:
    """Body of the job. Its caller may have left: it changes nothing but the decoded images."""
    begin = time.perf_counter()
    answer = _Answer([], {})
    images = []
    for position in batch:
        try:
            images.append(samples.get(position))
            answer.kept.append(position)
        except ImageError as error:
            answer.unreadable[position] = str(error)
        except Exception as error:  # one bad image must not take the others with it
            answer.unreadable[position] = f"{type(error).__name__}: {error}"
    start = time.perf_counter()
    answer.decode_seconds = start - begin
    if images:
        try:
            answer.scores = stage.score(images)
        except Exception as error:
            answer.error = error
        answer.seconds = time.perf_counter() - start
    return answer


def _checked(answer: _Answer, *, top1: bool) -> tuple[Floats, NDArray[Any] | None]:
    """Probabilities as float32 and labels of a stage's answer.

    Raises:
        CascadeError: it is not what a stage must return.
        InputError: the probabilities are not real numbers.
        Exception: what the stage itself raised.
    """
    if answer.error is not None:
        raise answer.error
    scores, count = answer.scores, len(answer.kept)
    if not isinstance(scores, StageScores) or not isinstance(scores.errors, Mapping):
        raise CascadeError(f"returned {scores!r:.80} instead of StageScores")
    probabilities = as_float32(scores.probabilities, "probabilities")
    if probabilities.shape != (count,):
        raise CascadeError(
            f"returned probabilities of shape {probabilities.shape} for {count} images"
        )
    if not top1:
        return probabilities, None
    labels = np.asarray(scores.labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise CascadeError(
            f"must return {count} integer labels with score='top1', got {scores.labels!r:.80}"
        )
    return probabilities, labels
