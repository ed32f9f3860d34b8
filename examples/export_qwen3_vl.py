"""Qwen3-VL: INT4-AWQ and FP8 checkpoints for a server.

With your weights, a folder as ``save_pretrained`` writes it, and pictures like those you serve::

    python examples/export_qwen3_vl.py --weights Qwen3-VL-2B-Instruct/ --data photos/

Without weights, for sizes and times; what the model says then means nothing::

    python examples/export_qwen3_vl.py --random-weights          # the size of the 2B model
    python examples/export_qwen3_vl.py --random-weights --tiny   # two layers

vLLM has loaders for both folders (``vllm serve example-output/qwen3-vl/int4_awq``), SGLang for the
INT4 one; neither was tried. A cascade asks a server through ``VlmStage``.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from sn72engine.checkpoint import CheckpointOptions, export_checkpoint
from sn72engine.stages.vlm import QUESTION

#: Layers, width, width of the MLP, heads and key-value heads of the language model; layers, width
#: and width of the MLP of the vision tower; words. As of the 2B model, and of something tiny.
SIZES = {
    "2b": (28, 2048, 6144, 16, 8, 24, 1024, 4096, 151936),
    "tiny": (2, 256, 512, 4, 2, 2, 128, 256, 512),
}

#: A picture of 16 x 16 patches, which are merged two by two for the language model.
GRID = (1, 16, 16)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def random_model(size: str) -> Qwen3VLForConditionalGeneration:
    """A model of that size that has learned nothing."""
    layers, width, mlp, heads, kv_heads, depth, vision, vision_mlp, words = SIZES[size]
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": words, "hidden_size": width, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": 128, "initializer_range": width**-0.5,
            "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]},
        },
        vision_config={
            "depth": depth, "hidden_size": vision, "intermediate_size": vision_mlp,
            "num_heads": vision // 64, "out_hidden_size": width,
            "deepstack_visual_indexes": [depth // 4, depth // 2, 3 * depth // 4],
        },
        image_token_id=words - 1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu"):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Qwen3VLForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(previous)


def random_batches(model: Qwen3VLForConditionalGeneration, count: int) -> list[dict[str, Any]]:
    """Prompts of random words around one random picture: they calibrate nothing of use."""
    generator = torch.Generator().manual_seed(0)
    vision, image = model.config.vision_config, model.config.image_token_id
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = GRID[1] * GRID[2]
    found = []
    for _ in range(count):
        ids = torch.randint(0, image, (1, 32 + patches // 4), generator=generator)
        ids[:, 8 : 8 + patches // 4] = image
        found.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == image).int(),
                "pixel_values": torch.randn(patches, values, generator=generator).bfloat16(),
                "image_grid_thw": torch.tensor([GRID]),
            }
        )
    return found


def asked(processor: Any, folder: Path, count: int) -> list[dict[str, Any]]:
    """The question of the cascade about each picture, as the model will be asked it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
    found = []
    for path in itertools.islice(paths, count):
        content = [{"type": "image", "image": Image.open(path).convert("RGB")}]
        found.append(
            processor.apply_chat_template(
                [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )
        )  # fmt: skip
    return found


def main() -> None:
    """Write each checkpoint and say what it is worth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", help="folder of the model; nothing is downloaded")
    weights.add_argument("--random-weights", action="store_true", help="for sizes and times only")
    parser.add_argument("--tiny", action="store_true", help="with random weights: two layers")
    parser.add_argument("--data", type=Path, help="calibration pictures; --weights needs them")
    parser.add_argument("--samples", type=int, default=32, help="most calibration pictures")
    parser.add_argument("--formats", nargs="+", default=["int4_awq", "fp8"])
    parser.add_argument("--output", type=Path, default=Path("example-output/qwen3-vl"))
    options = parser.parse_args()
    if options.weights and not options.data:
        parser.error("--weights needs --data: pictures like those that you will serve")

    for name in options.formats:
        if options.weights:
            processor = AutoProcessor.from_pretrained(options.weights, local_files_only=True)
            model = Qwen3VLForConditionalGeneration.from_pretrained(
                options.weights, local_files_only=True, dtype=torch.bfloat16
            )
            data = asked(processor, options.data, options.samples)
        else:
            processor, model = None, random_model("tiny" if options.tiny else "2b")
            data = random_batches(model, options.samples)
        start = time.perf_counter()
        made = export_checkpoint(
            model, data, CheckpointOptions(format=name), options.output / name, processor=processor
        )
        print(
            f"{name}: {made.float_bytes / 1e6:.1f} -> {made.bytes / 1e6:.1f} MB in "
            f"{time.perf_counter() - start:.1f} s: {made.folder}\n"
            f"  {len(made.quantised)} linear layers quantised, {len(made.skipped)} not: "
            f"{', '.join(sorted(set(made.skipped.values())))}\n"
            f"  logits against the model before: cosine {made.cosine:.5f}"
        )


if __name__ == "__main__":
    main()
