"""A quantised checkpoint holds what was asked for, near the original, or is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sn72engine import _deps, checkpoint_scales
from sn72engine.checkpoint import (
    BLOCK,
    RECORD,
    Checkpoint,
    CheckpointOptions,
    export_checkpoint,
)
from sn72engine.errors import CalibrationError, InputError, OptionError, QuantizationError
from sn72engine.quiet import quiet

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not _deps.available("modelopt"), reason="modelopt is not installed; extra 'quantize'"
)

LAYER = "model.language_model.layers.0"
IMAGE = 500


def tiny(seed: int = 0, width: int = 256, bias: bool = False) -> Any:
    """Qwen3-VL of two layers with random weights."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": 512,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": bias,
        "rope_parameters": {"rope_type": "default", "mrope_section": [12, 10, 10]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 2,
        "out_hidden_size": width,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=True
    )
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


def batches(count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Prompts with one image of 4 x 4 patches, as the processor would make them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 400, (1, 16), generator=generator)
        ids[:, 4:8] = IMAGE
        found.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": torch.randn(16, 1536, generator=generator),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
            }
        )
    return found


class Words:
    """Stands for a tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


#: Weights of the INT4 model as it was measured: those of ModelOpt, rounded, after settling.
MEASURED: dict[str, torch.Tensor] = {}


@pytest.fixture(scope="module", params=["int4_awq", "fp8"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint") / "out"
    options = CheckpointOptions(format=request.param)
    settle = checkpoint_scales.settle

    def settle_and_note(model: Any) -> None:
        settle(model)
        for name, layer in model.named_modules():
            if name.startswith("model.language_model.") and isinstance(layer, torch.nn.Linear):
                MEASURED[name] = layer.weight_quantizer(layer.weight).detach().clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_scales, "settle", settle_and_note)
        return export_checkpoint(tiny(), batches(), options, folder, processor=Words())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def weight(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight of an INT4 layer as a server computes it: eight inputs to a word, value plus 8."""
    words = tensors[f"{name}.weight_packed"].long() % 2**32
    values = torch.stack([words // 16**digit % 16 - 8 for digit in range(8)], 2).flatten(1)
    assert values.shape == tuple(tensors[f"{name}.weight_shape"])
    return values * tensors[f"{name}.weight_scale"].repeat_interleave(BLOCK, 1)


def test_the_language_model_is_quantised_and_nothing_else(made: Checkpoint) -> None:
    assert len(made.quantised) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in made.quantised)
    assert made.skipped["lm_head"] == "left in float by ModelOpt's rule '*lm_head*'"
    visual = {name: why for name, why in made.skipped.items() if name != "lm_head"}
    assert len(visual) == 2 * 4 + 2 + 2
    assert set(visual.values()) == {"left in float by ModelOpt's rule '*visual*'"}


def test_the_folder_is_what_a_server_loads(made: Checkpoint) -> None:
    config = json.loads((made.folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    quantization = config["quantization_config"]
    if made.format == "fp8":
        assert quantization["quant_algo"] == "FP8"
        assert quantization["quant_method"] == "modelopt"
        assert "lm_head" in quantization["ignore"]
    else:
        assert quantization["format"] == "pack-quantized"
        assert quantization["quant_method"] == "compressed-tensors"
        assert any("lm_head" in pattern for pattern in quantization["ignore"])
        assert not (made.folder / "hf_quant_config.json").exists()
        assert not [name for name in stored(made.folder) if name.endswith("pre_quant_scale")]
    assert (made.folder / "tokenizer.json").is_file()
    record = json.loads((made.folder / RECORD).read_text())
    assert record["quantised"] == list(made.quantised)
    assert record["batches"] == 8
    assert [path.name for path in made.folder.parent.iterdir()] == ["out"]  # no scratch left


def test_sizes(made: Checkpoint) -> None:
    original = tiny()
    assert made.float_bytes == 4 * sum(p.numel() for p in original.parameters())
    saved = sum(
        layer.weight.numel() * (3.5 if made.format == "int4_awq" else 3)
        for name, layer in original.named_modules()
        if name in made.quantised
    )
    assert made.float_bytes - saved < made.bytes < made.float_bytes - 0.95 * saved


def test_weights_are_near_the_original(made: Checkpoint) -> None:
    """Half a step of the format for every element: AWQ scales channels, but clips nothing."""
    original, tensors = tiny().state_dict(), stored(made.folder)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"):
        name = f"{LAYER}.{part}"
        wanted, scale = original[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        if made.format == "fp8":
            got = tensors[f"{name}.weight"].float() * scale
            # Three bits of mantissa: 1/16 of the value, or half the smallest subnormal.
            step = wanted.abs() / 16 + scale * 2.0**-10
        else:
            # What goes before the rounding is in the normalisation before, which was all ones.
            norm = "post_attention_layernorm" if "mlp" in part else "input_layernorm"
            smooth = tensors[f"{LAYER}.{norm}.weight"]
            assert smooth.std() > 0.01
            got = weight(tensors, name) * smooth
            step = scale.repeat_interleave(BLOCK, 1) * smooth / 2
        error = (got - wanted).abs()
        assert bool((error <= step * 1.001 + 1e-7).all()), (name, (error / step).max())
        assert error.mean() > 0.1 * step.mean()  # it was rounded indeed


def test_int4_weights_are_those_that_were_measured(made: Checkpoint) -> None:
    """Of every layer, but for the last bit of a float32."""
    if made.format == "fp8":
        pytest.skip("written by ModelOpt alone")
    tensors = stored(made.folder)
    assert MEASURED.keys() == set(made.quantised)
    for name, wanted in MEASURED.items():
        step = tensors[f"{name}.weight_scale"].repeat_interleave(BLOCK, 1)
        steps = (weight(tensors, name) - wanted).abs() / step
        # ModelOpt's export takes the mean of equal scales once more; in float32 that can move the
        # last bit, and with it a weight that lies halfway between two values.
        assert (steps > 1e-4).float().mean() < 1e-4, name


def test_transformers_reads_the_int4_checkpoint(made: Checkpoint) -> None:
    """With compressed-tensors: the logits are those of the model that was measured."""
    if made.format == "fp8":
        pytest.skip("transformers does not read ModelOpt's layout")
    pytest.importorskip("compressed_tensors")
    with quiet("compressed_tensors", "transformers"):
        read = transformers.Qwen3VLForConditionalGeneration.from_pretrained(made.folder).eval()
        layer = read.get_submodule(f"{LAYER}.mlp.down_proj")
        assert layer.weight_packed.dtype == torch.int32
        assert not hasattr(read.model.visual.blocks[0].attn.qkv, "weight_packed")
        got, float_logits = logits(read), logits(tiny())
    cosine = float(torch.nn.functional.cosine_similarity(got, float_logits, dim=0))
    assert cosine == pytest.approx(made.cosine, abs=2e-5)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten() for batch in batches()[:4]])


def test_fidelity_is_of_the_quantised_model(made: Checkpoint) -> None:
    low, high = {"int4_awq": (0.9, 0.995), "fp8": (0.99, 0.99999)}[made.format]
    assert low < made.cosine < high


def test_layers_that_do_not_fit_or_are_excluded_stay(tmp_path: Path) -> None:
    options = CheckpointOptions(exclude=("*.layers.1.*",), minimum=1)
    model = tiny(width=320, bias=True)
    model.get_submodule(f"{LAYER}.self_attn.v_proj").bias.data.normal_()
    made = export_checkpoint(model, batches(1), options, tmp_path / "out")
    assert made.quantised == tuple(
        f"{LAYER}.{part}" for part in ("self_attn.o_proj", "mlp.down_proj")
    )
    assert made.skipped[f"{LAYER}.self_attn.q_proj"] == "its 320 inputs are no multiple of 128"
    last = "model.language_model.layers.1.mlp.down_proj"
    assert made.skipped[last] == "excluded by '*.layers.1.*'"
    assert stored(made.folder)[f"{last}.weight"].dtype == torch.float32


def test_nothing_quantised_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    options = CheckpointOptions(exclude=("*",), minimum=1)
    with pytest.raises(QuantizationError, match="0 of 27 linear layers would be quantised"):
        export_checkpoint(tiny(), batches(1), options, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    options = CheckpointOptions(exclude=("*.nothing",), minimum=1)
    with pytest.raises(QuantizationError, match=r"exclude='\*\.nothing' matches none of the 27"):
        export_checkpoint(tiny(), batches(1), options, tmp_path / "out")


def test_layers_that_servers_load_as_one_are_not_torn_apart(tmp_path: Path) -> None:
    options = CheckpointOptions(exclude=("*.layers.0.*.k_proj",), format="fp8", minimum=1)
    with pytest.raises(
        QuantizationError, match=r"k_proj stays in float \(.*q_proj, .*v_proj would"
    ):
        export_checkpoint(tiny(), batches(1), options, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_scales_are_not_moved_past_what_is_not_linear(tmp_path: Path) -> None:
    """As in models that normalise the values."""
    model = tiny()
    values = model.get_submodule(f"{LAYER}.self_attn.v_proj")
    values.weight.data.mul_(torch.exp(2 * torch.randn(128, 1)))  # else the scale is about 1
    values.register_forward_hook(lambda _, inputs, output: output.sign() * output.abs() ** 0.5)
    options = CheckpointOptions(exclude=("*.layers.1.*", "*.layers.0.mlp.*"), minimum=1)
    with pytest.raises(QuantizationError, match=r"AWQ's scales cannot be moved .* cosine 0\.9"):
        export_checkpoint(model, batches(1), options, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unfit_data_is_refused(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(CalibrationError, match="2 calibration batches, fewer than minimum=8"):
        export_checkpoint(model, batches(2), CheckpointOptions(), tmp_path / "out")
    with pytest.raises(CalibrationError, match="is an iterator"):
        export_checkpoint(model, iter(batches()), CheckpointOptions(), tmp_path / "out")
    spoiled = batches()
    spoiled[3]["pixel_values"][0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="batch 3: 'pixel_values' holds NaN"):
        export_checkpoint(model, spoiled, CheckpointOptions(), tmp_path / "out")
    with pytest.raises(CalibrationError, match="the model fails on a calibration batch of words"):
        export_checkpoint(model, [{"words": 1}] * 8, CheckpointOptions(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"precious")
    options = CheckpointOptions(format="fp8", minimum=1)
    with pytest.raises(InputError, match="is no checkpoint of ours"):
        export_checkpoint(tiny(), batches(1), options, tmp_path / "photos")
    first = export_checkpoint(tiny(), batches(1), options, tmp_path / "out")
    (first.folder / "leftover").write_text("of the first")
    export_checkpoint(tiny(seed=1), batches(1), options, tmp_path / "out")
    assert not (first.folder / "leftover").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


@pytest.mark.parametrize("values", [{"format": "int4"}, {"minimum": 0}])
def test_options_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(values))):
        CheckpointOptions(**values)
