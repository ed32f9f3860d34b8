"""The lanes that no batch is in, and the callers that wait for one."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from sn72engine.errors import CascadeError, CudaUnavailableError

T = TypeVar("T")


class LanePool(Generic[T]):
    """Lends each lane to one batch at a time, to any number of threads, in their order.

    Nobody waits for a lane that will not come: a failure of the GPU and :meth:`close` reach every
    caller in line.

    Args:
        lanes: all of them.
    """

    def __init__(self, lanes: Sequence[T]) -> None:
        self._free = list(lanes)
        self._count = len(lanes)
        self._closed = False
        self._failure = ""
        self._line: deque[object] = deque()  # one ticket per caller that wants a lane
        self._changed = threading.Condition()

    @property
    def failure(self) -> str:
        """Why the GPU is no longer used; empty while it is."""
        return self._failure

    def take(self, until: float) -> T | None:
        """A free lane; None if there is none before ``until``, a time of ``time.monotonic()``.

        Callers are served in the order in which they ask: a call of many batches, which asks for
        each of them, does not keep the others waiting until its end.

        Raises:
            CudaUnavailableError: the GPU has failed.
            CascadeError: the pool has been closed.
        """
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            try:
                while True:
                    if self._failure:
                        raise CudaUnavailableError(self._failure)
                    if self._closed:
                        raise CascadeError("the cascade has been closed")
                    if self._free and self._line[0] is ticket:
                        return self._free.pop()  # the last one used: its memory is the warmest
                    if not self._wait(until):
                        return None
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()

    def give(self, lane: T) -> None:
        """Give a lane back, on which nothing is going on any more."""
        with self._changed:
            self._free.append(lane)
            self._changed.notify_all()

    def fail(self, reason: str) -> bool:
        """The GPU has failed: no lane is lent any more. Whether this was not known yet."""
        with self._changed:
            first = not self._failure
            self._failure = self._failure or reason
            self._changed.notify_all()
            return first

    def close(self) -> list[T] | None:
        """Lend no more lanes.

        Returns:
            All lanes, to be released, and none on a further call. None while one of them has not
            been given back.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if len(self._free) < self._count:
                return None
            lanes, self._free, self._count = self._free, [], 0
            return lanes

    def _wait(self, until: float) -> bool:
        """Wait for a change; False once ``until`` has come."""
        left = until - time.monotonic()
        if left <= 0:
            return False
        self._changed.wait(None if math.isinf(left) else min(left, threading.TIMEOUT_MAX))
        return True
