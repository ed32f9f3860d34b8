"""Which executor is chosen, and what the report says of it."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import json
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn72engine.cascade import Cascade
from sn72engine.cascade.executor import CpuExecutor
from sn72engine.cascade.graphed import GraphExecutor
from sn72engine.cascade.modes import GraphOptions, default_buckets, make_executor
from sn72engine.cascade.result import Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.cuda.api import NodeKind
from sn72engine.cuda.driver import driver_available
from sn72engine.cuda.layout import MAX_BUCKETS
from sn72engine.errors import CascadeError, CudaUnavailableError, OptionError
from sn72engine.preprocessing import preprocess
from sn72engine.spec import Preprocess, RuntimeOptions, ShapeRange
from sn72engine.stages.base import StageScores
from sn72engine.stages.capture import Rows
from sn72engine.stages.engine import EngineStage
from sn72engine.stages.scoring import to_scores
from sn72engine.stages.tensor_offer import TensorBuffer, TensorOffer, device_scores
from sn72engine.stages.torch_stage import TorchStage
from tests.cpu.simulated_cuda import ColumnOffer, SimulatedCapturer, SimulatedCuda

no_driver = pytest.mark.skipif(driver_available().ok, reason="there is a GPU here")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Plain:
    """A stage that offers nothing."""

    needs = None

    def prepare(self) -> None:
        pass

    def score(self, images: Sequence[Any]) -> StageScores:
        return StageScores(np.full(len(images), 0.5))

    def close(self) -> None:
        pass


class Offering(Plain):
    """A stage that can be captured, at most ``most`` rows at a time."""

    def __init__(self, cuda: SimulatedCuda, most: int = 99, refusal: str = "") -> None:
        self._cuda, self._most, self._refusal = cuda, most, refusal

    def offer_capture(self, device: int) -> ColumnOffer:
        if self._refusal:
            raise CudaUnavailableError(self._refusal)
        offer = ColumnOffer(self._cuda, Rows((1,), "float32", "key"), 0)
        offer.limits = (2, self._most)
        return offer


def spec_of(*names: str, **fields: Any) -> CascadeSpec:
    return CascadeSpec(tuple(StageSpec(name) for name in names), max_batch=4, **fields)


class Gpu:
    """Opens one simulated GPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.cuda = SimulatedCuda(library)
        self.capturer = SimulatedCapturer(self.cuda)

    def __call__(self, device: int) -> tuple[SimulatedCuda, SimulatedCapturer]:
        return self.cuda, self.capturer

    def make(
        self, stages: Sequence[Any], mode: Any, spec: CascadeSpec | None = None, **options: Any
    ) -> Any:
        spec = spec or spec_of(*(f"s{k}" for k in range(len(stages))))
        return make_executor(spec, stages, mode, GraphOptions(**options), gpu=self)


@pytest.fixture
def gpu(library: ctypes.CDLL) -> Gpu:
    return Gpu(library)


@no_driver
def test_without_a_driver_auto_runs_on_the_host_and_says_why() -> None:
    with Cascade(spec_of("a"), {"a": Plain()}) as cascade:
        executor = cascade.report().executor
    assert (executor.mode, executor.reason) == ("cpu", driver_available().reason)
    assert f"executor cpu ({driver_available().reason})" in str(cascade.report())
    assert json.loads(json.dumps(cascade.report().to_dict()))["executor"]["mode"] == "cpu"


@no_driver
@pytest.mark.parametrize("mode", ["host", "device"])
def test_without_a_driver_a_gpu_mode_is_refused(mode: Any) -> None:
    with pytest.raises(CudaUnavailableError, match=f"mode='{mode}' needs a GPU: no NVIDIA driver"):
        Cascade(spec_of("a"), {"a": Plain()}, mode=mode)


@no_driver
def test_without_a_driver_nothing_of_cuda_is_loaded_and_nothing_hangs() -> None:
    code = (
        "import sys\n"
        "from sn72engine.cascade import Cascade\n"
        "from sn72engine.cascade.spec import CascadeSpec, StageSpec\n"
        "from sn72engine.errors import CudaUnavailableError\n"
        "spec = CascadeSpec((StageSpec('a'),))\n"
        "for mode in ('auto', 'device', 'host', 'auto'):\n"
        "    try: Cascade(spec, {'a': lambda images: [0.5] * len(images)}, mode=mode).close()\n"
        "    except CudaUnavailableError: assert mode != 'auto'\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('cuda', 'torch')])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OptionError, match="mode='gpu' is not one of auto, cpu, host, device"):
        Cascade(spec_of("a"), {"a": Plain()}, mode="gpu")  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize(
    ("asked", "mode", "reason"),
    [
        ("auto", "host", "has not been proven on a GPU"),
        ("host", "host", "mode='host' was asked for"),
        ("device", "device", "mode='device' was asked for"),
        ("cpu", "cpu", "mode='cpu' was asked for"),
    ],
)
def test_with_a_gpu(gpu: Gpu, asked: str, mode: str, reason: str) -> None:
    executor, report = gpu.make([Offering(gpu.cuda), Offering(gpu.cuda)], asked)
    assert isinstance(executor, CpuExecutor if mode == "cpu" else GraphExecutor)
    assert report().mode == mode
    assert reason in report().reason
    if mode != "cpu":
        assert report().captured == ("s0", "s1")
        assert report().lanes == 2
        assert report().bytes == {(s, rows): 2000 for s in ("s0", "s1") for rows in (2, 4)}
        assert f"executor {mode}, captured: s0, s1 (" in str(report())
    executor.close(0.0)
    assert not gpu.cuda.executables


@needs_compiler
def test_forbidden_nodes_force_the_host_mode(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.capturer.extra = (NodeKind.HOST,)
    executor, report = gpu.make([Offering(gpu.cuda)], "device")
    assert report().mode == "host"
    assert "mode='device' is not possible: the graph of stage 's0' with 4 rows holds 1 host" in (
        report().reason
    )
    assert report().reason in caplog.text or "'host' is used" in caplog.text
    executor.close(0.0)


@needs_compiler
def test_a_driver_that_refuses_the_cascade_forces_the_host_mode(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise CudaUnavailableError("cuGraphAddNode failed with CUDA_ERROR_NOT_SUPPORTED")

    monkeypatch.setattr(gpu.cuda, "add_switch", refuse)
    executor, report = gpu.make([Offering(gpu.cuda), Offering(gpu.cuda)], "device")
    assert report().mode == "host"
    assert "CUDA_ERROR_NOT_SUPPORTED" in report().reason
    executor.close(0.0)


@needs_compiler
@pytest.mark.parametrize(
    ("stages", "captured", "reason"),
    [
        (lambda c: [Offering(c), Plain(), Offering(c)], ("s0",), "stage 's1', a Plain, cannot be"),
        (lambda c: [Offering(c), Offering(c, refusal="its engine runs on the CPU")], ("s0",),
         "stage 's1' cannot be captured: its engine runs on the CPU"),
    ],
)  # fmt: skip
def test_the_first_stages_are_captured(
    gpu: Gpu, stages: Any, captured: tuple[str, ...], reason: str
) -> None:
    executor, report = gpu.make(stages(gpu.cuda), "device")
    assert report().captured == captured
    assert reason in report().reason
    executor.close(0.0)


PAIR = CascadeSpec(
    (
        StageSpec("s0"),
        StageSpec("left", group="pair", when="t"),
        StageSpec("right", group="pair", when="t", combine="weighted"),
        StageSpec("s3"),
    ),
    max_batch=4,
)


@needs_compiler
@pytest.mark.parametrize("mode", ["host", "device"])
def test_a_parallel_group_is_captured_as_a_whole(gpu: Gpu, mode: Any) -> None:
    executor, report = gpu.make([Offering(gpu.cuda) for _ in range(4)], mode, spec=PAIR)
    assert report().mode == mode
    assert report().captured == ("s0", "left", "right", "s3")
    assert "captured up to" not in report().reason
    executor.close(0.0)


@needs_compiler
@pytest.mark.parametrize(
    ("stages", "when", "reason"),
    [
        (lambda c: [Offering(c) for _ in range(4)], "other",
         "stage 'right' waits for 'other' and 'left' beside it for 't'"),
        (lambda c: [Offering(c), Offering(c), Plain(), Offering(c)], "t",
         "stage 'right', a Plain, cannot be captured"),
        (lambda c: [Offering(c), *[Offering(c)] * 2, Offering(c)], "t",
         "stage 'right' is the same object as one beside it"),
    ],
)  # fmt: skip
def test_a_parallel_group_is_not_captured_in_part(
    gpu: Gpu, stages: Any, when: str, reason: str
) -> None:
    own = dataclasses.replace(PAIR.stages[2], when=when)
    spec = dataclasses.replace(PAIR, stages=(*PAIR.stages[:2], own, PAIR.stages[3]))
    executor, report = gpu.make(stages(gpu.cuda), "device", spec=spec)
    assert report().captured == ("s0",)
    assert f"captured up to where {reason}" in report().reason
    executor.close(0.0)


@needs_compiler
def test_a_cascade_with_nothing_to_capture(gpu: Gpu) -> None:
    _, report = gpu.make([Plain(), Offering(gpu.cuda)], "auto")
    assert (report().mode, "stage 's0', a Plain" in report().reason) == ("cpu", True)
    with pytest.raises(CascadeError, match="mode='device' cannot capture the first stage"):
        gpu.make([Plain(), Offering(gpu.cuda)], "device")


@needs_compiler
def test_a_stage_for_smaller_batches_is_not_captured(gpu: Gpu) -> None:
    stages = [Offering(gpu.cuda, most=3)]
    with pytest.raises(CascadeError, match="'s0' takes batches of 2 to 3, and max_batch=4"):
        gpu.make(stages, "host")
    _, report = gpu.make(stages, "auto")
    assert report().mode == "cpu"


@needs_compiler
def test_a_capture_that_fails_releases_what_was_made(gpu: Gpu) -> None:
    calls = 0

    def capture(call: Any, pool: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("out of memory")
        return SimulatedCapturer.capture(gpu.capturer, call, pool)

    gpu.capturer.capture = capture  # type: ignore[method-assign]
    with pytest.raises(CudaUnavailableError, match="out of memory"):
        gpu.make([Offering(gpu.cuda), Offering(gpu.cuda)], "host")
    offers_own = 2 * 2 * 2 + 2 * 2  # inputs and outputs, fewer for the capture that failed
    assert gpu.cuda.allocations <= offers_own
    assert not gpu.cuda._pinned
    assert not gpu.cuda._streams


@needs_compiler
@pytest.mark.parametrize("mode", ["host", "device"])
def test_a_closed_executor_holds_no_work_of_the_stages(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """It may be kept for its report, and its stages' contexts must not be kept with it."""
    offers: list[weakref.ref[Any]] = []
    offer_capture = Offering.offer_capture

    def noted(self: Offering, device: int) -> ColumnOffer:
        offer = offer_capture(self, device)
        offers.append(weakref.ref(offer))
        return offer

    monkeypatch.setattr(Offering, "offer_capture", noted)
    executor, report = gpu.make([Offering(gpu.cuda), Offering(gpu.cuda)], mode)
    assert all(offer() is not None for offer in offers)
    assert executor.close(0.0) == (True, True)
    gc.collect()
    assert [offer() for offer in offers] == [None, None]
    assert report().captured == ("s0", "s1")


class Exhausted(Offering):
    """A stage whose library runs out of memory, in its own words."""

    def __init__(self, cuda: SimulatedCuda, where: str) -> None:
        super().__init__(cuda)
        self._where = where

    def offer_capture(self, device: int) -> ColumnOffer:
        def fail(*_: Any) -> Any:
            raise RuntimeError("CUDA out of memory")

        offer = super().offer_capture(device)
        setattr(offer, self._where, fail)
        return offer


@needs_compiler
@pytest.mark.parametrize("buckets", [(), "measured"])
@pytest.mark.parametrize("where", ["allocate", "bind"])
def test_what_the_library_of_a_stage_raises(gpu: Gpu, where: str, buckets: Any) -> None:
    stages = [Offering(gpu.cuda), Exhausted(gpu.cuda, where)]
    executor, report = gpu.make(stages, "auto", buckets=buckets)
    assert isinstance(executor, CpuExecutor)
    assert (report().mode, report().reason) == ("cpu", "RuntimeError: CUDA out of memory")
    with pytest.raises(CudaUnavailableError, match=r"mode='host' .*RuntimeError: CUDA out of"):
        gpu.make(stages, "host", buckets=buckets)
    assert not gpu.cuda._pinned
    assert not gpu.cuda._streams


@needs_compiler
def test_a_gpu_that_pytorch_cannot_open(gpu: Gpu) -> None:
    def broken(device: int) -> Any:
        raise RuntimeError(f"invalid device ordinal {device}")

    stages = [Offering(gpu.cuda)]
    spec, options = spec_of("s0"), GraphOptions()
    _, report = make_executor(spec, stages, "auto", options, device=7, gpu=broken)
    assert report().reason == "RuntimeError: invalid device ordinal 7"
    with pytest.raises(CudaUnavailableError, match=r"mode='device'.*invalid device ordinal 7"):
        make_executor(spec, stages, "device", options, device=7, gpu=broken)


@needs_compiler
@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize("at", range(10))
def test_a_graph_that_the_driver_does_not_take_leaves_no_other(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, mode: Any, at: int
) -> None:
    instantiate, calls = gpu.cuda.instantiate, itertools.count()
    # Per lane two graphs with device; with host two of the first stage and three of the second.
    lanes, per_lane = 2, {"device": 2, "host": 5}

    def refuse_one(graph: int, stream: int) -> int:
        if next(calls) == at:
            raise CudaUnavailableError("cuGraphInstantiate failed with CUDA_ERROR_OUT_OF_MEMORY")
        return instantiate(graph, stream)

    monkeypatch.setattr(gpu.cuda, "instantiate", refuse_one)
    stages = [Offering(gpu.cuda), Offering(gpu.cuda)]
    if mode == "host":
        with pytest.raises(CudaUnavailableError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            gpu.make(stages, mode)
        assert not gpu.cuda.executables
        assert not gpu.cuda._streams
        return
    executor, report = gpu.make(stages, mode)
    assert report().mode == ("host" if at < lanes * per_lane["device"] else "device")
    assert len(gpu.cuda.executables) == lanes * per_lane[report().mode]
    executor.close(0.0)
    assert not gpu.cuda.executables


@given(st.integers(1, 5000))
def test_default_buckets(capacity: int) -> None:
    buckets = default_buckets(capacity)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == capacity
    assert buckets[0] == 1
    assert len(buckets) <= MAX_BUCKETS
    if capacity <= 200:
        waste = max(b - a - 1 for a, b in zip((0, *buckets), buckets, strict=False))
        assert waste <= 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 0}, "lanes=0"),
        ({"buckets": (4, 2)}, "must be ascending"),
        ({"buckets": (0,)}, "buckets=0"),
        ({"buckets": tuple(range(1, 40))}, "must be fewer than 32"),
    ],
)
def test_options_that_cannot_be_used(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GraphOptions(**options)


@pytest.mark.parametrize("score", ["sigmoid", "probability", "softmax", "top1"])
def test_scores_of_tensors_are_those_of_arrays(score: Any) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    shape = (40, 1) if score in ("sigmoid", "probability") else (40, 5)
    outputs = rng.normal(0, 4, shape).astype(np.float32)
    outputs[3], outputs[4], outputs[5] = np.nan, np.inf, 0.0
    wanted = to_scores(outputs, score, positive=2)
    scores, labels = device_scores(torch.from_numpy(outputs), score, positive=2, rows=40)
    given = torch.where(torch.isfinite(scores), scores.sigmoid(), torch.nan)
    given = given if score == "sigmoid" else scores
    np.testing.assert_allclose(given.numpy(), wanted.probabilities, rtol=3e-7)
    if score == "top1":
        finite = np.isfinite(wanted.probabilities)
        assert labels is not None
        np.testing.assert_array_equal(labels.numpy()[finite], np.asarray(wanted.labels)[finite])


class Network:
    """A small module on 8-bit pictures; made where torch is installed."""

    def __new__(cls, seed: int) -> Any:
        torch = pytest.importorskip("torch")
        torch.manual_seed(seed)
        layers = torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 1)
        layers[1].weight.data.mul_(3)  # so that some pictures are clear
        return torch.nn.Sequential(*layers).eval()


@needs_compiler
@pytest.mark.parametrize("mode", ["host", "device"])
def test_modules_in_a_cascade_answer_as_on_the_host(
    gpu: Gpu, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real modules and preprocessing, on tensors in host memory, through the simulated GPU."""
    torch = pytest.importorskip("torch")
    transform = Preprocess(height=4, width=4)
    modules = [Network(1), Network(2)]

    def bind(module: Any, rows: Any) -> Any:
        out = torch.zeros(len(rows), 1)  # a replayed graph writes where the capture wrote
        return lambda: out.copy_(module(rows))

    def offer(self: TorchStage, device: int) -> TensorOffer:
        made = TensorOffer(
            lambda rows, lane: bind(self._module, rows),
            transform,
            "sigmoid",
            positive=1,
            device="cpu",
            limits=(1, 99),
        )
        allocate = made.allocate

        def adopted(rows: int) -> Any:
            buffer = allocate(rows)
            gpu.cuda.adopt(buffer.address, rows * made.rows.bytes)
            return buffer

        monkeypatch.setattr(made, "allocate", adopted)
        return made

    monkeypatch.setattr(TorchStage, "offer_capture", offer)
    monkeypatch.setattr(
        "sn72engine.cascade.cascade.make_executor",
        lambda *a, device: make_executor(*a, device=device, gpu=gpu),
    )
    stages = (StageSpec("small", low=0.3, high=0.7), StageSpec("large", low=0.4, high=0.6))
    spec = CascadeSpec(stages, max_batch=8)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (21, 9, 7, 3), np.uint8))
    given = {s.name: TorchStage(m, transform) for s, m in zip(stages, modules, strict=True)}
    with Cascade(spec, given, mode="cpu") as plain, Cascade(spec, given, mode=mode) as graphed:
        wanted, results = plain(images), graphed(images)
        assert graphed.submit(images[:3]).result(timeout=60) == results[:3]
        assert graphed.report().executor.mode == mode
    assert {r.stage for r in wanted} == {"small", "large"}
    assert Status.UNDECIDED in {r.status for r in wanted}
    for result, want in zip(results, wanted, strict=True):
        assert (result.label, result.stage, result.status) == (want.label, want.stage, want.status)
        assert abs(result.probability - want.probability) < 1e-6


@needs_compiler
@pytest.mark.parametrize("mode", ["host", "device"])
def test_a_result_that_nobody_waits_for_costs_no_lane(
    gpu: Gpu, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``result(timeout)`` that runs out, and a call that is taken back while it waits its turn."""
    gate, reached = threading.Event(), threading.Event()

    def load(self: ColumnOffer, image: Any, out: Any) -> None:
        if image[0, 0, 0] == 0:
            reached.set()
            assert gate.wait(20)
        out[...] = image[0, 0, 0] / np.float32(255)

    monkeypatch.setattr(ColumnOffer, "load", load)
    monkeypatch.setattr(
        "sn72engine.cascade.cascade.make_executor",
        lambda *a, device: make_executor(*a, device=device, gpu=gpu),
    )
    given = {name: Offering(gpu.cuda) for name in ("s0", "s1")}
    pictures = {n: np.full((1, 1, 3), n, np.uint8) for n in (0, 51, 255)}
    options = GraphOptions(lanes=1)
    with Cascade(spec_of("s0", "s1"), given, mode=mode, graphs=options) as cascade:
        slow = cascade.submit([pictures[0], pictures[255]])
        assert reached.wait(20)
        queued = [cascade.submit([pictures[51]]) for _ in range(4)]  # two run side by side
        with pytest.raises(TimeoutError):
            slow.result(timeout=0.01)
        with pytest.raises(TimeoutError):
            queued[0].result(timeout=0.01)
        assert queued[-1].cancel()
        gate.set()
        wanted = [[0.0, 1.0]] + [[pytest.approx(0.2)]] * 3
        for future, probabilities in zip([slow, *queued[:-1]], wanted, strict=True):
            assert [r.probability for r in future.result(timeout=20)] == probabilities
        assert [r.status for r in cascade([pictures[51]])] == [Status.UNDECIDED]
    assert not gpu.cuda.executables


def test_a_module_in_training_mode_is_refused() -> None:
    with pytest.raises(OptionError, match="training mode"):
        TorchStage(Network(0).train(), Preprocess(height=4, width=4))


def test_a_module_on_the_cpu_offers_nothing() -> None:
    stage = TorchStage(Network(0), Preprocess(height=4, width=4))
    stage.prepare()
    assert 0 < stage.score([np.zeros((5, 5, 3), np.uint8)]).probabilities[0] < 1
    with pytest.raises(CudaUnavailableError, match="its module is on cpu, not on cuda:0"):
        stage.offer_capture(0)


class Sessions:
    """Stands for an open TensorRT engine, which needs a GPU: what a stage asks of its session."""

    bindable = True

    def __init__(self, made: list[Sessions] | None = None, target: str = "sm_90") -> None:
        tensor = SimpleNamespace(name="x"), SimpleNamespace(name="y")
        self.inputs, self.outputs = tensor[:1], tensor[1:]
        self.preprocess = Preprocess(height=4, width=4, mean=(0.0,) * 3, std=(1.0,) * 3)
        self.options = RuntimeOptions()
        self.manifest = SimpleNamespace(
            batch=ShapeRange(2, 4, 16), target=target, backend="tensorrt"
        )
        self.made = [] if made is None else made
        self.made.append(self)
        self.closed = False

    def clone(self) -> Sessions:
        return Sessions(self.made)

    def bind(self, inputs: Any) -> Any:
        (given,) = inputs.values()
        out = given.new_zeros(len(given), 1)

        class Bound:
            outputs: ClassVar = {"y": out}

            def __call__(self) -> None:
                out[:, 0] = given.mean(dim=(1, 2, 3))

        return Bound()

    def close(self) -> None:
        self.closed = True


def test_an_engine_has_a_session_per_lane() -> None:
    torch = pytest.importorskip("torch")
    session = Sessions()
    stage = EngineStage(session, "sigmoid")  # type: ignore[arg-type]
    offer = stage.offer_capture(0)
    assert offer.limits == (2, 16)
    assert (offer.rows.shape, offer.rows.dtype) == ((4, 4, 3), "uint8")
    pixels = [torch.zeros(8, 4, 4, 3, dtype=torch.uint8) for _ in range(2)]
    buffers = [TensorBuffer(one) for one in pixels]
    bounds = [offer.bind(buffers[lane], rows, lane) for lane in (0, 1) for rows in (8, 4, 2)]
    assert len(session.made) == 3  # its own, and one for each lane
    buffers[0].tensor.fill_(2)
    for bound in bounds:
        bound()
    assert len({bound.output.address for bound in bounds}) == 6
    output = bounds[1].output
    assert (output.kind, output.stride, output.from_logits, output.label) == ("f32", 1, True, None)
    scores = (ctypes.c_float * 4).from_address(output.address)
    assert list(scores) == [2.0] * 4
    lanes = [weakref.ref(one) for one in session.made[1:]]
    del session.made[1:]
    assert all(lane() is not None for lane in lanes)
    del offer, bounds, bound  # a cascade that is not captured after all keeps nothing
    gc.collect()
    assert all(lane() is None for lane in lanes)
    assert not session.closed
    stage.close()
    assert session.closed


def test_an_engine_of_a_backend_that_cannot_be_captured_offers_nothing() -> None:
    session = Sessions()
    session.bindable, session.manifest.backend = False, "onnxruntime"
    stage = EngineStage(session, "sigmoid")  # type: ignore[arg-type]
    with pytest.raises(CudaUnavailableError, match="engines of onnxruntime cannot be captured"):
        stage.offer_capture(0)


def test_an_engine_that_does_not_run_there_offers_nothing() -> None:
    for session, device, where in (
        (Sessions(target="cpu"), 0, "the CPU"),
        (Sessions(), 1, "cuda:0"),
    ):
        stage = EngineStage(session, "sigmoid")  # type: ignore[arg-type]
        with pytest.raises(CudaUnavailableError, match=f"its engine runs on {where}, not on cuda:"):
            stage.offer_capture(device)


@pytest.mark.parametrize("fit", ["center_crop", "squash", "pad"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_rows_become_what_preprocessing_makes_to_the_bit(fit: Any, dtype: Any, layout: Any) -> None:
    pytest.importorskip("torch")
    transform = Preprocess(height=12, width=10, fit=fit, dtype=dtype, layout=layout)
    rng = np.random.default_rng(6)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((30, 20), (9, 40), (12, 10))]
    seen: list[Any] = []

    def bind(rows: Any, lane: int) -> Any:
        seen.append(rows)
        return lambda: rows.reshape(len(rows), -1)[:, 0]

    offer = TensorOffer(bind, transform, "sigmoid", positive=1, device="cpu", limits=(1, 9))
    assert offer.rows.dtype == (dtype if fit == "pad" else "uint8")
    buffer = offer.allocate(5)
    for image, row in zip(images, buffer.tensor.numpy(), strict=False):
        offer.load(image, row)
    for rows in (5, 3):
        offer.bind(buffer, rows, 0)()
    wanted = preprocess(images, transform)
    for rows_seen in seen:
        np.testing.assert_array_equal(rows_seen.numpy()[:3], wanted)
