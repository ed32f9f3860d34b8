"""Runs the first stages of a cascade as CUDA graphs, and the others as the CPU executor does.

A request is cut into batches of at most ``max_batch`` samples. A batch takes a lane, its images are
decoded and made into rows in the lane's pinned memory, the captured stages run, and the lane's
answers go into the same tally that the CPU executor fills. What is still open then goes through
the other stages, if there are any. While the GPU works on a batch, the next one is made ready in
another lane, if one is free.

Where the answers differ from the CPU executor's, which is otherwise the definition:

- A deadline is looked at between stages, by the GPU's clock, which starts when the batch has been
  uploaded. A stage under way is not left behind: its scores count, and a call may outlast its
  deadline by as long as one stage takes. Decoding is not cut short either.
- A request larger than ``max_batch`` is answered batch by batch: late batches may have no score.
- A score that is no probability is known to be one, but not its value.
- Probabilities from logits may differ in the last places, as ``csrc/README.md`` says.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sn72engine.cascade.entrance import Entrance
from sn72engine.cascade.executor import CpuExecutor, Request
from sn72engine.cascade.lane import Lane
from sn72engine.cascade.lane_pool import LanePool
from sn72engine.cascade.report import StageCounts
from sn72engine.cascade.result import Result
from sn72engine.cascade.route import NEGATIVE, POSITIVE
from sn72engine.cascade.spec import ALWAYS, CascadeSpec
from sn72engine.cascade.tally import Indices, Tally
from sn72engine.cuda.layout import NO_STAGE, Code
from sn72engine.errors import CascadeError, CudaUnavailableError, described
from sn72engine.nvtx import span

log = logging.getLogger("sn72engine.cascade")

#: Nanoseconds that stand for no deadline: the most that the GPU can count.
_UNLIMITED = (1 << 64) - 1


class Launches(Protocol):
    """How the captured stages of a lane are launched: ``host.py`` or ``device.py``."""

    def start(self, rows: int) -> None:
        """Begin a batch of up to ``rows`` samples, whose rows are being uploaded."""
        ...

    def finish(self, between: Callable[[], None] | None) -> NDArray[Any]:
        """Wait for the answers; what each boundary decided. May call ``between`` at boundaries."""
        ...

    def close(self) -> None:
        """Release the graphs."""
        ...


_Equipped = tuple[Lane, Launches]


@dataclass(frozen=True, slots=True)
class _Flight:
    """A batch on the GPU.

    ``marks`` has a row per captured stage: which samples of the batch it applies to; those of a
    group are alike. ``readable`` are the rows whose image could be decoded, ``unreadable`` the
    others, with the reason.
    """

    equipped: _Equipped
    positions: Indices
    marks: NDArray[np.bool_]
    unreadable: dict[int, str]
    readable: NDArray[np.intp]
    budget_ns: int
    rows: int


class GraphExecutor:
    """Runs requests from any number of threads; as many batches at a time as there are lanes.

    Args:
        spec: of the cascade.
        lanes: each with its launches; all of them capture the same stages.
        cpu: runs the stages that are not captured, and everything once the GPU has failed.
        release: called when nothing uses the lanes any more.
    """

    def __init__(
        self,
        spec: CascadeSpec,
        lanes: Sequence[tuple[Lane, Launches]],
        cpu: CpuExecutor,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._spec = spec
        self._names = tuple(stage.name for stage in spec.stages)
        self._captured = len(lanes[0][0].stages)
        #: Stages that the GPU runs side by side; most often one.
        self._groups = tuple(group.stages for group in lanes[0][0].groups)
        self._capacity = lanes[0][0].capacity
        self._entrance = Entrance()
        self._pool = LanePool(lanes)
        self._loaders = {s.offer.rows: s.offer.load for s in reversed(lanes[0][0].stages)}
        self._cpu = cpu
        self._release = release

    @property
    def failure(self) -> str:
        """Why the GPU is no longer used; empty while it is."""
        return self._pool.failure

    def run(self, request: Request) -> tuple[list[Result], list[StageCounts]]:
        """Answer every sample of a request.

        Raises:
            CascadeError: a sample was left without a status, which is a bug; or the executor has
                been closed.
        """
        with self._entrance.visit():
            return self._run(request)

    def close(self, patience: float) -> tuple[bool, ...]:
        """Take no more work; for each stage, whether it is idle and so may be closed.

        Calls that are running get up to ``patience`` seconds to end.
        """
        until = time.monotonic() + patience
        self._entrance.close(patience)
        lanes = self._pool.close()
        idle = lanes is not None and self._released(lanes)
        rest = self._cpu.close(max(until - time.monotonic(), 0.0))
        return tuple(free and (idle or at >= self._captured) for at, free in enumerate(rest))

    def _released(self, lanes: Sequence[_Equipped]) -> bool:
        """Let go of what the lanes hold; False if the GPU does not take it back."""
        try:
            for lane, launches in lanes:
                with lane.driver.current():
                    launches.close()
                    lane.close()
            if lanes:
                with lanes[0][0].driver.current():
                    self._release()
        except CudaUnavailableError as error:
            self._fail(error)
            return False
        if lanes:
            self._loaders.clear()  # they hold what the stages have captured with
        return True

    def _run(self, request: Request) -> tuple[list[Result], list[StageCounts]]:
        if self.failure:
            return self._cpu.run(request)
        spec = self._spec
        tally = Tally(len(request.samples))
        counts = [StageCounts() for _ in spec.stages]
        try:
            self._run_captured(request, tally, counts)
        except CudaUnavailableError as error:
            self._fail(error)
            return self._cpu.run(request)
        everyone = np.arange(len(request.samples))
        request.samples.drop(everyone[~tally.is_open(everyone)])
        if self._captured < len(spec.stages):
            if request.progress is not None:
                known = tally.snapshot(self._names, spec.decision_threshold, top1=spec.top1)
                request.progress(*known)
            self._cpu.run_from(self._captured, request, tally, counts)
        return tally.results(self._names, spec.decision_threshold, top1=spec.top1), counts

    def _run_captured(self, request: Request, tally: Tally, counts: Sequence[StageCounts]) -> None:
        marks = self._marks(request)
        positions = np.flatnonzero(marks.any(axis=0))
        flights: deque[_Flight] = deque()
        try:
            for start in range(0, len(positions), self._capacity):
                batch = positions[start : start + self._capacity]
                lane = self._lane(-math.inf if flights else request.until, counts)
                if lane is None and flights:  # never wait for a second lane while holding one
                    self._finish(flights.popleft(), request, tally, counts)
                    lane = self._lane(request.until, counts)
                flight = None
                if lane is not None:
                    flight = self._start(lane, batch, marks[:, batch], request, counts)
                if flight is None:
                    self._late(batch, marks, tally, counts)
                    continue
                flights.append(flight)
                if len(flights) > 1:
                    self._finish(flights.popleft(), request, tally, counts)
            while flights:
                self._finish(flights.popleft(), request, tally, counts)
        except BaseException:
            for flight in flights:
                self._recover(flight.equipped)
            raise

    def _marks(self, request: Request) -> NDArray[np.bool_]:
        """Which samples each captured stage applies to, shape (stages, samples)."""
        marks = np.ones((self._captured, len(request.samples)), bool)
        for mark, stage in zip(marks, self._spec.stages, strict=False):
            if stage.when != ALWAYS:
                mark[:] = request.flags[stage.when]
        return marks

    def _lane(self, until: float, counts: Sequence[StageCounts]) -> _Equipped | None:
        """A free lane; None if there is none before ``until``, a time of ``time.monotonic()``."""
        begin = time.perf_counter()
        try:
            return self._pool.take(until)
        finally:
            counts[0].waited_seconds += time.perf_counter() - begin

    @contextlib.contextmanager
    def _recovered(self, equipped: _Equipped) -> Iterator[None]:
        """What goes wrong in here costs no lane."""
        try:
            yield
        except BaseException:
            self._recover(equipped)
            raise

    def _recover(self, equipped: _Equipped) -> None:
        """Give a lane back once what it was doing, whatever that was, is over.

        Where the GPU cannot even say that, the lane is not given back: it may be at it for ever.
        """
        lane, _ = equipped
        try:
            with lane.driver.current():
                lane.settle()
        except CudaUnavailableError as error:
            self._fail(error)
        else:
            self._pool.give(equipped)

    def _fail(self, error: CudaUnavailableError) -> None:
        """Run everything on the host from now on."""
        if self._pool.fail(str(error)):
            log.error("the GPU failed; stages run on the host from now on", exc_info=error)

    def _start(
        self,
        equipped: _Equipped,
        positions: Indices,
        marks: NDArray[np.bool_],
        request: Request,
        counts: Sequence[StageCounts],
    ) -> _Flight | None:
        """Decode, upload and launch a batch; None, with the lane given back, if it is too late."""
        lane, launches = equipped
        with self._recovered(equipped):
            begin = time.perf_counter()
            unreadable = self._load(lane, positions, request)
            counts[0].decode_seconds += time.perf_counter() - begin
            left = request.until - time.monotonic()
            if left <= 0:
                self._pool.give(equipped)
                return None
            budget_ns = _UNLIMITED if math.isinf(left) else min(int(left * 1e9), _UNLIMITED)
            visible = marks.copy()
            visible[:, [*unreadable]] = False
            self._write_parameters(lane, positions, visible, budget_ns, request)
            count = len(positions)
            rows = next(bucket for bucket in lane.groups[0].buckets if bucket >= count)
            with lane.driver.current():
                lane.upload(count)
                launches.start(rows)
            readable = np.flatnonzero([row not in unreadable for row in range(count)])
            return _Flight(equipped, positions, marks, unreadable, readable, budget_ns, rows)

    def _write_parameters(
        self,
        lane: Lane,
        positions: Indices,
        visible: NDArray[np.bool_],
        budget_ns: int,
        request: Request,
    ) -> None:
        """What the GPU is told about a batch. ``visible``: which stage is to see which sample."""
        count, parameters = len(positions), lane.parameters
        parameters["batch"], parameters["budget_ns"] = count, budget_ns
        for at in self._groups[0]:
            parameters["scored"][at, :count] = np.where(visible[at], at, NO_STAGE)
        for number, (first, *_) in enumerate(self._groups):
            if number:
                parameters["eligible"][number - 1, :count] = visible[first]
            for name, bound in zip(("low", "high"), request.bounds[first], strict=True):
                parameters[name][number, :count] = bound if bound.ndim == 0 else bound[positions]

    def _load(self, lane: Lane, positions: Indices, request: Request) -> dict[int, str]:
        """Make the images into rows; those that cannot be, with the reason."""
        unreadable: dict[int, str] = {}
        targets = [(self._loaders[rows], view) for rows, view in lane.sources.items()]
        with span("decode"):
            for row, position in enumerate(positions.tolist()):
                try:
                    image = request.samples.get(position)
                    for load, view in targets:
                        load(image, view[row])
                except Exception as error:  # one bad image must not take the others with it
                    unreadable[row] = described(error)
        return unreadable

    def _finish(
        self, flight: _Flight, request: Request, tally: Tally, counts: Sequence[StageCounts]
    ) -> None:
        """Wait for a batch, take its answers over and give its lane back."""
        lane, launches = flight.equipped

        def tell() -> None:
            self._take(flight, tally)
            known = tally.snapshot(self._names, self._spec.decision_threshold, top1=self._spec.top1)
            assert request.progress is not None
            request.progress(*known)

        with self._recovered(flight.equipped), lane.driver.current():
            with span("captured stages"):
                controls = launches.finish(None if request.progress is None else tell)
            samples = self._take(flight, tally)
        self._pool.give(flight.equipped)  # from here on nothing of the lane is used
        for control in controls[:-1]:
            if control["count"] and not control["rows"]:
                raise CascadeError(
                    f"no bucket holds {control['count']} samples; please report this"
                )
        self._take_unreadable(flight, controls, tally, counts)
        self._add_counts(flight, samples, controls, counts)
        if self._captured == len(self._names):
            settled = flight.positions
        else:
            settled = flight.positions[~tally.is_open(flight.positions)]
        request.samples.forget(settled)

    def _take(self, flight: _Flight, tally: Tally) -> NDArray[Any]:
        """The lane's answers into the tally; returns those of the readable samples."""
        answers, rows = flight.equipped[0].answers, flight.readable
        positions = flight.positions[rows]
        samples: NDArray[Any] = answers["samples"][rows]
        tally.load(positions, samples, self._names)
        if self._spec.top1:
            scored = samples["stage"] != NO_STAGE
            tally.label(positions[scored], answers["labels"][rows[scored]])
        return samples

    def _take_unreadable(
        self,
        flight: _Flight,
        controls: NDArray[Any],
        tally: Tally,
        counts: Sequence[StageCounts],
    ) -> None:
        """End the samples without an image at the first group that would have seen them."""
        for row, error in flight.unreadable.items():
            position = int(flight.positions[row])
            number = next(n for n, (at, *_) in enumerate(self._groups) if flight.marks[at, row])
            elapsed_us = int(controls[number - 1]["elapsed_us"]) if number else 0
            late = number > 0 and elapsed_us * 1000 >= flight.budget_ns
            if late:
                tally.late(np.array([position]))
            else:
                tally.fail(position, error, final=True)
                log.warning("sample %d: %s", position, error)
            for at in self._groups[number]:
                counts[at].asked += 1
                counts[at].late += late
                counts[at].failed += not late

    def _add_counts(
        self,
        flight: _Flight,
        samples: NDArray[Any],
        controls: NDArray[Any],
        counts: Sequence[StageCounts],
    ) -> None:
        """What each captured stage did, from the samples and the boundaries."""
        asked = int(flight.marks[0, flight.readable].sum())
        padded, before = flight.rows - asked, 0
        for group, control in zip(self._groups, controls, strict=True):
            elapsed, seconds = int(control["elapsed_us"]), 0.0
            if elapsed:  # a boundary that was not run has no time
                seconds = (elapsed - before) % (1 << 32) * 1e-6
                before = elapsed
            for at in group:
                count = counts[at]
                closed = samples["route"][samples["closed"] == at]
                negative = int(np.count_nonzero(closed == NEGATIVE))
                positive = int(np.count_nonzero(closed == POSITIVE))
                failed = int(np.count_nonzero(samples["failed"] >> at & 1))
                count.calls += padded + asked > 0
                count.asked += asked
                count.negative += negative
                count.positive += positive
                count.failed += failed
                count.escalated += asked - negative - positive - failed
                count.padded += padded
                count.seconds += seconds  # of the whole group: its stages run side by side
            late = (samples["closed"] == group[-1]) & (samples["status"] == Code.DEADLINE)
            self._count_late(group[-1] + 1, int(np.count_nonzero(late)), counts)
            asked, padded = int(control["count"]), int(control["rows"] - control["count"])

    def _count_late(self, first: int, late: int, counts: Sequence[StageCounts]) -> None:
        """Samples for which time ran out before the group that begins with stage ``first``."""
        if not late:
            return
        for at in next(group for group in self._spec.groups if group[0] == first):
            log.warning("stage %s: time ran out for %d samples", self._names[at], late)
            counts[at].asked += late
            counts[at].late += late

    def _late(
        self,
        batch: Indices,
        marks: NDArray[np.bool_],
        tally: Tally,
        counts: Sequence[StageCounts],
    ) -> None:
        """Time ran out before the batch could begin."""
        for first, *_ in self._groups:
            late = batch[marks[first, batch] & tally.is_open(batch)]
            tally.late(late)
            self._count_late(first, late.size, counts)
