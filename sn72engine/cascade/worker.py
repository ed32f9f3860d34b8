"""A thread that does one job at a time, and that a caller can walk away from.

Python cannot stop a running thread. So a caller whose time is up leaves the job running, and the
worker stays busy with it: the job's late answer goes nowhere, and nobody else enters the stage
before it has ended. A stage therefore never runs twice at once, at most one thread per stage is
ever left behind, and there is no queue that could grow.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from sn72engine.errors import CascadeError

T = TypeVar("T")


class Overrun(Exception):  # noqa: N818 - an event of the cascade, not an error of the program
    """The job had not ended, or not even begun, when the time was up."""


class _Job(Generic[T]):
    __slots__ = ("call", "done", "error", "value")

    def __init__(self, call: Callable[[], T]) -> None:
        self.call = call
        self.done = threading.Event()
        self.value: T | None = None
        self.error: BaseException | None = None


class Worker:
    """Runs jobs one at a time, each within the time that its caller has."""

    def __init__(self, name: str) -> None:
        self._name = name
        #: Held while a job runs, and released by whoever runs it.
        self._busy = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._started = False
        self._closed = False
        weakref.finalize(self, self._jobs.put, None)

    def acquire(self, until: float) -> None:
        """Wait for the worker to be free. The caller must :meth:`run` one job next.

        Raises:
            Overrun: it was still busy at ``until``, a time of ``time.monotonic()``.
            CascadeError: it has been closed.
        """
        remaining = until - time.monotonic()
        timeout = -1.0 if math.isinf(until) else min(max(remaining, 0.0), threading.TIMEOUT_MAX)
        if not self._busy.acquire(timeout=timeout):
            raise Overrun
        if self._closed:
            self._busy.release()
            raise CascadeError(f"{self._name} has been closed")

    def run(self, call: Callable[[], T], until: float) -> T:
        """Run ``call`` on an acquired worker and return what it returns, or raise what it raises.

        Without a limit (``until`` infinite) it runs on the calling thread, which is cheaper.

        Raises:
            Overrun: it was not done at ``until``; it goes on, and the worker stays busy with it.
        """
        if math.isinf(until):
            try:
                return call()
            finally:
                self._busy.release()
        return self.start(call, until)()

    def start(self, call: Callable[[], T], until: float) -> Callable[[], T]:
        """Begin ``call`` on the thread of an acquired worker.

        Returns:
            What waits for the end of it, and returns or raises as :meth:`run` does.

        Raises:
            Overrun: it is past ``until`` already.
        """
        remaining = until - time.monotonic()
        if remaining <= 0:
            self._busy.release()
            raise Overrun
        try:
            self._start_thread()
        except RuntimeError:  # the system gives no more threads
            self._busy.release()
            raise
        job = _Job(call)
        self._jobs.put(job)
        return lambda: _wait(job, until)

    def close(self, patience: float) -> bool:
        """Take no more jobs; wait up to ``patience`` seconds for the running one.

        Returns:
            Whether it has ended, so that what it uses may be released.
        """
        self._closed = True
        free = self._busy.acquire(timeout=patience)
        self._jobs.put(None)
        if free:
            self._busy.release()
        return free

    def _start_thread(self) -> None:
        # Under the lock, so once. A daemon, so that a stage that hangs cannot hold up the exit.
        if not self._started:
            threading.Thread(
                target=_work, args=(self._jobs, self._busy), name=self._name, daemon=True
            ).start()
            self._started = True


def _wait(job: _Job[T], until: float) -> T:
    limited = not math.isinf(until)
    timeout = min(max(until - time.monotonic(), 0.0), threading.TIMEOUT_MAX) if limited else None
    if not job.done.wait(timeout):
        raise Overrun
    if job.error is not None:
        raise job.error
    return cast("T", job.value)


def _work(jobs: queue.SimpleQueue[_Job[Any] | None], busy: threading.Lock) -> None:
    """Thread body. It knows the queue and not the worker, so that the worker can be collected."""
    while (job := jobs.get()) is not None:
        try:
            job.value = job.call()
        except BaseException as error:  # handed to the caller, whatever it is
            job.error = error
        done = job.done
        # Drop the job before waiting for the next one: it holds images.
        del job
        busy.release()
        done.set()
