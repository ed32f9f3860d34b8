# mypy: ignore-errors
"""Triton kernels of early-exit routing: comparisons, one prefix sum, no atomics.

``route_loop`` does a whole batch in one program and one launch. Larger batches take two launches,
``route_blocks`` and ``compact_blocks``. Every output element is written by exactly one program,
at a place that depends on the scores alone.
"""

import triton
import triton.language as tl

from sn72kernels.ops import exact_kernel


@triton.jit
def _decide(
    scores, lows, highs, low, high, at, inside, score_stride, low_stride, high_stride,
    FROM_LOGITS: tl.constexpr, PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """Probability and route of the samples ``at``; route 3 outside the batch."""
    p = tl.load(scores + at.to(tl.int64) * score_stride, inside, other=0.0).to(tl.float32)
    if FROM_LOGITS:
        p = exact_kernel.sigmoid(p)
    if PER_SAMPLE:
        low = tl.load(lows + at.to(tl.int64) * low_stride, inside, other=0.0)
        high = tl.load(highs + at.to(tl.int64) * high_stride, inside, other=0.0)
    return p, tl.where(inside, exact_kernel.route(p, low, high), 3)


@triton.jit
def _summarise(summary, escalated, negative, positive, BUCKETS: tl.constexpr):
    bucket = escalated * 0
    for place in tl.static_range(len(BUCKETS)):
        bucket += (escalated > BUCKETS[place]).to(tl.int32)
    tl.store(summary, escalated)
    tl.store(summary + 1, tl.where(escalated == 0, len(BUCKETS), bucket))
    tl.store(summary + 2, negative)
    tl.store(summary + 3, positive)


@triton.jit
def route_loop(
    scores, lows, highs, low, high, routes, positions, summary, probability,
    n, score_stride, low_stride, high_stride,
    FROM_LOGITS: tl.constexpr, PER_SAMPLE: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A whole batch in one program, BLOCK samples at a time."""
    escalated = tl.full((), 0, tl.int32)
    negative = tl.full((), 0, tl.int32)
    positive = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        p, route = _decide(
            scores, lows, highs, low, high, at, inside, score_stride, low_stride, high_stride,
            FROM_LOGITS, PER_SAMPLE,
        )  # fmt: skip
        tl.store(probability + at, p, inside)
        tl.store(routes + at, route.to(tl.uint8), inside)
        chosen = (route == 2).to(tl.int32)
        place = escalated + tl.cumsum(chosen, axis=0) - 1
        tl.store(positions + place, at, chosen != 0)
        escalated += tl.sum(chosen, axis=0)
        negative += tl.sum((route == 0).to(tl.int32), axis=0)
        positive += tl.sum((route == 1).to(tl.int32), axis=0)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(positions + at, 0, (at >= escalated) & (at < n))
    _summarise(summary, escalated, negative, positive, BUCKETS)


@triton.jit
def route_blocks(
    scores, lows, highs, low, high, routes, counts, probability,
    n, blocks, score_stride, low_stride, high_stride,
    FROM_LOGITS: tl.constexpr, PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Routes of one block, and how many of each it has: ``counts`` is (3, blocks) by route."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    p, route = _decide(
        scores, lows, highs, low, high, at, inside, score_stride, low_stride, high_stride,
        FROM_LOGITS, PER_SAMPLE,
    )  # fmt: skip
    tl.store(probability + at, p, inside)
    tl.store(routes + at, route.to(tl.uint8), inside)
    for kind in tl.static_range(3):
        tl.store(counts + kind * blocks + block, tl.sum((route == kind).to(tl.int32), axis=0))


@triton.jit
def compact_blocks(
    routes, counts, positions, summary, n, blocks,
    BUCKETS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Places of one block's escalated samples; every program adds up the blocks before its own."""
    block = tl.program_id(0)
    others = tl.arange(0, BLOCKS)
    per_block = tl.load(counts + 2 * blocks + others, others < blocks, other=0)
    before = tl.sum(tl.where(others < block, per_block, 0), axis=0)
    escalated = tl.sum(per_block, axis=0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    route = tl.load(routes + at, inside, other=3)
    chosen = (route == 2).to(tl.int32)
    place = before + tl.cumsum(chosen, axis=0) - 1
    tl.store(positions + place, at, chosen != 0)
    # Places from the total onward belong to no sample, so this store meets no other.
    tl.store(positions + at, 0, (at >= escalated) & inside)
    if block == 0:
        negative = tl.sum(tl.load(counts + others, others < blocks, other=0), axis=0)
        positive = tl.sum(tl.load(counts + blocks + others, others < blocks, other=0), axis=0)
        _summarise(summary, escalated, negative, positive, BUCKETS)
