"""The driver interface over ``cuda.bindings``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sn72engine import _deps
from sn72engine.cuda.api import NodeKind
from sn72engine.cuda.driver import driver_available
from sn72engine.cuda.kernels import Kernels, load_kernels
from sn72engine.cuda.layout import Launch
from sn72engine.errors import CudaUnavailableError, MissingDependencyError

#: Older drivers that know SWITCH nodes have had faults in them.
_SWITCH_VERSION = (13, 0)

_KINDS = {
    "KERNEL": NodeKind.KERNEL,
    "MEMCPY": NodeKind.COPY,
    "MEMSET": NodeKind.SET,
    "HOST": NodeKind.HOST,
    "GRAPH": NodeKind.CHILD,
    "EMPTY": NodeKind.EMPTY,
    "WAIT_EVENT": NodeKind.WAIT_EVENT,
    "EVENT_RECORD": NodeKind.RECORD_EVENT,
    "MEM_ALLOC": NodeKind.ALLOCATE,
    "MEM_FREE": NodeKind.FREE,
    "CONDITIONAL": NodeKind.CONDITIONAL,
}


def open_driver(device: int = 0) -> CudaDriver:
    """The driver for one GPU, with the kernels loaded; the thread's current GPU stays that.

    Raises:
        CudaUnavailableError: there is no usable driver, GPU or kernels; says which and why.
    """
    found = driver_available()  # before anything of cuda.bindings, parts of which may hang
    if not found.ok:
        raise CudaUnavailableError(found.reason)
    assert found.version is not None  # an available driver has one
    with _same_context():
        return CudaDriver(load_kernels(device), found.version)


@contextmanager
def _same_context() -> Iterator[None]:
    """Afterwards the thread's context is what it was before, which may be none."""
    try:
        cuda: Any = _deps.require("cuda.bindings", purpose="drive CUDA graphs", submodule="driver")
    except MissingDependencyError as error:
        raise CudaUnavailableError(str(error)) from error
    status, context = cuda.cuCtxGetCurrent()
    if int(status) != 0:
        raise CudaUnavailableError(f"cuCtxGetCurrent failed with {status!r}")
    try:
        yield
    finally:
        cuda.cuCtxSetCurrent(context)


class CudaDriver:
    """:class:`~sn72engine.cuda.api.Driver` on the GPU whose context is current now.

    Args:
        kernels: loaded on that GPU.
        version: newest CUDA version that the installed driver serves.
    """

    def __init__(self, kernels: Kernels, version: tuple[int, int]) -> None:
        cuda = _deps.require("cuda.bindings", purpose="drive CUDA graphs", submodule="driver")
        self._cuda: Any = cuda
        self._kernels = kernels
        self._version = version
        (self._context,) = self._call("cuCtxGetCurrent")

    @property
    def switch_nodes(self) -> bool:
        """Whether SWITCH nodes can be relied upon."""
        return self._version >= _SWITCH_VERSION

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU's context current on this thread, above the one that is."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def allocate(self, size: int) -> int:
        """Device memory."""
        return self._one("cuMemAlloc", size)

    def free(self, address: int) -> None:
        """Release device memory."""
        self._call("cuMemFree", self._cuda.CUdeviceptr(address))

    def allocate_host(self, size: int) -> int:
        """Pinned memory that every context can use, mapped into the device's address space."""
        flags = self._cuda.CU_MEMHOSTALLOC_PORTABLE | self._cuda.CU_MEMHOSTALLOC_DEVICEMAP
        return self._one("cuMemHostAlloc", size, flags)

    def free_host(self, address: int) -> None:
        """Release pinned memory."""
        self._call("cuMemFreeHost", address)

    def new_stream(self) -> int:
        """A non-blocking stream."""
        return self._one("cuStreamCreate", int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        """Release a stream."""
        self._call("cuStreamDestroy", self._cuda.CUstream(stream))

    def new_event(self) -> int:
        """An event on which waiting spins: waking a sleeping thread takes longer than a stage."""
        return self._one("cuEventCreate", int(self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def destroy_event(self, event: int) -> None:
        """Release an event."""
        self._call("cuEventDestroy", self._cuda.CUevent(event))

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Asynchronous copy; the driver sees from the addresses which way it goes."""
        cuda = self._cuda
        self._call(
            "cuMemcpyAsync",
            cuda.CUdeviceptr(target),
            cuda.CUdeviceptr(source),
            size,
            cuda.CUstream(stream),
        )

    def launch_graph(self, executable: int, stream: int) -> None:
        """Launch an executable graph."""
        cuda = self._cuda
        self._call("cuGraphLaunch", cuda.CUgraphExec(executable), cuda.CUstream(stream))

    def record(self, event: int, stream: int) -> None:
        """Record an event."""
        self._call("cuEventRecord", self._cuda.CUevent(event), self._cuda.CUstream(stream))

    def wait(self, event: int) -> None:
        """Wait for an event; other Python threads run meanwhile."""
        self._call("cuEventSynchronize", self._cuda.CUevent(event))

    def new_graph(self) -> int:
        """An empty graph."""
        return self._one("cuGraphCreate", 0)

    def destroy_graph(self, graph: int) -> None:
        """Release a graph."""
        self._call("cuGraphDestroy", self._cuda.CUgraph(graph))

    def new_condition(self, graph: int, default: int) -> int:
        """A conditional handle that each launch resets to ``default``."""
        flags = self._cuda.CU_GRAPH_COND_ASSIGN_DEFAULT
        return self._one(
            "cuGraphConditionalHandleCreate",
            self._cuda.CUgraph(graph),
            self._context,
            default,
            flags,
        )

    def add_kernel(self, graph: int, after: Sequence[int], launch: Launch) -> int:
        """A kernel node; the driver copies the arguments before it returns."""
        cuda = self._cuda
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(launch.args))
        node = cuda.CUDA_KERNEL_NODE_PARAMS()
        node.kern, node.ctx = cuda.CUkernel(self._kernels.handles[launch.kernel]), self._context
        node.gridDimX, node.gridDimY, node.gridDimZ = launch.grid
        node.blockDimX, node.blockDimY, node.blockDimZ = launch.block
        node.kernelParams = ctypes.addressof(pointers)
        return self._add("cuGraphAddKernelNode", graph, after, node)

    def add_copy(
        self, graph: int, after: Sequence[int], target: int, source: int, size: int
    ) -> int:
        """A copy node between unified addresses: pinned memory has one, as device memory has."""
        cuda = self._cuda
        node = cuda.CUDA_MEMCPY3D()
        node.srcMemoryType = node.dstMemoryType = cuda.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        node.srcDevice, node.dstDevice = cuda.CUdeviceptr(source), cuda.CUdeviceptr(target)
        node.WidthInBytes, node.Height, node.Depth = size, 1, 1
        node.srcPitch = node.dstPitch = size
        node.srcHeight = node.dstHeight = 1
        return self._add("cuGraphAddMemcpyNode", graph, after, node, self._context)

    def add_child(self, graph: int, after: Sequence[int], child: int) -> int:
        """A child graph node, which holds a clone of ``child``."""
        return self._add("cuGraphAddChildGraphNode", graph, after, self._cuda.CUgraph(child))

    def add_switch(
        self, graph: int, after: Sequence[int], condition: int, bodies: int
    ) -> tuple[int, tuple[int, ...]]:
        """A SWITCH node and its bodies."""
        kind = self._cuda.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH
        return self._add_conditional(graph, after, condition, kind, bodies)

    def add_if(self, graph: int, after: Sequence[int], condition: int) -> tuple[int, int]:
        """An IF node and its body."""
        kind = self._cuda.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        node, (body,) = self._add_conditional(graph, after, condition, kind, 1)
        return node, body

    def nodes(self, graph: int) -> list[tuple[NodeKind, int | None]]:
        """Kinds of the nodes, and what child graph nodes hold."""
        _, count = self._call("cuGraphGetNodes", self._cuda.CUgraph(graph), 0)
        if not count:
            return []
        nodes, count = self._call("cuGraphGetNodes", self._cuda.CUgraph(graph), count)
        return [self._described(node) for node in nodes[:count]]

    def instantiate(self, graph: int, stream: int) -> int:
        """Instantiate and upload, so that the first launch costs what later ones do."""
        cuda = self._cuda
        executable = self._one("cuGraphInstantiate", cuda.CUgraph(graph), 0)
        self._call("cuGraphUpload", cuda.CUgraphExec(executable), cuda.CUstream(stream))
        return executable

    def destroy_executable(self, executable: int) -> None:
        """Release an executable."""
        self._call("cuGraphExecDestroy", self._cuda.CUgraphExec(executable))

    def _described(self, node: Any) -> tuple[NodeKind, int | None]:
        (kind,) = self._call("cuGraphNodeGetType", node)
        name = getattr(kind, "name", str(kind)).removeprefix("CU_GRAPH_NODE_TYPE_")
        if name != "GRAPH":
            return _KINDS.get(name, NodeKind.OTHER), None
        return NodeKind.CHILD, self._one("cuGraphChildGraphNodeGetGraph", node)

    def _add_conditional(
        self, graph: int, after: Sequence[int], condition: int, kind: Any, bodies: int
    ) -> tuple[int, tuple[int, ...]]:
        cuda = self._cuda
        node = cuda.CUgraphNodeParams()
        node.type = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle = cuda.CUgraphConditionalHandle(condition)
        node.conditional.type = kind
        node.conditional.size = bodies
        node.conditional.ctx = self._context
        before = [cuda.CUgraphNode(one) for one in after]
        # Bindings of CUDA 12 have this function under a name of its own, and leave no edge out.
        edges = [cuda.CUgraphEdgeData() for _ in after]
        name = "cuGraphAddNode_v2" if hasattr(cuda, "cuGraphAddNode_v2") else "cuGraphAddNode"
        added = self._one(name, cuda.CUgraph(graph), before, edges, len(before), node)
        # Only now: reading them from a node that has not been added crashes the process.
        graphs = tuple(int(body) for body in node.conditional.phGraph_out[:bodies])
        return added, graphs

    def _add(self, function: str, graph: int, after: Sequence[int], *what: Any) -> int:
        before = [self._cuda.CUgraphNode(node) for node in after]
        return self._one(function, self._cuda.CUgraph(graph), before, len(before), *what)

    def _one(self, function: str, *arguments: Any) -> int:
        (value,) = self._call(function, *arguments)
        return int(value)

    def _call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        status, *values = getattr(self._cuda, function)(*arguments)
        if int(status) != 0:
            raise CudaUnavailableError(f"{function} failed with {status!r}")
        return tuple(values)
