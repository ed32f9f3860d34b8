"""Captured CUDA graphs, one for each stage, number of rows and lane.

What a capture must keep to, and where it is seen to:

- The work runs twice before it is captured, so that libraries have been initialised, kernels
  compiled and algorithms chosen (:meth:`GraphStore.capture`).
- One capture at a time in a process: another thread's allocations may break one
  (:meth:`GraphStore.capture`).
- Graphs of one stage and lane share a memory pool, because a sample batch uses one of them at a
  time. Nothing else shares one (:meth:`GraphStore.capture`).
- cuBLAS keeps a workspace for each stream. Graphs of two lanes would write to the same one at the
  same time, so each capture gets its own, from its pool (:class:`TorchCapturer`).
- PyTorch's ``cudaMallocAsync`` backend would put allocation nodes into the graph; it is refused
  (:class:`TorchCapturer`).
- What cannot stand in the body of a conditional node is counted (:attr:`Captured.forbidden`).
- The graph's owner is kept: when PyTorch's object goes, so does its memory pool
  (:class:`GraphStore`).
- A capture that fails must leave nothing behind: the process goes on without it
  (:class:`TorchCapturer`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sn72engine.cuda.api import Driver, NodeKind, forbidden_nodes
from sn72engine.errors import CudaUnavailableError

#: Calls before a capture.
_WARMUP = 2

_capturing = threading.Lock()


class Capturer(Protocol):
    """Records work that is put on a stream as a graph."""

    def new_pool(self) -> Any:
        """A memory pool that captures may share, if only one of their graphs runs at a time."""
        ...

    def run(self, call: Callable[[], None]) -> None:
        """Do the work on the stream that captures use, and wait for it."""
        ...

    def capture(self, call: Callable[[], None], pool: Any) -> tuple[int, Any]:
        """Record the work. Returns the graph and the object that owns it and its memory."""
        ...

    def reserved_bytes(self) -> int:
        """Device memory held now, for the difference that a capture makes."""
        ...


@dataclass(frozen=True, slots=True)
class Captured:
    """One captured graph.

    Attributes:
        stage, rows, lane: what was captured.
        graph: to be embedded in others.
        bytes: device memory that this capture added to its pool.
        nodes: number of nodes.
        forbidden: kinds of nodes that may not stand in a conditional body, with their numbers.
        owner: keeps the graph and its memory.
    """

    stage: str
    rows: int
    lane: int
    graph: int
    bytes: int
    nodes: int
    forbidden: dict[NodeKind, int]
    owner: Any


class GraphStore:
    """Captures graphs and keeps them as long as they are in use.

    Args:
        driver: of the GPU.
        capturer: of the library that the stages are written in.
    """

    def __init__(self, driver: Driver, capturer: Capturer) -> None:
        self._driver = driver
        self._capturer = capturer
        self._pools: dict[tuple[str, int], Any] = {}
        self._graphs: dict[tuple[str, int, int], Captured] = {}

    @property
    def graphs(self) -> tuple[Captured, ...]:
        """What has been captured, in order."""
        return tuple(self._graphs.values())

    def capture(self, stage: str, rows: int, lane: int, call: Callable[[], None]) -> Captured:
        """Warm up and capture. Largest number of rows first: smaller ones then fit its pool.

        Raises:
            CudaUnavailableError: it cannot be captured; the message names the stage and the cause.
        """
        pool = self._pools.get((stage, lane))
        if pool is None:
            pool = self._pools[stage, lane] = self._capturer.new_pool()
        with _capturing:
            try:
                for _ in range(_WARMUP):
                    self._capturer.run(call)
                before = self._capturer.reserved_bytes()
                graph, owner = self._capturer.capture(call, pool)
                grown = self._capturer.reserved_bytes() - before
            except Exception as error:  # whatever the stage's library raises
                raise CudaUnavailableError(
                    f"stage {stage!r} cannot be captured with {rows} rows: "
                    f"{type(error).__name__}: {error}"
                ) from error
        captured = Captured(
            stage,
            rows,
            lane,
            graph,
            max(grown, 0),
            len(self._driver.nodes(graph)),
            forbidden_nodes(self._driver, graph),
            owner,
        )
        self._graphs[stage, rows, lane] = captured
        return captured

    def objection(self) -> str:
        """Why the graphs cannot stand in the bodies of conditional nodes; empty if they can."""
        for captured in self._graphs.values():
            if captured.forbidden:
                kinds = ", ".join(f"{n} {kind.value}" for kind, n in captured.forbidden.items())
                return (
                    f"the graph of stage {captured.stage!r} with {captured.rows} rows holds "
                    f"{kinds}, which a conditional body may not"
                )
            if not captured.nodes:
                return (
                    f"the graph of stage {captured.stage!r} with {captured.rows} rows is empty: "
                    "its work went to another stream"
                )
        return ""

    def bytes_by_bucket(self) -> dict[tuple[str, int], int]:
        """Device memory that the captures added, all lanes together, by stage and rows."""
        total: dict[tuple[str, int], int] = {}
        for captured in self._graphs.values():
            key = captured.stage, captured.rows
            total[key] = total.get(key, 0) + captured.bytes
        return total

    def close(self) -> None:
        """Let go of the graphs and their memory. Nothing made from them may be run any more."""
        self._graphs.clear()
        self._pools.clear()


class TorchCapturer:
    """Captures what PyTorch, and whatever uses PyTorch's current stream, does on one GPU.

    Args:
        device: number of the GPU.

    Raises:
        CudaUnavailableError: this PyTorch has no CUDA, sees no such GPU, or its allocator cannot be
            captured.
    """

    def __init__(self, device: int) -> None:
        import torch

        if not torch.cuda.is_available():
            raise CudaUnavailableError(f"torch {torch.__version__} sees no CUDA device")
        count = torch.cuda.device_count()
        if not 0 <= device < count:
            raise CudaUnavailableError(f"device={device} is not one of the {count} GPUs of torch")
        backend = torch.cuda.get_allocator_backend()
        if backend != "native":
            raise CudaUnavailableError(
                f"PyTorch's allocator is {backend!r}, which puts allocations into captured graphs; "
                "unset backend in PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF"
            )
        self._torch: Any = torch
        self._device = torch.device("cuda", device)
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def new_pool(self) -> Any:
        """A handle for graphs that never run at the same time."""
        return self._torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], None]) -> None:
        """Run on the capture stream, after the work of the stream that is current now."""
        torch = self._torch
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream), torch.inference_mode():
                call()
            self._stream.synchronize()

    def capture(self, call: Callable[[], None], pool: Any) -> tuple[int, Any]:
        """Record on the capture stream; only this thread's unsafe calls break the capture."""
        torch = self._torch
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # Before: so that a workspace is allocated while capturing. After: so that nobody else uses
        # it once it belongs to the graph.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Inference mode inside: what PyTorch makes for the graph itself is no inference tensor.
            with self._recording(graph, pool), torch.inference_mode():
                call()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return int(graph.raw_cuda_graph()), graph

    def reserved_bytes(self) -> int:
        """What the caching allocator holds on this GPU, without what it could give back."""
        # Those of the warm-up: left, they would hide the ones that the capture allocates.
        self._torch._C._cuda_clearCublasWorkspaces()
        self._torch.cuda.empty_cache()
        return int(self._torch.cuda.memory_reserved(self._device))

    @contextlib.contextmanager
    def _recording(self, graph: Any, pool: Any) -> Iterator[None]:
        """Capture what is done in the ``with`` block.

        Ending a capture that was broken is an error too. It must not take the place of the one that
        says why, nor leave this thread on the capture stream or the allocator in the capture.
        """
        cuda = self._torch.cuda
        cause: BaseException | None = None
        try:
            with (
                cuda.device(self._device),
                cuda.stream(self._stream),  # gives back the thread's own where PyTorch does not
                cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    yield
                except BaseException as error:
                    cause = error
                    raise
        except BaseException:
            # Older releases of PyTorch leave it so for good: memory that a second stream has used
            # is never used again, and emptying the cache is an internal error.
            with contextlib.suppress(RuntimeError):  # it has been ended
                self._torch._C._cuda_endAllocateToPool(self._device.index, pool)
            if cause is not None:
                raise cause from None
            raise
