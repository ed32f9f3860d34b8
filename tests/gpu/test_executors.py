"""The host and device executors on a GPU: the same answers as the oracle and the CPU executor."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sn72engine import BuildOptions, ProgramOptions, ShapeRange, Store, build, export_program
from sn72engine.cascade import Cascade
from sn72engine.cascade.executor import Request, Samples
from sn72engine.cascade.graphed import GraphExecutor
from sn72engine.cascade.modes import GraphOptions, make_executor, open_gpu
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.cuda.api import NodeKind
from sn72engine.cuda.driver import driver_available
from sn72engine.errors import CudaUnavailableError, ImageError
from sn72engine.spec import Preprocess
from sn72engine.stages.base import StageScores
from sn72engine.stages.capture import Rows
from sn72engine.stages.tensor_offer import TensorBound, TensorBuffer
from sn72engine.stages.torch_stage import TorchStage
from tests import tiny_modules
from tests.oracle import Case, answers, expected, random_case

pytestmark = pytest.mark.gpu

MODES = ("host", "device")


@pytest.fixture(scope="module", autouse=True)
def _usable() -> None:
    found = driver_available()
    if not found.ok:
        pytest.skip(found.reason)
    try:
        open_gpu(0)
    except CudaUnavailableError as error:
        pytest.skip(str(error))


class ColumnStage:
    """A stage whose score is a column of its row; on the host and captured.

    Args:
        column: which.
        width: columns of a row.
        extra: done after the score has been computed, while capturing too.
        dtype: of the scores.
    """

    needs = None
    limits = (1, 1 << 20)

    def __init__(
        self,
        column: int,
        width: int,
        *,
        extra: Callable[[], None] = lambda: None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rows = Rows((width,), "float32", "column")
        self.buffers: list[torch.Tensor] = []
        self._column, self._extra, self._dtype = column, extra, dtype

    def prepare(self) -> None:
        pass

    def score(self, images: Sequence[Any]) -> StageScores:
        column = torch.from_numpy(np.stack(images)[:, self._column])
        return StageScores(column.to(self._dtype).float().numpy())

    def close(self) -> None:
        pass

    def offer_capture(self, device: int) -> ColumnStage:
        assert device == 0
        return self

    def load(self, image: Any, out: Any) -> None:
        out[...] = image

    def allocate(self, rows: int) -> TensorBuffer:
        self.buffers.append(torch.full((rows, *self.rows.shape), torch.nan, device="cuda"))
        return TensorBuffer(self.buffers[-1])

    def bind(self, buffer: TensorBuffer, rows: int, lane: int) -> TensorBound:
        def call() -> torch.Tensor:
            scores = buffer.tensor[:rows, self._column].to(self._dtype, copy=True)
            self._extra()
            return scores

        return TensorBound(call, rows, "probability", 1)


def made(
    spec: CascadeSpec, mode: Any, *, lanes: int = 1, **fields: Any
) -> tuple[Any, list[ColumnStage], Any]:
    width = len(spec.stages)
    stages = [ColumnStage(k, width, **fields) for k in range(width)]
    executor, report = make_executor(spec, stages, mode, GraphOptions(lanes=lanes))
    assert mode == "cpu" or isinstance(executor, GraphExecutor)
    return executor, stages, report


def request_of(case: Case, until: float = math.inf) -> Request:
    with np.errstate(over="ignore"):
        rows = np.array(case.scores, np.float32).reshape(len(case.scores), len(case)).T.copy()
    rows[:, [bool(broken) for broken in case.broken]] = np.nan

    def decode(source: int) -> Any:
        if not case.readable[source]:
            raise ImageError(f"{source} is no image")
        return rows[source]

    bounds = [
        tuple(
            np.asarray(bound, np.float64).astype(np.float32)
            for bound in case.bounds.get(stage.name, stage.thresholds)
        )
        for stage in case.spec.stages
    ]
    flags = {name: np.array(marks, bool) for name, marks in case.flags.items()}
    return Request(Samples(range(len(case)), decode), until, flags, bounds)  # type: ignore[arg-type]


def plain(stages: int, max_batch: int) -> CascadeSpec:
    return CascadeSpec(
        tuple(StageSpec(f"s{k}", low=0.2, high=0.8) for k in range(stages)), max_batch=max_batch
    )


def case_of(spec: CascadeSpec, scores: Any) -> Case:
    scores = np.asarray(scores)
    return Case(spec, scores.tolist(), [""] * len(scores), {}, {}, [True] * scores.shape[1])


def cases(spec: CascadeSpec, rng: np.random.Generator, count: int) -> Iterator[Case]:
    """Random samples of every number from 0 to twice a full batch, with strange scores."""
    strange = np.array([0, 0.15, 0.5, 0.85, 1, np.nan, np.inf, -np.inf, -0.1, 1.1])
    for number in range(count):
        samples = number % (2 * spec.max_batch + 1)
        shape = len(spec.stages), samples
        scores = np.where(rng.random(shape) < 0.6, rng.random(shape), rng.choice(strange, shape))
        bounds = {
            k: [tuple(pair) for pair in rng.choice(strange, (samples, 2)).tolist()]
            for k in range(len(spec.stages))
            if rng.random() < 0.3
        }
        yield Case(
            spec,
            scores.tolist(),
            [""] * len(spec.stages),
            {name: (rng.random(samples) < 0.5).tolist() for name in spec.triggers},
            bounds,
            (rng.random(samples) > 0.05).tolist(),
        )


@pytest.mark.parametrize("mode", ["cpu", *MODES])
def test_every_sample_as_the_oracle_says(mode: str) -> None:
    rng = np.random.default_rng(1)
    for number in range(8):
        groups = number % 2 == 1  # without triggers, so that all of them can be captured
        drawn = random_case(
            rng, most_samples=1, groups=groups, triggers=not groups, deadlines=False
        ).spec
        spec = dataclasses.replace(drawn, max_batch=int(rng.choice([1, 5, 16, 33])))
        executor, _, _ = made(spec, mode)
        for case in cases(spec, rng, 100):
            results, counts = executor.run(request_of(case))
            assert answers(results) == expected(case), case
            for count in counts:
                ends = count.negative, count.positive, count.escalated, count.failed, count.late
                assert sum(ends) == count.asked
        assert all(executor.close(1.0))


@pytest.mark.parametrize("mode", MODES)
def test_measured_buckets_answer_as_the_oracle_says(mode: Any) -> None:
    spec = plain(3, 16)
    stages = [ColumnStage(k, 3) for k in range(3)]
    graphs = GraphOptions(lanes=2, buckets="measured", max_buckets=3, memory_bytes=1 << 30)
    executor, report = make_executor(spec, stages, mode, graphs)
    plans = report().plans
    assert list(plans) == ["s0", "s1", "s2"]
    for plan in plans.values():
        assert plan.buckets[-1] == 16
        assert len(plan.buckets) <= 3
        assert all(0 < seconds < 1 for seconds in plan.curve.seconds)
    assert set(report().bytes) == {(s, rows) for s, p in plans.items() for rows in p.buckets}
    for case in cases(spec, np.random.default_rng(7), 66):
        assert answers(executor.run(request_of(case))[0]) == expected(case), case
    assert all(executor.close(1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_scores(mode: str, dtype: torch.dtype) -> None:
    spec = plain(3, 16)
    rng = np.random.default_rng(2)
    executor, _, _ = made(spec, mode, dtype=dtype)
    for _ in range(30):
        scores = torch.from_numpy(rng.random((3, 16))).to(dtype).double().numpy()
        case = case_of(spec, scores)
        assert answers(executor.run(request_of(case))[0]) == expected(case)
    executor.close(1.0)


@pytest.mark.parametrize("mode", MODES)
def test_every_number_of_samples_with_poisoned_buffers(mode: str) -> None:
    """What an earlier batch left in the buffers never reaches an answer."""
    spec = plain(3, 33)
    executor, stages, _ = made(spec, mode)
    rng = np.random.default_rng(3)
    for batch, escalated in itertools.product(range(34), (0, 1, 0.5, 1.0)):
        most = int(batch * escalated) if isinstance(escalated, float) else min(batch, escalated)
        scores = rng.random((3, batch))
        scores[0, :most], scores[0, most:] = 0.5, 0.9
        for buffer in itertools.chain.from_iterable(stage.buffers for stage in stages):
            buffer.fill_(torch.nan)
        torch.cuda.synchronize()
        case = case_of(spec, scores)
        results, counts = executor.run(request_of(case))
        assert answers(results) == expected(case)
        assert counts[1].asked == most
    executor.close(1.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_thousand_replays_with_flat_memory(mode: str) -> None:
    spec = plain(2, 4)
    executor, _, _ = made(spec, mode, lanes=2)
    case = case_of(spec, [[0.5, 0.9, 0.1, 0.5], [0.9, 0.5, 0.5, 0.5]])
    wanted = expected(case)
    free = 0
    for number in range(100_000):
        results, _ = executor.run(request_of(case))
        if number % 1000 == 0:
            assert answers(results) == wanted
        if number == 1000:
            torch.cuda.synchronize()
            free, _ = torch.cuda.mem_get_info()
    torch.cuda.synchronize()
    assert abs(torch.cuda.mem_get_info()[0] - free) < 8 << 20
    executor.close(1.0)


@pytest.mark.parametrize("mode", MODES)
def test_two_lanes_at_once(mode: str) -> None:
    spec = plain(3, 16)
    executor, _, report = made(spec, mode, lanes=2)
    assert report().lanes == 2
    wrong: list[Case] = []

    def caller(seed: int) -> None:
        wrong.extend(
            case
            for case in cases(spec, np.random.default_rng(seed), 300)
            if answers(executor.run(request_of(case))[0]) != expected(case)
        )

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(executor.close(1.0))


@pytest.mark.parametrize("mode", MODES)
def test_a_deadline_is_seen_at_the_boundary(mode: str) -> None:
    """A first stage that spins past the deadline: what it is not sure of goes no further."""
    spec = plain(2, 4)
    width = len(spec.stages)
    spin = ColumnStage(0, width, extra=lambda: torch.cuda._sleep(400_000_000))
    stages = [spin, ColumnStage(1, width)]
    executor, _ = make_executor(spec, stages, mode, GraphOptions(lanes=1))  # type: ignore[arg-type]
    case = case_of(spec, [[0.5, 0.9, 0.1, 0.5], [0.9] * 4])
    results, counts = executor.run(request_of(case, time.monotonic() + 0.02))
    late = dataclasses.replace(case, late_after=0)
    assert answers(results) == expected(late)
    assert counts[1].late == 2
    executor.close(1.0)


def test_forbidden_nodes_force_the_host_mode() -> None:
    event = torch.cuda.Event(external=True)
    spec = plain(2, 4)
    executor, _, report = made(spec, "device", extra=event.record)
    assert report().mode == "host"
    assert "event record" in report().reason
    case = case_of(spec, [[0.5, 0.9, 0.1, 0.5], [0.9] * 4])
    assert answers(executor.run(request_of(case))[0]) == expected(case)
    executor.close(1.0)


def test_what_the_driver_says_of_a_captured_graph() -> None:
    driver, capturer = open_gpu(0)
    left = torch.ones(64, 64, device="cuda")
    out = torch.zeros_like(left)

    def call() -> None:
        torch.matmul(left, left, out=out)

    capturer.run(call)
    graph, owner = capturer.capture(call, capturer.new_pool())
    kinds = {kind for kind, _ in driver.nodes(graph)}
    assert NodeKind.KERNEL in kinds
    assert kinds <= {NodeKind.KERNEL, NodeKind.SET, NodeKind.COPY}
    del owner


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return list(rng.integers(0, 256, (count, 20, 24, 3), np.uint8))


def same(results: Sequence[Any], wanted: Sequence[Any]) -> None:
    for result, want in zip(results, wanted, strict=True):
        assert abs(result.probability - want.probability) < 1e-3
        assert (result.stage, result.status) == (want.stage, want.status)


def two_stages(**second: Any) -> CascadeSpec:
    # Thresholds that nobody is near: the first stage decides nothing, the second all.
    return CascadeSpec(
        (
            StageSpec("small", low=0.0, high=1.0),
            StageSpec("large", low=0.0, high=0.0, **second),
        ),
        max_batch=16,
    )


@pytest.mark.parametrize("mode", MODES)
def test_modules_inside_switch_bodies(mode: Any) -> None:
    transform = Preprocess(height=16, width=16)
    modules = [tiny_modules.transformer().cuda().eval() for _ in range(2)]
    given = {
        name: TorchStage(module, transform, score="sigmoid", device="cuda")
        for name, module in zip(("small", "large"), modules, strict=True)
    }
    images = pictures(41)
    with (
        Cascade(two_stages(), given, mode="cpu") as cpu,
        Cascade(two_stages(), given, mode=mode) as cascade,
    ):
        assert cascade.report().executor.mode == mode
        same(cascade(images), cpu(images))
        future = cascade.submit(images[:5])
        same(future.result(timeout=60), cpu(images[:5]))


@pytest.mark.parametrize("mode", MODES)
def test_labels_of_many_classes(mode: Any) -> None:
    """Labels go another way than scores: scattered by the first stage too, and copied apart."""
    transform = Preprocess(height=16, width=16)
    torch.manual_seed(7)
    layers = [torch.nn.Linear(3 * 16 * 16, 5) for _ in range(3)]
    modules = [torch.nn.Sequential(torch.nn.Flatten(), one).cuda().eval() for one in layers]
    names = ("first", "second", "third")
    given = {
        name: TorchStage(module, transform, score="top1", device="cuda")
        for name, module in zip(names, modules, strict=True)
    }
    spec = CascadeSpec(
        tuple(StageSpec(name, score="top1", high=0.45) for name in names), max_batch=8
    )
    images = pictures(61)
    with (
        Cascade(spec, given, mode="cpu") as cpu,
        Cascade(spec, given, mode=mode) as cascade,
    ):
        wanted, results = cpu(images), cascade(images)
        assert cascade.report().executor.captured == names
    assert len({want.stage for want in wanted}) > 1
    assert len({want.label for want in wanted}) > 2
    same(results, wanted)
    assert [result.label for result in results] == [want.label for want in wanted]


@pytest.mark.parametrize("mode", MODES)
def test_close_while_calls_run(mode: str) -> None:
    """Those that are inside end as if nothing were, and then everything is released."""
    spec = plain(3, 4)
    executor, _, _ = made(spec, mode, lanes=2)
    rng = np.random.default_rng(9)
    ended: list[bool] = []
    inside = threading.Barrier(3)

    def caller(case: Case) -> None:
        request = request_of(case)
        decode = request.samples._decode

        def slow(source: Any) -> Any:
            if source == 0:
                inside.wait(60)  # inside, and with nearly all of its batches to come
            return decode(source)

        request.samples._decode = slow
        ended.append(answers(executor.run(request)[0]) == expected(case))

    cases_of_callers = [case_of(spec, rng.random((3, 400))) for _ in range(2)]
    threads = [threading.Thread(target=caller, args=(case,)) for case in cases_of_callers]
    for thread in threads:
        thread.start()
    inside.wait(60)
    assert all(executor.close(60.0))
    for thread in threads:
        thread.join()
    assert ended == [True, True]


@pytest.mark.parametrize("mode", MODES)
def test_inductor_packages_inside_switch_bodies(mode: Any, tmp_path: Path) -> None:
    transform = Preprocess(height=16, width=16)
    program = export_program(
        tiny_modules.transformer(),
        ProgramOptions(max_batch=16),
        tmp_path / "vit.pt2",
        example=torch.zeros(1, 3, 16, 16),
        preprocess=transform,
    )
    options = BuildOptions(backend="inductor", target="cuda", batch=ShapeRange(1, 8, 16))
    engine = build(program, options, store=Store(tmp_path / "store"))
    module = tiny_modules.transformer().cuda().eval()
    first = TorchStage(module, transform, score="sigmoid", device="cuda")
    spec = two_stages(engine=str(engine.folder), score="sigmoid")
    images = pictures(23)
    with (
        Cascade(spec, {"small": first}, mode="cpu") as cpu,
        Cascade(spec, {"small": first}, mode=mode) as cascade,
    ):
        assert cascade.report().executor.captured == ("small", "large")
        same(cascade(images), cpu(images))
