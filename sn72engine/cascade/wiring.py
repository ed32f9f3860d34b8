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

Stages of a parallel group share a boundary and its body, on branches that meet where their scores
are combined. With stages 1 and 2 side by side, a body and what follows it are::

    gather -> [stage 1] -> scatter -> combine
    gather -> [stage 2] ----------------------> scatter        (body) -> route 2

"Combine" is a route launch that decides nothing. Stages take turns from the first scatter on, in
their order, so that they can share the memory that scores are scattered to.

Graphs are made once, per number of rows of the first stage, when the cascade is opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from sn72engine.cascade.lane import Lane, Program
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
        after = _add_opening(lane, graph, rows)
        for number, following in enumerate(lane.groups[1:]):
            buckets = fitting(following.buckets, rows)
            add = _add_switch if driver.switch_nodes else _add_ifs
            after = [add(lane, graph, after, number, rows, buckets)]
        last = _add_route(lane, graph, after, len(lane.groups) - 1, rows, ())
        driver.add_copy(
            graph, [last], lane.pinned("answers"), lane.device("answers"), lane.size("answers")
        )
        return driver.instantiate(graph, lane.stream)


def first_graph(lane: Lane, rows: int) -> int:
    """Executable of the first group and its boundary, for batches of up to ``rows``."""
    with _graph(lane) as graph:
        after = _add_opening(lane, graph, rows)
        _add_boundary(lane, graph, after, 0, rows)
        return lane.driver.instantiate(graph, lane.stream)


def next_graph(lane: Lane, number: int, rows: int) -> int:
    """Executable of a later group with ``rows`` rows, and its boundary."""
    with _graph(lane) as graph:
        after = _add_visit(lane, graph, number, rows, lane.capacity)
        _add_boundary(lane, graph, after, number, lane.capacity)
        return lane.driver.instantiate(graph, lane.stream)


def skip_graph(lane: Lane, number: int) -> int:
    """Executable of the boundary alone, for a group that no sample of the batch reaches."""
    with _graph(lane) as graph:
        _add_boundary(lane, graph, [], number, lane.capacity)
        return lane.driver.instantiate(graph, lane.stream)


@contextlib.contextmanager
def _graph(lane: Lane) -> Iterator[int]:
    graph = lane.driver.new_graph()
    try:
        yield graph
    finally:
        lane.driver.destroy_graph(graph)


def _add_opening(lane: Lane, graph: int, rows: int) -> list[int]:
    """Parameters to the device, a fresh tally, and the first group on the uploaded rows.

    Returns:
        What the boundary comes after.
    """
    driver = lane.driver
    last = driver.add_copy(
        graph, [], lane.device("parameters"), lane.pinned("parameters"), lane.size("parameters")
    )
    begin = layout.BeginArgs(
        samples=lane.device("answers", "samples"),
        scored=lane.device("work", "scored"),
        start_ns=lane.device("work", "start_ns"),
        capacity=rows,
    )
    begun = driver.add_kernel(graph, [last], layout.begin(begin))
    group = lane.groups[0].stages
    after: list[int] = []
    for at in group:
        program = lane.programs[at, rows]
        after = [driver.add_child(graph, [begun], program.graph), *after]
        if program.bound.output.label is not None:
            # Scores are taken from where they are; only the labels have to be handed on.
            count = lane.device("parameters", "batch")
            scatter = _scatter(lane, at, program, index=None, count=count)
            after = [driver.add_kernel(graph, after, scatter)]
        if at != group[-1]:
            after = [_add_combine(lane, graph, after, 0, at, rows)]
    return after


def _add_visit(lane: Lane, graph: int, number: int, rows: int, capacity: int) -> list[int]:
    """Gather the rows of a group's stages, run them, and hand their scores to their samples.

    Args:
        lane, graph: where.
        number: of the group.
        rows: bucket that it runs in.
        capacity: samples that the batch may have.

    Returns:
        What the boundary comes after.
    """
    driver = lane.driver
    index = lane.device("work", "index", number - 1)
    count = lane.device("answers", "controls", number - 1) + _offset_of_count()
    group = lane.groups[number].stages
    after: list[int] = []
    for at in group:
        program, kind = lane.programs[at, rows], lane.stages[at].offer.rows
        gather = layout.GatherArgs(
            source=lane.source(kind),
            target=program.input,
            index=index,
            row_bytes=kind.bytes,
            source_stride=kind.bytes,
            target_stride=kind.bytes,
            rows=rows,
        )
        gathered = driver.add_kernel(graph, [], layout.gather(gather))
        after = [driver.add_child(graph, [gathered], program.graph), *after]
        scatter = _scatter(lane, at, program, index=index, count=count)
        after = [driver.add_kernel(graph, after, scatter)]
        if at != group[-1]:
            after = [_add_combine(lane, graph, after, number, at, capacity)]
    return after


def _add_switch(
    lane: Lane, graph: int, after: list[int], number: int, rows: int, buckets: tuple[int, ...]
) -> int:
    """The boundary after a group, and the next group in the bodies of a SWITCH node."""
    driver = lane.driver
    condition = driver.new_condition(graph, len(buckets))
    last = _add_route(lane, graph, after, number, rows, buckets, condition=condition)
    node, bodies = driver.add_switch(graph, [last], condition, len(buckets))
    for body, bucket in zip(bodies, buckets, strict=True):
        _add_visit(lane, body, number + 1, bucket, rows)
    return node


def _add_ifs(
    lane: Lane, graph: int, after: list[int], number: int, rows: int, buckets: tuple[int, ...]
) -> int:
    """As :func:`_add_switch`, with one IF node per bucket, of which one at most runs its body."""
    driver = lane.driver
    conditions = [driver.new_condition(graph, 0) for _ in buckets]
    table = lane.write(np.array(conditions, np.uint64))
    last = _add_route(lane, graph, after, number, rows, buckets, conditions=table)
    for condition, bucket in zip(conditions, buckets, strict=True):
        last, body = driver.add_if(graph, [last], condition)
        _add_visit(lane, body, number + 1, bucket, rows)
    return last


def _add_boundary(lane: Lane, graph: int, after: list[int], number: int, rows: int) -> None:
    """A boundary whose decision goes to the host."""
    final = number + 1 == len(lane.groups)
    buckets = () if final else fitting(lane.groups[number + 1].buckets, rows)
    last = _add_route(lane, graph, after, number, rows, buckets)
    lane.driver.add_copy(
        graph,
        [last],
        lane.pinned("answers", "controls", number),
        lane.device("answers", "controls", number),
        layout.CONTROL.itemsize,
    )


def _add_route(
    lane: Lane,
    graph: int,
    after: list[int],
    number: int,
    rows: int,
    buckets: tuple[int, ...],
    *,
    condition: int | None = None,
    conditions: int | None = None,
) -> int:
    """The boundary after a group: combine its last scores, decide, compact, pick a bucket."""
    group = lane.groups[number].stages
    args, kind = _route_args(lane, number, group[-1], rows)
    args.bucket_count = len(buckets)
    args.buckets[: len(buckets)] = buckets
    if not buckets:
        args.flags |= Flag.LAST_STAGE
    if not lane.stages[group[0]].spec.negative_exit:  # then none in the group has one
        args.flags |= Flag.NO_NEGATIVE_EXIT
    if condition is not None:
        args.flags, args.condition = args.flags | Flag.SET_CONDITION, condition
    if conditions is not None:
        args.flags, args.conditions = args.flags | Flag.SET_EACH, conditions
    return lane.driver.add_kernel(graph, after, layout.route(args, kind))


def _add_combine(lane: Lane, graph: int, after: list[int], number: int, at: int, rows: int) -> int:
    """The scores of stage ``at`` into the samples; a later stage of its group decides."""
    args, kind = _route_args(lane, number, at, rows)
    args.flags |= Flag.COMBINE_ONLY
    return lane.driver.add_kernel(graph, after, layout.route(args, kind))


def _route_args(
    lane: Lane, number: int, at: int, rows: int
) -> tuple[layout.RouteArgs, layout.Score]:
    """What a route launch for stage ``at`` of a group needs, whether it decides or not."""
    stage = lane.stages[at]
    args = layout.RouteArgs(
        samples=lane.device("answers", "samples"),
        low=lane.device("parameters", "low", number),
        high=lane.device("parameters", "high", number),
        eligible=lane.device("parameters", "eligible", number),
        budget_ns=lane.device("parameters", "budget_ns"),
        start_ns=lane.device("work", "start_ns"),
        batch=lane.device("parameters", "batch"),
        index=lane.device("work", "index", number),
        control=lane.device("answers", "controls", number),
        weight=stage.spec.weight,
        threshold_stride=1,
        capacity=rows,
        stage=at,
        combine=layout.Combine[stage.spec.combine.upper()],
        first=lane.groups[number].stages[0],
    )
    if number == 0:  # straight from the stage, for all rows that the host has given it
        output = lane.programs[at, rows].bound.output
        args.score, args.score_stride = output.address, output.stride
        args.scored = lane.device("parameters", "scored", at)
        args.flags = int(Flag.FROM_LOGITS) * output.from_logits
        return args, output.kind
    args.score, args.score_stride = lane.device("work", "score"), 1
    args.scored = lane.device("work", "scored")
    return args, "f32"


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
