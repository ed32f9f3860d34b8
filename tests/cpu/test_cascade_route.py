from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sn72engine.cascade.route import ESCALATE, NEGATIVE, POSITIVE, compact, route, sigmoid
from sn72engine.errors import InputError

NAN, INF = math.nan, math.inf

#: Values around which comparisons go wrong.
AWKWARD = [
    0.0,
    -0.0,
    1.0,
    0.15,
    0.5,
    0.85,
    1e-45,
    -1e-45,
    math.nextafter(1, 2),
    NAN,
    INF,
    -INF,
    2.0,
]
numbers = st.one_of(
    st.sampled_from(AWKWARD), st.floats(0, 1), st.floats(allow_nan=True, allow_infinity=True)
)


def as_float32(value: float) -> float:
    """Round to float32 without NumPy."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(INF, value)


def expected(p: float, low: float, high: float) -> int:
    """The definition, written out for one sample."""
    p, low, high = as_float32(p), as_float32(low), as_float32(high)
    if any(math.isnan(v) for v in (p, low, high)) or p < 0.0 or p > 1.0 or low > high:
        return ESCALATE
    if p < low:
        return NEGATIVE
    if p > high:
        return POSITIVE
    return ESCALATE


@settings(max_examples=400)
@given(st.lists(st.tuples(numbers, numbers, numbers), max_size=40))
@example([(0.15, 0.15, 0.85), (0.85, 0.15, 0.85), (0.5, 0.5, 0.5), (0.4, 0.6, 0.4)])
def test_per_sample_thresholds_match_the_definition(rows: list[tuple[float, float, float]]) -> None:
    p, low, high = (np.array([row[i] for row in rows], np.float64) for i in range(3))
    routes = route(p, low, high)
    assert routes.dtype == np.uint8
    assert routes.tolist() == [expected(*row) for row in rows]


@settings(max_examples=200)
@given(st.lists(numbers, max_size=40), numbers, numbers)
def test_scalar_thresholds_match_the_definition(p: list[float], low: float, high: float) -> None:
    assert route(p, low, high).tolist() == [expected(value, low, high) for value in p]


@pytest.mark.parametrize(
    ("p", "low", "high", "answer"),
    [
        (0.149, 0.15, 0.85, NEGATIVE),
        (0.15, 0.15, 0.85, ESCALATE),
        (0.85, 0.15, 0.85, ESCALATE),
        (0.851, 0.15, 0.85, POSITIVE),
        (0.0, 0.15, 0.85, NEGATIVE),
        (1.0, 0.15, 0.85, POSITIVE),
        (NAN, 0.15, 0.85, ESCALATE),
        (INF, 0.15, 0.85, ESCALATE),
        (-INF, 0.15, 0.85, ESCALATE),
        (-0.01, 0.15, 0.85, ESCALATE),
        (1.01, 0.15, 0.85, ESCALATE),
        (0.0, 0.85, 0.15, ESCALATE),
        (1.0, 0.85, 0.15, ESCALATE),
        (0.0, NAN, 0.85, ESCALATE),
        (1.0, 0.15, NAN, ESCALATE),
        (0.4, 0.5, 0.5, NEGATIVE),
        (0.5, 0.5, 0.5, ESCALATE),
        (0.6, 0.5, 0.5, POSITIVE),
        (0.5, -INF, INF, ESCALATE),
        (0.5, 2.0, 3.0, NEGATIVE),
    ],
)
def test_table(p: float, low: float, high: float, answer: int) -> None:
    assert route([p], low, high).tolist() == [answer]


def test_comparison_is_made_in_float32() -> None:
    low = 0.15  # float32(0.15) is above 0.15
    just_below = np.nextafter(np.float32(low), np.float32(0))
    assert float(just_below) < float(np.float32(low))
    assert route(np.array([just_below]), low, 1.0).tolist() == [NEGATIVE]
    # A float64 that rounds to the threshold is a tie.
    assert route(np.array([low - 1e-12]), low, 1.0).tolist() == [ESCALATE]


def test_float16_scores_widen_exactly() -> None:
    p = np.array([0.1, 0.5, 0.9], np.float16)
    assert route(p, 0.15, 0.85).tolist() == [NEGATIVE, ESCALATE, POSITIVE]
    assert route(p, p.astype(np.float32), 1.0).tolist() == [ESCALATE] * 3


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2), max_size=60))
def test_compaction_keeps_order_and_loses_nothing(values: list[int]) -> None:
    index = compact(np.array(values, np.uint8))
    assert index.tolist() == [i for i, v in enumerate(values) if v == ESCALATE]


@settings(max_examples=200)
@given(st.floats(-1e30, 1e30))
@example(0.0)
@example(-104.0)
@example(89.0)
def test_sigmoid_is_close_to_the_formula(x: float) -> None:
    logit = as_float32(x)
    exact = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
    value = float(sigmoid([x])[0])
    assert 0.0 <= value <= 1.0
    assert value == pytest.approx(exact, rel=4e-7, abs=1e-44)


def test_sigmoid_of_bad_logits_is_nan_and_escalates() -> None:
    logits = [NAN, INF, -INF, 1e300]
    assert np.isnan(sigmoid(logits)).all()
    assert route(logits, 0.15, 0.85, from_logits=True).tolist() == [ESCALATE] * 4


def test_logits_are_routed_by_probability() -> None:
    # 0.5 and 2 as probabilities would be undecided and bad; as logits they are 0.62 and 0.88.
    assert route([-4.0, 0.5, 2.0], 0.15, 0.85, from_logits=True).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0.5, 0.1, 0.9), "p must have shape"),
        (([[0.5]], 0.1, 0.9), "p must have shape"),
        (([0.5, 0.5], [0.1], 0.9), "low must be a scalar"),
        (([0.5, 0.5], 0.1, [0.9] * 3), "high must be a scalar"),
        ((["a"], 0.1, 0.9), "p must hold real numbers"),
        (([None], 0.1, 0.9), "p must hold real numbers"),
        (([1j], 0.1, 0.9), "p must hold real numbers"),
        (([0.5], "low", 0.9), "low must hold real numbers"),
        (([[0.5], [0.1, 0.2]], 0.1, 0.9), "p must be an array"),
    ],
)
def test_misuse_is_named(arguments: tuple[object, object, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        route(*arguments)  # type: ignore[arg-type]


def test_inputs_are_not_changed() -> None:
    p = np.array([0.1, NAN, 0.9], np.float32)
    before = p.copy()
    route(p, 0.15, 0.85)
    np.testing.assert_array_equal(p, before)
