"""Automatic mixed precision: the search, the costs, and whole runs on a small network."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn72engine import cli
from sn72engine.calibration import CalibrationData, batches
from sn72engine.errors import InputError, OptionError, QuantizationError
from sn72engine.mixing import MixOptions, Mixture, mix, sensitivity
from sn72engine.mixing.cost import BYTES, CARDS, Card, Product, products
from sn72engine.mixing.search import Point, assignment, furthest, hull, order
from sn72engine.model import OnnxModel
from sn72engine.quantizer import quantize
from sn72engine.spec import CalibrationOptions, QuantizeOptions, VerifyOptions
from tests import tiny_models, tiny_modules
from tests.quantized_models import data, exported

WIDTH, LAYERS = 32, 4

#: The layer whose input has one value that dwarfs the others: one scale for all spoils it.
SPOILT = 2

FLOAT = Point("float", 1.0, 0.0)


def points() -> st.SearchStrategy[list[Point]]:
    """Forms of one layer in up to three formats, costs and damages on a coarse grid for ties."""
    one = st.tuples(st.integers(1, 12), st.integers(0, 12))
    return st.lists(one, min_size=0, max_size=3).map(
        lambda pairs: [Point(f"f{i}", c / 8, d / 16) for i, (c, d) in enumerate(pairs)]
    )


@given(st.lists(points(), min_size=1, max_size=4))
def test_every_prefix_of_the_order_is_the_cheapest_for_its_damage(forms: list[list[Point]]) -> None:
    layers = {f"layer{i}": (FLOAT, others) for i, others in enumerate(forms)}
    steps = order(layers)
    free = sum(step.rate == math.inf for step in steps)  # taken first, whatever the budget
    for count in range(free, len(steps) + 1):
        chosen = assignment(steps[:count])
        held = [
            next(p for p in (FLOAT, *others) if p.precision == chosen.get(name, "float"))
            for name, (_, others) in layers.items()
        ]
        damage, cost = sum(p.damage for p in held), sum(p.cost for p in held)
        cheapest = min(
            sum(p.cost for p in choice)
            for choice in itertools.product(*((FLOAT, *others) for _, others in layers.values()))
            if sum(p.damage for p in choice) <= damage
        )
        assert cost == pytest.approx(cheapest, abs=1e-12)


@given(points())
def test_a_hull_falls_in_cost_and_in_rate(others: list[Point]) -> None:
    kept = hull(FLOAT, others)
    costs = [point.cost for point in kept]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)
    rates = [step.rate for step in order({"layer": (FLOAT, others)})]
    assert rates == sorted(rates, reverse=True)


def test_a_format_without_a_finite_damage_is_never_taken() -> None:
    others = [Point("nan", 0.1, math.nan), Point("inf", 0.2, math.inf), Point("good", 0.5, 0.1)]
    assert [point.precision for point in hull(FLOAT, others)] == ["float", "good"]


@given(st.integers(0, 200), st.integers(0, 200))
def test_furthest_finds_the_last_that_holds(count: int, last: int) -> None:
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        return number <= last

    assert furthest(count, holds) == min(count, last)
    assert len(asked) == len(set(asked)) <= count.bit_length() + 1
    assert 0 not in asked


def network(path: Path, spoilt: int = SPOILT) -> OnnxModel:
    """``LAYERS`` square products with a ReLU between them, and a narrow one to 4 logits.

    Before layer ``spoilt`` one value grows 3000 times, and its weight shrinks as much.
    """
    rng = np.random.default_rng(5)
    weights = {
        f"w{i}": (rng.standard_normal((WIDTH, WIDTH)) * math.sqrt(2 / WIDTH)).astype(np.float32)
        for i in range(LAYERS)
    }
    weights["w_last"] = (rng.standard_normal((WIDTH, 4)) / 4).astype(np.float32)
    factor = np.ones(WIDTH, np.float32)
    factor[3] = 3000.0
    weights["factor"] = factor
    weights[f"w{spoilt}"] /= factor[:, None]
    lines, source = [], "x"
    for i in range(LAYERS):
        if i == spoilt:
            lines.append(f"grown = Mul({source}, factor)")
            source = "grown"
        lines += [f"p{i} = MatMul({source}, w{i})", f"r{i} = Relu(p{i})"]
        source = f"r{i}"
    lines.append(f"logits = MatMul({source}, w_last)")
    graph = f"network (float[N, {WIDTH}] x) => (float[N, 4] logits) {{ {chr(10).join(lines)} }}"
    model = tiny_models.save(path, graph, weights)
    proto = onnx.load(path)
    for node in proto.graph.node:
        node.name = f"node_{node.output[0]}"
    onnx.save(proto, path)
    return OnnxModel.open(model.path)


def samples(seed: int, count: int = 48) -> CalibrationData:
    rng = np.random.default_rng(seed)
    rows = list(rng.standard_normal((count, WIDTH)).astype(np.float32))
    return batches(rows, None, CalibrationOptions(batch_size=16))


BOUND = VerifyOptions(min_cosine=0.999, min_agreement=0.9, min_speedup=None)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixing")
    options = MixOptions(formats=("fp8", "int8"), minimise="bytes", verify=BOUND)
    return mix(network(folder / "net.onnx"), samples(1), samples(2), options, folder / "mix.onnx")


def test_the_spoilt_layer_is_told_from_the_others(mixture: Mixture) -> None:
    by_name = {layer.name: layer for layer in mixture.layers}
    assert list(by_name) == [f"node_p{i}" for i in range(LAYERS)]
    spoilt = by_name.pop(f"node_p{SPOILT}")
    worst = max(layer.point("int8").damage for layer in by_name.values())
    assert spoilt.point("int8").damage > 100 * worst
    assert spoilt.chosen != "int8"
    assert {layer.chosen for layer in by_name.values()} == {"int8"}
    assert mixture.report.passed
    assert mixture.cost < mixture.float_cost


def test_the_file_holds_what_was_chosen_and_reproduces(mixture: Mixture, tmp_path: Path) -> None:
    assert mixture.model.quantization is not None
    chosen = {
        node: layer.chosen
        for layer in mixture.layers
        for node in layer.nodes
        if layer.chosen != "float"
    }
    assert mixture.model.quantization["precisions"] == chosen
    source = mixture.model.path.parent / "net.onnx"
    again = quantize(
        OnnxModel.open(source),
        samples(1),
        QuantizeOptions(method="max", overrides=mixture.overrides),
        tmp_path / "again.onnx",
    )
    assert again.quantization is not None
    assert again.quantization["precisions"] == chosen
    held = samples(3)
    for first, second in zip(
        sensitivity.answers(mixture.model, held), sensitivity.answers(again, held), strict=True
    ):
        np.testing.assert_array_equal(first, second)


def test_the_same_question_has_the_same_answer(mixture: Mixture, tmp_path: Path) -> None:
    source = mixture.model.path.parent / "net.onnx"
    again = mix(
        OnnxModel.open(source), samples(1), samples(2), mixture.options, tmp_path / "mix.onnx"
    )
    assert again.model.path.read_bytes() == mixture.model.path.read_bytes()
    assert again.steps == mixture.steps


def test_the_report_is_json_text_and_picture(mixture: Mixture, tmp_path: Path) -> None:
    values = json.loads(json.dumps(mixture.to_dict(), allow_nan=False))
    assert [layer["chosen"] for layer in values["layers"]] == [
        layer.chosen for layer in mixture.layers
    ]
    assert values["trials"][-1]["report"]["samples"] == 48
    text = mixture.render()
    assert all(layer.name in text for layer in mixture.layers)
    assert "MB of weights" in text
    assert mixture.save_plot(tmp_path / "mix.png").read_bytes().startswith(b"\x89PNG")


def test_a_bound_that_nothing_keeps_is_refused_with_the_figure(tmp_path: Path) -> None:
    bound = VerifyOptions(min_cosine=-1.0, min_agreement=0.0, max_abs_error=1e-9, min_speedup=None)
    options = MixOptions(formats=("int8",), minimise="bytes", verify=bound)
    with pytest.raises(QuantizationError, match=r"already with 1 of 4 steps, .*1e-09"):
        mix(network(tmp_path / "n.onnx"), samples(1), samples(2), options, tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n.onnx"]


def test_ranges_of_a_module_serve_every_format(tmp_path: Path) -> None:
    """MXFP8 needs none, whatever the order in which the formats are named."""
    options = MixOptions(
        formats=("mxfp8", "fp8"),
        minimise="bytes",
        card="rtx5090",
        verify=VerifyOptions(min_cosine=0.0, min_agreement=0.0, min_speedup=None),
    )
    found = mix(
        *(exported("transformer"), data(16), data(8, seed=3), options, tmp_path / "m.onnx"),
        module=tiny_modules.transformer(),
    )
    for layer in found.layers:
        assert layer.point("fp8").damage < 0.01


def test_costs_given_decide(tmp_path: Path) -> None:
    options = MixOptions(formats=("int8",), verify=BOUND)
    costs = {f"node_p{i}": {"float": 2.0, "int8": 1.0} for i in range(LAYERS)}
    costs["node_p0"]["int8"] = 2.0  # nothing to gain
    found = mix(
        *(network(tmp_path / "n.onnx"), samples(1), samples(2), options, tmp_path / "m.onnx"),
        costs=costs,
    )
    assert found.layers[0].chosen == "float"
    assert found.layers[1].chosen == "int8"
    assert "given" in found.render()
    del costs["node_p1"]["int8"]
    with pytest.raises(OptionError, match=r"costs lacks node 'node_p1' in 'int8'"):
        mix(
            *(network(tmp_path / "n.onnx"), samples(1), samples(2), options, tmp_path / "m.onnx"),
            costs=costs,
        )


def test_arguments_are_checked(tmp_path: Path) -> None:
    model = network(tmp_path / "n.onnx")
    with pytest.raises(InputError, match="3 labels for 48 samples"):
        mix(
            *(model, samples(1), samples(2), MixOptions(), tmp_path / "m.onnx"),
            labels=np.zeros(3, np.int64),
        )
    with pytest.raises(OptionError, match=r"minimise='bytes'"):
        mix(
            *(model, samples(1), samples(2), MixOptions(minimise="bytes"), tmp_path / "m.onnx"),
            costs={},
        )
    every = tuple(f"node_p{i}" for i in range(LAYERS))
    options = MixOptions(formats=("int8",), exclude=every)
    with pytest.raises(QuantizationError, match=r"^int8: 0 nodes"):
        mix(model, samples(1), samples(2), options, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"card": "rtx3090"}, "card='rtx3090' is not one of"),
        ({"formats": ("nvfp4",)}, "rtx4090 does not compute in nvfp4; it does in int8, fp8"),
        ({"formats": ("int8", "int8")}, "names one twice"),
        ({"minimise": "joules"}, "minimise='joules'"),
        ({"batch": 0}, "batch=0"),
        ({"verify": VerifyOptions()}, "verify.min_speedup=1.0 must be None"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        MixOptions(**options)  # type: ignore[arg-type]


def test_options_survive_json() -> None:
    options = MixOptions(formats=("fp8",), card="h100", batch=8)
    assert MixOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert MixOptions(card="b200").resolved_formats == ("int8", "fp8", "mxfp8", "nvfp4")


def test_sizes_of_products(tmp_path: Path) -> None:
    proto = onnx.load(network(tmp_path / "n.onnx").path)
    sizes = products(proto, batch=8)
    assert sizes["node_p0"] == Product(WIDTH * WIDTH, 8 * WIDTH, 8 * WIDTH, WIDTH)
    proto = onnx.load(tiny_models.convolution(tmp_path / "c.onnx").path)
    proto.graph.node[0].name = "conv"
    conv = products(proto, batch=2)["conv"]
    assert (conv.weight, conv.input, conv.depth) == (8 * 27, 2 * 3 * 256, 27)
    assert conv.output == 2 * 8 * math.prod(_grid(proto))


def _grid(proto: onnx.ModelProto) -> tuple[int, int]:
    inferred = onnx.shape_inference.infer_shapes(proto)
    name = proto.graph.node[0].output[0]
    value = next(v for v in inferred.graph.value_info if v.name == name)
    axes = value.type.tensor_type.shape.dim
    return axes[2].dim_value, axes[3].dim_value


@settings(max_examples=50)
@given(*(st.integers(1, 10**6) for _ in range(4)), st.sampled_from(sorted(BYTES)))
def test_time_is_the_longer_of_arithmetic_and_traffic(
    weight: int, given_: int, made: int, depth: int, precision: str
) -> None:
    card = Card("round", 2.0, dict.fromkeys(BYTES, 5.0))
    seconds = Product(weight, given_, made, depth).seconds(precision, card)
    traffic = BYTES[precision] * (weight + given_) + 2 * made
    assert seconds == pytest.approx(max(2 * made * depth / 5e12, traffic / 2e12))


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(QuantizationError, match="minimise='bytes'"):
        Product(4, None, 4, 2).seconds("int8", CARDS["h100"])


def test_bytes_of_block_formats_match_the_files(tmp_path: Path) -> None:
    model = network(tmp_path / "n.onnx", spoilt=0)
    for precision in ("int8", "mxfp8", "nvfp4"):
        made = quantize(
            model, samples(1), QuantizeOptions(precision=precision, method="max"), tmp_path / "q"
        )
        proto = onnx.load(made.path)
        stored = {t.name: t for t in proto.graph.initializer}
        whole = {
            "int8": ["node_p1_w_i8"],
            "mxfp8": ["node_p1_w_f8", "node_p1_w_block_scale"],
            "nvfp4": ["node_p1_w_f4", "node_p1_w_block_scale"],
        }[precision]
        found = sum(len(stored[name].raw_data) for name in whole)
        assert found == Product(WIDTH * WIDTH, None, None, WIDTH).bytes(precision)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network(tmp_path / "n.onnx")
    rng = np.random.default_rng(8)
    for name in ("data", "check"):
        np.savez(tmp_path / f"{name}.npz", x=rng.standard_normal((32, WIDTH)).astype(np.float32))
    code = cli.main(
        [
            *("mix", str(model.path), "-o", str(tmp_path / "m.onnx")),
            *("--data", str(tmp_path / "data.npz"), "--check", str(tmp_path / "check.npz")),
            *("--format", "int8", "--minimise", "bytes", "--plot", str(tmp_path / "p.png")),
        ]
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "node_p1" in printed.out
    assert "passed: 32 samples" in printed.out
    assert OnnxModel.open(tmp_path / "m.onnx").precision == "int8"
    assert (tmp_path / "p.png").is_file()
