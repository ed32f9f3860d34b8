"""The CPU executor: runs samples through the stages. Other executors must answer as it does.

Stage by stage: the samples that are still open, and that the stage's trigger marks, are scored in
batches of at most ``max_batch``; the scores are combined (see ``tally.py``) and routed (see
``route.py``); what is sure leaves, and the rest goes on to the next stage. A batch larger than
``max_batch`` therefore has a first answer for every sample before any sample reaches the second
stage, which is what a deadline wants.

The stages of a parallel group are asked about a batch at the same time, each on its own thread.
Their scores and failures count in the order of the stages, whichever was first, and the samples
are then routed once, by the thresholds of the group's first stage. A sample is routed by the
scores that there are, and can leave as negative only if a stage that has a negative exit scored
it. If one of the stages overruns, the samples that it was asked about end with DEADLINE and what
the others said.

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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sn72engine.cascade.entrance import Entrance
from sn72engine.cascade.report import StageCounts
from sn72engine.cascade.result import Result
from sn72engine.cascade.route import ESCALATE, NEGATIVE, POSITIVE, as_float32, route
from sn72engine.cascade.spec import ALWAYS, CascadeSpec
from sn72engine.cascade.tally import Floats, Indices, Tally
from sn72engine.cascade.worker import Overrun, Worker
from sn72engine.errors import CascadeError, described
from sn72engine.nvtx import span
from sn72engine.stages.base import Stage, StageScores

log = logging.getLogger("sn72engine.cascade")

Progress = Callable[[list[Result], list[bool]], None]
"""Gets what is known of each sample between two stages, and which samples are settled."""

_Known = tuple[Indices, Floats]  # positions of samples, and their probabilities

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
        self._lock = threading.Lock()  # the stages of a parallel group share the images

    def __len__(self) -> int:
        return len(self._sources)

    def get(self, position: int) -> Any:
        """The decoded image.

        Raises:
            ImageError: it cannot be decoded.
        """
        with self._lock:
            image = self._images[position]
            if image is None:
                image = self._images[position] = self._decode(self._sources[position])
            return image

    def forget(self, positions: Indices) -> None:
        """Let go of decoded images. A stage that asks for one gets it, decoded once more."""
        for position in positions.tolist():
            self._images[position] = None

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


class Executor(Protocol):
    """Runs requests from any number of threads."""

    def run(self, request: Request) -> tuple[list[Result], list[StageCounts]]:
        """One result per sample, in order, and the counts of this run for each stage.

        Raises:
            CascadeError: a sample was left without a status, which is a bug.
        """
        ...

    def close(self, patience: float) -> tuple[bool, ...]:
        """Take no more work, and give calls that are running ``patience`` seconds to end.

        Returns:
            For each stage, whether it is idle and so may be closed.
        """
        ...


class CpuExecutor:
    """Runs requests, from any number of threads; one thread at a time in each stage.

    Args:
        spec: of the cascade.
        stages: one per stage of ``spec``, in order.
    """

    def __init__(self, spec: CascadeSpec, stages: Sequence[Stage]) -> None:
        self._spec = spec
        self._stages = tuple(stages)
        self._groups = spec.groups
        self._names = tuple(stage.name for stage in spec.stages)
        self._entrance = Entrance()
        self._workers = tuple(Worker(f"sn72-stage-{name}") for name in self._names)

    def run(self, request: Request) -> tuple[list[Result], list[StageCounts]]:
        """Answer every sample of a request.

        Returns:
            One result per sample, in order, and the counts of this run for each stage.

        Raises:
            CascadeError: a sample was left without a status, which is a bug; or the executor has
                been closed.
        """
        spec = self._spec
        tally = Tally(len(request.samples))
        counts = [StageCounts() for _ in self._stages]
        with self._entrance.visit():
            self.run_from(0, request, tally, counts)
        return tally.results(self._names, spec.decision_threshold, top1=spec.top1), counts

    def run_from(
        self, first: int, request: Request, tally: Tally, counts: Sequence[StageCounts]
    ) -> None:
        """Run the stages from number ``first``, which begins a group, on the open samples.

        Args:
            first: earlier stages have had their say already.
            request: as for :meth:`run`.
            tally, counts: what is known so far; both are added to.
        """
        spec = self._spec
        for group in self._groups:
            if group[0] < first:
                continue
            marks = {number: self._marked(number, request) for number in group}
            given = [mark for mark in marks.values() if mark is not None]
            marked = np.logical_or.reduce(given) if len(given) == len(marks) else None
            waiting = tally.open(marked)
            for start in range(0, len(waiting), spec.max_batch):
                batch = waiting[start : start + spec.max_batch]
                asked = {
                    number: batch if mark is None else batch[mark[batch]]
                    for number, mark in marks.items()
                }
                self._run_batch(asked, request, tally, counts)
            if request.progress is not None and group is not self._groups[-1]:
                known = tally.snapshot(self._names, spec.decision_threshold, top1=spec.top1)
                request.progress(*known)

    def close(self, patience: float) -> tuple[bool, ...]:
        """Take no more work; for each stage, whether it is idle and so may be closed.

        Calls that are running, and stages that were left behind, get up to ``patience`` seconds in
        all to end.
        """
        until = time.monotonic() + patience
        self._entrance.close(patience)
        return tuple(worker.close(max(until - time.monotonic(), 0.0)) for worker in self._workers)

    def _marked(self, number: int, request: Request) -> NDArray[np.bool_] | None:
        """Samples that a stage's trigger marks; None for all."""
        when = self._spec.stages[number].when
        return None if when == ALWAYS else request.flags[when]

    def _run_batch(
        self,
        asked: Mapping[int, Indices],
        request: Request,
        tally: Tally,
        counts: Sequence[StageCounts],
    ) -> None:
        """Ask the stages of a group, each about its samples; combine in their order; route once."""
        first = min(asked)
        asked = {number: batch for number, batch in asked.items() if batch.size}
        said = _Said.nothing(len(request.samples))
        known: _Known | None = None
        for number, answer in self._ask(asked, request, counts).items():
            batch, count = asked[number], counts[number]
            count.asked += len(batch)
            if answer is None:
                log.warning(
                    "stage %s: time ran out for %d samples", self._names[number], len(batch)
                )
                count.late += len(batch)
                said.late[batch] = True
                continue
            count.calls += 1
            count.seconds += answer.seconds
            count.decode_seconds += answer.decode_seconds
            for position, error in answer.unreadable.items():
                tally.fail(position, error, final=True)
                log.warning("sample %d: %s", position, error)
            scored = self._take_scores(number, answer, tally)
            count.failed += len(batch) - scored.index.size
            count.escalated += scored.index.size  # less those that leave, see _route
            known = self._combine(number, scored, tally, said)
        with span("route"):
            self._route(first, said, known if len(asked) == 1 else None, request, tally, counts)

    def _ask(
        self, asked: Mapping[int, Indices], request: Request, counts: Sequence[StageCounts]
    ) -> dict[int, _Answer | None]:
        """Decode and score on the workers of the stages, all at the same time.

        Returns:
            One answer per stage, in order; None where time ran out.
        """
        *others, last = asked
        waits = [self._start(n, asked[n], request, counts[n], threaded=True) for n in others]
        # Without a deadline the last one runs on this thread, which is cheaper.
        waits.append(self._start(last, asked[last], request, counts[last], threaded=False))
        answers = [wait() for wait in reversed(waits)]
        return dict(zip(asked, reversed(answers), strict=True))

    def _start(
        self,
        number: int,
        batch: Indices,
        request: Request,
        counts: StageCounts,
        *,
        threaded: bool,
    ) -> Callable[[], _Answer | None]:
        """Begin to score a batch; what is returned waits for the answer, None if it is late."""
        worker, stage, until = self._workers[number], self._stages[number], request.until

        name = self._names[number]

        def job() -> _Answer:
            return _score(name, stage, request.samples, batch.tolist())

        begin = time.monotonic()
        try:
            worker.acquire(until)
            start = time.monotonic()
            wait = worker.start(job, until) if threaded else lambda: worker.run(job, until)
        except Overrun:
            return lambda: None
        finally:
            counts.waited_seconds += time.monotonic() - begin

        def answer() -> _Answer | None:
            try:
                return wait()
            except Overrun:
                counts.seconds += time.monotonic() - start
                return None

        return answer

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

    def _combine(self, number: int, scored: _Scored, tally: Tally, said: _Said) -> _Known:
        """Combine the scores of a stage with what is known; the samples that it changed."""
        stage = self._spec.stages[number]
        known = tally.add(scored.index, scored.scores, number, stage.combine, stage.weight)
        if scored.labels is not None:
            tally.label(scored.index, scored.labels)
        said.last[known[0]] = number + 1
        if stage.negative_exit:
            said.negative_exit[scored.index] = True
        return known

    def _route(
        self,
        first: int,
        said: _Said,
        known: _Known | None,
        request: Request,
        tally: Tally,
        counts: Sequence[StageCounts],
    ) -> None:
        """Let sure samples leave, and end those for which time ran out.

        ``known`` spares looking up what the only stage that was asked has changed.
        """
        if said.late.any():
            tally.late(tally.open(said.late))
        if known is None:
            index = tally.open(said.last > 0)
            known = index, tally.probability(index)
        index, probability = known
        low, high = (b if b.ndim == 0 else b[index] for b in request.bounds[first])
        routes = route(probability, low, high)
        leaving = routes == NEGATIVE
        if leaving.any():
            routes[leaving & ~said.negative_exit[index]] = ESCALATE
        request.samples.drop(tally.leave(index, routes))
        last = said.last[index]
        for mark in set(last.tolist()):
            exits, count = routes[last == mark], counts[mark - 1]
            negative = int(np.count_nonzero(exits == NEGATIVE))
            positive = int(np.count_nonzero(exits == POSITIVE))
            count.negative += negative
            count.positive += positive
            count.escalated -= negative + positive


@dataclass(frozen=True, slots=True)
class _Said:
    """What the stages of a group did, one element per sample of the request.

    ``last`` is one more than the number of the last stage that changed the answer, 0 for none;
    ``negative_exit`` marks what was scored by a stage that has one; ``late`` what a stage that
    overran was asked about.
    """

    last: NDArray[np.int64]
    negative_exit: NDArray[np.bool_]
    late: NDArray[np.bool_]

    @classmethod
    def nothing(cls, count: int) -> _Said:
        return cls(np.zeros(count, np.int64), np.zeros(count, bool), np.zeros(count, bool))


@dataclass(frozen=True, slots=True)
class _Scored:
    """Samples that a stage scored, with scores in [0, 1]."""

    index: Indices
    scores: Floats
    labels: NDArray[Any] | None


def _score(name: str, stage: Stage, samples: Samples, batch: list[int]) -> _Answer:
    """Body of the job. Its caller may have left: it changes nothing but the decoded images."""
    begin = time.perf_counter()
    answer = _Answer([], {})
    images = []
    with span("decode"):
        for position in batch:
            try:
                images.append(samples.get(position))
                answer.kept.append(position)
            except Exception as error:  # one bad image must not take the others with it
                answer.unreadable[position] = described(error)
    start = time.perf_counter()
    answer.decode_seconds = start - begin
    if images:
        try:
            with span(name):
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
