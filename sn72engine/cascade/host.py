"""``host``: a batch is one graph launch per group; the host reads each decision in between.

A group is one stage, or several that run side by side.

The decision is 16 bytes. The answers follow it on the same stream, so that they are there already
when the host sees that no sample goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sn72engine.cascade.lane import Lane
from sn72engine.cascade.spec import ALWAYS
from sn72engine.cascade.wiring import first_graph, next_graph, skip_graph
from sn72engine.cuda.layout import CONTROL


class HostLaunches:
    """The graphs of a lane: one for each group and number of rows, and one to pass a group by.

    Raises:
        CudaUnavailableError: the driver refuses one; none is left.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._first: dict[int, int] = {}
        #: By number of the group and number of rows, 0 for none.
        self._next: dict[tuple[int, int], int] = {}
        with contextlib.ExitStack() as unfinished:
            unfinished.callback(self.close)
            for rows in lane.groups[0].buckets:
                self._first[rows] = first_graph(lane, rows)
            for number, group in enumerate(lane.groups[1:], 1):
                self._next[number, 0] = skip_graph(lane, number)
                for rows in group.buckets:
                    self._next[number, rows] = next_graph(lane, number, rows)
            unfinished.pop_all()

    def start(self, rows: int) -> None:
        """Launch the first stage on what has been uploaded."""
        self._launch(self._first[rows])

    def finish(self, between: Callable[[], None] | None) -> NDArray[Any]:
        """Launch the other stages as the decisions come in, and wait for the answers.

        Args:
            between: called after every group but the last, with the answers so far in the lane.

        Returns:
            What each boundary decided, ``CONTROL`` per captured group.
        """
        lane, driver = self._lane, self._lane.driver
        controls = np.zeros(len(lane.groups), CONTROL)
        for number in range(len(lane.groups)):
            driver.wait(lane.decided)
            control = controls[number] = lane.answers["controls"][number]
            following = lane.groups[number + 1 :]
            if between is not None and following:
                driver.wait(lane.answered)
                between()
            if not following or self._nobody_left(number, int(control["count"])):
                break
            self._launch(self._next[number + 1, int(control["rows"])])
        driver.wait(lane.answered)
        return controls

    def close(self) -> None:
        """Release the graphs."""
        for graph in (*self._first.values(), *self._next.values()):
            self._lane.driver.destroy_executable(graph)
        self._first.clear()
        self._next.clear()

    def _nobody_left(self, number: int, count: int) -> bool:
        """Whether no later group has work: one with a trigger may want what the next one skips."""
        later = self._lane.stages[self._lane.groups[number].stages[-1] + 1 :]
        return count == 0 and all(stage.spec.when == ALWAYS for stage in later)

    def _launch(self, graph: int) -> None:
        lane, driver = self._lane, self._lane.driver
        driver.launch_graph(graph, lane.stream)
        driver.record(lane.decided, lane.stream)
        driver.copy(
            lane.pinned("answers"), lane.device("answers"), lane.size("answers"), lane.stream
        )
        driver.record(lane.answered, lane.stream)
