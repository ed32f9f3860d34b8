"""All that the cascade asks of the CUDA driver, as one narrow interface.

:class:`~sn72engine.cuda.bindings.CudaDriver` answers it with ``cuda.bindings``. The tests answer it
with a simulated driver, which records each graph and executes it on host memory with the kernels
of ``csrc/`` compiled by g++.

Handles and addresses are ints. Work on one stream is done in order; the host learns that it is
done from an event.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol

from sn72engine.cuda.layout import Launch


class NodeKind(enum.Enum):
    """What a graph node does."""

    KERNEL = "kernel"
    COPY = "memcpy"
    SET = "memset"
    CHILD = "child graph"
    EMPTY = "empty"
    CONDITIONAL = "conditional"
    HOST = "host function"
    WAIT_EVENT = "event wait"
    RECORD_EVENT = "event record"
    ALLOCATE = "memory allocation"
    FREE = "memory free"
    OTHER = "other"


#: What the body of a conditional node may hold, at any depth, by the CUDA driver API's rules.
ALLOWED_IN_BODIES: Final = frozenset(
    {
        NodeKind.KERNEL,
        NodeKind.EMPTY,
        NodeKind.COPY,
        NodeKind.SET,
        NodeKind.CHILD,
        NodeKind.CONDITIONAL,
    }
)


class Driver(Protocol):
    """One GPU. Every method raises CudaUnavailableError when the driver reports failure."""

    @property
    def switch_nodes(self) -> bool:
        """Whether SWITCH nodes can be relied upon; else a chain of IF nodes takes their place."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make the GPU current on the calling thread; afterwards it is the one that was before.

        Everything else, but for properties, is called within.
        """
        ...

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes on the device, aligned to 256."""
        ...

    def free(self, address: int) -> None:
        """Release what :meth:`allocate` gave."""
        ...

    def allocate_host(self, size: int) -> int:
        """Address of ``size`` bytes of pinned host memory, which the device can reach too."""
        ...

    def free_host(self, address: int) -> None:
        """Release what :meth:`allocate_host` gave."""
        ...

    def new_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Release a stream on which nothing is running."""
        ...

    def new_event(self) -> int:
        """An event without timing."""
        ...

    def destroy_event(self, event: int) -> None:
        """Release an event."""
        ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy bytes in order with the stream; host memory must be pinned."""
        ...

    def launch_graph(self, executable: int, stream: int) -> None:
        """Run an instantiated graph in order with the stream."""
        ...

    def record(self, event: int, stream: int) -> None:
        """Let the event stand for all work put on the stream so far."""
        ...

    def wait(self, event: int) -> None:
        """Block until the work that the event stands for is done."""
        ...

    def new_graph(self) -> int:
        """An empty graph."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Release a graph; its executables stay."""
        ...

    def new_condition(self, graph: int, default: int) -> int:
        """A condition of the graph, which each launch of it begins with ``default``."""
        ...

    def add_kernel(self, graph: int, after: Sequence[int], launch: Launch) -> int:
        """Add a node that runs a kernel; the arguments are copied now."""
        ...

    def add_copy(
        self, graph: int, after: Sequence[int], target: int, source: int, size: int
    ) -> int:
        """Add a node that copies bytes between device memory and device or pinned memory."""
        ...

    def add_child(self, graph: int, after: Sequence[int], child: int) -> int:
        """Add a node that runs a copy of another graph, which may hold no conditional node."""
        ...

    def add_switch(
        self, graph: int, after: Sequence[int], condition: int, bodies: int
    ) -> tuple[int, tuple[int, ...]]:
        """Add a SWITCH node: value ``v`` runs body ``v``, and nothing when there is none.

        Returns:
            The node, and the graphs of the bodies, which are to be filled.
        """
        ...

    def add_if(self, graph: int, after: Sequence[int], condition: int) -> tuple[int, int]:
        """Add an IF node, whose body runs unless the value is 0. Returns the node and the body."""
        ...

    def nodes(self, graph: int) -> list[tuple[NodeKind, int | None]]:
        """Kind of each node, and for a child graph node the graph that it holds."""
        ...

    def instantiate(self, graph: int, stream: int) -> int:
        """An executable of the graph, already uploaded to the device."""
        ...

    def destroy_executable(self, executable: int) -> None:
        """Release an executable that is not running."""
        ...


def forbidden_nodes(driver: Driver, graph: int) -> dict[NodeKind, int]:
    """How many nodes of a graph, child graphs included, may not stand in a conditional body.

    A conditional node is counted too: what is checked here is to become a child graph, and
    those are copied, which a graph with conditional nodes cannot be.
    """
    found: dict[NodeKind, int] = {}
    for kind, child in driver.nodes(graph):
        if child is not None:
            for inner, count in forbidden_nodes(driver, child).items():
                found[inner] = found.get(inner, 0) + count
        elif kind not in ALLOWED_IN_BODIES or kind is NodeKind.CONDITIONAL:
            found[kind] = found.get(kind, 0) + 1
    return found
