"""A lane: everything that one batch in flight needs on the GPU, at addresses that never change.

Memory of a lane, beside the stages' own:

==============  ========  ==========================================================================
piece           where     what
==============  ========  ==========================================================================
``parameters``  both      what the host says about a batch; copied to the device as one piece
``work``        device    what the kernels pass to each other
``answers``     both      what the host gets; copied from the device as one piece
sources         both      one row per image for each kind of row that the stages take
==============  ========  ==========================================================================

"Both" means a pinned copy on the host and one on the device.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sn72engine.cascade.spec import StageSpec, parallel_groups
from sn72engine.cuda.api import Driver
from sn72engine.cuda.layout import CONTROL, SAMPLE
from sn72engine.graphs import GraphStore
from sn72engine.stages.capture import Bound, Buffer, Capturable, Rows

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class CapturedStage:
    """A stage that runs on the GPU. Captured stages are the first ones of a cascade.

    Attributes:
        spec: how its scores count.
        offer: its work.
        buckets: numbers of rows that it is captured for, ascending; the last holds a full batch.
    """

    spec: StageSpec
    offer: Capturable
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CapturedGroup:
    """Stages that run side by side and are routed once; most often one by itself.

    Attributes:
        stages: their positions.
        buckets: numbers of rows that all of them are captured for, ascending.
    """

    stages: tuple[int, ...]
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A stage captured with a number of rows in one lane."""

    rows: int
    graph: int
    input: int
    bound: Bound


class Lane:
    """Memory, captured graphs, stream and events of one batch in flight.

    Args:
        driver: of the GPU.
        store: captures the stages' work.
        stages: the captured stages, in order; a parallel group is captured as a whole.
        number: of the lane.

    Raises:
        CudaUnavailableError: there is not enough memory, or a stage cannot be captured.
    """

    def __init__(
        self, driver: Driver, store: GraphStore, stages: Sequence[CapturedStage], number: int
    ) -> None:
        self.driver = driver
        self.stages = tuple(stages)
        self.number = number
        #: In order. Their numbers, from 0, are those of the boundaries that follow them.
        self.groups = tuple(
            _captured_group(stages, group) for group in parallel_groups([s.spec for s in stages])
        )
        self.capacity = stages[0].buckets[-1]
        count, first = len(self.groups), len(self.groups[0].stages)
        self._layouts = {
            "parameters": _parameters(self.capacity, first, count),
            "work": _work(self.capacity, count, max(s.buckets[-1] for s in stages)),
            "answers": _answers(self.capacity, count),
        }
        #: Releases what has been allocated, the last first.
        self._held = contextlib.ExitStack()
        try:
            self._allocate_pieces()
            self._sources: dict[Rows, tuple[Buffer, int, NDArray[Any]]] = {}
            for stage in stages:
                self._add_source(stage.offer)
            #: By position of the stage and number of rows.
            self.programs: dict[tuple[int, int], Program] = {}
            for group in self.groups:
                for at in group.stages:
                    self._capture(store, at, group)
        except BaseException:
            self._held.close()
            raise

    @property
    def sources(self) -> dict[Rows, NDArray[Any]]:
        """Pinned rows that images are made into, ``capacity`` of each kind."""
        return {rows: view for rows, (_, _, view) in self._sources.items()}

    def size(self, piece: str) -> int:
        """Bytes of a piece."""
        return self._layouts[piece].itemsize

    def device(self, piece: str, field: str = "", row: int = 0) -> int:
        """Device address of a piece, or of row ``row`` of a field of it."""
        return self._device[piece] + self._offset(piece, field, row)

    def pinned(self, piece: str, field: str = "", row: int = 0) -> int:
        """Host address of the pinned copy."""
        return self._pinned[piece] + self._offset(piece, field, row)

    def source(self, rows: Rows) -> int:
        """Device address of the rows of one kind."""
        return self._sources[rows][0].address

    def upload(self, count: int) -> None:
        """Put the copies of ``count`` rows of each kind on the stream."""
        for rows, (buffer, pinned, _) in self._sources.items():
            self.driver.copy(buffer.address, pinned, count * rows.bytes, self.stream)

    def write(self, values: NDArray[Any]) -> int:
        """Device address of a copy of an array, made at once and kept as long as the lane."""
        pinned = self._allocate_pinned(values.nbytes)
        _view(pinned, values.dtype, values.size)[:] = values.ravel()
        address = self.allocate(values.nbytes)
        self.driver.copy(address, pinned, values.nbytes, self.stream)
        self.settle()
        return address

    def settle(self) -> None:
        """Wait for everything on the stream."""
        self.driver.record(self.answered, self.stream)
        self.driver.wait(self.answered)

    def allocate(self, size: int) -> int:
        """Device memory that is released with the lane."""
        address = self.driver.allocate(size)
        self._held.callback(self.driver.free, address)
        return address

    def close(self) -> None:
        """Release everything. Nothing may be running; calling it twice is allowed."""
        self._held.close()
        self._sources.clear()
        self.programs.clear()

    def _allocate_pieces(self) -> None:
        driver = self.driver
        self._device = {name: self.allocate(d.itemsize) for name, d in self._layouts.items()}
        self._pinned = {
            name: self._allocate_pinned(self._layouts[name].itemsize)
            for name in ("parameters", "answers")
        }
        #: Host views of the pinned copies; ``answers`` is valid once :attr:`answered` is reached.
        self.parameters = _view(self._pinned["parameters"], self._layouts["parameters"], 1)[0]
        self.answers = _view(self._pinned["answers"], self._layouts["answers"], 1)[0]
        self.stream = driver.new_stream()
        self._held.callback(driver.destroy_stream, self.stream)
        #: Events: a decision, and the answers, have arrived on the host.
        self.decided = driver.new_event()
        self._held.callback(driver.destroy_event, self.decided)
        self.answered = driver.new_event()
        self._held.callback(driver.destroy_event, self.answered)

    def _allocate_pinned(self, size: int) -> int:
        address = self.driver.allocate_host(size)
        self._held.callback(self.driver.free_host, address)
        return address

    def _add_source(self, offer: Capturable) -> None:
        rows = offer.rows
        if rows in self._sources:
            return
        buffer = offer.allocate(self.capacity)
        pinned = self._allocate_pinned(self.capacity * rows.bytes)
        view = _view(pinned, np.dtype(rows.dtype), self.capacity * int(np.prod(rows.shape)))
        self._sources[rows] = buffer, pinned, view.reshape(self.capacity, *rows.shape)

    def _capture(self, store: GraphStore, at: int, group: CapturedGroup) -> None:
        """Capture a stage for each bucket. The first group reads the uploaded rows in place."""
        stage = self.stages[at]
        offer, in_place = stage.offer, group is self.groups[0]
        buffer = self._sources[offer.rows][0] if in_place else offer.allocate(group.buckets[-1])
        for rows in reversed(group.buckets):  # the largest first: the others fit into its memory
            bound = offer.bind(buffer, rows, self.number)
            captured = store.capture(stage.spec.name, rows, self.number, bound)
            self.programs[at, rows] = Program(rows, captured.graph, buffer.address, bound)

    def _offset(self, piece: str, field: str, row: int) -> int:
        if not field:
            return 0
        fields = self._layouts[piece].fields
        assert fields is not None
        dtype, offset = fields[field][:2]
        rows = dtype.shape[0] if dtype.shape else 1
        return int(offset) + row * (dtype.itemsize // rows)


def _captured_group(stages: Sequence[CapturedStage], group: tuple[int, ...]) -> CapturedGroup:
    common = set.intersection(*(set(stages[at].buckets) for at in group))
    return CapturedGroup(group, tuple(sorted(common)))


def _parameters(capacity: int, first: int, groups: int) -> np.dtype[Any]:
    """What the host says about a batch.

    ``scored``: by stage of the first group, its number where it has a score; ``eligible``: by
    boundary, for the next group; ``low`` and ``high``: by boundary.
    """
    return _packed(
        batch=np.dtype(np.int32),
        budget_ns=np.dtype(np.uint64),
        scored=np.dtype((np.uint8, (first, capacity))),
        eligible=np.dtype((np.uint8, (groups, capacity))),
        low=np.dtype((np.float32, (groups, capacity))),
        high=np.dtype((np.float32, (groups, capacity))),
    )


def _work(capacity: int, groups: int, rows: int) -> np.dtype[Any]:
    """``index``: by boundary, for the next group."""
    return _packed(
        start_ns=np.dtype(np.uint64),
        scored=np.dtype((np.uint8, (capacity,))),
        score=np.dtype((np.float32, (capacity,))),
        index=np.dtype((np.int32, (groups, rows))),
    )


def _answers(capacity: int, groups: int) -> np.dtype[Any]:
    """``controls``: by boundary; ``labels``: only where a stage gives some."""
    return _packed(
        samples=np.dtype((SAMPLE, (capacity,))),
        controls=np.dtype((CONTROL, (groups,))),
        labels=np.dtype((np.int64, (capacity,))),
    )


def _packed(**fields: np.dtype[Any]) -> np.dtype[Any]:
    """A record of these fields, each at an aligned address."""
    offsets, end = [], 0
    for dtype in fields.values():
        offsets.append(end)
        end = -(-(end + dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT
    return np.dtype(
        {
            "names": list(fields),
            "formats": list(fields.values()),
            "offsets": offsets,
            "itemsize": end,
        }
    )


def _view(address: int, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    memory: Any = (ctypes.c_char * (dtype.itemsize * count)).from_address(address)
    view: NDArray[Any] = np.ndarray(count, dtype, memory)
    return view
