"""Florence-2: vision tower, encoder and decoder as three ONNX files that answer on a CPU.

With your weights, a folder as ``save_pretrained`` writes it, and the ids of your prompt's tokens::

    python examples/export_florence2.py --weights Florence-2-base-ft/ --prompt 0 2264 473 5 2274 2

Without weights, for sizes and times; the answers then mean nothing::

    python examples/export_florence2.py --random-weights          # the size of Florence-2-base
    python examples/export_florence2.py --random-weights --tiny   # seconds

The decoder keeps no cache of keys and values. It takes the whole answer so far, padded to its
greatest length, and gives logits for every place: a causal decoder's logits do not depend on what
comes later. For answers of a few tokens ("yes", a box) running it again costs little beside the
vision tower, and one file with fixed shapes serves every step. Long captions want a cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Florence2Config, Florence2ForConditionalGeneration

from sn72engine import BuildOptions, ExportOptions, Session, ShapeRange, Store, build, export

#: Depths, widths and heads of the vision tower; width, layers, heads and words of the language
#: model; pixels. As of Florence-2-base, and of something tiny.
SIZES = {
    "base": ((1, 1, 9, 1), (128, 256, 512, 1024), (4, 8, 16, 32), 768, 6, 12, 51290, 768),
    "tiny": ((1, 1, 1, 1), (16, 32, 64, 128), (1, 2, 4, 8), 64, 2, 2, 200, 96),
}

START = 2  # BART begins an answer with the token that ends one


class Vision(nn.Module):
    """Pixels (N, 3, size, size) to image tokens (N, tokens, width)."""

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The projected features of the last stage."""
        return self.projector(self.tower(pixel_values).last_hidden_state)


class Encoder(nn.Module):
    """Image tokens and the prompt's ids (N, words) to states (N, tokens + words, width)."""

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.encoder = model.model.language_model.encoder
        self.embed = model.get_input_embeddings()

    def forward(self, image_tokens: Tensor, prompt: Tensor) -> Tensor:
        """The image goes first, as Florence-2's processor puts it."""
        inputs = torch.cat([image_tokens, self.embed(prompt)], 1)
        return self.encoder(inputs_embeds=inputs).last_hidden_state


class Decoder(nn.Module):
    """The answer so far (N, places) and the states to logits (N, places, words)."""

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.decoder = model.model.language_model.decoder
        self.head = model.lm_head

    def forward(self, answer: Tensor, states: Tensor) -> Tensor:
        """Logits of the token after each place."""
        found = self.decoder(input_ids=answer, encoder_hidden_states=states, use_cache=False)
        return self.head(found.last_hidden_state)


def make_model(options: argparse.Namespace) -> Florence2ForConditionalGeneration:
    """The model, from disk or with random weights."""
    torch.manual_seed(0)
    if options.weights:
        model = Florence2ForConditionalGeneration.from_pretrained(
            options.weights, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval().requires_grad_(False)
    depths, widths, heads, width, layers, text_heads, words, _ = SIZES[options.size]
    config = Florence2Config(
        vision_config={
            "depths": depths, "embed_dim": widths, "num_heads": heads, "num_groups": heads,
            "projection_dim": width,
        },
        text_config={
            "model_type": "bart", "vocab_size": words, "d_model": width,
            "encoder_layers": layers, "decoder_layers": layers,
            "encoder_attention_heads": text_heads, "decoder_attention_heads": text_heads,
            "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width, "init_std": width**-0.5,
        },
        image_token_id=words - 1, attn_implementation="eager",
        tie_word_embeddings=False,  # tied, a model with random weights repeats one word
    )  # fmt: skip
    return Florence2ForConditionalGeneration(config).eval().requires_grad_(False)


def greedy(step: Callable[[np.ndarray], np.ndarray], places: int) -> list[int]:
    """The answer, token by token; ``step`` maps ids (1, places) to logits (1, places, words)."""
    answer = [START]
    while len(answer) < places:
        ids = np.full((1, places), START, np.int64)
        ids[0, : len(answer)] = answer
        answer.append(int(step(ids)[0, len(answer) - 1].argmax()))
        if answer[-1] == START:
            break
    return answer[1:]


def main() -> None:
    """Export the parts, run them, and compare each answer with PyTorch's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", help="folder of the model; nothing is downloaded")
    weights.add_argument("--random-weights", action="store_true", help="for sizes and times only")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", default="base")
    parser.add_argument("--prompt", type=int, nargs="+", default=[0, 5, 7, 11, 2])
    parser.add_argument("--places", type=int, default=8, help="longest answer, and its start")
    parser.add_argument("--output", type=Path, default=Path("example-output/florence2"))
    options = parser.parse_args()

    model, size = make_model(options), SIZES[options.size][-1]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, size, size, generator=generator)
    prompt = torch.tensor([options.prompt])
    answer = torch.arange(options.places)[None]
    vision, encoder, decoder = Vision(model), Encoder(model), Decoder(model)
    tokens = vision(pixels)
    states = encoder(tokens, prompt)
    parts = {
        "vision": (vision, ("pixel_values",), "image_tokens", (pixels,)),
        "encoder": (encoder, ("image_tokens", "prompt"), "states", (tokens, prompt)),
        "decoder": (decoder, ("answer", "states"), "logits", (answer, states)),
    }
    sessions = {}
    for name, (part, inputs, output, example) in parts.items():
        start = time.perf_counter()
        exported = export(
            part,
            ExportOptions(input_names=inputs, output_names=(output,), parity_batches=(1, 2)),
            options.output / f"{name}.onnx",
            example=example,
        )
        engine = build(
            exported, BuildOptions(batch=ShapeRange(1, 1, 8)), store=Store(options.output)
        )
        sessions[name] = Session(engine)
        got = sessions[name](*(tensor.numpy() for tensor in example)).ravel()
        wanted = part(*example).numpy().ravel()
        cosine = got @ wanted / (np.linalg.norm(got) * np.linalg.norm(wanted))
        print(
            f"{name}: {sum(f.bytes for f in engine.manifest.files) / 1e6:.1f} MB, exported, built "
            f"in {time.perf_counter() - start:.1f} s, cosine to PyTorch {cosine:.6f}"
        )

    start = time.perf_counter()
    image = sessions["vision"](pixels.numpy())
    states_here = sessions["encoder"](image, prompt.numpy())
    here = greedy(lambda ids: sessions["decoder"](ids, states_here), options.places)
    taken = time.perf_counter() - start
    # The whole model, and not the parts that were exported.
    places = torch.full((1, tokens.shape[1]), model.config.image_token_id)
    ids = torch.cat([places, prompt], 1)
    there = greedy(
        lambda so_far: model(
            input_ids=ids, pixel_values=pixels, decoder_input_ids=torch.from_numpy(so_far)
        ).logits.numpy(),
        options.places,
    )
    print(f"answer in {1e3 * taken:.0f} ms: {here}; PyTorch's: {there}")
    if here != there:
        raise SystemExit("the answers differ")


if __name__ == "__main__":
    main()
