from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sn72engine import affine

VALUES = st.floats(-1e4, 1e4, allow_nan=False, width=32)


def round_trip(values: np.ndarray, p: affine.Affine) -> np.ndarray:
    integers = np.clip(np.rint(values / p.scale) + p.zero, 0, 255)
    return (integers - p.zero) * np.float64(p.scale)


@given(VALUES, VALUES)
def test_covering_holds_its_range_to_half_a_step_and_zero_exactly(a, b):
    low, high = min(a, b), max(a, b)
    p = affine.covering(low, high)
    assert 0 <= p.zero <= 255
    assert round_trip(np.zeros(1), p)[0] == 0.0
    values = np.linspace(low, high, 101)
    # The zero point is rounded too, which moves either end by up to half a step.
    assert np.abs(round_trip(values, p) - values).max() <= 1.01 * float(p.scale) + 1e-12


@given(st.floats(0, 1e4, width=32))
def test_what_is_not_negative_gets_zero_point_0(high):
    assert affine.covering(0.0, high).zero == 0


@given(st.floats(-100, 0, width=32), st.floats(0, 100, width=32))
def test_inside_never_leaves_the_range_and_wastes_at_most_two_steps(low, high):
    p = affine.inside(low, high)
    if high - low > affine.SMALLEST_SCALE * 255:
        assert low <= p.low <= 0 <= p.high <= high
        assert max(high - p.high, p.low - low) <= 2.01 * float(p.scale)


def test_inside_uses_all_of_relu6():
    p = affine.inside(0.0, 6.0)
    assert p.zero == 0
    assert 5.9999 < p.high <= 6.0


def test_weights_round_half_to_even_and_saturate():
    weight = np.float32([[0.5, 1.5, 2.5, 500.0, -500.0]])
    integers = affine.quantize_weight(weight, np.float32([1.0]), 0)
    np.testing.assert_array_equal(integers, np.int8([[0, 2, 2, 127, -128]]))


def test_weight_scales_follow_their_axis():
    weight = np.float32([[10, 10], [10, 10]])
    scales = np.float32([1, 2])
    np.testing.assert_array_equal(affine.quantize_weight(weight, scales, 0), [[10, 10], [5, 5]])
    np.testing.assert_array_equal(affine.quantize_weight(weight, scales, 1), [[10, 5], [10, 5]])


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8),
    st.floats(2**-26, 10, width=32),
    st.floats(2**-26, 10, width=32),
)
def test_bias_fits_and_is_exact_to_half_a_unit(bias, input_scale, weight_scale):
    values = np.float32(bias)
    integers, scales = affine.quantize_bias(
        values, np.float32(input_scale), np.float32(weight_scale)
    )
    assert integers.dtype == np.int32
    assert np.abs(integers.astype(np.int64)).max() <= affine.BIAS_LIMIT + 64
    assert (scales >= np.float32(weight_scale)).all()
    units = np.float64(np.float32(input_scale)) * scales
    error = np.abs(integers * units - values)
    assert (error <= 0.5 * units + 1e-6 * np.abs(values)).all()


def test_a_normal_bias_leaves_the_weight_scale_alone():
    scales = np.float32([0.01, 0.02])
    _, found = affine.quantize_bias(np.float32([1, -1]), np.float32(0.02), scales)
    np.testing.assert_array_equal(found, scales)
