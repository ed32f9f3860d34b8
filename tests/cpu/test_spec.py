"""Options refuse what cannot work, by name, and survive a trip through JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn72engine.errors import OptionError
from sn72engine.spec import (
    BenchOptions,
    BuildOptions,
    CalibrationOptions,
    ExportOptions,
    Options,
    Preprocess,
    QuantizeOptions,
    RuntimeOptions,
    ShapeRange,
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
    VerifyOptions,
)


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
        (RuntimeOptions, {"threads": 0}, "threads=0"),
        (BenchOptions, {"repeats": 1}, "repeats=1"),
        (VerifyOptions, {"min_cosine": 2.0}, r"min_cosine=2\.0"),
    ],
)
def test_a_bad_value_is_named(kind: type[Options], values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(**values)


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
