"""The first layer where two graphs part is the one that differs, however it is searched for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sn72engine import cli
from sn72engine.builder import build
from sn72engine.divergence import CompareOptions, compare
from sn72engine.errors import InputError, OptionError, SessionError
from sn72engine.graph_order import ancestors, feeds, made_tensors
from sn72engine.half import to_half
from sn72engine.model import OnnxModel
from sn72engine.spec import BuildOptions, ShapeRange
from sn72engine.store import Store
from sn72engine.tensor_error import TensorError
from sn72engine.tensor_probe import TensorProbe
from tests import quantized_models, tiny_models

#: Weight of the transformer of :mod:`tests.tiny_models` -> the layer that reads it.
READERS = {
    "patch": "p",
    "one": "n",
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "quarter": "s",
    "head": "logits",
}


def with_weight(source: OnnxModel, target: Path, name: str, change: object) -> Path:
    """A copy in which one weight went through ``change``."""
    proto = onnx.load(source.path)
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    values = np.asarray(change(onnx.numpy_helper.to_array(tensor)), np.float32)  # type: ignore[operator]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, target)
    return target


@pytest.fixture
def model(tmp_path: Path) -> OnnxModel:
    return tiny_models.transformer(tmp_path / "a.onnx")


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    weight=st.sampled_from(sorted(READERS)),
    factor=st.sampled_from([-1.0, 0.5, 1.01, 3.0]),
    search=st.sampled_from(["all", "bisect"]),
    memory=st.sampled_from([1, 20_000, 1 << 30]),
)
# Queries and keys change their signs, and their product does not: a right tensor after wrong ones.
@example(weight="one", factor=-1.0, search="bisect", memory=20_000)
def test_the_layer_with_the_changed_weight_is_named(
    model: OnnxModel, tmp_path: Path, weight: str, factor: float, search: str, memory: int
) -> None:
    other = with_weight(model, tmp_path / "b.onnx", weight, lambda w: w * factor)
    options = CompareOptions(search=search, memory_bytes=memory, samples=2)  # type: ignore[arg-type]
    report = compare(model, other, options=options)
    assert report.first_bad is not None
    assert report.first_bad.layer == READERS[weight]
    assert report.first_bad.inherited == 0
    assert report.parted


def test_one_element_of_one_weight_is_enough(model: OnnxModel, tmp_path: Path) -> None:
    def change(weight: np.ndarray) -> np.ndarray:
        weight = weight.copy()
        weight[3, 5] += 0.5
        return weight

    report = compare(model, with_weight(model, tmp_path / "b.onnx", "wk", change))
    assert report.first_bad is not None
    assert report.first_bad.layer == "k"
    # A sibling that comes later in the order is not blamed, nor called wrong.
    assert {r.layer: r.parted for r in report.layers}["v"] is False


def test_bisecting_reads_fewer_tensors_and_finds_the_same(tmp_path: Path) -> None:
    depth = 60
    rng = np.random.default_rng(0)
    body = "h0 = Add(x, w0)"
    for i in range(1, depth):
        body += f"h{i} = Tanh(h{i - 1})" if i % 2 else f"h{i} = Add(h{i - 1}, w{i})"
    weights = {f"w{i}": rng.standard_normal(4).astype(np.float32) for i in range(0, depth, 2)}
    graph = f"deep (float[N, 4] x) => (float[N, 4] h{depth - 1}) {{ {body} }}"
    deep = tiny_models.save(tmp_path / "deep.onnx", graph, weights)
    other = with_weight(deep, tmp_path / "other.onnx", "w42", lambda w: w + 1)
    found = {}
    for search in ("all", "bisect"):
        report = compare(deep, other, options=CompareOptions(search=search))  # type: ignore[arg-type]
        assert report.first_bad is not None
        found[search] = (report.first_bad.layer, len(report.layers))
    assert found["all"] == ("h42", depth)
    assert found["bisect"][0] == "h42"
    assert found["bisect"][1] < depth / 2


def test_equal_files_do_not_part_and_backends_agree(model: OnnxModel) -> None:
    same = compare(model, model)
    assert not same.parted
    assert {layer.error.relative for layer in same.layers} == {0.0}
    names = "p r t n q k v kt qk s a o h m logits"
    assert " ".join(layer.layer for layer in same.layers) == names
    across = compare(model, model, options=CompareOptions(other_backend="openvino"))
    assert not across.parted, across.render()
    assert 0 < across.layers[-1].error.relative < 1e-5


def test_float16_is_held_to_its_own_bound(model: OnnxModel, tmp_path: Path) -> None:
    to_half(model.path, tmp_path / "half.onnx")
    report = compare(model, tmp_path / "half.onnx")
    assert report.max_relative_error == 2e-2
    assert not report.parted, report.render()
    assert len(report.layers) == 15
    strict = compare(model, tmp_path / "half.onnx", options=CompareOptions(max_relative_error=1e-6))
    assert strict.first_bad is not None
    assert strict.first_bad.layer.startswith(("p", "Conv"))


def test_float_against_quantised(tmp_path: Path) -> None:
    model = tiny_models.convolution(tmp_path / "a.onnx")
    int8 = tiny_models.quantised(tmp_path / "b.onnx")
    images = np.random.default_rng(0).standard_normal((6, 3, 16, 16)).astype(np.float32)
    report = compare(model, int8, images)
    assert report.max_relative_error == 0.3
    assert not report.parted
    assert [layer.tensor for layer in report.layers] == ["c", "r", "g", "f", "logits"]
    assert 1e-3 < report.layers[0].error.relative < 0.05
    broken = with_weight(int8, tmp_path / "c.onnx", "ks", lambda s: s * 2)
    report = compare(model, broken, images)
    assert report.first_bad is not None
    assert report.first_bad.layer == "c"
    assert report.first_bad.error.relative == pytest.approx(1.0, abs=0.05)


def test_what_our_quantiser_writes_has_every_name_of_the_float_model() -> None:
    model = quantized_models.exported("transformer")
    images = quantized_models.images(2, seed=7)
    report = compare(model, quantized_models.quantized("transformer"), images)
    assert report.unmeasured == 0
    assert not report.parted, report.render()
    assert 0 < max(layer.error.relative for layer in report.layers) < 0.1


def test_formats_that_no_cpu_has_are_emulated() -> None:
    model = quantized_models.exported("transformer")
    images = quantized_models.images(2, seed=7)
    fp8 = quantized_models.quantized("transformer", precision="fp8")
    report = compare(model, fp8, images)
    assert not report.parted, report.render()
    assert 0.01 < max(layer.error.relative for layer in report.layers) < 0.2
    with pytest.raises(InputError, match="is fp8, which OpenVINO computes wrongly"):
        compare(model, fp8, images, CompareOptions(other_backend="openvino"))


def test_engines_of_two_backends(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    batch = ShapeRange(1, 2, 4)
    source = tiny_models.quantised(tmp_path / "q.onnx")
    lowered = build(source, BuildOptions(batch=batch), store=store)
    other = build(source, BuildOptions(backend="openvino", batch=batch), store=store)
    exact = build(
        tiny_models.convolution(tmp_path / "f.onnx"), BuildOptions(batch=batch), store=store
    )
    for engine in (lowered, other):
        report = compare(exact, engine.folder, options=CompareOptions(batch=3, samples=6))
        assert report.samples == 6
        assert not report.parted, report.render()
        assert engine.manifest.backend in report.names[1]
    with pytest.raises(InputError, match=r"batch=8 lies outside .*1\.\.4"):
        compare(exact, other, options=CompareOptions(batch=8))


def test_not_a_number_is_a_parting_with_a_reason(tmp_path: Path) -> None:
    def graph(op: str) -> str:
        return f"""g (float[N, 4] x) => (float[N, 4] y) {{
            a = Add(x, one)
            b = {op}(a)
            y = Add(b, one)
        }}"""

    weights = {"one": np.ones(1, np.float32)}
    good = tiny_models.save(tmp_path / "a.onnx", graph("Abs"), weights)
    bad = tiny_models.save(tmp_path / "b.onnx", graph("Log"), weights)
    inputs = np.full((1, 4), -3, np.float32)
    report = compare(good, bad, inputs)
    assert report.first_bad is not None
    assert report.first_bad.tensor == "b"
    assert "NaN or infinity in b only, 4 values" in report.verdict
    assert report.layers[-1].added == 0  # it inherits what is infinite
    json.dumps(report.to_dict(), allow_nan=False)
    report.save_plot(tmp_path / "p.png")
    # The same NaN in both, as masks have it, is no difference.
    assert not compare(bad, bad, inputs).parted


def test_another_shape_is_a_parting_with_a_reason(tmp_path: Path) -> None:
    def graph(axis: int) -> str:
        return f"""g (float[N, 4, 2] x) => (float[N, 2] y) {{
            t = Transpose <perm = [0, {axis}, {3 - axis}]> (x)
            r = ReduceSum <keepdims = 0> (t, axis)
            s = Mul(r, half)
            y = Gemm(s, {"w" if axis == 1 else "v"})
        }}"""

    weights = {
        "axis": np.array([1]),
        "half": np.full(1, 0.5, np.float32),
        "w": np.ones((2, 2), np.float32),
        "v": np.ones((4, 2), np.float32),
    }
    report = compare(
        tiny_models.save(tmp_path / "a.onnx", graph(1), weights),
        tiny_models.save(tmp_path / "b.onnx", graph(2), weights),
    )
    assert report.first_bad is not None
    assert report.first_bad.layer == "t"
    assert report.first_bad.error.problem == "shape (1, 2, 4) against (1, 4, 2)"


def test_what_cannot_be_compared_is_refused(tmp_path: Path, model: OnnxModel) -> None:
    linear = tiny_models.linear(tmp_path / "linear.onnx")
    with pytest.raises(InputError, match=r"inputs pixel_values.*linear\.onnx.* x: rename"):
        compare(model, linear)
    renamed = onnx.load(model.path)
    renamed.graph.node[-1].output[0] = renamed.graph.output[0].name = "answer"
    onnx.save(renamed, tmp_path / "renamed.onnx")
    with pytest.raises(InputError, match=r"outputs logits, .* answer: rename"):
        compare(model, tmp_path / "renamed.onnx")
    with pytest.raises(InputError, match=r"'pixel_values' has shape \(1, 5\)"):
        compare(model, model, np.zeros((1, 5), np.float32))
    with pytest.raises(InputError, match="same number of them"):
        compare(model, model, np.zeros((0, 3, 16, 16), np.float32))
    with pytest.raises(InputError, match="there is no batch"):
        compare(model, model, [])
    with pytest.raises(InputError, match="no such ONNX file"):
        compare(model, tmp_path / "absent.onnx")
    fixed = tiny_models.linear(tmp_path / "fixed.onnx", batch=2)
    with pytest.raises(InputError, match="takes batch 2 only"):
        compare(fixed, fixed)
    two = tiny_models.two_by_two(tmp_path / "two.onnx")
    with pytest.raises(InputError, match="give arrays by name"):
        compare(two, two, np.zeros((1, 4), np.float32))
    given = {"a": np.ones((2, 4), np.float32), "b": np.ones((2, 4), np.float32)}
    assert compare(two, two, given).samples == 2
    with pytest.raises(OptionError, match="search='deep'"):
        CompareOptions(search="deep")  # type: ignore[arg-type]


def test_weights_that_an_inner_graph_reads_are_there(tmp_path: Path) -> None:
    graph = """g (float[N, 8] x) => (float[N, 8] y) {
        s = ReduceSum <keepdims = 0> (x)  d = Cast <to = 9> (s)  y = If (d) <
            then_branch = t () => (float[N, 8] p) { p = MatMul (x, w) },
            else_branch = e () => (float[N, 8] q) { q = Mul (x, x) }> }"""
    weights = {"w": np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)}
    model = tiny_models.save(tmp_path / "m.onnx", graph, weights)
    other = with_weight(model, tmp_path / "b.onnx", "w", lambda w: w * 2)
    assert not compare(model, model).parted
    report = compare(model, other)
    assert report.first_bad is not None
    assert report.first_bad.op == "If"


def test_files_without_a_float_tensor_in_common_are_refused(tmp_path: Path) -> None:
    graph = "g (float[N, 8] x) => (int64[2, K] y) { y = NonZero (x) }"
    model = tiny_models.save(tmp_path / "m.onnx", graph, {})
    with pytest.raises(InputError, match="no floating-point tensor of one name"):
        compare(model, model)


@pytest.mark.parametrize("kind", ["array", "batches", "random"])
@pytest.mark.parametrize(("batch", "samples", "used"), [(6, 4, 6), (3, 4, 3), (2, 4, 4)])
def test_samples_come_in_whole_batches_of_which_there_is_one(
    tmp_path: Path, kind: str, batch: int, samples: int, used: int
) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    array = np.random.default_rng(0).standard_normal((9, 3, 16, 16)).astype(np.float32)
    inputs = {"array": array, "batches": [array[:1], array[1:]], "random": None}[kind]
    options = CompareOptions(batch=batch, samples=samples)
    report = compare(model, model, inputs, options)
    assert (report.samples, report.parted) == (used, False)


def test_tensorrt_needs_the_onnx_file_and_a_gpu(tmp_path: Path) -> None:
    import torch

    model = tiny_models.convolution(tmp_path / "m.onnx")
    options = BuildOptions(
        backend="tensorrt_rtx", target="sm_89", precision="fp16", batch=ShapeRange(1, 1, 1)
    )
    engine = build(model, options, store=Store(tmp_path / "store"))
    with pytest.raises(InputError, match="give the ONNX file that it was built from"):
        compare(model, engine)
    if not torch.cuda.is_available():
        with pytest.raises(SessionError, match="runs on a GPU and there is none"):
            compare(model, model, options=CompareOptions(other_backend="tensorrt_rtx"))


def test_a_fusion_that_marking_prevents_is_called_that(
    model: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What runs unmarked is another file here, as a wrong fusion would have it.
    other = with_weight(model, tmp_path / "b.onnx", "wv", lambda w: w * 2)
    opened = TensorProbe._open

    def run(self: TensorProbe, tensors: object) -> object:
        if tensors or "b.onnx" not in self.name:
            self = good if "b.onnx" in self.name else self
        return opened(self, tensors)  # type: ignore[arg-type]

    with TensorProbe(model) as good:
        monkeypatch.setattr(TensorProbe, "_open", run)
        report = compare(model, other)
    assert report.parted
    assert report.first_bad is None
    assert "a fusion that marking prevents" in report.verdict


def test_the_text_shows_the_first_bad_layer_among_many(model: OnnxModel, tmp_path: Path) -> None:
    report = compare(model, with_weight(model, tmp_path / "b.onnx", "wk", lambda w: w * 2))
    shown = report.render(rows=14)
    assert ">>" in shown
    assert "they part at layer 'k' (MatMul)" in shown
    assert "..." in shown
    assert len(report.render(rows=100).splitlines()) == 6 + len(report.layers)


@given(st.data())
def test_feeds_follows_the_graph_through_what_is_left_out(data: st.DataObject) -> None:
    """Against a direct search over a random graph."""
    count = data.draw(st.integers(2, 12))
    nodes, sources = [], {}
    for index in range(count):
        reads = data.draw(st.lists(st.integers(-1, index - 1), min_size=1, max_size=3))
        sources[index] = set(reads)
        names = ["x" if read < 0 else f"t{read}" for read in reads]
        nodes.append(onnx.helper.make_node("Sum", names, [f"t{index}"]))
    x = onnx.helper.make_tensor_value_info("x", 1, ["N"])
    y = onnx.helper.make_tensor_value_info(f"t{count - 1}", 1, ["N"])
    proto = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y]))
    assert [m.tensor for m in made_tensors(proto)] == [f"t{i}" for i in range(count)]
    chosen = data.draw(st.sets(st.integers(0, count - 1)))
    found = feeds(proto, {f"t{i}" for i in chosen})

    def nearest(index: int) -> set[str]:
        near: set[str] = set()
        for read in sources[index]:
            if read >= 0:
                near |= {f"t{read}"} if read in chosen else nearest(read)
        return near

    assert found == {f"t{i}": frozenset(nearest(i)) for i in chosen}

    def above(index: int) -> set[int]:
        return {r for s in sources[index] if s >= 0 for r in {s} | above(s)}

    last = count - 1
    if last in chosen:
        wanted = {f"t{i}" for i in above(last) & chosen}
        assert ancestors([f"t{last}"], found) == wanted


@given(
    st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=1, max_size=8),
    st.floats(0.25, 4.0),
)
def test_error_of_a_scaled_tensor(values: list[float], factor: float) -> None:
    a = np.array(values, np.float64)
    error = TensorError.between(a, a * factor)
    if factor == 1 or not a.any():
        assert error.relative == 0
    else:
        assert error.relative == pytest.approx(abs(factor - 1), rel=1e-6)
        assert error.cosine == pytest.approx(1)
        assert error.largest == pytest.approx(np.abs(a).max() * abs(factor - 1), rel=1e-6)
    assert TensorError.between(a, -a).cosine in (pytest.approx(-1), 1.0)


def test_the_command(tmp_path: Path, model: OnnxModel, capsys: pytest.CaptureFixture[str]) -> None:
    other = with_weight(model, tmp_path / "b.onnx", "wv", lambda w: w * 2)
    data = tmp_path / "x.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32))
    picture = tmp_path / "error.png"
    words = ["compare", model.path, other, "--data", data, "--samples", 3, "--plot", picture]
    assert cli.main([*map(str, words), "--json"]) == 5
    report = json.loads(capsys.readouterr().out)
    assert report["first_bad"]["layer"] == "v"
    assert report["samples"] == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    words = ["compare", model.path, model.path, "--data", data, "--samples", 1, "--batch", 4]
    assert cli.main([*map(str, words), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 4
    assert cli.main(["compare", str(model.path), str(model.path), "--search", "bisect"]) == 0
    assert "the outputs agree" in capsys.readouterr().out
    assert cli.main(["compare", str(model.path), str(model.path)]) == 0
    assert "no layer parts (15 compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        ([1, 2, 3], [1, np.nan, np.inf], "b only, 2 values"),
        ([np.nan, 2, 3], [1, 2, 3], "a only, 1 values"),
        ([np.inf, 2, 3], [-np.inf, 2, 3], "both, not alike, 1 values"),
        ([np.nan, 2, np.inf], [1, np.nan, np.inf], "both, not alike, 2 values"),
    ],
)
def test_who_holds_what_is_not_finite_is_told(a: list[float], b: list[float], where: str) -> None:
    assert TensorError.between(np.float32(a), np.float32(b)).problem.endswith(f"in {where}")
