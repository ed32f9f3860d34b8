"""Who gets a lane, in which order, and what ends the waiting."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sn72engine.cascade.lane_pool import LanePool
from sn72engine.errors import CascadeError, CudaUnavailableError

NOW = -math.inf


class Waiter:
    """Asks for a lane on a thread of its own."""

    def __init__(self, pool: LanePool[str], until: float = math.inf) -> None:
        self.lane: str | None = ""
        self.error: Exception | None = None
        before = len(pool._line)
        self._thread = threading.Thread(target=self._take, args=(pool, until), daemon=True)
        self._thread.start()
        wait_for(lambda: len(pool._line) > before or not self._thread.is_alive())

    def _take(self, pool: LanePool[str], until: float) -> None:
        try:
            self.lane = pool.take(until)
        except Exception as error:
            self.error = error

    @property
    def waiting(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> Any:
        self._thread.join(20)
        assert not self.waiting, "hangs"
        return self.error or self.lane


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def test_the_lane_used_last_is_lent_first() -> None:
    pool = LanePool(["a", "b"])
    taken = [pool.take(NOW), pool.take(NOW)]
    assert sorted(map(str, taken)) == ["a", "b"]
    assert pool.take(NOW) is None
    pool.give("a")
    pool.give("b")
    assert pool.take(math.inf) == "b"


def test_callers_get_lanes_in_the_order_in_which_they_asked() -> None:
    pool = LanePool(["a"])
    assert pool.take(NOW) == "a"
    waiters = [Waiter(pool) for _ in range(4)]
    for waiter in waiters:
        pool.give("a")
        # A call of many batches gives a lane back and asks again at once: not before the others.
        assert pool.take(NOW) is None
        assert waiter.end() == "a"


def test_one_that_gives_up_does_not_hold_up_those_behind() -> None:
    pool = LanePool(["a"])
    pool.take(NOW)
    first = Waiter(pool, time.monotonic() + 0.1)
    second = Waiter(pool)
    assert first.end() is None
    pool.give("a")
    assert second.end() == "a"


def test_a_failure_reaches_everybody() -> None:
    pool = LanePool(["a", "b"])
    pool.take(NOW)
    pool.take(NOW)
    waiters = [Waiter(pool) for _ in range(3)]
    assert pool.fail("broken")
    assert not pool.fail("and again")
    assert pool.failure == "broken"
    for waiter in waiters:
        assert isinstance(waiter.end(), CudaUnavailableError)
    pool.give("a")
    with pytest.raises(CudaUnavailableError, match="broken"):
        pool.take(NOW)
    assert pool.close() is None


def test_close_has_all_lanes_once() -> None:
    pool = LanePool(["a", "b"])
    assert sorted(pool.close() or []) == ["a", "b"]
    assert pool.close() == []
    with pytest.raises(CascadeError, match="closed"):
        pool.take(NOW)


def test_close_with_a_batch_in_a_lane_ends_those_that_wait() -> None:
    pool = LanePool(["a"])
    pool.take(NOW)
    waiter = Waiter(pool)
    assert pool.close() is None
    assert isinstance(waiter.end(), CascadeError)
    pool.give("a")
    assert pool.close() == ["a"]
