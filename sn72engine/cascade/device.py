"""``device``: a batch is one graph launch, and the host waits once, for the answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from sn72engine.cascade.lane import Lane
from sn72engine.cascade.wiring import cascade_graph


class DeviceLaunches:
    """The graphs of a lane, one for each number of rows of the first stage.

    Raises:
        CudaUnavailableError: the driver refuses one; none is left.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._graphs: dict[int, int] = {}
        with contextlib.ExitStack() as unfinished:
            unfinished.callback(self.close)
            for rows in lane.groups[0].buckets:
                self._graphs[rows] = cascade_graph(lane, rows)
            unfinished.pop_all()

    def start(self, rows: int) -> None:
        """Launch the cascade on what has been uploaded."""
        lane = self._lane
        lane.driver.launch_graph(self._graphs[rows], lane.stream)
        lane.driver.record(lane.answered, lane.stream)

    def finish(self, between: Callable[[], None] | None) -> NDArray[Any]:
        """Wait for the answers. ``between`` is not called: the host sees no boundary.

        Returns:
            What each boundary decided, ``CONTROL`` per captured group.
        """
        self._lane.driver.wait(self._lane.answered)
        controls: NDArray[Any] = self._lane.answers["controls"].copy()
        return controls

    def close(self) -> None:
        """Release the graphs."""
        for graph in self._graphs.values():
            self._lane.driver.destroy_executable(graph)
        self._graphs.clear()
