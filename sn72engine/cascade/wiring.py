"""The graphs of a lane: which kernel follows which, and on what memory.

With three stages, the second captured for 8 and 64 rows and the third for 64, ``device`` runs one
graph for a batch::

    copy parameters -> begin -> [stage 0] -> route 0
        -> SWITCH { 8: gather -> [stage 1] -> scatter | 64: gather -> [stage 1] -> scatter }
        -> route 1
        -> SWITCH { 64: gather -> [stage 2] -> scatter }
        -> route 2 -> copy answers

Brackets are child graphs. The SWITCH nodes stand in sequence, so there are as many bodies as
buckets, and not one for each path through the cascade. No node waits for the host.

``host`` runs the pieces between two SWITCH nodes as graphs of their own; the host reads the route's
16-byte answer and launches the piece of the bucket that it names::

    copy parameters -> begin -> [stage 0] -> route 0 -> copy control
    gather -> [stage 1] -> scatter -> route 1 -> copy control

Graphs are made once, per number of rows of the first stage, when the cascade is opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from sn72engine.cascade.lane import CapturedStage, Lane, Program
from sn72engine.cuda import layout
from sn72engine.cuda.layout import Flag


def fitting(buckets: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The buckets that a batch of up to ``rows`` can need: those below, and the first above."""
    below = tuple(bucket for bucket in buckets if bucket < rows)
    return (*below, buckets[len(below)])


def cascade_graph(lane: Lane, rows: int) -> int:
    """Executable of the whole cascade for batches of up to ``rows``."""
    driver = lane.driver
    with _graph(lane) as graph:
        last = _add_opening(lane, graph, rows)
        for at, following in enumerate(lane.stages[1:]):
            buckets = fitting(following.buckets, rows)
            add = _add_switch if driver.switch_nodes else _add_ifs
            last = add(lane, graph, last, at, rows, buckets)
        last = _add_route(lane, graph, [last], len(lane.stages) - 1, rows, ())
        driver.add_copy(
            graph, [last], lane.pinned("answers"), lane.device("answers"), lane.size("answers")
        )
        return driver.instantiate(graph, lane.stream)


def first_graph(lane: Lane, rows: int) -> int:
    """Executable of the first stage and its boundary, for batches of up to ``rows``."""
    with _graph(lane) as graph:
        last = _add_opening(lane, graph, rows)
        _add_boundary(lane, graph, [last], 0, rows)
        return lane.driver.instantiate(graph, lane.stream)


def next_graph(lane: Lane, at: int, rows: int) -> int:
    """Executable of a later stage with ``rows`` rows, and its boundary."""
    with _graph(lane) as graph:
        last = _add_visit(lane, graph, at, rows)
        _add_boundary(lane, graph, [last], at, lane.capacity)
        return lane.driver.instantiate(graph, lane.stream)


def skip_graph(lane: Lane, at: int) -> int:
    """Executable of the boundary alone, for a stage that no sample of the batch reaches."""
    with _graph(lane) as graph:
        _add_boundary(lane, graph, [], at, lane.capacity)
        return lane.driver.instantiate(graph, lane.stream)


@contextlib.contextmanager
def _graph(lane: Lane) -> Iterator[int]:
    graph = lane.driver.new_graph()
    try:
        yield graph
    finally:
        lane.driver.destroy_graph(graph)


def _add_opening(lane: Lane, graph: int, rows: int) -> int:
    """Parameters to the device, a fresh tally, and the first stage on the uploaded rows."""
    driver, program = lane.driver, lane.programs[0, rows]
    last = driver.add_copy(
        graph, [], lane.device("parameters"), lane.pinned("parameters"), lane.size("parameters")
    )
    begin = layout.BeginArgs(
        samples=lane.device("answers", "samples"),
        scored=lane.device("work", "scored"),
        start_ns=lane.device("work", "start_ns"),
        capacity=rows,
    )
    last = driver.add_kernel(graph, [last], layout.begin(begin))
    last = driver.add_child(graph, [last], program.graph)
    if program.bound.output.label is None:
        return last
    # Scores are routed from where they are; only the labels have to be handed on.
    count = lane.device("parameters", "batch")
    return driver.add_kernel(graph, [last], _scatter(lane, 0, program, index=None, count=count))


def _add_visit(lane: Lane, graph: int, at: int, rows: int) -> int:
    """Gather the rows of a stage, run it, and hand its scores to their samples."""
    driver, program = lane.driver, lane.programs[at, rows]
    kind = lane.stages[at].offer.rows
    index = lane.device("work", "index", at - 1)
    gather = layout.GatherArgs(
        source=lane.source(kind),
        target=program.input,
        index=index,
        row_bytes=kind.bytes,
        source_stride=kind.bytes,
        target_stride=kind.bytes,
        rows=rows,
    )
    last = driver.add_kernel(graph, [], layout.gather(gather))
    last = driver.add_child(graph, [last], program.graph)
    count = lane.device("answers", "controls", at - 1) + _offset_of_count()
    scatter = _scatter(lane, at, program, index=index, count=count)
    return driver.add_kernel(graph, [last], scatter)


def _add_switch(
    lane: Lane, graph: int, after: int, at: int, rows: int, buckets: tuple[int, ...]
) -> int:
    """The boundary after stage ``at``, and the next stage in the bodies of a SWITCH node."""
    driver = lane.driver
    condition = driver.new_condition(graph, len(buckets))
    last = _add_route(lane, graph, [after], at, rows, buckets, condition=condition)
    node, bodies = driver.add_switch(graph, [last], condition, len(buckets))
    for body, bucket in zip(bodies, buckets, strict=True):
        _add_visit(lane, body, at + 1, bucket)
    return node


def _add_ifs(
    lane: Lane, graph: int, after: int, at: int, rows: int, buckets: tuple[int, ...]
) -> int:
    """As :func:`_add_switch`, with one IF node per bucket, of which one at most runs its body."""
    driver = lane.driver
    conditions = [driver.new_condition(graph, 0) for _ in buckets]
    table = lane.write(np.array(conditions, np.uint64))
    last = _add_route(lane, graph, [after], at, rows, buckets, conditions=table)
    for condition, bucket in zip(conditions, buckets, strict=True):
        last, body = driver.add_if(graph, [last], condition)
        _add_visit(lane, body, at + 1, bucket)
    return last


def _add_boundary(lane: Lane, graph: int, after: list[int], at: int, rows: int) -> None:
    """A boundary whose decision goes to the host."""
    final = at + 1 == len(lane.stages)
    buckets = () if final else fitting(lane.stages[at + 1].buckets, rows)
    last = _add_route(lane, graph, after, at, rows, buckets)
    lane.driver.add_copy(
        graph,
        [last],
        lane.pinned("answers", "controls", at),
        lane.device("answers", "controls", at),
        layout.CONTROL.itemsize,
    )


def _add_route(
    lane: Lane,
    graph: int,
    after: list[int],
    at: int,
    rows: int,
    buckets: tuple[int, ...],
    *,
    condition: int | None = None,
    conditions: int | None = None,
) -> int:
    """The boundary after stage ``at``: decide, compact, pick a bucket of the next stage."""
    stage = lane.stages[at]
    args = layout.RouteArgs(
        samples=lane.device("answers", "samples"),
        low=lane.device("parameters", "low", at),
        high=lane.device("parameters", "high", at),
        eligible=lane.device("parameters", "eligible", at),
        budget_ns=lane.device("parameters", "budget_ns"),
        start_ns=lane.device("work", "start_ns"),
        batch=lane.device("parameters", "batch"),
        index=lane.device("work", "index", at),
        control=lane.device("answers", "controls", at),
        weight=stage.spec.weight,
        threshold_stride=1,
        capacity=rows,
        stage=at,
        combine=layout.Combine[stage.spec.combine.upper()],
        flags=_route_flags(stage, final=not buckets),
        bucket_count=len(buckets),
    )
    args.buckets[: len(buckets)] = buckets
    if condition is not None:
        args.flags, args.condition = args.flags | Flag.SET_CONDITION, condition
    if conditions is not None:
        args.flags, args.conditions = args.flags | Flag.SET_EACH, conditions
    if at == 0:  # straight from the stage, for all rows that the host has given it
        output = lane.programs[0, rows].bound.output
        args.score, args.score_stride = output.address, output.stride
        args.scored = lane.device("parameters", "scored")
        args.flags |= Flag.FROM_LOGITS * output.from_logits
        return lane.driver.add_kernel(graph, after, layout.route(args, output.kind))
    args.score, args.score_stride = lane.device("work", "score"), 1
    args.scored = lane.device("work", "scored")
    return lane.driver.add_kernel(graph, after, layout.route(args, "f32"))


def _route_flags(stage: CapturedStage, *, final: bool) -> int:
    flags = Flag.LAST_STAGE if final else Flag(0)
    if not stage.spec.negative_exit:
        flags |= Flag.NO_NEGATIVE_EXIT
    return int(flags)


def _scatter(
    lane: Lane, at: int, program: Program, *, index: int | None, count: int
) -> layout.Launch:
    output = program.bound.output
    args = layout.ScatterArgs(
        score=output.address,
        label=output.label,
        index=index,
        count=count,
        out=lane.device("work", "score"),
        label_out=lane.device("answers", "labels"),
        scored=lane.device("work", "scored"),
        score_stride=output.stride,
        stage=at,
        flags=int(Flag.FROM_LOGITS) * output.from_logits,
    )
    return layout.scatter(args, output.kind, program.rows)


def _offset_of_count() -> int:
    assert layout.CONTROL.fields is not None
    return int(layout.CONTROL.fields["count"][1])
