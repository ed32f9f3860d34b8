"""The layout of compressed-tensors holds ModelOpt's values, and says what stays in float."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sn72engine.checkpoint_layout import (
    VALUES_PER_WORD,
    configuration,
    float_patterns,
    pack,
    repack,
    rewrite,
    unpack,
)
from sn72engine.errors import QuantizationError

safetensors = pytest.importorskip("safetensors.torch")

QUANTISED = [
    f"model.language_model.layers.{layer}.{part}"
    for layer in range(2)
    for part in ("self_attn.q_proj", "mlp.down_proj")
]
FLOAT = ["model.visual.blocks.0.attn.qkv", "model.visual.merger.linear_fc1", "lm_head"]

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda s: (2 * s[0], 8 * s[1]))


def values(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)


def decoded(words: torch.Tensor) -> np.ndarray:
    """The values in the words, by arithmetic on Python's side of the definition."""
    unsigned = words.numpy().astype(np.int64) % 2**32
    digits = [unsigned // 16**digit % 16 - 8 for digit in range(VALUES_PER_WORD)]
    return np.stack(digits, axis=2).reshape(len(unsigned), -1)


def of_modelopt(integers: torch.Tensor) -> torch.Tensor:
    utils = pytest.importorskip("modelopt.torch.export.quant_utils")
    scales = torch.ones(integers.shape[0], integers.shape[1] // 8)
    packed: torch.Tensor = utils.pack_int4_in_uint8(integers.float(), scales, 8)
    return packed


@given(shapes, st.integers(0, 2**32))
@settings(max_examples=40)
def test_words_hold_the_values(shape: tuple[int, int], seed: int) -> None:
    integers = values(shape, seed)
    words = pack(integers)
    assert words.dtype == torch.int32
    assert words.shape == (shape[0], shape[1] // 8)
    assert np.array_equal(decoded(words), integers.numpy())


def test_the_first_value_is_in_the_lowest_bits() -> None:
    integers = torch.tensor([[-7, -8, -8, -8, -8, -8, -8, 7]], dtype=torch.int8)
    assert pack(integers).item() == 0xF0000001 - 2**32


@given(shapes, st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_bytes_of_modelopt_are_read(shape: tuple[int, int], seed: int) -> None:
    integers = values(shape, seed)
    assert torch.equal(unpack(of_modelopt(integers)), integers)


def test_the_library_reads_the_words() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    integers = values((6, 72))
    read = helpers.unpack_from_int32(pack(integers), 4, integers.shape)
    assert torch.equal(read, integers)


def test_a_file_is_repacked() -> None:
    integers = values((4, 256))
    tensors = {
        "a.weight": of_modelopt(integers),
        "a.weight_scale": torch.full((4, 2), 1 / 3),
        "a.bias": torch.ones(4),
        "norm.weight": torch.ones(256),
    }
    made = repack(tensors, torch.bfloat16)
    assert set(made) == {
        *("a.weight_packed", "a.weight_scale", "a.weight_shape", "a.bias", "norm.weight")
    }
    assert np.array_equal(decoded(made["a.weight_packed"]), integers.numpy())
    assert made["a.weight_shape"].tolist() == [4, 256]
    assert torch.equal(made["a.weight_scale"], tensors["a.weight_scale"].bfloat16())
    assert made["norm.weight"] is tensors["norm.weight"]


def test_a_scale_that_no_server_applies_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"^model\.fc2: no layer before it can take"):
        repack({"model.fc2.pre_quant_scale": torch.ones(8)}, torch.float32)


@pytest.mark.parametrize(
    ("quantised", "names"),
    [
        # As transformers and compressed-tensors, vLLM and SGLang name them.
        (False, ["model.visual.blocks.0.attn.qkv", "lm_head"]),
        (False, ["visual.blocks.0.attn.qkv", "language_model.lm_head"]),
        (False, ["visual.blocks.0.attn.qkv_proj", "visual.merger.mlp.0", "lm_head"]),
        (False, ["language_model.model.layers.2.self_attn.qkv_proj"]),
        (False, ["model.layers.2.mlp.down_proj", "model.layers.1.self_attn.o_proj"]),
        (
            True,
            ["model.language_model.layers.1.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"],
        ),
        (True, ["model.layers.22.mlp.down_proj", "language_model.model.layers.12.mlp.down_proj"]),
    ],
)
def test_patterns_match_what_servers_call_the_layers(quantised: bool, names: list[str]) -> None:
    excluded = ["model.language_model.layers.2.mlp.down_proj"]
    excluded += ["model.language_model.layers.1.self_attn.o_proj"]
    patterns = float_patterns(QUANTISED, [*FLOAT, *excluded])
    assert len(patterns) == 4
    for name in names:
        matching = [p for p in patterns if re.match(p.removeprefix("re:"), name)]
        assert bool(matching) is not quantised, name


def write(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    for shard, tensors in shards.items():
        safetensors.save_file(tensors, folder / shard, metadata={"format": "pt"})
    (folder / "config.json").write_text('{"a": 1, "quantization_config": {"quant_algo": "X"}}')
    (folder / "hf_quant_config.json").write_text("{}")


def test_a_checkpoint_of_several_files_is_rewritten(tmp_path: Path) -> None:
    """A weight and its scale may be in different files."""
    integers = values((4, 128))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shards = {
        first: {"lm_head.weight": torch.ones(3), "a.weight": of_modelopt(integers)},
        second: {"a.weight_scale": torch.ones(4, 1)},
    }
    write(tmp_path, shards)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"a.weight": "old"}}')
    rewrite(tmp_path, ["a"], ["lm_head"], torch.bfloat16)
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": 4 * 128 // 2 + 16 + 12 + 4 * 2},
        "weight_map": {
            "a.weight_packed": first,
            "a.weight_shape": first,
            "lm_head.weight": first,
            "a.weight_scale": second,
        },
    }
    read = safetensors.load_file(tmp_path / first)
    assert np.array_equal(decoded(read["a.weight_packed"]), integers.numpy())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"a": 1, "quantization_config": configuration(["a"], ["lm_head"])}
    names = {"config.json", first, second, index.name}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_library_understands_the_configuration() -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    read = library.QuantizationConfig.model_validate(configuration(QUANTISED, FLOAT))
    weights = read.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 128, True)
    assert read.format == "pack-quantized"
