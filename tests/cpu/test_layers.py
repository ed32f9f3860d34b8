from __future__ import annotations

import onnx
import pytest

from sn72engine import layers
from sn72engine.errors import OptionError, QuantizationError
from sn72engine.spec import QuantizeOptions
from tests.quantized_models import exported


def choose(name: str, **options) -> layers.Choice:
    proto = onnx.load(exported(name).path)
    layers.name_nodes(proto)
    return layers.choose(proto, QuantizeOptions(**options))


def by_module(choice: layers.Choice) -> dict[str, str]:
    return {choice.modules[name]: precision for name, precision in choice.precisions.items()}


def test_a_transformer_keeps_its_convolution_and_head_in_float():
    choice = choose("transformer")
    assert by_module(choice) == dict.fromkeys(("qkv", "out", "up", "down"), "int8")
    reasons = {choice.modules[n]: why for n, why in choice.skipped.items() if n in choice.unasked}
    assert reasons == {"patches": "a convolution of a transformer", "head": "the head"}


def test_a_convolutional_network_is_quantised_throughout():
    choice = choose("residual_net")
    # The exporter folds a normalisation into the convolution before it, under its own name.
    assert set(by_module(choice)) == {"stem.1", "expand.0", "depthwise.0", "project", "head"}
    assert not choice.skipped


def test_fp8_leaves_convolutions_over_few_channels_unless_they_are_named():
    assert set(by_module(choose("residual_net", precision="fp8"))) == {
        *("expand.0", "project", "head"),
    }
    forced = choose("residual_net", precision="fp8", overrides={"depthwise*": "fp8"})
    assert by_module(forced)["depthwise.0"] == "fp8"
    reasons = set(forced.skipped.values())
    assert reasons == {"sums over 3 channels only: too few for fp8"}


def test_named_operator_types_are_what_is_taken():
    choice = choose("transformer", op_types=("Conv",))
    assert by_module(choice) == {"patches": "int8"}
    assert set(choice.skipped.values()) == {"not in op_types"}


def test_the_last_override_that_matches_holds():
    overrides = {"*": "fp8", "qkv": "int8", "node_MatMul_37": "nvfp4", "head": "float"}
    choice = choose("transformer", overrides=overrides)
    expected = {"patches": "fp8", "qkv": "int8", "out": "fp8", "up": "nvfp4", "down": "fp8"}
    assert by_module(choice) == expected
    head = next(name for name, path in choice.modules.items() if path == "head")
    assert choice.skipped[head] == "excluded by name"
    assert head in choice.unasked


@pytest.mark.parametrize(
    ("precision", "module", "reason"),
    [
        ("nvfp4", "patches", "nvfp4 has no convolution"),
        ("mxfp8", "patches", "mxfp8 has no convolution"),
    ],
)
def test_what_a_format_lacks_is_a_reason(precision, module, reason):
    choice = choose("transformer", overrides={module: precision})
    name = next(name for name, path in choice.modules.items() if path == module)
    assert choice.skipped[name] == reason
    assert name not in choice.unasked


@pytest.mark.parametrize(("precision", "block"), [("nvfp4", 16), ("mxfp8", 32)])
def test_inputs_must_fill_blocks(precision, block):
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]>'
        "g (float[N, 24] x) => (float[N, 32] y) <float[24, 32] w> { y = MatMul(x, w) }"
    )
    proto.graph.initializer.append(onnx.helper.make_tensor("w", 1, [24, 32], [0.0] * 768))
    layers.name_nodes(proto)
    with pytest.raises(QuantizationError, match=f"24 inputs are no multiple .* block of {block}"):
        layers.choose(proto, QuantizeOptions(precision=precision))
    assert layers.choose(proto, QuantizeOptions(precision="fp8")).precisions


def test_a_pattern_that_fits_nothing_suggests_names():
    with pytest.raises(QuantizationError, match=r"'qkw' matches no .*did you mean qkv"):
        choose("transformer", overrides={"qkw": "fp8"})


def test_a_model_without_module_paths_is_matched_by_name():
    proto = onnx.load(exported("transformer").path)
    for node in proto.graph.node:
        del node.metadata_props[:]
    choice = layers.choose(proto, QuantizeOptions(overrides={"node_MatMul_7": "float"}))
    assert choice.modules == {}
    assert choice.skipped["node_MatMul_7"] == "excluded by name"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision='int4' is not one of int8, fp8, nvfp4, mxfp8"),
        ({"op_types": ("Add",)}, "op_types='Add' is not one of"),
        ({"overrides": {"a": "fp16"}}, r"overrides\['a'\]='fp16' is not one of"),
        ({"overrides": ("a",)}, "must map patterns"),
        ({"precision": "fp8", "method": "entropy"}, "method='entropy' is for int8"),
        ({"precision": "nvfp4", "method": "smoothquant"}, "method='smoothquant' is for int8"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        QuantizeOptions(**options)


def test_options_travel_as_plain_values():
    options = QuantizeOptions(precision="fp8", overrides={"a.*": "float", "b": "int8"})
    assert QuantizeOptions.from_dict(options.to_dict()) == options
    assert options.resolved_method == "entropy"
    assert QuantizeOptions(precision="fp8").resolved_method == "max"
