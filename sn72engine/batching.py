"""Gathers single images from many callers into batches.

Who does what:

- A *caller* puts its request in line and waits for its future.
- A *worker* waits until a batch is worth running (full, or its oldest request has waited long
  enough), runs it, and answers its requests. While it runs, the next batch gathers.
- The *clock* answers requests whose time is up, in line or in a batch, so that a deadline holds
  even where a model hangs. It sleeps until the earliest deadline.

A request ends exactly once: whoever sets ``ended``, under the lock, owns the answer and delivers it
after letting go of the lock, because a future runs its callbacks on the spot.
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from sn72engine.cascade.result import Result, Status
from sn72engine.closing import Closing
from sn72engine.errors import CascadeError, OptionError, OverloadedError
from sn72engine.events import BatchEvent, Observe, Outcome, RequestsEvent, notify
from sn72engine.spec import Options, check_int, check_number

log = logging.getLogger("sn72engine.batching")

#: Entries that the clock may hold of requests that have ended, before it is swept.
_SLACK = 64


class Answerer(Protocol):
    """What a batcher runs: a :class:`~sn72engine.cascade.Cascade` or a callable like it.

    ``deadline`` is seconds from now, ``math.inf`` for none. ``progress`` may be called between
    stages, with a result per image as known so far and which of them are settled; settled ones are
    answered at once.
    """

    def __call__(
        self,
        images: Sequence[Any],
        *,
        deadline: float,
        progress: Callable[[list[Result], list[bool]], None],
    ) -> Sequence[Result]:
        """One result per image, in order."""
        ...


@dataclass(frozen=True, slots=True)
class BatchingOptions(Options):
    """When a batch is run, and how much may wait.

    Args:
        max_batch: most images in a batch.
        max_wait: seconds that the oldest request waits for the batch to fill. While all workers
            are busy it waits longer, and batches fill by themselves: 0 suits a loaded service.
        max_queue: most requests in line; one more is refused with OverloadedError.
        max_queue_per_client: as ``max_queue``, for each client; None for no such limit.
        workers: batches that run at the same time. A cascade lets one batch into each stage, so
            more than its number of stages gains nothing.
    """

    max_batch: int = 32
    max_wait: float = 0.002
    max_queue: int = 1024
    max_queue_per_client: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        check_int("max_batch", self.max_batch, 1)
        check_number("max_wait", self.max_wait, 0.0, threading.TIMEOUT_MAX)
        check_int("max_queue", self.max_queue, 1)
        if self.max_queue_per_client is not None:
            check_int("max_queue_per_client", self.max_queue_per_client, 1)
        check_int("workers", self.workers, 1)


class _Request(Future[Result]):
    """A caller's future, and what the batcher knows of it. Times are of ``time.monotonic()``."""

    def __init__(
        self, batcher: MicroBatcher, image: Any, client: Hashable, since: float, until: float
    ) -> None:
        super().__init__()
        self.batcher = batcher
        self.image = image
        self.client = client
        self.since = since
        self.until = until
        #: What is known so far, for when time runs out.
        self.best: Result | None = None
        self.claimed: bool | None = None
        self.ended = False

    def cancel(self) -> bool:
        """Take the request back; False when it is in a batch already, or answered."""
        cancelled = super().cancel()
        if cancelled:
            self.batcher._withdraw(self)
        return cancelled


_Line = OrderedDict[_Request, None]
"""Requests of one client, oldest first; a dictionary so that one can leave from the middle."""


class MicroBatcher(Closing):
    """Answers single images, in batches. Thread-safe; use as a context manager, or close it.

    Order: first come, first served. Where callers name their ``client``, clients take turns, one
    request each, and the requests of one client stay in order.

    Deadlines: each request has its own. A batch may run as long as the latest deadline in it, and
    a request whose own time is up is answered then, with status DEADLINE and the best that is
    known: what earlier stages said, 0.5 where it never ran.

    Back-pressure: a request that would exceed the queue is refused at once. A request that was
    taken gets exactly one answer or error.

    An image that cannot be decoded is a matter of the cascade and leaves its batch unharmed. When
    the call as a whole raises, each request of the batch gets a CascadeError with the cause.

    Args:
        answer: a cascade, or a callable with its signature; called by ``workers`` threads.
        options: when a batch is run, and how much may wait.
        observe: is told of batches and of how requests ended, see :mod:`sn72engine.events`.
    """

    def __init__(
        self,
        answer: Answerer,
        options: BatchingOptions | None = None,
        *,
        observe: Observe | None = None,
    ) -> None:
        if not callable(answer):
            raise OptionError(
                f"answer is a {type(answer).__name__}; pass a Cascade or a callable with its "
                "signature"
            )
        self._answer = answer
        self._options = options or BatchingOptions()
        self._observe = observe
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)  # for workers: look at the lines again
        self._earlier = threading.Condition(self._lock)  # for the clock: look at it again
        self._lines: OrderedDict[Hashable, _Line] = OrderedDict()
        self._waiting = 0  # requests in lines
        self._running: set[_Request] = set()
        self._alarms: list[tuple[float, int, _Request]] = []
        self._numbers = itertools.count()
        self._workers: list[threading.Thread] = []
        self._clock: threading.Thread | None = None
        self._closed = False
        self._stopped = False

    @property
    def options(self) -> BatchingOptions:
        """When a batch is run, and how much may wait."""
        return self._options

    @property
    def waiting(self) -> int:
        """Requests in line now."""
        return self._waiting

    def __call__(
        self, image: Any, *, deadline: float | None = None, client: Hashable = None
    ) -> Result:
        """Answer one image; waits until it has been part of a batch.

        Args:
            image: as the cascade takes it.
            deadline: seconds from now, for waiting and running together; ``math.inf`` is no
                limit. None takes that of the cascade's specification, if there is one.
            client: on whose behalf; clients take turns.

        Raises:
            OptionError: ``deadline`` is no number.
            OverloadedError: too many requests are waiting.
            CascadeError: the batch failed, or the batcher has been closed.
        """
        request = self.submit(image, deadline=deadline, client=client)
        try:
            return request.result()
        except BaseException:
            request.cancel()  # an interrupted caller wants no answer; otherwise no effect
            raise

    def submit(
        self, image: Any, *, deadline: float | None = None, client: Hashable = None
    ) -> Future[Result]:
        """As a call, but returns at once. The future can be cancelled until a batch takes it.

        Raises:
            as a call does, except for the batch's own failure.
        """
        since = time.monotonic()
        request = _Request(self, image, client, since, since + self._limit(deadline))
        try:
            self._enqueue(request)
        except OverloadedError:
            notify(self._observe, RequestsEvent("refused", (0.0,)))
            raise
        return request

    async def predict(
        self, image: Any, *, deadline: float | None = None, client: Hashable = None
    ) -> Result:
        """As a call, for ``await``. Cancelling the task takes the request out of the line."""
        return await asyncio.wrap_future(self.submit(image, deadline=deadline, client=client))

    def close(self, *, drain: bool = True, patience: float | None = None) -> None:
        """Refuse new requests and end the threads. Calling it twice is allowed.

        Batches that run are waited for. The cascade is not closed.

        Args:
            drain: run what is in line; otherwise those requests get a CascadeError.
            patience: seconds to wait at most, None for no limit. What has no answer by then gets
                a CascadeError, and a thread that hangs is left behind.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            dropped = [] if drain else self._empty_lines()
            self._ready.notify_all()
        self._fail(dropped, "closed", "the batcher was closed before this request was run")
        end = math.inf if patience is None else time.monotonic() + patience
        _join(self._workers, end)
        with self._lock:
            lost = self._empty_lines()
            lost += [r for r in self._running if self._end(r)]
            self._stopped = True
            self._earlier.notify_all()
        self._fail(lost, "closed", f"no answer within {patience} s of closing the batcher")
        if self._clock is not None:
            _join([self._clock], end)

    # ------------------------------------------------------------ in line; the lock is held

    def _limit(self, deadline: float | None) -> float:
        if deadline is None:
            deadline = getattr(getattr(self._answer, "spec", None), "deadline", None)
            return math.inf if deadline is None else deadline
        if deadline != math.inf:
            check_number("deadline", deadline)
        return deadline

    def _enqueue(self, request: _Request) -> None:
        options = self._options
        with self._lock:
            if self._closed:
                raise CascadeError("the batcher has been closed")
            if self._waiting >= options.max_queue:
                raise OverloadedError(
                    f"{self._waiting} requests are waiting, as many as max_queue allows; try again "
                    "later, or raise BatchingOptions.max_queue if callers can wait that long"
                )
            line = self._lines.get(request.client)
            share = options.max_queue_per_client
            if line is not None and share is not None and len(line) >= share:
                raise OverloadedError(
                    f"{len(line)} requests of client {request.client!r:.80} are waiting, as many "
                    "as max_queue_per_client allows; try again later"
                )
            self._start(clock=math.isfinite(request.until))
            if line is None:
                line = self._lines[request.client] = OrderedDict()
            line[request] = None
            self._waiting += 1
            if math.isfinite(request.until):
                self._set_alarm(request)
            if self._waiting == 1 or self._waiting >= options.max_batch:
                self._ready.notify()

    def _start(self, *, clock: bool) -> None:
        # Daemons, so that a model that hangs cannot hold up the exit.
        while len(self._workers) < self._options.workers:
            worker = threading.Thread(target=self._work, name="sn72-batcher", daemon=True)
            worker.start()
            self._workers.append(worker)
        if clock and self._clock is None:
            self._clock = threading.Thread(target=self._watch, name="sn72-clock", daemon=True)
            self._clock.start()

    def _set_alarm(self, request: _Request) -> None:
        alarms = self._alarms
        if len(alarms) > _SLACK + 2 * (self._waiting + len(self._running)):
            # In place: the list is what the clock looks at.
            alarms[:] = [alarm for alarm in alarms if not alarm[2].ended]
            heapq.heapify(alarms)
        heapq.heappush(alarms, (request.until, next(self._numbers), request))
        if alarms[0][2] is request:
            self._earlier.notify()

    def _leave_line(self, request: _Request) -> None:
        line = self._lines.get(request.client)
        if line is not None and request in line:
            del line[request]
            self._waiting -= 1
            if not line:
                del self._lines[request.client]

    def _pick(self) -> list[_Request]:
        """The next batch, out of the lines: from each client in turn."""
        batch: list[_Request] = []
        now = time.monotonic()
        while self._lines and len(batch) < self._options.max_batch:
            client, line = self._lines.popitem(last=False)
            request, _ = line.popitem(last=False)
            self._waiting -= 1
            if line:
                self._lines[client] = line
            # One that is cancelled just now is gone; one whose time is up is for the clock.
            if request.until > now and self._claim(request):
                batch.append(request)
        self._running.update(batch)
        return batch

    def _empty_lines(self) -> list[_Request]:
        requests = [r for line in self._lines.values() for r in line if self._end(r)]
        self._lines.clear()
        self._waiting = 0
        return requests

    def _claim(self, request: _Request) -> bool:
        """Put a request beyond cancelling; False when it has been cancelled."""
        if request.claimed is None:  # a future may be asked once only
            request.claimed = request.set_running_or_notify_cancel()
        return request.claimed

    def _end(self, request: _Request) -> bool:
        """Take the right to answer; False when it has been answered, or cancelled."""
        if request.ended or not self._claim(request):
            return False
        request.ended = True
        return True

    # ------------------------------------------------------------ threads

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._run(batch)

    def _next_batch(self) -> list[_Request] | None:
        """Wait for a batch that is worth running; None when there will be no more."""
        options = self._options
        with self._lock:
            while True:
                if not self._waiting:
                    if self._closed:
                        return None
                    self._ready.wait()
                    continue
                oldest = min(next(iter(line)).since for line in self._lines.values())
                remaining = oldest + options.max_wait - time.monotonic()
                if self._waiting >= options.max_batch or remaining <= 0 or self._closed:
                    batch = self._pick()
                    if self._waiting:
                        self._ready.notify()  # more for another worker
                    return batch
                self._ready.wait(remaining)

    def _run(self, batch: list[_Request]) -> None:
        begin = time.monotonic()
        waiting = self._waiting

        def progress(results: list[Result], settled: list[bool]) -> None:
            answers = []
            known = list(zip(batch, results, settled, strict=True))  # checked before any is ended
            with self._lock:
                for request, result, final in known:
                    request.best = result
                    if final and self._end(request):
                        answers.append((request, result))
            self._deliver("answered", answers)

        try:
            # The latest deadline: the clock sees to the earlier ones.
            results = self._answer(
                [request.image for request in batch],
                deadline=max(request.until for request in batch) - begin,
                progress=progress,
            )
            _check_results(results, len(batch))
        except BaseException as error:  # whatever it is, nobody may wait for ever
            log.warning("a batch of %d failed", len(batch), exc_info=error)
            failed = self._finish(batch)
            reason = f"the batch of {len(batch)} failed: {type(error).__name__}: {error}"
            self._fail(failed, "failed", reason, error)
        else:
            mine = set(self._finish(batch))
            self._deliver(
                "answered", [(r, a) for r, a in zip(batch, results, strict=True) if r in mine]
            )
        event = BatchEvent(
            len(batch),
            time.monotonic() - begin,
            tuple(begin - request.since for request in batch),
            waiting,
        )
        notify(self._observe, event)

    def _finish(self, batch: list[_Request]) -> list[_Request]:
        """Those of a batch that have no answer yet, for the caller to answer."""
        with self._lock:
            self._running.difference_update(batch)
            return [request for request in batch if self._end(request)]

    def _watch(self) -> None:
        while (overdue := self._next_overdue()) is not None:
            self._deliver("expired", [(overdue, self._late(overdue))])

    def _next_overdue(self) -> _Request | None:
        """Wait for a request whose time is up; None when there will be no more."""
        alarms = self._alarms
        with self._lock:
            while True:
                while alarms and alarms[0][2].ended:
                    heapq.heappop(alarms)
                if not alarms:
                    if self._stopped:
                        return None
                    self._earlier.wait()
                    continue
                remaining = alarms[0][0] - time.monotonic()
                if remaining > 0:
                    self._earlier.wait(min(remaining, threading.TIMEOUT_MAX))
                    continue
                request = heapq.heappop(alarms)[2]
                self._leave_line(request)
                if self._end(request):
                    return request

    def _late(self, request: _Request) -> Result:
        if request.best is not None:
            return dataclasses.replace(request.best, status=Status.DEADLINE, error="")
        spec = getattr(self._answer, "spec", None)
        if getattr(spec, "top1", False):
            label = -1
        else:
            label = int(getattr(spec, "decision_threshold", 0.5) < 0.5)
        return Result(0.5, label, None, Status.DEADLINE)

    # ------------------------------------------------------------ ending; the lock is not held

    def _withdraw(self, request: _Request) -> None:
        with self._lock:
            self._leave_line(request)
            if request.ended:
                return
            self._claim(request)  # tells those who wait for it in concurrent.futures.wait
            request.ended = True
        request.image = None
        seconds = time.monotonic() - request.since
        notify(self._observe, RequestsEvent("cancelled", (seconds,)))

    def _deliver(self, outcome: Outcome, answers: Iterable[tuple[_Request, Result]]) -> None:
        ended = []
        for request, result in answers:
            request.image = None
            request.set_result(result)
            ended.append(request)
        self._tell(outcome, ended)

    def _fail(
        self,
        requests: list[_Request],
        outcome: Outcome,
        reason: str,
        cause: BaseException | None = None,
    ) -> None:
        for request in requests:
            # One each: an exception collects the traceback of every thread that raises it.
            error = CascadeError(reason)
            error.__cause__ = cause
            request.image = None
            request.set_exception(error)
        self._tell(outcome, requests)

    def _tell(self, outcome: Outcome, ended: list[_Request]) -> None:
        if ended and self._observe is not None:
            now = time.monotonic()
            seconds = tuple(now - request.since for request in ended)
            notify(self._observe, RequestsEvent(outcome, seconds))


def _check_results(results: object, count: int) -> None:
    if not isinstance(results, Sequence) or len(results) != count:
        raise CascadeError(f"returned {results!r:.80} for {count} images")
    for result in results:
        if not isinstance(result, Result):
            raise CascadeError(f"returned {result!r:.80} instead of a Result")


def _join(threads: Iterable[threading.Thread], end: float) -> None:
    for thread in threads:
        if thread is threading.current_thread():
            continue  # closed from a callback
        timeout = None if math.isinf(end) else max(end - time.monotonic(), 0.0)
        thread.join(timeout)
