"""The gate passes good engines and refuses bad and slow ones, each with its figures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sn72engine.builder import build
from sn72engine.errors import InputError, VerificationError
from sn72engine.model import OnnxModel, write_record
from sn72engine.session import Session
from sn72engine.spec import BuildOptions, RuntimeOptions, ShapeRange, VerifyOptions
from sn72engine.store import Store
from sn72engine.verifier import VerifyReport, torch_reference, verify

Array = np.ndarray[Any, Any]

ACCURACY = VerifyOptions(min_speedup=None)
FEATURES, CLASSES = 16, 5
WEIGHTS = np.random.default_rng(0).standard_normal((FEATURES, CLASSES)).astype(np.float32)


def batches(count: int = 4, size: int = 8, seed: int = 1) -> list[Array]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((size, FEATURES)).astype(np.float32) for _ in range(count)]


def linear(batch: Array) -> Array:
    return np.asarray(batch @ WEIGHTS)


# ---- real engines ---------------------------------------------------------------------------


def save_linear(path: Path, *, scale: float | None = None, depth: int = 0) -> OnnxModel:
    """Write ``logits = pixel_values @ WEIGHTS``.

    With a ``scale`` it is an INT8 model whose input has that step; with a ``depth`` the input first
    passes through so many products with a large identity matrix, which cost time and change
    nothing.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights = [], {"w": WEIGHTS}
    tensor = "pixel_values"
    if scale is not None:
        step = np.abs(WEIGHTS).max() / 127
        weights = {
            "s": np.array(scale, np.float32),
            "z": np.array(0, np.int8),
            "ws": np.array(step, np.float32),
            "w8": np.rint(WEIGHTS / step).astype(np.int8),
        }
        nodes.append(helper.make_node("QuantizeLinear", [tensor, "s", "z"], ["q"], "quantize"))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"))
        nodes.append(helper.make_node("DequantizeLinear", ["w8", "ws", "z"], ["w"], "weights"))
        tensor = "d"
    if depth:
        width = 1024
        weights["wide"] = np.eye(FEATURES, width, dtype=np.float32)
        weights["same"] = np.eye(width, dtype=np.float32)
        weights["narrow"] = np.eye(width, FEATURES, dtype=np.float32)
        for name in ["wide", *["same"] * depth, "narrow"]:
            # Relu(x) - Relu(-x) = x: keeps the products from being folded into one.
            step = f"{tensor}_{name}"
            nodes.append(helper.make_node("MatMul", [tensor, name], [step]))
            nodes.append(helper.make_node("Neg", [step], [f"{step}_n"]))
            nodes.append(helper.make_node("Relu", [step], [f"{step}_p"]))
            nodes.append(helper.make_node("Relu", [f"{step}_n"], [f"{step}_m"]))
            tensor = f"{step}_x"
            nodes.append(helper.make_node("Sub", [f"{step}_p", f"{step}_m"], [tensor]))
    nodes.append(helper.make_node("MatMul", [tensor, "w"], ["logits"], "head"))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if scale is not None:
        write_record(proto, {"quantization": {"method": "max", "layers": 1}})
    onnx.save(proto, path)
    return OnnxModel.open(path)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[..., Session]]:
    store = Store(tmp_path / "cache")
    opened: list[Session] = []

    def make(**arguments: Any) -> Session:
        model = save_linear(tmp_path / f"model{len(opened)}.onnx", **arguments)
        options = BuildOptions(batch=ShapeRange(1, 8, 16), precision=model.precision)
        session = Session(build(model, options, store=store), RuntimeOptions(threads=1))
        opened.append(session)
        return session

    yield make
    for session in opened:
        session.close()


def test_engine_that_computes_the_same_passes(engine: Callable[..., Session]) -> None:
    report = verify(engine(), linear, batches(), options=ACCURACY)
    report.check()
    assert report.passed
    assert report.samples == 32
    (output,) = report.outputs
    assert output.name == "logits"
    assert output.cosine_min > 0.999999
    assert output.max_abs_error < 1e-4
    assert report.classes.agreement == 1.0
    assert report.speed == ()
    assert report.speedup is None


def test_int8_engine_with_good_scales_passes(engine: Callable[..., Session]) -> None:
    report = verify(engine(scale=4 / 127), engine(), batches(), options=ACCURACY)
    report.check()
    assert 0.99 < report.outputs[0].cosine_min < 0.999999  # it is quantised, and right


def test_int8_engine_with_wrong_scales_is_refused(engine: Callable[..., Session]) -> None:
    reference = engine()
    labels = np.concatenate([linear(batch).argmax(axis=1) for batch in batches()])
    report = verify(
        engine(scale=1.9),
        reference,
        batches(),
        labels=labels,
        options=VerifyOptions(min_speedup=None, min_worst_cosine=0.5, max_abs_error=0.5),
    )
    assert not report.passed
    with pytest.raises(VerificationError) as caught:
        report.check()
    text = str(caught.value)
    for figure in (
        f"mean cosine {report.outputs[0].cosine_mean:.5f}",
        "below the bound 0.98",
        f"cosine of sample {report.outputs[0].worst_sample} {report.outputs[0].cosine_min:.5f}",
        "below the bound 0.5",
        f"largest error {report.outputs[0].max_abs_error:.4g}",
        "above the bound 0.5",
        f"agreement {report.classes.agreement:.2%} (arg max)",
        "below the bound 95.00%",
        f"top-1 accuracy {report.classes.candidate_top1:.2%} against 100.00%",
        "more than the bound 0.5",
    ):
        assert figure in text
    assert len(report.failures) == 5


def test_engines_of_any_batch_range_are_compared(tmp_path: Path) -> None:
    model = save_linear(tmp_path / "m.onnx")
    store = Store(tmp_path / "store")
    ranges = ShapeRange(1, 1, 1), ShapeRange(2, 2, 3), ShapeRange(16, 16, 16)
    one, few, many = (Session(build(model, BuildOptions(batch=r), store=store)) for r in ranges)
    with one, few, many:
        for candidate, reference in ((one, few), (few, many), (many, linear)):
            report = verify(candidate, reference, batches(2, 5), options=ACCURACY)
            assert report.passed, report.failures
            assert report.samples == 10


def test_engine_slower_than_its_reference_is_refused(engine: Callable[..., Session]) -> None:
    slow, fast = engine(depth=4), engine()
    options = VerifyOptions(batch=8, repeats=5)
    report = verify(slow, fast, batches(), options=options)
    assert report.outputs[0].cosine_min > 0.9999  # right, only slow
    assert len(report.failures) == 1
    (speed,) = report.speed
    assert speed.reference == "reference"
    assert speed.speedup < 1
    assert report.speedup == speed.speedup == speed.reference_ms / speed.candidate_ms
    with pytest.raises(VerificationError, match=r"times as fast as reference \(.* ms against "):
        report.check()
    verify(fast, slow, batches(), options=options).check()
    verify(slow, fast, batches(), options=dataclasses.replace(options, min_speedup=0.0)).check()


def test_several_references_are_timed_in_one_run(engine: Callable[..., Session]) -> None:
    slow, fast = engine(depth=4), engine()
    references = {"fp32": slow, "fp16": fast}
    options = VerifyOptions(batch=3, repeats=3, min_speedup=1e-6)
    report = verify(linear, references, batches(count=1, size=2), options=options)
    assert [entry.reference for entry in report.speed] == ["fp32", "fp16"]
    assert len({entry.candidate_ms for entry in report.speed}) == 1
    refused = verify(
        slow, {"same": slow, "fp16": fast}, batches(), options=VerifyOptions(repeats=3)
    )
    assert any("times as fast as fp16" in failure for failure in refused.failures)


def test_torch_module_as_reference(engine: Callable[..., Session]) -> None:
    import torch

    module = torch.nn.Linear(FEATURES, CLASSES, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(WEIGHTS.T))
    with pytest.raises(InputError, match=r"Linear is in training mode; call \.eval\(\) first"):
        torch_reference(module)
    frozen = batches()
    for batch in frozen:
        batch.flags.writeable = False
    verify(engine(), torch_reference(module.eval()), frozen, options=ACCURACY).check()


def test_torch_outputs_of_every_form_become_arrays() -> None:
    import torch

    class Several(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": x.bfloat16(), "b": [x, (x.half(),)]}

    got = torch_reference(Several().eval())(np.ones((2, 3), np.float32))
    assert got["a"].dtype == np.float32
    assert got["b"][1][0].dtype == np.float16
    assert all(np.array_equal(x, np.ones((2, 3))) for x in (got["a"], got["b"][0]))


# ---- figures --------------------------------------------------------------------------------


def report_of(got: Array, wanted: Array, **arguments: Any) -> VerifyReport:
    """Verify recorded outputs, a few samples at a time."""
    arguments.setdefault("options", ACCURACY)
    index = np.arange(len(got))
    parts = np.array_split(index, max(1, len(index) // 3))
    return verify(lambda i: got[i], lambda i: wanted[i], parts, **arguments)


SMALL = st.floats(-100, 100, width=32)
MATRIX = hnp.array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=5).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=SMALL)] * 2)
)


@given(MATRIX)
def test_figures_are_those_of_the_whole_arrays(pair: tuple[Array, Array]) -> None:
    got, wanted = pair
    report = report_of(got, wanted)
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in pair)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.divide((a * b).sum(1), lengths, out=np.zeros(len(a)), where=lengths > 0)
    cosine[(a == 0).all(axis=1) & (b == 0).all(axis=1)] = 1.0
    (output,) = report.outputs
    assert output.cosine_min == pytest.approx(cosine.min(), abs=1e-9)
    assert output.cosine_mean == pytest.approx(cosine.mean(), abs=1e-9)
    assert output.worst_sample is not None
    assert cosine[output.worst_sample] == pytest.approx(cosine.min(), abs=1e-9)
    assert output.max_abs_error == np.abs(a - b).max()
    assert report.samples == len(got)
    if got.ndim == 2:
        assert report.classes.agreement == np.mean(got.argmax(1) == wanted.argmax(1))
        assert report.classes.decision == "arg max"
    else:
        assert report.classes.agreement is None
        assert report.classes.decision == "the first output gives no class"


@given(hnp.arrays(np.float64, (6, 4), elements=st.floats(-1e300, 1e300)))
def test_equal_outputs_pass_the_tightest_bounds(values: Array) -> None:
    options = VerifyOptions(
        min_cosine=1.0, max_abs_error=0.0, min_agreement=1.0, max_top1_drop=0.0, min_speedup=None
    )
    report_of(values, values.copy(), labels=np.zeros(6, int), options=options).check()


@given(hnp.arrays(np.float32, (9, 1), elements=SMALL), hnp.arrays(np.float32, 9, elements=SMALL))
def test_single_values_agree_by_side(got: Array, wanted: Array) -> None:
    wanted = wanted.reshape(9, 1)
    report = report_of(got, wanted, labels=np.arange(9) % 2)
    logits = bool(((wanted < 0) | (wanted > 1)).any())
    point = 0.0 if logits else 0.5
    assert report.classes.agreement == np.mean((got >= point) == (wanted >= point))
    assert report.classes.decision.startswith(f"side of {point:g}")
    top1 = np.mean((got >= point).ravel() == (np.arange(9) % 2 == 1))
    assert report.classes.candidate_top1 == pytest.approx(top1)
    assert report.outputs[0].cosine_over == "dataset"
    assert report.outputs[0].worst_sample is None


def test_single_value_named_a_logit_is_split_at_zero() -> None:
    values = np.array([[0.1], [0.2], [0.6]], np.float32)
    names = ({"probability": 0.5, "road_logit": 0.0}).items()
    for name, point in names:
        report = verify(
            lambda x, name=name: {name: x},  # type: ignore[misc]
            lambda x, name=name: {name: x + 0.35},  # type: ignore[misc]
            [values],
            options=ACCURACY,
        )
        assert report.classes.decision.startswith(f"side of {point:g}")
        assert report.classes.agreement == (1.0 if point == 0 else pytest.approx(2 / 3))


def test_single_logits_are_not_judged_by_the_sign_of_one_sample() -> None:
    wanted = np.linspace(-5, 5, 40)[:, None]
    wanted[20] = 1e-3
    got = wanted.copy()
    got[20] = -1e-3  # the cosine of this sample alone would be -1
    report = report_of(got, wanted)
    assert report.passed
    assert report.outputs[0].cosine_min > 0.9999
    assert report.classes.agreement == 39 / 40


def test_class_indices_agree_when_equal() -> None:
    wanted = np.array([3, 1, 2, 0])
    report = report_of(np.array([3, 1, 0, 0]), wanted, labels=wanted)
    assert report.classes.agreement == 0.75
    assert report.classes.candidate_top1 == 0.75
    assert report.classes.decision == "class index"


def test_bounds_are_kept_when_met_exactly() -> None:
    wanted = np.eye(2)[np.zeros(200, int)]
    got = wanted.copy()
    got[0] = got[0][::-1]  # 0.5 points of top-1 lost, 99.5% agreement
    options = dataclasses.replace(
        ACCURACY,
        min_cosine=0.995,
        min_worst_cosine=0.0,
        min_agreement=0.995,
        max_top1_drop=0.5,
        max_abs_error=1.0,
    )
    report = report_of(got, wanted, labels=np.zeros(200, int), options=options)
    assert report.passed, report.failures
    assert report.classes.candidate_top1 == 0.995
    for change in (
        {"min_cosine": 0.9951},
        {"min_worst_cosine": 1e-6},
        {"min_agreement": 0.996},
        {"max_top1_drop": 0.49},
        {"max_abs_error": 0.99},
    ):
        tighter = dataclasses.replace(options, **change)
        assert len(report_of(got, wanted, labels=np.zeros(200, int), options=tighter).failures) == 1


def test_engine_better_than_its_reference_loses_nothing() -> None:
    labels = np.arange(4) % 2
    right, wrong = np.eye(2)[labels], np.eye(2)[1 - labels]
    options = dataclasses.replace(ACCURACY, min_cosine=-1.0, min_agreement=0.0)
    assert report_of(right, wrong, labels=labels, options=options).passed
    assert not report_of(wrong, right, labels=labels, options=options).passed


# ---- outputs that cannot be judged ----------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["candidate", "reference"])
def test_not_finite_always_fails(bad: float, who: str) -> None:
    good = np.concatenate([linear(batch) for batch in batches()])
    broken = good.copy()
    broken[[7, 20], 2] = bad
    pair = (broken, good) if who == "candidate" else (good, broken)
    lax = VerifyOptions(min_cosine=-1.0, min_agreement=0.0, max_top1_drop=100.0, min_speedup=None)
    report = report_of(*pair, options=lax)
    assert report.failures == (
        f"output 'output0' of the {who} holds NaN or infinity in 2 samples, first in sample 7",
    )
    assert report.outputs[0].cosine_min == 1.0  # of the others


def test_nothing_finite_fails_and_is_still_plain_json() -> None:
    report = report_of(np.full((4, 3), np.nan), np.ones((4, 3)), options=ACCURACY)
    assert not report.passed
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["outputs"][0]["cosine_min"] is None
    assert values["passed"] is False


def test_outputs_without_elements_fail() -> None:
    report = report_of(np.ones((4, 0)), np.ones((4, 0)))
    assert not report.passed


@pytest.mark.parametrize("data", [[], [np.empty((0, FEATURES), np.float32)]])
def test_no_data_is_an_error(data: list[Array]) -> None:
    with pytest.raises(InputError, match="no data to verify with"):
        verify(linear, linear, data)


@pytest.mark.parametrize("count", [31, 33])
def test_labels_must_fit_the_data(count: int) -> None:
    with pytest.raises(InputError, match=f"{count} labels"):
        verify(linear, linear, batches(), labels=np.zeros(count, int), options=ACCURACY)


def test_labels_must_be_integers_and_have_classes_to_meet() -> None:
    for labels in (np.zeros(32), np.zeros((32, 1), int)):
        with pytest.raises(InputError, match="labels must be integers"):
            verify(linear, linear, batches(), labels=labels)
    maps = np.ones((4, 2, 2))
    with pytest.raises(InputError, match="labels need a first output of shape"):
        report_of(maps, maps, labels=np.zeros(4, int))


def test_outputs_must_match() -> None:
    with pytest.raises(InputError, match=r"gave shape \(8, 5\), the reference \(8, 4\)"):
        verify(linear, lambda x: linear(x)[:, :4], batches(), options=ACCURACY)
    with pytest.raises(InputError, match="candidate has 1 outputs, the reference 2"):
        verify(linear, lambda x: [linear(x), x], batches(), options=ACCURACY)
    with pytest.raises(InputError, match="for a batch of 8"):
        verify(lambda x: x[:4], lambda x: x[:4], batches(), options=ACCURACY)


def test_references_must_be_there_and_apart() -> None:
    with pytest.raises(InputError, match="nothing to compare with"):
        verify(linear, {}, batches())
    with pytest.raises(InputError, match="may not be named 'candidate'"):
        verify(linear, {"candidate": linear}, batches())


def test_outputs_are_matched_by_name_and_each_is_judged() -> None:
    def candidate(batch: Array) -> dict[str, Array]:
        return {"logits": linear(batch), "features": -batch}

    def reference(batch: Array) -> dict[str, Array]:
        return {"features": batch, "logits": linear(batch)}

    report = verify(candidate, reference, batches(), options=ACCURACY)
    assert [output.name for output in report.outputs] == ["logits", "features"]
    assert [output.cosine_min for output in report.outputs] == pytest.approx([1.0, -1.0])
    assert report.classes.agreement == 1.0
    (failure,) = report.failures
    assert "'features'" in failure
    unnamed = verify(candidate, lambda x: (linear(x), -x), batches(), options=ACCURACY)
    assert unnamed.passed
    assert [output.name for output in unnamed.outputs] == ["logits", "features"]


def test_data_is_read_once_and_not_kept() -> None:
    alive: list[int] = []

    def stream() -> Iterator[Array]:
        buffer = np.empty((8, FEATURES), np.float32)  # one buffer, as a decoder would reuse it
        for batch in batches(count=3):
            buffer[:] = batch
            alive.append(1)
            yield buffer

    seen: list[Array] = []

    def remember(batch: Array) -> Array:
        seen.append(batch.copy())
        return linear(batch)

    options = VerifyOptions(batch=12, repeats=3, min_speedup=0.0)
    report = verify(remember, linear, stream(), options=options)
    assert report.samples == 24
    assert alive == [1, 1, 1]
    first = np.concatenate(batches(count=3))[:12]
    assert all(np.array_equal(timed, first) for timed in seen[3:])
    assert len(seen) > 3 + 3


def test_short_data_is_repeated_for_the_timed_batch() -> None:
    sizes: list[int] = []

    def remember(batch: Array) -> Array:
        sizes.append(len(batch))
        return linear(batch)

    options = VerifyOptions(batch=7, repeats=3, min_speedup=0.0)
    verify(remember, linear, batches(count=1, size=3), options=options)
    assert sizes[0] == 3
    assert set(sizes[1:]) == {7}


def test_report_as_text_and_json(engine: Callable[..., Session]) -> None:
    labels = np.zeros(32, int)
    report = verify(
        engine(),
        linear,
        batches(),
        labels=labels,
        options=VerifyOptions(repeats=3, min_speedup=1e-9),
    )
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["passed"] is True
    assert values["failures"] == []
    assert values["candidate_top1"] == report.classes.candidate_top1
    assert values["speed"][0]["speedup"] == report.speedup
    assert VerifyOptions.from_dict(values["options"]) == report.options
    text = report.render()
    for part in ("passed: 32 samples", "logits: cosine", "agreement 100.00%", "top-1", "times"):
        assert part in text
