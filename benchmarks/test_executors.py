"""What a boundary between captured stages costs, on a GPU; stages that do next to nothing.

Run with ``pytest benchmarks/test_executors.py``. Without a GPU every benchmark is skipped with the
reason: nothing here says anything about a GPU that is not there.

The tables' extra columns, medians in microseconds:

- ``boundary_us``: a call of a cascade, less the same call with one stage, for each boundary.
- ``beyond_stages_us``: the GPU's time for a cascade, less the sum of its stages' graphs replayed by
  themselves with the same numbers of rows. Taken with events around the launches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from sn72engine.cascade.device import DeviceLaunches
from sn72engine.cascade.executor import CpuExecutor, Request, Samples
from sn72engine.cascade.graphed import GraphExecutor
from sn72engine.cascade.host import HostLaunches
from sn72engine.cascade.lane import CapturedStage, Lane
from sn72engine.cascade.modes import default_buckets, open_gpu
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.cuda.driver import driver_available
from sn72engine.errors import CudaUnavailableError
from sn72engine.graphs import GraphStore
from sn72engine.stages.base import StageScores
from sn72engine.stages.capture import Rows
from sn72engine.stages.tensor_offer import TensorBound, TensorBuffer

BATCH = 32
REPEATS = 500
LAUNCHES = {"host": HostLaunches, "device": DeviceLaunches}


def _no_gpu() -> str:
    found = driver_available()
    if not found.ok:
        return f"no GPU: {found.reason}"
    try:
        open_gpu(0)
    except CudaUnavailableError as error:
        return f"no GPU: {error}"
    return ""


NO_GPU = _no_gpu()
pytestmark = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)


class Null:
    """A stage whose score is its input: one kernel that copies a number per row."""

    needs = None
    rows = Rows((4,), "float32", "null")
    limits = (1, 1 << 20)

    def prepare(self) -> None:
        pass

    def score(self, images: Sequence[Any]) -> StageScores:
        return StageScores(np.array([image[0] for image in images]))

    def close(self) -> None:
        pass

    def load(self, image: Any, out: Any) -> None:
        out[...] = image

    def allocate(self, rows: int) -> TensorBuffer:
        import torch

        return TensorBuffer(torch.zeros((rows, *self.rows.shape), device="cuda"))

    def bind(self, buffer: TensorBuffer, rows: int, lane: int) -> TensorBound:
        return TensorBound(lambda: buffer.tensor[:rows, 0].clone(), rows, "probability", 1)


class Rig:
    """A cascade of null stages in which every sample reaches every stage."""

    def __init__(self, mode: str, stages: int, bodies: int) -> None:
        names = [f"s{k}" for k in range(stages)]
        self.spec = CascadeSpec(
            tuple(StageSpec(name, low=0.0, high=1.0) for name in names), max_batch=BATCH
        )
        self.driver, capturer = open_gpu(0)
        self.current = ExitStack()
        self.current.enter_context(self.driver.current())
        self.store = GraphStore(self.driver, capturer)
        buckets = default_buckets(BATCH)[-bodies:]
        captured = [
            CapturedStage(stage, Null(), buckets if k else (BATCH,))
            for k, stage in enumerate(self.spec.stages)
        ]
        self.lane = Lane(self.driver, self.store, captured, 0)
        self.launches = LAUNCHES[mode](self.lane)
        cpu = CpuExecutor(self.spec, [Null() for _ in names])
        lanes = [(self.lane, self.launches)]
        self.executor = GraphExecutor(self.spec, lanes, cpu, self.store.close)

    def call(self) -> None:
        row = np.full(4, 0.5, np.float32)
        bounds = [(np.float32(0).reshape(()), np.float32(1).reshape(()))] * len(self.spec.stages)
        samples = Samples([row] * BATCH, lambda image: image)
        self.executor.run(Request(samples, math.inf, {}, bounds))

    def cascade_on_gpu(self) -> None:
        """Once through all stages on the rows that are there, without decoding or results."""
        self.launches.start(BATCH)
        self.launches.finish(None)

    def stages_on_gpu(self) -> Callable[[], None]:
        """The stages' graphs by themselves, with a full batch each."""
        executables = []
        for at in range(len(self.lane.stages)):
            graph = self.driver.new_graph()
            self.driver.add_child(graph, [], self.lane.programs[at, BATCH].graph)
            executables.append(self.driver.instantiate(graph, self.lane.stream))

        def run() -> None:
            for executable in executables:
                self.driver.launch_graph(executable, self.lane.stream)
            self.lane.settle()

        return run

    def close(self) -> None:
        self.executor.close(1.0)
        self.current.close()


def microseconds_on_gpu(rig: Rig, call: Callable[[], None]) -> float:
    """Median time between events on the lane's stream before and after a call."""
    import torch

    stream = torch.cuda.ExternalStream(rig.lane.stream)
    taken = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        taken.append(1e3 * begin.elapsed_time(end))
    return statistics.median(taken)


@pytest.mark.parametrize("bodies", [1, 4, 7])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("mode", LAUNCHES)
def test_null_stages(benchmark: Any, mode: str, stages: int, bodies: int) -> None:
    rig = Rig(mode, stages, bodies)
    alone = Rig(mode, 1, 1)
    try:
        rig.call()
        benchmark(rig.call)
        whole = microseconds_on_gpu(rig, rig.cascade_on_gpu)
        first = microseconds_on_gpu(alone, alone.cascade_on_gpu)
        apart = microseconds_on_gpu(rig, rig.stages_on_gpu())
        benchmark.extra_info["gpu_us"] = whole
        benchmark.extra_info["beyond_stages_us"] = whole - apart
        if stages > 1:
            benchmark.extra_info["boundary_us"] = (whole - first) / (stages - 1)
    finally:
        rig.close()
        alone.close()


@pytest.mark.parametrize("mode", LAUNCHES)
def test_own_work_of_a_call(benchmark: Any, mode: str) -> None:
    """One null stage, one image: rows, upload, launch, wait and results."""
    rig = Rig(mode, 1, 1)
    row = np.full(4, 0.5, np.float32)
    bounds = [(np.float32(0).reshape(()), np.float32(1).reshape(()))]

    def call() -> None:
        samples = Samples([row], lambda image: image)
        rig.executor.run(Request(samples, math.inf, {}, bounds))

    try:
        benchmark(call)
    finally:
        rig.close()
