from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn72engine import BuildOptions, Session, ShapeRange, Store, build
from sn72engine.cascade.buckets import (
    BucketOptions,
    BucketPlan,
    LatencyCurve,
    choose,
    choose_together,
    escalated,
    escalation_counts,
    expected_seconds,
    expected_waste,
    measure_curve,
    measure_session,
    observed_counts,
)
from sn72engine.errors import InputError, OptionError
from tests import tiny_models

ALL = tuple(range(1, 65))


def linear_curve(batches: tuple[int, ...] = ALL, fixed: float = 1e-3) -> LatencyCurve:
    return LatencyCurve(batches, tuple(fixed + b * 1e-4 for b in batches), (100,) * len(batches))


@st.composite
def problems(draw: st.DrawFn) -> tuple[LatencyCurve, list[float], BucketOptions]:
    batches = draw(st.lists(st.integers(1, 12), min_size=1, max_size=7, unique=True).map(sorted))
    count = len(batches)
    # Not always ascending: a larger batch may well be faster.
    seconds = draw(
        st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5, 8.0]), min_size=count, max_size=count)
    )
    sizes = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(0, 4), min_size=1, max_size=batches[-1] + 1).filter(any))
    options = BucketOptions(draw(st.integers(1, 5)), draw(st.none() | st.integers(0, 30)))
    curve = LatencyCurve(tuple(batches), tuple(seconds), tuple(sizes))
    return curve, [w / sum(weights) for w in weights], options


def by_force(
    curve: LatencyCurve, probabilities: list[float], options: BucketOptions
) -> float | None:
    """Smallest expected time over every choice of buckets that keeps the limits."""
    sizes = dict(zip(curve.batches, curve.bytes, strict=True))
    largest = max((c for c, p in enumerate(probabilities) if p), default=0)
    found = [
        expected_seconds(buckets, curve, probabilities)
        for k in range(1, options.max_buckets + 1)
        for buckets in itertools.combinations(curve.batches, k)
        if buckets[-1] >= largest
        and (options.memory_bytes is None or sum(sizes[b] for b in buckets) <= options.memory_bytes)
    ]
    return min(found, default=None)


@settings(max_examples=400, deadline=None)
@given(problems())
def test_no_other_choice_is_faster(
    problem: tuple[LatencyCurve, list[float], BucketOptions],
) -> None:
    curve, probabilities, options = problem
    best = by_force(curve, probabilities, options)
    if best is None:
        with pytest.raises(OptionError, match="is too little"):
            choose(curve, probabilities, options)
        return
    plan = choose(curve, probabilities, options)
    assert plan.seconds == pytest.approx(best, abs=1e-12)
    assert plan.seconds == pytest.approx(
        expected_seconds(plan.buckets, curve, probabilities), abs=1e-12
    )
    assert len(plan.buckets) <= options.max_buckets
    assert options.memory_bytes is None or plan.bytes <= options.memory_bytes
    assert list(plan.buckets) == sorted(set(plan.buckets))


@settings(max_examples=100, deadline=None)
@given(problems())
def test_more_buckets_or_memory_never_cost_time(
    problem: tuple[LatencyCurve, list[float], BucketOptions],
) -> None:
    curve, probabilities, _ = problem
    times = [choose(curve, probabilities, BucketOptions(k)).seconds for k in range(1, 6)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(times))


@settings(max_examples=60, deadline=None)
@given(problems(), problems())
def test_no_other_choice_is_faster_for_two_stages_together(
    one: tuple[LatencyCurve, list[float], BucketOptions],
    two: tuple[LatencyCurve, list[float], BucketOptions],
) -> None:
    curves, counts, options = [one[0], two[0]], [one[1], two[1]], one[2]
    limit = options.memory_bytes
    # Every way to share the memory out.
    shares = [(None, None)] if limit is None else [(m, limit - m) for m in range(limit + 1)]
    found = []
    for memory in shares:
        apart = [
            by_force(curve, count, BucketOptions(options.max_buckets, own))
            for curve, count, own in zip(curves, counts, memory, strict=True)
        ]
        if None not in apart:
            found.append(sum(seconds for seconds in apart if seconds is not None))
    if not found:
        with pytest.raises(OptionError, match=r"is too little.*for 2 stages"):
            choose_together(curves, counts, options)
        return
    plans = choose_together(curves, counts, options)
    assert sum(plan.seconds for plan in plans) == pytest.approx(min(found), abs=1e-12)
    assert limit is None or sum(plan.bytes for plan in plans) <= limit


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1))
def test_who_escalates_twice_escalates_with_the_product(
    batch: int, first: float, second: float
) -> None:
    counts = escalation_counts(batch, first)
    binomial = [
        math.comb(batch, k) * first**k * (1 - first) ** (batch - k) for k in range(batch + 1)
    ]
    np.testing.assert_allclose(counts, binomial, atol=1e-12)
    product = escalation_counts(batch, first * second)
    np.testing.assert_allclose(escalated(counts, second), product, atol=1e-12)


def test_large_batches_have_counts_too() -> None:
    counts = escalation_counts(3000, 0.3)  # its binomial coefficients are beyond any float
    assert counts.sum() == pytest.approx(1.0)
    assert counts @ np.arange(3001) == pytest.approx(900.0)


def test_a_count_runs_in_the_smallest_bucket_that_holds_it() -> None:
    plan = choose(linear_curve(), escalation_counts(64, 0.3), BucketOptions(4))
    assert plan.bucket(0) == 0
    for count in range(1, 65):
        assert plan.bucket(count) == min(b for b in plan.buckets if b >= count)
    with pytest.raises(InputError, match="count=65 is more than the largest bucket, 64"):
        plan.bucket(65)


def test_powers_of_two_waste_47_percent_and_steps_of_eight_18() -> None:
    counts = escalation_counts(64, 0.3)
    assert expected_waste([1, 2, 4, 8, 16, 32, 64], counts) == pytest.approx(0.47, abs=0.01)
    assert expected_waste(range(8, 65, 8), counts) == pytest.approx(0.18, abs=0.01)
    for seed in range(9):  # never less than none, whatever the order of the sums rounds to
        counts = np.random.default_rng(seed).dirichlet(np.ones(len(counts)))
        assert 0.0 <= expected_waste(ALL, counts) < 1e-12
    # The same from calls drawn at random.
    drawn = np.random.default_rng(0).binomial(64, 0.3, 20_000)
    assert expected_waste(range(8, 65, 8), observed_counts(drawn)) == pytest.approx(0.18, abs=0.01)


def test_seven_chosen_buckets_waste_less_than_seven_powers_of_two() -> None:
    counts = escalation_counts(64, 0.3)
    plan = choose(linear_curve(), counts, BucketOptions(7))
    assert len(plan.buckets) == 7
    assert plan.waste < 0.10


def test_the_limit_of_memory_is_kept_by_dropping_buckets() -> None:
    counts = escalation_counts(64, 0.3)
    roomy = choose(linear_curve(), counts, BucketOptions(6, memory_bytes=600))
    tight = choose(linear_curve(), counts, BucketOptions(6, memory_bytes=250))
    assert (len(roomy.buckets), len(tight.buckets)) == (6, 2)
    assert roomy.seconds < tight.seconds
    with pytest.raises(OptionError, match="one bucket that holds every count takes 100"):
        choose(linear_curve(), counts, BucketOptions(6, memory_bytes=99))


def test_a_curve_that_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match=r"64 samples may come, but .* ends at batch 32"):
        choose(linear_curve(tuple(range(1, 33))), escalation_counts(64, 0.3))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_counts_by_chance(share: float) -> None:
    counts = escalation_counts(8, share)
    assert counts.sum() == pytest.approx(1.0)
    assert (counts * np.arange(9)).sum() == pytest.approx(8 * share)


@pytest.mark.parametrize("bad", [[], [0.5, 0.6], [-0.1, 1.1], [math.nan, 1.0], [[0.5, 0.5]]])
def test_probabilities_are_checked(bad: list[float]) -> None:
    with pytest.raises(InputError, match="probabilities"):
        choose(linear_curve(), bad)


def test_arguments_are_checked() -> None:
    for arguments in [((2, 1), (1.0, 1.0), (0, 0)), ((1,), (math.nan,), (0,)), ((), (), ())]:
        with pytest.raises(InputError):
            LatencyCurve(*arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be among"):
        expected_seconds([3], LatencyCurve((1, 4), (1.0, 2.0), (0, 0)), [0.5, 0.5])
    with pytest.raises(InputError, match="none of them negative"):
        observed_counts([-1])
    with pytest.raises(OptionError, match=r"share=1\.5"):
        escalation_counts(8, 1.5)
    with pytest.raises(OptionError, match="max_buckets=0"):
        BucketOptions(0)


def plan() -> BucketPlan:
    return choose(linear_curve(), escalation_counts(64, 0.3), BucketOptions(4, 10_000))


def test_a_plan_explains_itself_and_becomes_json(tmp_path: Path) -> None:
    text = plan().explain()
    assert "powers of two" in text
    assert "47." in text
    assert "within 0.0 MB" in text
    values = json.loads(json.dumps(plan().to_dict()))
    assert values["buckets"] == list(plan().buckets)
    assert len(values["probabilities"]) == 65
    picture = plan().save_plot(tmp_path / "buckets.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_measured_curve_has_a_point_for_each_batch() -> None:
    calls: list[int] = []
    curve = measure_curve(
        lambda batch: lambda: calls.append(batch),
        (1, 4),
        bytes_at=lambda batch: 10 * batch,
        warmup=1,
        repeats=5,
    )
    assert (curve.batches, curve.bytes) == ((1, 4), (10, 40))
    assert sorted(calls) == [1] * 6 + [4] * 6


def test_the_curve_of_an_engine(tmp_path: Path) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    engine = build(model, BuildOptions(batch=ShapeRange(1, 2, 8)), store=Store(tmp_path / "store"))
    with Session(engine) as session:
        curve = measure_session(session, (1, 3, 8), warmup=0, repeats=3)
        assert curve.bytes == (28, 84, 224)  # 4 numbers in and 3 out, of 4 bytes
        assert choose(curve, observed_counts([0, 1, 8])).buckets[-1] == 8
        with pytest.raises(InputError, match="batch 9"):
            measure_session(session, (9,), warmup=0, repeats=3)
