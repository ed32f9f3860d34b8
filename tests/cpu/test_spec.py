"""Options refuse what cannot work, by name, and survive a trip through JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn72engine.errors import OptionError
from sn72engine.spec import (
    DINOV3_BATCH,
    BenchOptions,
    BuildOptions,
    CalibrationOptions,
    ExportOptions,
    Options,
    Preprocess,
    QuantizeOptions,
    RuntimeOptions,
    ShapeRange,
    TensorRTOptions,
    VerifyOptions,
    check_number,
)

ALL = (
    BenchOptions,
    BuildOptions,
    CalibrationOptions,
    ExportOptions,
    Preprocess,
    QuantizeOptions,
    RuntimeOptions,
    ShapeRange,
    TensorRTOptions,
    VerifyOptions,
)
RTX = {"backend": "tensorrt_rtx"}


@pytest.mark.parametrize("kind", ALL)
def test_defaults_survive_json(kind: type[Options]) -> None:
    made = kind()
    assert kind.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@given(st.integers(1, 64), st.integers(0, 64), st.integers(0, 64))
def test_any_ordered_range_survives_json(low: int, more: int, most: int) -> None:
    batch = ShapeRange(low, low + more, low + more + most)
    options = BuildOptions(batch=batch)
    assert BuildOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert low in batch
    assert low + more + most in batch
    assert low - 1 not in batch


@pytest.mark.parametrize("kind", ALL)
def test_an_unknown_key_is_named(kind: type[Options]) -> None:
    with pytest.raises(OptionError, match=f"{kind.__name__}: unknown key 'bogus'"):
        kind.from_dict({"bogus": 1})


def test_a_key_in_a_list_is_named_with_its_place() -> None:
    with pytest.raises(OptionError, match=r"build\.profiles\[1\]: unknown key 'mni'"):
        BuildOptions.from_dict({"profiles": [{}, {"mni": 1}]}, where="build")


def test_a_nested_key_is_named_with_its_path() -> None:
    with pytest.raises(OptionError, match=r"build\.batch: .*min <= opt <= max"):
        BuildOptions.from_dict({"batch": {"min": 4, "opt": 2, "max": 8}}, where="build")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ShapeRange, {"min": 0}, "min=0"),
        (ShapeRange, {"min": True}, "min=True"),
        (Preprocess, {"height": 0}, "height=0"),
        (Preprocess, {"std": (0.0, 1.0, 1.0)}, "std=0.0"),
        (Preprocess, {"mean": (float("nan"), 0.0, 0.0)}, "mean=nan"),
        (Preprocess, {"mean": (0.0, 0.0)}, "mean=.* three numbers"),
        (Preprocess, {"fit": "stretch"}, "fit='stretch' is not one of"),
        (ExportOptions, {"parity_batches": ()}, "parity_batches"),
        (ExportOptions, {"input_names": ("a", "a")}, "input_names"),
        (CalibrationOptions, {"batch_size": 0}, "batch_size=0"),
        (CalibrationOptions, {"limit": 0}, "limit=0"),
        (QuantizeOptions, {"method": "average"}, "method='average'"),
        (QuantizeOptions, {"op_types": ()}, "quantise nothing"),
        (BuildOptions, {"backend": "magic"}, "backend='magic'"),
        (BuildOptions, {"target": "gpu"}, "target='gpu'"),
        (BuildOptions, {"target": "sm_89"}, "needs backend='tensorrt_rtx'"),
        (BuildOptions, {"target": "cpu", "backend": "tensorrt"}, "needs backend='onnxruntime'"),
        (BuildOptions, {"optimization_level": 9}, "optimization_level=9"),
        (BuildOptions, {"target": "sm_89,sm_"}, "must be 'cpu', 'cuda', or like"),
        (BuildOptions, {"target": "sm_89,cpu"}, "must be 'cpu', 'cuda', or like"),
        (BuildOptions, {**RTX, "target": "sm_89,sm_89"}, "names one card twice"),
        (BuildOptions, {"profiles": (ShapeRange(),)}, "only TensorRT tunes ranges separately"),
        (
            BuildOptions,
            {**RTX, "profiles": (ShapeRange(1, 8, 16),)},
            "reach from 1 to 16, but batch=1..32",
        ),
        (
            BuildOptions,
            {**RTX, "profiles": (ShapeRange(1, 1, 1), ShapeRange(3))},
            "must begin at 2 or before",
        ),
        (
            BuildOptions,
            {**RTX, "profiles": (ShapeRange(), ShapeRange())},
            "must begin at 33 or before, and end after",
        ),
        (
            BuildOptions,
            {"tensorrt": TensorRTOptions(tiling="fast")},
            "^tensorrt.tiling='fast' is for backend='tensorrt'",
        ),
        (TensorRTOptions, {"tiling": "most"}, "tiling='most'"),
        (TensorRTOptions, {"tactic_bytes": 5}, "tactic_bytes=5"),
        (TensorRTOptions, {"exclude_lean_runtime": True}, "needs version_compatible=True"),
        (TensorRTOptions, {"strip_weights": True}, "needs refit='identical'"),
        (
            TensorRTOptions,
            {"user_allocation": True, "weight_streaming": True},
            "exclude each other",
        ),
        (TensorRTOptions, {"plugins": ["gelu"]}, "plugins='gelu'"),
        (RuntimeOptions, {"shape_kernels": "soon"}, "shape_kernels='soon'"),
        (RuntimeOptions, {"weight_streaming_bytes": -1}, "weight_streaming_bytes=-1"),
        (RuntimeOptions, {"threads": 0}, "threads=0"),
        (BenchOptions, {"repeats": 1}, "repeats=1"),
        (VerifyOptions, {"min_cosine": 2.0}, r"min_cosine=2\.0"),
    ],
)
def test_a_bad_value_is_named(kind: type[Options], values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(**values)


def test_profiles_survive_json() -> None:
    ranges = (ShapeRange(1, 1, 1), ShapeRange(1, 16, 32))
    options = BuildOptions(
        backend="tensorrt",
        batch=DINOV3_BATCH,
        profiles=ranges,
        tensorrt=TensorRTOptions(tiling="full", tactic_sources=("JIT_CONVOLUTIONS",)),
    )
    assert BuildOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True).map(sorted))
def test_ranges_that_follow_one_another_are_profiles(ends: list[int]) -> None:
    starts = [1, *(end + 1 for end in ends)]
    ranges = tuple(ShapeRange(start, end, end) for start, end in zip(starts, ends, strict=False))
    whole = ShapeRange(1, ends[-1], ends[-1])
    assert BuildOptions(backend="tensorrt", batch=whole, profiles=ranges).profiles == ranges
    if len(ranges) > 2:
        with pytest.raises(OptionError, match="leave no gap"):
            BuildOptions(backend="tensorrt", batch=whole, profiles=(ranges[0], *ranges[2:]))


def test_several_cards_have_one_order() -> None:
    options = BuildOptions(backend="tensorrt_rtx", target="sm_120,sm_86,sm_89")
    assert options.resolved_target == "sm_86,sm_89,sm_120"


def test_the_target_defaults_to_what_the_backend_runs_on() -> None:
    assert BuildOptions().resolved_target == "cpu"
    assert BuildOptions(backend="tensorrt").resolved_target == "cuda"
    assert BuildOptions(backend="tensorrt_rtx", target="sm_89").resolved_target == "sm_89"


@pytest.mark.parametrize(("layout", "shape"), [("nchw", (3, 8, 6)), ("nhwc", (8, 6, 3))])
def test_the_sample_shape_follows_the_layout(layout: str, shape: tuple[int, ...]) -> None:
    assert Preprocess(height=8, width=6, layout=layout).shape == shape  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bounds", "wanted"),
    [((), "number$"), ((0.0,), "number >= 0.0$"), ((0.0, 1.0), r"number in \[0.0, 1.0\]$")],
)
def test_a_number_out_of_range_says_its_range(bounds: tuple[float, ...], wanted: str) -> None:
    with pytest.raises(OptionError, match=wanted):
        check_number("deadline", math.nan, *bounds)
