"""What the capturer asks of PyTorch, and what it leaves behind when a capture fails.

PyTorch's CUDA part is a stand-in here, whose captures fail the way the real ones do: when what was
recorded broke the capture, ending it is an error, after which PyTorch's own context manager leaves
its stream current and its allocator in the capture. tests/gpu has the real one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sn72engine.errors import CudaUnavailableError, SessionError
from sn72engine.graphs import GraphStore, TorchCapturer

torch = pytest.importorskip("torch")

POOL = (0, 7)


class Cuda:
    """The parts of ``torch.cuda`` and ``torch._C`` that are called."""

    def __init__(self) -> None:
        self.current = "callers"
        self.workspaces = 0
        self.memory = 100
        self.recording: Any = None
        self.broken = False
        self.inference = False

    def matmul(self) -> None:
        """What a stage does: it takes a cuBLAS workspace where its stream has none."""
        if not self.workspaces:
            self.workspaces = 32
            self.memory += 32

    def clear_workspaces(self) -> None:
        # A workspace that was allocated while capturing belongs to the graph's pool.
        if self.recording is None and not self.captured:
            self.memory -= self.workspaces
        self.workspaces = 0

    captured = False

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(
        self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.inference = torch.is_inference_mode_enabled()
        before, self.current = self.current, stream
        self.recording = pool
        try:
            yield
        finally:
            if self.broken:
                raise RuntimeError("CUDA error: operation failed due to a previous error")
            self.recording, self.current, self.captured = None, before, True

    def end_allocation(self, device: int, pool: Any) -> None:
        assert device == 0
        if self.recording != pool:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording = None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_allocator_backend": lambda: "native",
        "Stream": lambda device: stream,
        "current_stream": lambda device: cuda.current,
        "CUDAGraph": lambda keep_graph: SimpleNamespace(raw_cuda_graph=lambda: 42),
        "device": lambda device: contextlib.nullcontext(),
        "stream": cuda.stream,
        "graph": cuda.graph,
        "graph_pool_handle": lambda: POOL,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: cuda.memory,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {
        "_cuda_clearCublasWorkspaces": cuda.clear_workspaces,
        "_cuda_endAllocateToPool": cuda.end_allocation,
    }.items():
        monkeypatch.setattr(torch._C, name, value, raising=False)
    return cuda


def test_a_capture_of_what_runs_in_inference_mode(cuda: Cuda) -> None:
    seen: list[tuple[bool, Any]] = []
    capturer = TorchCapturer(0)

    def call() -> None:
        seen.append((torch.is_inference_mode_enabled(), cuda.recording))

    capturer.run(call)
    graph, _ = capturer.capture(call, capturer.new_pool())
    assert graph == 42
    assert seen == [(True, None), (True, POOL)]
    assert not cuda.inference
    assert cuda.current == "callers"


def test_the_workspace_of_the_graph_is_counted(cuda: Cuda) -> None:
    """The warm-up has one of its own, which is given back before memory is counted."""
    driver = SimpleNamespace(nodes=lambda graph: [])
    store = GraphStore(driver, TorchCapturer(0))  # type: ignore[arg-type]
    assert store.capture("large", 8, 0, cuda.matmul).bytes == 32


@pytest.mark.parametrize("ended", [True, False])
def test_a_capture_that_fails_says_why_and_leaves_nothing_behind(cuda: Cuda, ended: bool) -> None:
    capturer = TorchCapturer(0)

    def call() -> None:
        cuda.matmul()
        if cuda.recording is not None:
            cuda.broken = not ended
            raise SessionError("waits for the device")

    store = GraphStore(None, capturer)  # type: ignore[arg-type]
    with pytest.raises(
        CudaUnavailableError, match=r"'large' cannot be captured with 8 rows: .*waits for the dev"
    ):
        store.capture("large", 8, 0, call)
    assert cuda.current == "callers"
    assert cuda.recording is None
    assert not cuda.workspaces, "one of the failed graph's pool would be used by what comes next"
    assert not store.graphs


def test_a_capture_that_only_shows_at_its_end_that_it_is_broken(cuda: Cuda) -> None:
    capturer = TorchCapturer(0)
    cuda.broken = True
    with pytest.raises(RuntimeError, match="due to a previous error"):
        capturer.capture(lambda: None, POOL)
    assert cuda.current == "callers"
    assert cuda.recording is None


def test_a_gpu_that_is_not_there_is_said(cuda: Cuda) -> None:
    for device in (1, -1):
        with pytest.raises(
            CudaUnavailableError, match=rf"device={device} is not one of the 1 GPUs"
        ):
            TorchCapturer(device)


def test_pytorch_without_cuda_captures_nothing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this PyTorch sees a GPU")
    with pytest.raises(CudaUnavailableError, match="sees no CUDA device"):
        TorchCapturer(0)


def test_an_allocator_that_allocates_in_graphs_is_refused(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    with pytest.raises(CudaUnavailableError, match="'cudaMallocAsync', which puts allocations"):
        TorchCapturer(0)


def test_pytorch_has_the_names_that_we_call() -> None:
    graph = torch.cuda.CUDAGraph
    assert "keep_graph" in inspect.signature(graph.__new__).parameters
    assert callable(graph.raw_cuda_graph)
    capture = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"pool", "stream", "capture_error_mode"} <= set(capture)
    for name in ("graph_pool_handle", "memory_reserved", "empty_cache", "get_allocator_backend"):
        assert callable(getattr(torch.cuda, name))
    declared = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    for signature in (
        "def _cuda_clearCublasWorkspaces() -> None",
        "def _cuda_endAllocateToPool(device: _int, mempool_id: tuple[_int, _int]) -> None",
        "def raw_cuda_graph(self) -> _int",
    ):
        assert signature in declared
