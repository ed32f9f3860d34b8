"""The graph executors on the simulated driver, which runs the real kernels on host memory.

Every answer is held against the oracle of tests/oracle.py, and so, through its own test, against
the CPU executor's, exactly. What the simulated driver itself checks is listed in its module.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import logging
import math
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from sn72engine.cascade import executor, graphed, lane_pool, wiring, worker
from sn72engine.cascade.device import DeviceLaunches
from sn72engine.cascade.executor import CpuExecutor, Request, Samples
from sn72engine.cascade.graphed import GraphExecutor
from sn72engine.cascade.host import HostLaunches
from sn72engine.cascade.lane import CapturedStage, Lane
from sn72engine.cascade.report import StageCounts
from sn72engine.cascade.result import Result, Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.cuda import layout
from sn72engine.cuda.api import NodeKind
from sn72engine.errors import CascadeError, CudaUnavailableError, ImageError
from sn72engine.graphs import GraphStore
from sn72engine.stages.base import StageScores
from sn72engine.stages.capture import Rows
from tests.cpu.simulated_cuda import (
    ColumnOffer,
    Graph,
    Node,
    SimulatedCapturer,
    SimulatedCuda,
    conditionals,
)
from tests.oracle import Case, answers, expected, random_case

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

LAUNCHES = {"host": HostLaunches, "device": DeviceLaunches}


class Clock:
    """Stands for the module ``time`` in the executors: time passes when the test says so."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (executor, worker, graphed, lane_pool):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "sn72engine.cascade")


class ColumnStage:
    """The same stage for the CPU executor: its score is a column of the image."""

    needs = None

    def __init__(self, column: int, label: int | None = None) -> None:
        self._column, self._label = column, label

    def prepare(self) -> None:
        pass

    def score(self, images: Sequence[Any]) -> StageScores:
        rows = np.stack(images)
        if self._label is None:
            return StageScores(rows[:, self._column])
        labels = np.nan_to_num(rows[:, self._label]).astype(np.int64)
        return StageScores(rows[:, self._column], labels)

    def close(self) -> None:
        pass


class Cpu(CpuExecutor):
    """Says at which stage the host goes on by itself."""

    resumed = 0

    def resuming(self, first: int) -> None:
        """Called before it does."""

    def run_from(self, first: int, *rest: Any) -> None:
        self.resumed = first
        self.resuming(first)
        super().run_from(first, *rest)


def default_buckets(capacity: int) -> tuple[int, ...]:
    return tuple(sorted({b for b in (1, 2, 4, 8, 16) if b < capacity} | {capacity}))


class Rig:
    """A graph executor on a simulated GPU.

    Args:
        library: the kernels.
        mode: ``host`` or ``device``.
        spec: of the cascade; captured are the stages before the first parallel group whose stages
            wait for different triggers.
        width: columns of a sample: one per stage, then one per stage for its label.
        lanes: how many.
        rng: chooses what does not matter, and that some stages have one bucket only.
        own_buckets: by name of the stage, instead.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        mode: str,
        spec: CascadeSpec,
        *,
        lanes: int = 1,
        rng: np.random.Generator | None = None,
        switch_nodes: bool = True,
        most: int = 99,
        own_buckets: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        all_buckets = rng is None
        rng = rng or np.random.default_rng(0)
        stages = len(spec.stages)
        self.cuda = SimulatedCuda(library, int(rng.integers(1 << 30)), switch_nodes=switch_nodes)
        self.capturer = SimulatedCapturer(self.cuda)
        self.store = GraphStore(self.cuda, self.capturer)
        alike = itertools.takewhile(
            lambda group: len({spec.stages[at].when for at in group}) == 1, spec.groups
        )
        buckets = default_buckets(spec.max_batch)
        self.captured = tuple(
            CapturedStage(
                spec.stages[number],
                ColumnOffer(
                    self.cuda,
                    Rows((2 * stages,), "float32", ["as they are", "reversed"][number % 2]),
                    number,
                    label=stages + number if spec.top1 else None,
                    stride=int(rng.integers(1, 3)),
                ),
                (own_buckets or {}).get(spec.stages[number].name)
                or (buckets if all_buckets or rng.random() < 0.8 else buckets[-1:]),
            )
            for number in itertools.chain(*itertools.islice(alike, most))
        )
        with self.cuda.current():
            self.lanes = [Lane(self.cuda, self.store, self.captured, n) for n in range(lanes)]
            launches = [LAUNCHES[mode](lane) for lane in self.lanes]
        self.cpu = Cpu(
            spec,
            [ColumnStage(k, stages + k if spec.top1 else None) for k in range(stages)],
        )
        self.executor = GraphExecutor(
            spec, list(zip(self.lanes, launches, strict=True)), self.cpu, self.store.close
        )


def rows_of(case: Case) -> np.ndarray:
    """The samples as the columns that the stages of the rig read."""
    stages, count = len(case.scores), len(case)
    rows = np.zeros((count, 2 * stages), np.float32)
    with np.errstate(over="ignore"):
        for k, scores in enumerate(case.scores):
            rows[:, k] = np.nan if case.broken[k] else scores
    return rows


def request_of(case: Case, until: float, progress: Any = None) -> Request:
    rows = rows_of(case)

    def decode(source: int) -> Any:
        if not case.readable[source]:
            raise ImageError(f"{source} is no image")
        return rows[source]

    bounds = []
    for stage in case.spec.stages:
        pair = case.bounds.get(stage.name, stage.thresholds)
        bounds.append(tuple(np.asarray(b, np.float64).astype(np.float32) for b in pair))
    flags = {name: np.array(marks, bool) for name, marks in case.flags.items()}
    return Request(Samples(range(len(case)), decode), until, flags, bounds, progress)


def run(case: Case, rig: Rig, clock: Clock) -> tuple[list[Result], list[StageCounts]]:
    """Answer a case; time runs out after the group that it names."""
    clock.now, told = 0.0, 0
    late = case.late_after
    group_of = {at: number for number, group in enumerate(case.spec.groups) for at in group}

    def elapsed_ns(stage: int) -> int:
        if late is None or group_of[stage] < late:
            return 0
        clock.now = 2.0
        return 2 * 10**9

    def progress(known: list[Result], settled: list[bool]) -> None:
        nonlocal told
        assert len(known) == len(settled) == len(case)
        if rig.cpu.resumed:
            told += 1
            if late is not None and group_of[rig.cpu.resumed] + told - 1 >= late:
                clock.now = 2.0

    def resuming(first: int) -> None:
        if late is not None and group_of[first] > late:  # also where the GPU had nothing to do
            clock.now = 2.0

    rig.cpu.resumed = 0
    rig.cpu.resuming = resuming  # type: ignore[method-assign]
    rig.cuda.elapsed_ns = elapsed_ns
    until = math.inf if late is None else -1.0 if late < 0 else 1.0
    return rig.executor.run(request_of(case, until, progress))


def check(case: Case, rig: Rig, clock: Clock) -> list[Result]:
    results, counts = run(case, rig, clock)
    assert answers(results) == expected(case), case
    for result in results:
        assert (result.error != "") == (result.status is Status.STAGE_FAILED)
    for count in counts:
        ends = count.negative, count.positive, count.escalated, count.failed, count.late
        assert sum(ends) == count.asked, case
        assert min(ends) >= 0
        assert count.padded >= 0
    exits = sum(count.negative + count.positive for count in counts)
    assert exits == sum(result.status is Status.DONE for result in results)
    return results


def variations(case: Case, rng: np.random.Generator, count: int) -> Iterator[Case]:
    """Cases of the same cascade with other samples, of every number up to twice a full batch."""
    spec = case.spec
    firsts = [group[0] for group in spec.groups]
    values = np.array([0, 0.1, 0.15, 0.3, 0.5, 0.7, 0.85, 0.9, 1, np.nan, np.inf, -0.1, 1.1])
    for number in range(count):
        late = int(rng.integers(-1, len(firsts))) if number % 6 == 0 else None
        most = spec.max_batch if late is not None else 2 * spec.max_batch
        samples = int(rng.integers(most + 1)) if rng.random() < 0.5 else number % (most + 1)
        shape = len(spec.stages), samples
        score = np.where(rng.random(shape) < 0.5, rng.random(shape), rng.choice(values, shape))
        pairs = {
            k: [tuple(pair) for pair in rng.choice(values, (samples, 2)).tolist()]
            for k in firsts
            if rng.random() < 0.25
        }
        yield Case(
            spec,
            score.tolist(),
            ["raises" if rng.random() < 0.05 else "" for _ in spec.stages],
            {name: (rng.random(samples) < 0.5).tolist() for name in spec.triggers},
            pairs,
            (rng.random(samples) > 0.05).tolist(),
            late,
        )


@pytest.mark.parametrize("switch_nodes", [True, False])
@pytest.mark.parametrize("mode", LAUNCHES)
def test_every_sample_as_the_oracle_says(
    library: ctypes.CDLL, clock: Clock, mode: str, switch_nodes: bool
) -> None:
    rng = np.random.default_rng([len(mode), switch_nodes])
    seen: Counter[Status] = Counter()
    cases = 0
    widest: Counter[int] = Counter()  # captured groups of several stages, by their position
    for number in range(64):
        seed_case = random_case(rng, most_samples=1, groups=number % 4 != 3)
        spec = dataclasses.replace(
            seed_case.spec, max_batch=int(rng.choice([1, 2, 3, 5, 9, 12, 33]))
        )
        if number % 4 < 2:
            spec = with_one_trigger_each(spec)
        if len({spec.stages[at].when for at in spec.groups[0]}) > 1:
            continue  # nothing can be captured
        rig = Rig(library, mode, spec, rng=rng, switch_nodes=switch_nodes)
        for position, group in enumerate(rig.lanes[0].groups):
            widest[position] += len(group.stages) > 1
        for case in variations(dataclasses.replace(seed_case, spec=spec), rng, 55):
            seen.update(result.status for result in check(case, rig, clock))
            cases += 1
    assert cases > 2500
    assert min(seen[status] for status in Status) > 100
    assert widest[0] >= 5
    assert widest.total() - widest[0] >= 5


def with_one_trigger_each(spec: CascadeSpec) -> CascadeSpec:
    """The same cascade, with the stages of a group waiting for what its first one waits for."""
    when = {at: spec.stages[group[0]].when for group in spec.groups for at in group}
    stages = [dataclasses.replace(s, when=when[at]) for at, s in enumerate(spec.stages)]
    return dataclasses.replace(spec, stages=tuple(stages))


def plain(stages: int, **fields: Any) -> CascadeSpec:
    return CascadeSpec(
        tuple(StageSpec(f"s{k}", low=0.2, high=0.8) for k in range(stages)), **fields
    )


def case_of(spec: CascadeSpec, scores: Any, **fields: Any) -> Case:
    scores = np.asarray(scores)
    count = scores.shape[1]
    base = Case(spec, scores.tolist(), [""] * len(scores), {}, {}, [True] * count)
    return dataclasses.replace(base, **fields)


@pytest.mark.parametrize("mode", LAUNCHES)
def test_the_cpu_executor_says_the_same_to_the_bit(
    library: ctypes.CDLL, clock: Clock, mode: str
) -> None:
    rng = np.random.default_rng(11)
    for _ in range(16):
        first = random_case(rng, most_samples=1, deadlines=False)
        spec = with_one_trigger_each(dataclasses.replace(first.spec, max_batch=16))
        rig = Rig(library, mode, spec, rng=rng)
        for case in variations(dataclasses.replace(first, spec=spec), rng, 12):
            case = dataclasses.replace(case, late_after=None)
            graphed_results, graphed_counts = run(case, rig, clock)
            results, counts = rig.cpu.run(request_of(case, math.inf))
            assert answers(graphed_results) == answers(results)
            for mine, theirs in zip(graphed_counts, counts, strict=True):
                for name in ("asked", "negative", "positive", "escalated", "failed", "late"):
                    assert getattr(mine, name) == getattr(theirs, name), name


@pytest.mark.parametrize("mode", LAUNCHES)
def test_every_number_of_escalated_samples_uses_the_smallest_bucket(
    library: ctypes.CDLL, clock: Clock, mode: str
) -> None:
    spec = plain(2, max_batch=12)
    rig = Rig(library, mode, spec)
    buckets = rig.captured[1].buckets
    for escalated in range(13):
        scores = np.full((2, 12), 0.95)
        scores[0, :escalated] = 0.5
        results, counts = run(case_of(spec, scores), rig, clock)
        assert {r.status for r in results} == {Status.DONE}
        fits = [b for b in buckets if b >= escalated]
        assert counts[1].asked == escalated
        assert counts[1].padded == (fits[0] - escalated if escalated else 0)
        assert counts[1].calls == (1 if escalated else 0)


@pytest.mark.parametrize("mode", LAUNCHES)
def test_labels_of_many_classes(library: ctypes.CDLL, clock: Clock, mode: str) -> None:
    spec = CascadeSpec(
        tuple(StageSpec(f"s{k}", score="top1", high=0.8) for k in range(2)), max_batch=4
    )
    rig = Rig(library, mode, spec)
    rows = np.array(
        [
            [0.9, 0.9, 7, 1],  # sure at once
            [0.5, 0.9, 7, 2],  # sure at the second stage
            [0.5, np.nan, 7, 3],  # the second stage fails: the first one's label stands
            [np.nan, np.nan, 7, 4],  # nobody knows
        ],
        np.float32,
    )
    bounds = [(np.float32(0), np.float32(0.8))] * 2
    bounds = [tuple(np.asarray(b) for b in pair) for pair in bounds]
    request = Request(Samples(list(rows), lambda row: row), math.inf, {}, bounds)  # type: ignore[arg-type]
    results, _ = rig.executor.run(request)
    assert [r.label for r in results] == [7, 2, 7, -1]
    assert [r.stage for r in results] == ["s0", "s1", "s0", None]
    assert results[2].error == "s1: the score is no probability"


def test_one_graph_holds_the_whole_cascade(library: ctypes.CDLL) -> None:
    """Kernel, copy, child and conditional nodes; n2 + n3 bodies; one chain."""
    rig = Rig(library, "device", plain(3, max_batch=8))
    assert [stage.buckets for stage in rig.captured[1:]] == [(1, 2, 4, 8)] * 2
    assert len(rig.cuda.executables) == len(rig.captured[0].buckets)
    graph = max(rig.cuda.executables, key=lambda g: len(conditionals(g)[0].bodies))
    kinds = [node.kind for node in graph.nodes]
    chain = "memcpy kernel child kernel conditional kernel conditional kernel memcpy"
    words = {NodeKind.CHILD: "child"}
    assert " ".join(words.get(kind, kind.value) for kind in kinds) == chain
    assert [node.after for node in graph.nodes] == [(), *((at,) for at in range(8))]
    switches = conditionals(graph)
    assert [len(switch.bodies) for switch in switches] == [4, 4]
    for switch in switches:
        for body in switch.bodies:
            assert [n.kind for n in body.nodes] == [
                NodeKind.KERNEL,
                NodeKind.CHILD,
                NodeKind.KERNEL,
            ]
    small = min(rig.cuda.executables, key=lambda g: len(conditionals(g)[0].bodies))
    assert [len(switch.bodies) for switch in conditionals(small)] == [1, 1]


def side_by_side(**fields: Any) -> CascadeSpec:
    """One stage; two side by side, of which the second may only raise; one."""
    pair = [
        StageSpec("left", low=0.2, high=0.8, group="pair"),
        StageSpec("right", combine="positive_only", group="pair"),
    ]
    first, last = plain(2).stages
    return CascadeSpec((first, *pair, last), **fields)


def bodies_of(graph: Graph) -> list[list[list[tuple[str, tuple[int, ...]]]]]:
    """What each node of each body of each conditional node is, and what it comes after."""

    def named(node: Node) -> str:
        if node.launch is None:
            return node.kind.value
        combines = getattr(node.launch.args, "flags", 0) & layout.Flag.COMBINE_ONLY
        return "combine" if combines else node.launch.kernel.split("_")[1]

    return [
        [[(named(node), node.after) for node in body.nodes] for body in switch.bodies]
        for switch in conditionals(graph)
    ]


def test_stages_side_by_side_are_branches_of_one_body(library: ctypes.CDLL) -> None:
    rig = Rig(library, "device", side_by_side(max_batch=8))
    graph = max(rig.cuda.executables, key=lambda g: len(conditionals(g)[0].bodies))
    pair, alone = bodies_of(graph)
    child = NodeKind.CHILD.value
    branches = [
        ("gather", ()),
        (child, (0,)),
        ("scatter", (1,)),
        ("combine", (2,)),
        ("gather", ()),
        (child, (4,)),
        ("scatter", (5, 3)),
    ]
    assert pair == [branches] * 4  # one body per bucket, not one per stage and bucket
    assert alone == [branches[:3]] * 4
    assert [node.kind for node in graph.nodes].count(NodeKind.CONDITIONAL) == 2


def test_a_first_group_reads_the_upload_in_place(library: ctypes.CDLL) -> None:
    spec = side_by_side(max_batch=8)
    rig = Rig(library, "device", dataclasses.replace(spec, stages=spec.stages[1:]))
    graph = max(rig.cuda.executables, key=lambda g: len(conditionals(g)[0].bodies))
    kinds = [node.kind.value for node in graph.nodes[:6]]
    child = NodeKind.CHILD.value
    assert kinds == ["memcpy", "kernel", child, "kernel", child, "kernel"]
    assert [node.after for node in graph.nodes[:6]] == [(), (0,), (1,), (2,), (1,), (4, 3)]
    assert graph.nodes[3].launch.args.flags & layout.Flag.COMBINE_ONLY  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", LAUNCHES)
def test_a_group_runs_in_buckets_that_all_its_stages_have(
    library: ctypes.CDLL, clock: Clock, mode: str
) -> None:
    spec = side_by_side(max_batch=8)
    own = {"s0": (8,), "left": (1, 2, 4, 8), "right": (2, 3, 8), "s1": (8,)}
    rig = Rig(library, mode, spec, own_buckets=own)
    assert [group.buckets for group in rig.lanes[0].groups] == [(8,), (2, 8), (8,)]
    assert {(c.stage, c.rows) for c in rig.store.graphs if c.stage in ("left", "right")} == {
        (stage, rows) for stage in ("left", "right") for rows in (2, 8)
    }
    for escalated in range(9):
        scores = np.full((4, 8), 0.9)
        scores[0, :escalated] = 0.5
        _, counts = run(case_of(spec, scores), rig, clock)
        rows = 0 if not escalated else 2 if escalated <= 2 else 8
        for count in counts[1:3]:
            assert (count.asked, count.padded) == (escalated, rows - escalated)
            assert count.calls == (escalated > 0)


@pytest.mark.parametrize("mode", LAUNCHES)
def test_what_stages_side_by_side_say_together(
    library: ctypes.CDLL, clock: Clock, mode: str
) -> None:
    """Routed once, on both; negative only where the one that votes has voted."""
    spec = side_by_side(max_batch=8)
    rows = [
        # s0, left, right, s1
        (0.5, 0.1, 0.1, 0.9),  # left says no, right cannot raise it above 0.1
        (0.5, 0.1, 0.9, 0.9),  # right raises it
        (0.5, math.nan, 0.9, 0.1),  # left fails, right is sure
        (0.5, math.nan, math.nan, 0.1),  # both fail: s1 answers
        (0.5, 0.9, math.nan, 0.1),  # right fails, left is sure
        (0.5, 0.5, 0.6, math.nan),  # neither is sure, and s1 fails
    ]
    rig = Rig(library, mode, spec)
    results = check(case_of(spec, np.array(rows).T), rig, clock)
    assert [r.stage for r in results] == ["left", "right", "right", "s1", "left", "right"]
    assert [r.label for r in results] == [0, 1, 1, 0, 1, 1]
    assert results[-1].error == "s1: the score is no probability"


def test_the_time_of_a_group_is_that_of_each_of_its_stages(
    library: ctypes.CDLL, clock: Clock
) -> None:
    spec = side_by_side(max_batch=4)
    case = case_of(spec, np.full((4, 3), 0.5))
    for mode in LAUNCHES:
        rig = Rig(library, mode, spec)
        rig.cuda.elapsed_ns = lambda stage: [1, 2, 3, 7][stage] * 10**9
        _, counts = rig.executor.run(request_of(case, math.inf))
        assert [count.seconds for count in counts] == pytest.approx([1, 2, 2, 4])


def test_a_batch_is_one_launch(library: ctypes.CDLL, clock: Clock) -> None:
    spec = side_by_side(max_batch=8)
    scores = [[0.5] * 8, [0.5] * 4 + [0.9] * 4, [0.5] * 8, [0.1] * 8]
    launches = {}
    for mode in LAUNCHES:
        rig = Rig(library, mode, spec)
        check(case_of(spec, scores), rig, clock)
        launches[mode] = rig.cuda.launches
    assert launches == {"host": 3, "device": 1}  # the pair counts once


def test_the_host_stops_when_nobody_is_left(library: ctypes.CDLL, clock: Clock) -> None:
    spec = plain(3, max_batch=8)
    rig = Rig(library, "host", spec)
    check(case_of(spec, [[0.9] * 8, [0.9] * 8, [0.9] * 8]), rig, clock)
    assert rig.cuda.launches == 1


def test_old_drivers_get_one_if_node_per_bucket(library: ctypes.CDLL) -> None:
    rig = Rig(library, "device", plain(2, max_batch=4), switch_nodes=False)
    graph = max(rig.cuda.executables, key=lambda g: len(g.nodes))
    nodes = conditionals(graph)
    assert [(node.single, len(node.bodies)) for node in nodes] == [(True, 1)] * 3


@pytest.mark.parametrize("mode", LAUNCHES)
def test_captures_share_memory_only_within_a_stage_and_lane(
    library: ctypes.CDLL, mode: str
) -> None:
    rig = Rig(library, mode, plain(2, max_batch=4), lanes=2)
    pools: dict[Any, set[int]] = {}
    for captured in rig.store.graphs:
        pool = rig.capturer.pool_of[captured.graph]
        pools.setdefault((captured.stage, captured.lane), set()).add(pool)
    assert len(pools) == 4
    assert sorted(pools.values(), key=min) == [{1}, {2}, {3}, {4}]
    assert [c.rows for c in rig.store.graphs[:3]] == [4, 2, 1]
    assert rig.store.bytes_by_bucket() == {
        (stage, rows): 2000 for stage in ("s0", "s1") for rows in (1, 2, 4)
    }


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (NodeKind.HOST, "1 host function"),
        (NodeKind.WAIT_EVENT, "1 event wait"),
        (NodeKind.ALLOCATE, "1 memory allocation"),
        (NodeKind.CONDITIONAL, "1 conditional"),
        (NodeKind.SET, ""),
        (NodeKind.EMPTY, ""),
    ],
)
def test_what_a_body_may_not_hold_is_found(library: ctypes.CDLL, kind: NodeKind, word: str) -> None:
    cuda = SimulatedCuda(library)
    capturer = SimulatedCapturer(cuda)
    capturer.extra = (kind,)
    store = GraphStore(cuda, capturer)
    with cuda.current():
        store.capture("large", 8, 0, lambda: None)
        objection = store.objection()
    assert bool(objection) == bool(word)
    if word:
        assert word in objection
        assert "'large' with 8 rows" in objection


def test_a_capture_that_fails_names_the_stage(library: ctypes.CDLL) -> None:
    cuda = SimulatedCuda(library)
    store = GraphStore(cuda, SimulatedCapturer(cuda))

    def call() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(CudaUnavailableError, match=r"'large'.*16 rows.*out of memory"):
        store.capture("large", 16, 0, call)


@pytest.mark.parametrize("mode", LAUNCHES)
def test_close_releases_everything(library: ctypes.CDLL, clock: Clock, mode: str) -> None:
    spec = plain(2, max_batch=4)
    rig = Rig(library, mode, spec, lanes=2)
    check(case_of(spec, np.full((2, 9), 0.5)), rig, clock)
    mine = rig.cuda.allocations
    assert rig.executor.close(1.0) == (True, True)
    assert not rig.cuda.executables
    stages_own = mine - rig.cuda.allocations
    assert stages_own == 2 * (3 + 2 + 2)  # pieces, their pinned copies, pinned rows
    with pytest.raises(CascadeError, match="closed"):
        run(case_of(spec, np.full((2, 1), 0.5)), rig, clock)


@pytest.mark.parametrize("spec", [plain(2, max_batch=4), side_by_side(max_batch=4)])
@pytest.mark.parametrize("mode", LAUNCHES)
def test_when_the_gpu_fails_the_host_answers(
    library: ctypes.CDLL, clock: Clock, mode: str, spec: CascadeSpec
) -> None:
    rig = Rig(library, mode, spec, lanes=2)
    stages = len(spec.stages)
    case = case_of(spec, np.random.default_rng(0).random((stages, 11)))
    rig.cuda.fail_at = 2
    assert answers(run(case, rig, clock)[0]) == expected(case)
    assert "CUDA_ERROR_LAUNCH_FAILED" in rig.executor.failure
    before = rig.cuda.launches
    assert answers(run(case, rig, clock)[0]) == expected(case)
    assert rig.cuda.launches == before
    # What it still answers to can be released, for a cascade that takes this one's place.
    assert rig.executor.close(0.0) == (True,) * stages
    assert not rig.cuda.executables


@pytest.mark.parametrize("mode", LAUNCHES)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_gpu_that_does_not_answer_any_more_keeps_its_lane(
    library: ctypes.CDLL,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    interrupted: bool,
) -> None:
    """Then its memory may still be written to. Nobody waits for the lane, whoever saw it first."""
    spec = plain(2, max_batch=4)
    rig = Rig(library, mode, spec)
    case = case_of(spec, np.random.default_rng(0).random((2, 11)))
    launch = rig.cuda.launch_graph

    def fail(*_: Any) -> Any:
        raise CudaUnavailableError("cuEventRecord failed with CUDA_ERROR_ILLEGAL_ADDRESS")

    def break_down(executable: int, stream: int) -> None:
        launch(executable, stream)
        monkeypatch.setattr(rig.cuda, "record", fail)
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(rig.cuda, "launch_graph", break_down)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            rig.executor.run(request_of(case, math.inf))
    for _ in range(2):
        assert answers(run(case, rig, clock)[0]) == expected(case)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in rig.executor.failure
    assert rig.executor.close(0.0) == (False, False)
    assert rig.cuda.executables


def test_close_does_not_fail_with_the_gpu(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages that are not captured can still be closed."""
    rig = Rig(library, "host", plain(3, max_batch=4), lanes=2, most=2)

    def fail(*_: Any) -> Any:
        raise CudaUnavailableError("cuGraphExecDestroy failed with CUDA_ERROR_ECC_UNCORRECTABLE")

    monkeypatch.setattr(rig.cuda, "destroy_executable", fail)
    assert rig.executor.close(0.0) == (False, False, True)
    assert "CUDA_ERROR_ECC_UNCORRECTABLE" in rig.executor.failure


@pytest.mark.parametrize("mode", LAUNCHES)
def test_what_goes_wrong_between_stages_costs_no_lane(
    library: ctypes.CDLL, clock: Clock, mode: str
) -> None:
    spec = plain(2, max_batch=2)
    rig = Rig(library, mode, spec, lanes=2, most=1)  # so that both modes tell progress
    case = case_of(spec, np.full((2, 7), 0.5))

    def progress(known: list[Result], settled: list[bool]) -> None:
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            rig.executor.run(request_of(case, math.inf, progress))
    check(case, rig, clock)
    assert rig.executor.close(0.0) == (True, True)


@pytest.mark.parametrize("mode", LAUNCHES)
def test_progress(library: ctypes.CDLL, clock: Clock, mode: str) -> None:
    """Between captured stages in host mode only; before the host's own stages in both."""
    spec = plain(3, max_batch=8)
    rig = Rig(library, mode, spec, most=2)
    told: list[tuple[list[Result], list[bool]]] = []
    case = case_of(spec, [[0.1, 0.5, 0.5], [0.5, 0.9, 0.5], [0.5, 0.5, 0.3]])
    results, _ = rig.executor.run(
        request_of(case, math.inf, lambda known, settled: told.append((known, settled)))
    )
    settled = [marks for _, marks in told]
    assert settled == [[True, False, False], [True, True, False]][-len(told) :]
    assert len(told) == (2 if mode == "host" else 1)
    assert told[-1][0][:2] == results[:2]


@pytest.mark.parametrize("mode", LAUNCHES)
def test_many_threads_on_two_lanes(library: ctypes.CDLL, mode: str) -> None:
    spec = plain(2, max_batch=5)
    rig = Rig(library, mode, spec, lanes=2)
    lock = threading.Lock()  # the emulator runs one kernel at a time
    execute = rig.cuda._execute

    def one_at_a_time(graph: Any) -> None:
        with lock:
            execute(graph)

    rig.cuda._execute = one_at_a_time  # type: ignore[method-assign]
    wrong: list[Any] = []

    def caller(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(15):
            case = case_of(spec, rng.random((2, int(rng.integers(14)))))
            results, _ = rig.executor.run(request_of(case, math.inf))
            if answers(results) != expected(case):
                wrong.append(case)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert rig.executor.close(1.0) == (True, True)


class Gate:
    """Samples whose decoding waits, from one position on, until the test lets it go on."""

    def __init__(self, case: Case, at: int) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.case, self.at = case, at

    def request(self) -> Request:
        request = request_of(self.case, math.inf)
        decode = request.samples._decode

        def held(source: int) -> Any:
            if source == self.at:
                self.reached.set()
                assert self.open.wait(20)
            return decode(source)

        request.samples._decode = held
        return request


class Call:
    """A request on a thread of its own."""

    def __init__(self, rig: Rig, request: Request) -> None:
        self.results: list[Result] = []
        self.counts: list[StageCounts] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(rig, request), daemon=True)
        self._thread.start()

    def _run(self, rig: Rig, request: Request) -> None:
        try:
            self.results, self.counts = rig.executor.run(request)
        except Exception as error:
            self.error = error

    def end(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "hangs"


def wait_until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def lines_up(rig: Rig, request: Request) -> Call:
    """A caller that waits for a lane."""
    line = rig.executor._pool._line
    before = len(line)
    call = Call(rig, request)
    wait_until(lambda: len(line) > before)
    return call


def test_busy_lanes_cost_a_caller_no_more_than_its_deadline(library: ctypes.CDLL) -> None:
    spec = plain(1, max_batch=4)
    rig = Rig(library, "device", spec)
    taken = rig.executor._pool.take(math.inf)
    assert taken is not None
    case = case_of(spec, [[0.9, 0.1]])
    results, counts = rig.executor.run(request_of(case, time.monotonic() + 0.05))
    assert {r.status for r in results} == {Status.DEADLINE}
    assert (counts[0].asked, counts[0].late) == (2, 2)
    assert counts[0].waited_seconds >= 0.04
    rig.executor._pool.give(taken)
    results, counts = rig.executor.run(request_of(case, math.inf))
    assert answers(results) == expected(case)
    assert counts[0].waited_seconds < 0.04


@pytest.mark.parametrize("mode", LAUNCHES)
def test_a_failure_of_the_gpu_reaches_those_that_wait_for_a_lane(
    library: ctypes.CDLL, mode: str
) -> None:
    spec = plain(2, max_batch=4)
    rig = Rig(library, mode, spec)
    case = case_of(spec, np.random.default_rng(1).random((2, 3)))
    gate = Gate(case, 0)
    first = Call(rig, gate.request())
    assert gate.reached.wait(20)
    second = lines_up(rig, request_of(case, math.inf))
    rig.cuda.fail_at = 1
    gate.open.set()
    for call in (first, second):
        call.end()
        assert answers(call.results) == expected(case)
    assert "CUDA_ERROR_LAUNCH_FAILED" in rig.executor.failure
    assert rig.cuda.launches == 1


@pytest.mark.parametrize("mode", LAUNCHES)
def test_close_lets_running_calls_end(library: ctypes.CDLL, mode: str) -> None:
    """Also those that still need lanes, and those that wait for one."""
    spec = plain(2, max_batch=2)
    rig = Rig(library, mode, spec)
    case = case_of(spec, np.random.default_rng(2).random((2, 7)))
    gate = Gate(case, 3)
    first = Call(rig, gate.request())
    assert gate.reached.wait(20)
    second = lines_up(rig, request_of(case, math.inf))
    idle: list[tuple[bool, ...]] = []
    closer = threading.Thread(target=lambda: idle.append(rig.executor.close(20.0)), daemon=True)
    closer.start()
    wait_until(lambda: rig.executor._entrance._closed)
    with pytest.raises(CascadeError, match="closed"):
        rig.executor.run(request_of(case, math.inf))
    gate.open.set()
    for call in (first, second):
        call.end()
        assert call.error is None
        assert answers(call.results) == expected(case)
    closer.join(20)
    assert idle == [(True, True)]
    assert not rig.cuda.executables


@pytest.mark.parametrize("mode", LAUNCHES)
def test_close_without_patience_ends_those_that_wait(library: ctypes.CDLL, mode: str) -> None:
    spec = plain(2, max_batch=2)
    rig = Rig(library, mode, spec)
    case = case_of(spec, np.random.default_rng(2).random((2, 2)))
    gate = Gate(case, 1)
    first = Call(rig, gate.request())
    assert gate.reached.wait(20)
    second = lines_up(rig, request_of(case, math.inf))
    assert rig.executor.close(0.05) == (False, False)
    second.end()
    assert isinstance(second.error, CascadeError)
    assert rig.cuda.executables  # for the batch that is on its way
    gate.open.set()
    first.end()


@pytest.mark.parametrize("mode", LAUNCHES)
@pytest.mark.parametrize("where", ["before the launch", "at the launch", "after it"])
def test_what_goes_wrong_in_a_batch_costs_no_lane(
    library: ctypes.CDLL, clock: Clock, monkeypatch: pytest.MonkeyPatch, mode: str, where: str
) -> None:
    """Whatever it is, such as an interrupt from the keyboard."""
    spec = plain(2, max_batch=2)
    rig = Rig(library, mode, spec, lanes=2)
    case = case_of(spec, np.random.default_rng(5).random((2, 7)))

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    method = {"before the launch": "copy", "at the launch": "launch_graph", "after it": "record"}
    for skipped in (0, 1, 3):
        with monkeypatch.context() as patch:
            original, calls = getattr(rig.cuda, method[where]), itertools.count()

            def once(
                *given: Any,
                original: Any = original,
                calls: Iterator[int] = calls,
                skipped: int = skipped,
            ) -> Any:
                return (interrupted if next(calls) == skipped else original)(*given)

            patch.setattr(rig.cuda, method[where], once)
            with pytest.raises(KeyboardInterrupt):
                rig.executor.run(request_of(case, math.inf))
        assert len(rig.executor._pool._free) == 2
        assert not any(rig.cuda._streams.values())  # and nothing is going on in them
        check(case, rig, clock)
    assert rig.executor.close(0.0) == (True, True)


@pytest.mark.parametrize("mode", LAUNCHES)
@pytest.mark.parametrize("most", [1, 99])
def test_a_long_call_does_not_keep_the_images_of_settled_samples(
    library: ctypes.CDLL, clock: Clock, mode: str, most: int
) -> None:
    spec = plain(2, max_batch=4)
    rig = Rig(library, mode, spec, lanes=2, most=most)
    scores = np.full((2, 60), 0.9)
    case = case_of(spec, scores)
    request = request_of(case, math.inf)
    decode = request.samples._decode
    images: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def counted(source: int) -> Any:
        image = decode(source).copy()
        images.append(weakref.ref(image))
        alive.append(sum(one() is not None for one in images))
        return image

    request.samples._decode = counted
    results, _ = rig.executor.run(request)
    assert answers(results) == expected(case)
    assert max(alive) <= 3 * spec.max_batch


@pytest.mark.parametrize("mode", LAUNCHES)
@pytest.mark.parametrize("limited", [True, False])
def test_a_clock_that_steps_back_makes_nothing_late(
    library: ctypes.CDLL, mode: str, limited: bool
) -> None:
    spec = plain(2, max_batch=4)
    rig = Rig(library, mode, spec)
    rig.cuda.elapsed_ns = lambda stage: -5000
    case = case_of(spec, np.full((2, 3), 0.5))
    until = time.monotonic() + 60.0 if limited else math.inf
    results, counts = rig.executor.run(request_of(case, until))
    assert answers(results) == expected(case)
    assert [count.seconds for count in counts] == [0.0, 0.0]


def check_random(rig: Rig, spec: CascadeSpec, rng: np.random.Generator, clock: Clock) -> None:
    for _ in range(40):
        check(case_of(spec, rng.random((len(spec.stages), spec.max_batch))), rig, clock)


def drop_edges(cuda: SimulatedCuda, kind: str) -> None:
    """Forget what nodes of a kind come after."""
    for graph in cuda.executables:
        for node in [
            *graph.nodes,
            *(n for c in conditionals(graph) for b in c.bodies for n in b.nodes),
        ]:
            name = node.launch.kernel if node.launch else node.kind.value
            if name.startswith(kind):
                node.after = ()


@pytest.mark.parametrize(
    "kind",
    ["sn72_begin", "sn72_route", "sn72_scatter", "child graph", "memcpy", "conditional"],
)
def test_a_missing_edge_is_noticed(library: ctypes.CDLL, clock: Clock, kind: str) -> None:
    spec = plain(3, max_batch=8)
    rig = Rig(library, "device", spec)
    drop_edges(rig.cuda, kind)
    rng = np.random.default_rng(3)
    with pytest.raises((AssertionError, CascadeError)):
        check_random(rig, spec, rng, clock)


@pytest.mark.parametrize(("kind", "position"), [("scatter", 0), ("scatter", 1), ("combine", 0)])
def test_a_missing_edge_in_a_group_is_noticed(
    library: ctypes.CDLL, clock: Clock, kind: str, position: int
) -> None:
    spec = side_by_side(max_batch=8)
    rig = Rig(library, "device", spec)
    dropped = 0
    for graph in rig.cuda.executables:
        (pairs, *_), names = conditionals(graph), bodies_of(graph)[0]
        for body, nodes in zip(pairs.bodies, names, strict=True):
            for node, (name, after) in zip(body.nodes, nodes, strict=True):
                if name == kind and len(after) > position:
                    node.after = after[:position] + after[position + 1 :]
                    dropped += 1
    assert dropped
    with pytest.raises((AssertionError, CascadeError)):
        check_random(rig, spec, np.random.default_rng(3), clock)


@pytest.mark.parametrize("mode", LAUNCHES)
@pytest.mark.parametrize("broken", ["combines nothing", "decides too early", "group of its own"])
def test_a_wrong_group_is_noticed(
    library: ctypes.CDLL, clock: Clock, monkeypatch: pytest.MonkeyPatch, mode: str, broken: str
) -> None:
    spec = side_by_side(max_batch=8)
    launch = layout.route

    def wrong(args: layout.RouteArgs, kind: layout.Score) -> layout.Launch:
        if broken == "group of its own":
            args.first = args.stage
        elif args.flags & layout.Flag.COMBINE_ONLY and broken == "combines nothing":
            args.stage = args.first = 77
        elif args.flags & layout.Flag.COMBINE_ONLY:
            args.flags = int(layout.Flag.LAST_STAGE)
        return launch(args, kind)

    monkeypatch.setattr(layout, "route", wrong)
    rig = Rig(library, mode, spec)
    with pytest.raises((AssertionError, CascadeError)):
        check_random(rig, spec, np.random.default_rng(3), clock)


@pytest.mark.parametrize("mode", LAUNCHES)
@pytest.mark.parametrize("broken", ["no gather", "no wait", "count of the wrong boundary"])
def test_a_wrong_executor_is_noticed(
    library: ctypes.CDLL, clock: Clock, monkeypatch: pytest.MonkeyPatch, mode: str, broken: str
) -> None:
    if broken == "no gather":
        monkeypatch.setattr(layout, "gather", lambda args: layout.begin(harmless))
    elif broken == "no wait":
        monkeypatch.setattr(SimulatedCuda, "wait", lambda self, event: None)
    else:
        monkeypatch.setattr(wiring, "_offset_of_count", lambda: 16)
    spec = plain(3, max_batch=8)
    scratch = np.zeros(4096, np.uint8)
    at = scratch.ctypes.data // 256 * 256 + 256
    harmless = layout.BeginArgs(samples=at, scored=at + 1024, start_ns=at + 2048, capacity=1)
    rng = np.random.default_rng(3)
    rig = Rig(library, mode, spec)
    with pytest.raises((AssertionError, CascadeError)):
        check_random(rig, spec, rng, clock)
