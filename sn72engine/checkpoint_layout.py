"""ModelOpt's INT4 checkpoint -> the ``pack-quantized`` layout of compressed-tensors.

vLLM and SGLang load that layout for any linear layer and serve it with their 4-bit kernels; they do
not take ModelOpt's own (sources of both as of 2026). For a layer of n outputs and m inputs:

- ``weight_packed`` int32 (n, m / 8): eight inputs to a word, the first in the lowest bits, each
  stored as its value plus 8;
- ``weight_scale`` (n, m / 128), of the model's type: the weight is value * scale;
- ``weight_shape`` int64 (2,): n and m.

The values are ModelOpt's. Its scales are float32; rounding them to a bfloat16 model's type moves a
weight by at most 2^-9 of itself, 1/70 of a step. Servers would round them when loading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sn72engine import _deps
from sn72engine.errors import QuantizationError

if TYPE_CHECKING:
    from torch import Tensor

#: Inputs that share one scale.
BLOCK = 128

#: What is in each int32.
VALUES_PER_WORD = 8

#: Layers that read the same input and that servers load as one, so all or none are quantised.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

#: Modules that servers name differently from transformers.
_WRAPPERS = ("model.", "language_model.")


def unpack(packed: Tensor) -> Tensor:
    """ModelOpt's bytes, two outputs to each and the first in the low half: (n/2, m) -> int8 (n, m).

    The values are in [-8, 7].
    """
    torch = _deps.require("torch", purpose="write a checkpoint")
    halves = torch.stack((packed & 15, packed >> 4), dim=1).flatten(0, 1).to(torch.int8)
    values: Tensor = halves - 16 * (halves > 7).to(torch.int8)
    return values


def pack(values: Tensor) -> Tensor:
    """Integers in [-8, 7] -> int32 words: (n, m) -> (n, m / 8); m must be a multiple of 8."""
    torch = _deps.require("torch", purpose="write a checkpoint")
    halves = (values + 8).to(torch.uint8)
    pairs = halves[:, 0::2] | (halves[:, 1::2] << 4)
    # Safetensors and every machine that ModelOpt runs on are little-endian.
    return pairs.contiguous().view(torch.int32)


def repack(tensors: Mapping[str, Tensor], dtype: Any) -> dict[str, Tensor]:
    """Tensors of a file in ModelOpt's INT4 layout -> the same file's in ``pack-quantized``.

    Args:
        tensors: by name. Weights in bytes are the packed ones.
        dtype: of the scales: the model's.

    Raises:
        QuantizationError: there is a ``pre_quant_scale``, which no server applies.
    """
    torch = _deps.require("torch", purpose="write a checkpoint")
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".pre_quant_scale"):
            layer = name.removesuffix(".pre_quant_scale")
            raise QuantizationError(
                f"{layer}: no layer before it can take AWQ's scale of its inputs, and servers do "
                "not apply one; exclude that layer"
            )
        if name.endswith(".weight") and tensor.dtype == torch.uint8:
            values = unpack(tensor)
            made[f"{name}_packed"] = pack(values)
            made[f"{name}_shape"] = torch.tensor(values.shape)
        elif name.endswith(".weight_scale"):
            made[name] = tensor.to(dtype)
        else:
            made[name] = tensor
    return made


def configuration(quantised: Iterable[str], skipped: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": BLOCK,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": float_patterns(quantised, skipped),
    }


def float_patterns(quantised: Iterable[str], skipped: Iterable[str]) -> list[str]:
    """Regular expressions, marked ``re:``, for the layers that stay in float.

    Not their names, for servers rename layers, each in its own way: SGLang's ``visual.blocks.0.
    attn.qkv_proj`` is ``model.visual.blocks.0.attn.qkv``. So a pattern is for the largest module
    that has nothing quantised in it, wherever that is.
    """
    parents = {name[: dot.start()] for name in quantised for dot in re.finditer(r"\.", name)}
    parents |= set(quantised)
    patterns = []
    for name in skipped:
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        path = next(path for path in paths if path not in parents)
        for wrapper in _WRAPPERS:
            path = path.removeprefix(wrapper)
        patterns.append(rf"re:(.*\.)?{re.escape(path)}(\..*)?$")
    return list(dict.fromkeys(patterns))


def rewrite(folder: Path, quantised: Iterable[str], skipped: Iterable[str], dtype: Any) -> None:
    """Turn ModelOpt's INT4 checkpoint in ``folder`` into ``pack-quantized``, file by file.

    Not atomic: for a folder that nobody reads yet.

    Args:
        folder: as ``export_hf_checkpoint`` left it.
        quantised: paths of the quantised linear layers, as the model names them.
        skipped: paths of its other linear layers.
        dtype: of the model.

    Raises:
        QuantizationError: a ``pre_quant_scale`` is left.
    """
    files = _deps.require("safetensors", purpose="write a checkpoint", submodule="torch")
    weight_map: dict[str, str] = {}
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = repack(files.load_file(path), dtype)
        # What was read is mapped from the file, so that is not written over.
        fresh = path.with_suffix(".fresh")
        files.save_file(tensors, fresh, metadata={"format": "pt"})
        fresh.replace(path)
        weight_map |= dict.fromkeys(tensors, path.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = folder / "model.safetensors.index.json"
    if index.exists():
        _write_json(index, {"metadata": {"total_size": size}, "weight_map": weight_map})
    # The same as in config.json, in the form of older releases of ModelOpt.
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = configuration(quantised, skipped)
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
