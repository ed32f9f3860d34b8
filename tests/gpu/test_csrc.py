"""The compiled kernels on a GPU: against the CPU executor's definitions, and inside a graph."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from sn72engine import _deps
from sn72engine.cascade.route import ESCALATE, compact, route
from sn72engine.cuda import kernels, layout
from sn72engine.cuda.driver import driver_available
from sn72engine.errors import MissingDependencyError

pytestmark = pytest.mark.gpu

CAPACITY = 1500


@pytest.fixture(scope="module")
def loaded() -> kernels.Kernels:
    found = driver_available()
    if not found.ok:
        pytest.skip(found.reason)
    try:
        for module in ("cuda.core", "cuda.bindings"):
            _deps.require(module, purpose="run the kernels")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    torch.cuda.init()
    return kernels.load_kernels()


class Lane:
    """Buffers of one batch on the device, by way of PyTorch."""

    def __init__(self, batch: int, capacity: int = CAPACITY) -> None:
        import torch

        def zeros(count: int, dtype: Any) -> Any:
            return torch.zeros(count, dtype=dtype, device="cuda")

        self.capacity = capacity
        self.samples = zeros(capacity * layout.SAMPLE.itemsize, torch.uint8)
        self.scored = zeros(capacity, torch.uint8)
        self.score = zeros(capacity, torch.float32)
        self.start = zeros(1, torch.int64)
        self.batch = torch.tensor([batch], dtype=torch.int32, device="cuda")
        self.index = torch.full((capacity,), -1, dtype=torch.int32, device="cuda")
        self.control = zeros(layout.CONTROL.itemsize, torch.uint8)

    def begin(self) -> layout.Launch:
        return layout.begin(
            layout.BeginArgs(
                samples=self.samples.data_ptr(),
                scored=self.scored.data_ptr(),
                start_ns=self.start.data_ptr(),
                capacity=self.capacity,
            )
        )

    def route_args(self, score: Any, low: Any, high: Any, buckets: list[int]) -> layout.RouteArgs:
        args = layout.RouteArgs(
            samples=self.samples.data_ptr(),
            score=score.data_ptr(),
            low=low.data_ptr(),
            high=high.data_ptr(),
            start_ns=self.start.data_ptr(),
            batch=self.batch.data_ptr(),
            index=self.index.data_ptr(),
            control=self.control.data_ptr(),
            score_stride=1,
            weight=1.0,
            threshold_stride=int(low.numel() > 1),
            capacity=self.capacity,
            bucket_count=len(buckets),
        )
        args.buckets[: len(buckets)] = buckets
        return args

    def answers(self) -> Any:
        return self.samples.cpu().numpy().view(layout.SAMPLE)

    def decided(self) -> Any:
        return self.control.cpu().numpy().view(layout.CONTROL)[0]


def stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("batch", [0, 1, 33, 1024, 1025, CAPACITY])
def test_routes_equal_the_numpy_definition(loaded: kernels.Kernels, kind: str, batch: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(batch)
    low = torch.rand(CAPACITY, generator=generator) * 0.6
    high = low + torch.rand(CAPACITY, generator=generator) * 0.4
    score = torch.rand(CAPACITY, generator=generator)
    score[::7] = low[::7]
    score[1::11] = float("nan")
    score[2::13] = float("inf")
    low[::17] = float("nan")
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    given = score.to(dtype)
    lane = Lane(batch)
    on_device = [x.cuda() for x in (given, low, high)]
    loaded.launch(lane.begin(), stream())
    args = lane.route_args(*on_device, [100, 700, CAPACITY])
    loaded.launch(layout.route(args, kind), stream())
    torch.cuda.synchronize()
    wanted = route(given.float().numpy()[:batch], low.numpy()[:batch], high.numpy()[:batch])
    np.testing.assert_array_equal(lane.answers()["route"][:batch], wanted)
    escalated = compact(wanted)
    decided = lane.decided()
    index = lane.index.cpu().numpy()
    assert decided["count"] == len(escalated)
    np.testing.assert_array_equal(index[: len(escalated)], escalated)
    assert (index[len(escalated) : decided["rows"]] == 0).all()
    assert (index[decided["rows"] :] == -1).all()


def test_logits_are_within_four_steps(loaded: kernels.Kernels) -> None:
    import torch

    logits = torch.linspace(-110, 110, CAPACITY)
    half = torch.tensor([0.5], device="cuda")
    lane = Lane(CAPACITY)
    args = lane.route_args(logits.cuda(), half, half, [CAPACITY])
    args.flags = int(layout.Flag.FROM_LOGITS)
    on_device = logits.cuda()
    args.score = on_device.data_ptr()
    loaded.launch(lane.begin(), stream())
    loaded.launch(layout.route(args, "f32"), stream())
    torch.cuda.synchronize()
    truth = torch.sigmoid(logits.double()).numpy()
    step = np.spacing(truth.astype(np.float32)).astype(np.float64)
    assert (np.abs(lane.answers()["probability"] - truth) <= 4 * step).all()


@pytest.mark.parametrize("unit", [1, 2, 4, 16])
def test_gather_copies_rows_of_any_alignment(loaded: kernels.Kernels, unit: int) -> None:
    import torch

    source = torch.randint(0, 256, (50, unit * 37), dtype=torch.uint8, device="cuda")
    index = torch.randint(0, 50, (20,), dtype=torch.int32, device="cuda")
    target = torch.zeros((20, unit * 37), dtype=torch.uint8, device="cuda")
    args = layout.GatherArgs(
        source=source.data_ptr(),
        target=target.data_ptr(),
        index=index.data_ptr(),
        row_bytes=source.shape[1],
        source_stride=source.stride(0),
        target_stride=target.stride(0),
        rows=20,
    )
    loaded.launch(layout.gather(args), stream())
    torch.cuda.synchronize()
    assert torch.equal(target, source[index.long()])


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_scatter_leaves_padding_alone(loaded: kernels.Kernels, kind: str) -> None:
    import torch

    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    lane = Lane(100, 100)
    index = torch.tensor([3, 50, 99, 0, 0], dtype=torch.int32, device="cuda")
    score = torch.tensor([0.25, 0.5, 0.75, 9, 9], dtype=dtype, device="cuda")
    count = torch.tensor([3], dtype=torch.int32, device="cuda")
    args = layout.ScatterArgs(
        score=score.data_ptr(),
        index=index.data_ptr(),
        count=count.data_ptr(),
        out=lane.score.data_ptr(),
        scored=lane.scored.data_ptr(),
        score_stride=1,
        stage=2,
    )
    loaded.launch(layout.scatter(args, kind, 5), stream())
    torch.cuda.synchronize()
    wanted = torch.zeros(100)
    wanted[[3, 50, 99]] = torch.tensor([0.25, 0.5, 0.75])
    assert torch.equal(lane.score.cpu(), wanted)
    assert torch.equal(lane.scored.cpu(), (wanted > 0).to(torch.uint8) * 2)


@pytest.mark.parametrize(("budget_ns", "late"), [(0, True), (60 * 10**9, False)])
def test_late_samples_stop(loaded: kernels.Kernels, budget_ns: int, late: bool) -> None:
    import torch

    lane = Lane(64, 64)
    unsure = torch.full((64,), 0.5, device="cuda")
    low, high = (torch.tensor([x], device="cuda") for x in (0.1, 0.9))
    budget = torch.tensor([budget_ns], dtype=torch.int64, device="cuda")
    args = lane.route_args(unsure, low, high, [64])
    args.budget_ns = budget.data_ptr()
    loaded.launch(lane.begin(), stream())
    loaded.launch(layout.route(args, "f32"), stream())
    torch.cuda.synchronize()
    code = layout.Code.DEADLINE if late else layout.Code.UNDECIDED
    assert (lane.answers()["status"] == code).all()
    assert lane.decided()["count"] == (0 if late else 64)


@pytest.mark.parametrize("escalated", [0, 1, 8, 9, 64])
def test_the_condition_selects_the_body_of_a_switch_node(
    loaded: kernels.Kernels, escalated: int
) -> None:
    """Each body writes its own number; body ``b`` runs for the bucket ``b``, or none."""
    found = driver_available()
    if found.version is None or found.version < (12, 8):
        pytest.skip(f"SWITCH nodes need a driver for CUDA 12.8, this one serves {found.version}")
    import torch

    driver = _deps.require("cuda.bindings", purpose="build a graph", submodule="driver")

    def done(answer: tuple[Any, ...]) -> Any:
        assert int(answer[0]) == 0, answer[0]
        return answer[1] if len(answer) == 2 else answer[1:]

    buckets = [8, 32, 64]
    lane = Lane(64, 64)
    score = torch.zeros(64, device="cuda")
    score[:escalated] = 0.5
    low, high = (torch.tensor([x], device="cuda") for x in (0.1, 0.9))
    ran = torch.zeros(1, dtype=torch.uint8, device="cuda")
    loaded.launch(lane.begin(), stream())
    torch.cuda.synchronize()

    context = done(driver.cuCtxGetCurrent())
    graph = done(driver.cuGraphCreate(0))
    handle = done(driver.cuGraphConditionalHandleCreate(graph, context, len(buckets), 0))
    args = lane.route_args(score, low, high, buckets)
    args.flags, args.condition = int(layout.Flag.SET_CONDITION), int(handle)
    launch = layout.route(args, "f32")
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.args))
    node = driver.CUDA_KERNEL_NODE_PARAMS()
    node.kern, node.ctx = driver.CUkernel(loaded.handles[launch.kernel]), context
    node.gridDimX, node.gridDimY, node.gridDimZ = launch.grid
    node.blockDimX, node.blockDimY, node.blockDimZ = launch.block
    node.kernelParams = ctypes.addressof(pointers)
    routed = done(driver.cuGraphAddKernelNode(graph, None, 0, node))
    switch = driver.CUgraphNodeParams()
    switch.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    switch.conditional.handle = handle
    switch.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH
    switch.conditional.size = len(buckets)
    switch.conditional.ctx = context
    done(driver.cuGraphAddNode(graph, [routed], None, 1, switch))
    for number, body in enumerate(switch.conditional.phGraph_out, 1):
        write = driver.CUDA_MEMSET_NODE_PARAMS()
        write.dst = driver.CUdeviceptr(ran.data_ptr())
        write.elementSize, write.value, write.width, write.height = 1, number, 1, 1
        done(driver.cuGraphAddMemsetNode(body, None, 0, write, context))
    executable = done(driver.cuGraphInstantiate(graph, 0))
    try:
        done((*driver.cuGraphLaunch(executable, driver.CUstream(stream())), None))
        torch.cuda.synchronize()
    finally:
        driver.cuGraphExecDestroy(executable)
        driver.cuGraphDestroy(graph)
    fits = [number for number, size in enumerate(buckets, 1) if size >= escalated]
    assert int(ran.item()) == (fits[0] if escalated else 0)
    assert int((lane.answers()["route"] == ESCALATE).sum()) == escalated
