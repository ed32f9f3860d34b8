"""The buckets of captured stages, from what their graphs take on the GPU.

Each stage is captured for trial at every size that may become a bucket, and the graphs are replayed
in turns. What is timed is the replay, because that is what a cascade will run: an eager call of a
small batch takes as long as the host needs to launch its kernels, whatever its size. The trial is
over before the lanes are made, so that its memory is free again.

The stages of a parallel group run in the same buckets. These are chosen for all of them together,
with the sum of their times: what a busy GPU needs for them, side by side or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np

from sn72engine.cascade.buckets import (
    BucketOptions,
    BucketPlan,
    Floats,
    LatencyCurve,
    choose_together,
    escalated,
    measure_curve,
    plan_of,
)
from sn72engine.cascade.lane import CapturedStage
from sn72engine.cascade.spec import parallel_groups
from sn72engine.cuda.api import Driver
from sn72engine.graphs import Capturer, GraphStore
from sn72engine.latency import Call
from sn72engine.progress import track
from sn72engine.stages.capture import Bound


def measured_plans(
    driver: Driver,
    capturer: Capturer,
    stages: Sequence[CapturedStage],
    *,
    lanes: int,
    shares: Sequence[float],
    options: BucketOptions,
) -> list[BucketPlan]:
    """Choose the buckets of each stage among those that it comes with.

    The samples of a call are taken to be any number from one to a full batch, all equally likely,
    and each of them to escalate by itself.

    Args:
        driver, capturer: of the GPU.
        stages: with their candidates as buckets; the last holds a full batch.
        lanes: how many will capture them; the memory of a plan is that of all.
        shares: of the samples that escalate from each stage or parallel group; the last one holds
            for later ones.
        options: limits.

    Returns:
        A plan for each stage; those of a parallel group have the same buckets.

    Raises:
        CudaUnavailableError: a stage cannot be captured, or there is not enough memory for one
            lane's graphs of a stage at every candidate.
        OptionError: no choice keeps the memory limit.
    """
    curves = [
        _curve(driver, capturer, stage, lanes)
        for stage in track(stages, "measuring buckets", total=len(stages), unit="stage")
    ]
    groups = parallel_groups([stage.spec for stage in stages])
    counts = expected_counts(stages[0].buckets[-1], len(groups), shares)
    chosen = choose_together(
        [_together([curves[at] for at in group]) for group in groups], counts, options
    )
    return [
        plan_of(plan.buckets, curves[at], count, options)
        for group, plan, count in zip(groups, chosen, counts, strict=True)
        for at in group
    ]


def with_plans(stages: Sequence[CapturedStage], plans: Sequence[BucketPlan]) -> list[CapturedStage]:
    """The stages with the buckets that were chosen."""
    return [
        dataclasses.replace(stage, buckets=plan.buckets)
        for stage, plan in zip(stages, plans, strict=True)
    ]


def expected_counts(capacity: int, groups: int, shares: Sequence[float]) -> list[Floats]:
    """Probability of each number of samples, 0 to ``capacity``, at each stage or group."""
    counts = np.full(capacity + 1, 1.0 / capacity)
    counts[0] = 0.0
    found = [counts]
    for at in range(groups - 1):
        counts = escalated(counts, shares[min(at, len(shares) - 1)])
        # A full batch must fit, however unlikely it is.
        counts[-1] = max(counts[-1], np.finfo(np.float64).tiny)
        found.append(counts)
    return found


def _together(curves: Sequence[LatencyCurve]) -> LatencyCurve:
    """One after the other, at the sizes that all of them have."""
    rows = [dict(zip(c.batches, zip(c.seconds, c.bytes, strict=True), strict=True)) for c in curves]
    common = sorted(set.intersection(*map(set, rows)))
    return LatencyCurve(
        tuple(common),
        tuple(sum(row[batch][0] for row in rows) for batch in common),
        tuple(sum(row[batch][1] for row in rows) for batch in common),
    )


def _curve(driver: Driver, capturer: Capturer, stage: CapturedStage, lanes: int) -> LatencyCurve:
    """Time and memory of a stage's graphs at each of its buckets."""
    with contextlib.ExitStack() as held:
        store = GraphStore(driver, capturer)
        held.callback(store.close)
        stream, event = driver.new_stream(), driver.new_event()
        held.callback(driver.destroy_stream, stream)
        held.callback(driver.destroy_event, event)
        buffer = stage.offer.allocate(stage.buckets[-1])
        bounds: list[Bound] = []  # as long as their graphs are replayed
        executables: dict[int, int] = {}
        sizes: dict[int, int] = {}
        for rows in reversed(stage.buckets):  # the largest first, as a lane does
            bounds.append(stage.offer.bind(buffer, rows, 0))
            captured = store.capture(stage.spec.name, rows, 0, bounds[-1])
            executables[rows] = driver.instantiate(captured.graph, stream)
            held.callback(driver.destroy_executable, executables[rows])
            sizes[rows] = captured.bytes * lanes

        def replay(rows: int) -> Call:
            def call() -> None:
                driver.launch_graph(executables[rows], stream)
                driver.record(event, stream)
                driver.wait(event)

            return call

        return measure_curve(replay, stage.buckets, bytes_at=sizes.__getitem__)
