"""A CUDA driver that records graphs and executes them on host memory, with the real kernels.

The kernels are those of ``csrc/``, compiled by g++ with the SIMT emulator. Everything else that a
GPU would do is done here, strictly:

- Work on a stream is done when the host waits for an event, and not before: a host that reads too
  early reads stale memory.
- The nodes of a graph run in a random order that its edges allow: a missing edge shows.
- New memory is filled with 0xFF: NaN as a float, -1 as an index.
- Every copy must stay inside one allocation, and kernels' arguments are taken when a node is made.
- A conditional body is refused when it is empty, or holds what CUDA does not allow there; a child
  graph, when it holds a conditional node.
- Everything is asked for while the GPU is the thread's current one.
- A condition must belong to the graph, and be set exactly once in a launch before it is used.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sn72engine.cuda.api import ALLOWED_IN_BODIES, NodeKind
from sn72engine.cuda.layout import Launch, RouteArgs
from sn72engine.errors import CudaUnavailableError
from sn72engine.stages.base import Image
from sn72engine.stages.capture import Output, Rows

CSRC = Path(__file__).parents[2] / "csrc"
_POISON = 0xFF


def compile_kernels(target: Path, sources: Path = CSRC) -> ctypes.CDLL:
    """The kernels and the emulator as a library."""
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
    files = [sources / "emulator" / name for name in ("library.cpp", "simt.cpp")]
    subprocess.run(["g++", *flags, *map(str, files), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@dataclass
class Node:
    kind: NodeKind
    after: tuple[int, ...] = ()
    run: Callable[[], None] | None = None
    launch: Launch | None = None
    child: Graph | None = None
    condition: int = 0
    bodies: list[Graph] = field(default_factory=list)
    single: bool = False  # IF: one body, for any value but 0


@dataclass
class Graph:
    number: int
    nodes: list[Node] = field(default_factory=list)
    defaults: dict[int, int] = field(default_factory=dict)
    owner: Graph | None = None  # of a conditional body


class SimulatedCuda:
    """See :class:`sn72engine.cuda.api.Driver`."""

    def __init__(self, library: ctypes.CDLL, seed: int = 0, *, switch_nodes: bool = True) -> None:
        self.switch_nodes = switch_nodes
        self.random = random.Random(seed)
        self.kernels: Counter[str] = Counter()
        self.launches = 0
        #: Nanoseconds from begin to the boundary after a stage; called when that is reached.
        self.elapsed_ns: Callable[[int], int] = lambda stage: 0
        #: Raise at this launch of a graph, counted from now; 0 for never.
        self.fail_at = 0
        self._library = library
        self._memory: dict[int, Any] = {}
        self._pinned: set[int] = set()
        self._numbers = iter(range(1, 1 << 62))
        self._graphs: dict[int, Graph] = {}
        self._executables: dict[int, Graph] = {}
        self._streams: dict[int, list[Callable[[], None]]] = {}
        self._done: dict[int, int] = {}
        self._events: dict[int, tuple[int, int] | None] = {}
        self._depth = threading.local()

    # Memory

    @contextmanager
    def current(self) -> Iterator[None]:
        self._depth.here = getattr(self._depth, "here", 0) + 1
        try:
            yield
        finally:
            self._depth.here -= 1

    def _check_current(self) -> None:
        assert getattr(self._depth, "here", 0), "another GPU may be current on this thread"

    def allocate(self, size: int) -> int:
        self._check_current()
        assert size > 0
        raw = (ctypes.c_ubyte * (size + 256))()
        ctypes.memset(raw, _POISON, size + 256)
        address = -(-ctypes.addressof(raw) // 256) * 256
        self._memory[address] = (raw, size)
        return address

    def free(self, address: int) -> None:
        self._check_current()
        del self._memory[address]

    def allocate_host(self, size: int) -> int:
        self._check_current()
        address = self.allocate(size)
        self._pinned.add(address)
        return address

    def free_host(self, address: int) -> None:
        self._check_current()
        self._pinned.remove(address)
        self.free(address)

    def adopt(self, address: int, size: int) -> None:
        """Memory that somebody else holds, such as a tensor's."""
        self._memory[address] = (None, size)

    @property
    def allocations(self) -> int:
        return len(self._memory)

    def _check_range(self, address: int, size: int) -> None:
        for start, (_, length) in self._memory.items():
            if start <= address and address + size <= start + length:
                return
        raise AssertionError(f"{size} bytes at {address:#x} are not inside one allocation")

    # Streams and events

    def new_stream(self) -> int:
        self._check_current()
        stream = next(self._numbers)
        self._streams[stream], self._done[stream] = [], 0
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._check_current()
        assert not self._streams.pop(stream), "destroyed with work on it"

    def new_event(self) -> int:
        self._check_current()
        event = next(self._numbers)
        self._events[event] = None
        return event

    def destroy_event(self, event: int) -> None:
        self._check_current()
        del self._events[event]

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._check_current()
        self._check_range(target, size)
        self._check_range(source, size)
        self._streams[stream].append(lambda: ctypes.memmove(target, source, size) and None)

    def launch_graph(self, executable: int, stream: int) -> None:
        self._check_current()
        self.launches += 1
        if self.fail_at:
            self.fail_at -= 1
            if not self.fail_at:
                raise CudaUnavailableError("cuGraphLaunch failed with CUDA_ERROR_LAUNCH_FAILED")
        graph = self._executables[executable]
        self._streams[stream].append(lambda: self._execute(graph))

    def record(self, event: int, stream: int) -> None:
        self._check_current()
        self._events[event] = stream, self._done[stream] + len(self._streams[stream])

    def wait(self, event: int) -> None:
        self._check_current()
        mark = self._events[event]
        assert mark is not None, "waits for an event that was never recorded"
        stream, until = mark
        while self._done[stream] < until:
            self._done[stream] += 1
            self._streams[stream].pop(0)()

    # Graphs

    def new_graph(self) -> int:
        self._check_current()
        return self._new_graph(None).number

    def destroy_graph(self, graph: int) -> None:
        self._check_current()
        del self._graphs[graph]

    def new_condition(self, graph: int, default: int) -> int:
        self._check_current()
        condition = next(self._numbers) << 20
        self._graphs[graph].defaults[condition] = default
        return condition

    def add_kernel(self, graph: int, after: Sequence[int], launch: Launch) -> int:
        self._check_current()
        launch = Launch(
            launch.kernel,
            launch.grid,
            launch.block,
            type(launch.args).from_buffer_copy(launch.args),
        )
        return self._add(graph, after, Node(NodeKind.KERNEL, launch=launch))

    def add_copy(
        self, graph: int, after: Sequence[int], target: int, source: int, size: int
    ) -> int:
        self._check_current()
        self._check_range(target, size)
        self._check_range(source, size)
        move = lambda: ctypes.memmove(target, source, size) and None  # noqa: E731
        return self._add(graph, after, Node(NodeKind.COPY, run=move))

    def add_child(self, graph: int, after: Sequence[int], child: int) -> int:
        self._check_current()
        inner = self._graphs[child]
        assert not conditionals(inner), "a cloned graph may hold no conditional node"
        return self._add(graph, after, Node(NodeKind.CHILD, child=inner))

    def add_switch(
        self, graph: int, after: Sequence[int], condition: int, bodies: int
    ) -> tuple[int, tuple[int, ...]]:
        self._check_current()
        return self._add_conditional(graph, after, condition, bodies, single=False)

    def add_if(self, graph: int, after: Sequence[int], condition: int) -> tuple[int, int]:
        self._check_current()
        node, (body,) = self._add_conditional(graph, after, condition, 1, single=True)
        return node, body

    def nodes(self, graph: int) -> list[tuple[NodeKind, int | None]]:
        self._check_current()
        nodes = self._graphs[graph].nodes
        return [(n.kind, n.child.number if n.child else None) for n in nodes]

    def instantiate(self, graph: int, stream: int) -> int:
        self._check_current()
        assert stream in self._streams
        found = self._graphs[graph]
        check(found, outermost=True)
        used = [node.condition for node in conditionals(found)]
        assert sorted(used) == sorted(found.defaults), "a condition without its one node"
        executable = next(self._numbers)
        self._executables[executable] = found
        return executable

    def destroy_executable(self, executable: int) -> None:
        self._check_current()
        del self._executables[executable]

    @property
    def executables(self) -> list[Graph]:
        return list(self._executables.values())

    def register(self, nodes: Sequence[Node]) -> int:
        """A graph as a capture leaves it: nodes in a chain."""
        graph = self._new_graph(None)
        for at, node in enumerate(nodes):
            node.after = (at - 1,) if at else ()
            graph.nodes.append(node)
        return graph.number

    def _new_graph(self, owner: Graph | None) -> Graph:
        graph = Graph(next(self._numbers), owner=owner)
        self._graphs[graph.number] = graph
        return graph

    def _add(self, graph: int, after: Sequence[int], node: Node) -> int:
        nodes = self._graphs[graph].nodes
        node.after = tuple(one - (graph << 20) for one in after)
        assert all(0 <= one < len(nodes) for one in node.after), "an edge from another graph"
        nodes.append(node)
        return (graph << 20) + len(nodes) - 1

    def _add_conditional(
        self, graph: int, after: Sequence[int], condition: int, bodies: int, *, single: bool
    ) -> tuple[int, tuple[int, ...]]:
        owner = self._graphs[graph]
        assert condition in owner.defaults, "the condition of another graph"
        filled = [self._new_graph(owner) for _ in range(bodies)]
        node = Node(NodeKind.CONDITIONAL, condition=condition, bodies=filled, single=single)
        return self._add(graph, after, node), tuple(body.number for body in filled)

    # Execution

    def _execute(self, graph: Graph) -> None:
        self._take_conditions(set())
        self._run(graph, dict(graph.defaults), set())

    def _run(self, graph: Graph, values: dict[int, int], set_already: set[int]) -> None:
        waiting = list(range(len(graph.nodes)))
        done: set[int] = set()
        while waiting:
            ready = [at for at in waiting if done.issuperset(graph.nodes[at].after)]
            at = self.random.choice(ready)
            waiting.remove(at)
            self._run_node(graph.nodes[at], values, set_already)
            done.add(at)

    def _run_node(self, node: Node, values: dict[int, int], set_already: set[int]) -> None:
        if node.launch is not None:
            self._run_kernel(node.launch)
            for condition, value in self._take_conditions(set(values)):
                assert condition not in set_already, "a condition set twice in one launch"
                set_already.add(condition)
                values[condition] = value
        elif node.run is not None:
            node.run()
        elif node.child is not None:
            self._run(node.child, values, set_already)
        elif node.bodies:
            assert node.condition in set_already, "a condition that no kernel has set yet"
            value = values[node.condition]
            body = (0 if value else 1) if node.single else value
            if body < len(node.bodies):
                self._run(node.bodies[body], values, set_already)

    def _run_kernel(self, launch: Launch) -> None:
        self.kernels[launch.kernel] += 1
        now = 10**6
        if isinstance(launch.args, RouteArgs):
            now += self.elapsed_ns(launch.args.stage)
        self._library.sn72_set_clock(ctypes.c_uint64(now))
        failed = self._library.sn72_emulate(
            launch.kernel.encode(),
            launch.grid[0],
            launch.grid[1],
            launch.block[0],
            self.random.getrandbits(31),
            ctypes.byref(launch.args),
        )
        assert not failed, f"no kernel {launch.kernel}"

    def _take_conditions(self, known: set[int]) -> list[tuple[int, int]]:
        room = 64
        handles, values = (ctypes.c_uint64 * room)(), (ctypes.c_uint * room)()
        count = self._library.sn72_take_conditions(handles, values, room)
        assert count <= room
        taken = list(zip(handles[:count], values[:count], strict=True))
        assert all(handle in known for handle, _ in taken), "the condition of another graph is set"
        return taken


def conditionals(graph: Graph) -> list[Node]:
    """Conditional nodes at any depth."""
    found = []
    for node in graph.nodes:
        if node.kind is NodeKind.CONDITIONAL:
            found.append(node)
        for inner in ([node.child] if node.child else []) + node.bodies:
            found += conditionals(inner)
    return found


def check(graph: Graph, *, outermost: bool) -> None:
    """What the driver refuses when a graph is instantiated, and what old drivers hang on."""
    for node in graph.nodes:
        assert outermost or node.kind in ALLOWED_IN_BODIES, f"{node.kind} in a body"
        for body in node.bodies:
            assert body.nodes, "an empty body"
            check(body, outermost=False)
        if node.child is not None:
            check(node.child, outermost=outermost)


class SimulatedCapturer:
    """See :class:`sn72engine.graphs.Capturer`. What is captured is a call of a Python function."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self._cuda = cuda
        self.pools = 0
        self.runs: Counter[Any] = Counter()
        self.pool_of: dict[int, int] = {}
        #: Kinds of further nodes that each capture gets.
        self.extra: tuple[NodeKind, ...] = ()

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def run(self, call: Callable[[], None]) -> None:
        self.runs[id(call)] += 1
        call()

    def capture(self, call: Callable[[], None], pool: int) -> tuple[int, Any]:
        assert self.runs[id(call)] >= 2, "captured without a warm-up"
        nodes = [Node(NodeKind.KERNEL, run=call), *(Node(kind) for kind in self.extra)]
        graph = self._cuda.register(nodes)
        self.pool_of[graph] = pool
        return graph, call

    def reserved_bytes(self) -> int:
        return 1000 * len(self.pool_of)


class Buffer:
    """See :class:`sn72engine.stages.capture.Buffer`."""

    def __init__(self, cuda: SimulatedCuda, size: int) -> None:
        self.address = cuda.allocate(size)


class ColumnOffer:
    """A stage whose score is a column of its input row, and whose label, if any, another one.

    Args:
        cuda: the driver.
        rows: what its input is.
        column: of the score.
        label: of the class index.
        dtype: of the scores it leaves, float32 or float16.
        stride: elements between them.
    """

    def __init__(
        self,
        cuda: SimulatedCuda,
        rows: Rows,
        column: int,
        *,
        label: int | None = None,
        dtype: str = "float32",
        stride: int = 1,
        from_logits: bool = False,
    ) -> None:
        self.rows = rows
        self.limits = (1, 1 << 30)
        self._cuda = cuda
        self._column, self._label = column, label
        self._dtype, self._stride = np.dtype(dtype), stride
        self._from_logits = from_logits

    def load(self, image: Image, out: Any) -> None:
        order = slice(None, None, -1) if self.rows.key == "reversed" else slice(None)
        out[...] = image[order]

    def allocate(self, rows: int) -> Buffer:
        return Buffer(self._cuda, rows * self.rows.bytes)

    def bind(self, buffer: Buffer, rows: int, lane: int) -> ColumnBound:
        scores = self._cuda.allocate(rows * self._stride * self._dtype.itemsize)
        labels = None if self._label is None else self._cuda.allocate(8 * rows)
        output = Output(
            scores,
            "f32" if self._dtype == np.float32 else "f16",
            self._stride,
            self._from_logits,
            labels,
        )
        width = self.rows.shape[0]
        back = self.rows.key == "reversed"
        given = view(buffer.address, np.dtype(np.float32), rows * width).reshape(rows, width)
        given = given[:, ::-1] if back else given
        target = view(scores, self._dtype, rows * self._stride)[:: self._stride]
        named = None if labels is None else view(labels, np.dtype(np.int64), rows)
        return ColumnBound(output, given, self._column, target, self._label, named)


@dataclass
class ColumnBound:
    output: Output
    given: Any
    column: int
    target: Any
    label: int | None
    labels: Any

    def __call__(self) -> None:
        with np.errstate(all="ignore"):
            self.target[:] = self.given[:, self.column]
            if self.labels is not None:
                self.labels[:] = np.nan_to_num(self.given[:, self.label], posinf=0, neginf=0)


def view(address: int, dtype: np.dtype[Any], count: int) -> Any:
    memory = (ctypes.c_char * (dtype.itemsize * count)).from_address(address)
    return np.ndarray(count, dtype, memory)
