"""DINOv3 ViT-L/16 with a one-logit head: PyTorch to fp16 and INT8 engines for a card elsewhere.

The engines are built by TensorRT-RTX for an RTX 4090 (sm_89) on a machine that needs no GPU. With
your weights, a folder as ``save_pretrained`` writes it, and pictures like those you will serve::

    python examples/build_dinov3.py --weights dinov3-vitl16/ --head head.pt --data photos/

Without weights, for sizes and build times; the answers then mean nothing::

    python examples/build_dinov3.py --random-weights                 # 10 to 20 minutes, 14 GB
    python examples/build_dinov3.py --random-weights --size small    # a minute or two
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from sn72engine import (
    BuildOptions,
    CalibrationOptions,
    ExportOptions,
    OnnxModel,
    Preprocess,
    QuantizeOptions,
    ShapeRange,
    Store,
    batches,
    build,
    export,
    quantize,
)
from sn72engine.half import to_half
from sn72engine.roadscenes import dataset

#: The whole frame, squashed to a square, as DINOv3's own image processor does it.
PREPROCESS = Preprocess(height=384, width=384, fit="squash", interpolation="bilinear")

#: Smallest batch, the one tuned for, and largest.
BATCH = ShapeRange(1, 16, 32)

#: Layers, heads and width of ViT-L/16, and of something small with the same parts.
SIZES = {"large": (24, 16, 1024), "small": (4, 3, 192)}


class RoadworkClassifier(nn.Module):
    """Backbone and MLP head: pixels (N, 3, 384, 384) to logits (N, 1)."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The logit of roadwork from the class token."""
        return self.head(self.backbone(pixel_values=pixel_values).pooler_output)


def make_model(options: argparse.Namespace) -> RoadworkClassifier:
    """The module, from disk or with random weights."""
    torch.manual_seed(0)
    # Eager attention exports as plain matrix products, which TensorRT-RTX fuses in any precision.
    if options.weights:
        backbone = DINOv3ViTModel.from_pretrained(
            options.weights, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
        )
    else:
        layers, heads, width = SIZES[options.size]
        # An initializer_range of 0.02, the usual one, would leave all outputs nearly alike.
        config = DINOv3ViTConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * width, num_register_tokens=4,
            initializer_range=width**-0.5, attn_implementation="eager",
        )  # fmt: skip
        backbone = DINOv3ViTModel(config)
    model = RoadworkClassifier(backbone, backbone.config.hidden_size)
    if options.head:
        model.head.load_state_dict(torch.load(options.head, weights_only=True))
    return model.eval().requires_grad_(False)


def fidelity(model: OnnxModel, samples: np.ndarray, wanted: np.ndarray) -> str:
    """How near PyTorch's logits the file is that the builder is given: ``model`` in float16."""
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder) / "half.onnx"
        to_half(model.path, half)
        import onnxruntime  # after sn72engine, which keeps it from sending usage data

        session = onnxruntime.InferenceSession(str(half), providers=["CPUExecutionProvider"])
        answers = [session.run(None, {"pixel_values": sample[None]})[0] for sample in samples]
    got, wanted = np.concatenate(answers).ravel(), wanted.ravel()
    cosine = got @ wanted / (np.linalg.norm(got) * np.linalg.norm(wanted))
    error, spread = np.abs(got - wanted).max(), np.ptp(wanted)
    return f"cosine {cosine:.5f}, largest error {error:.1e} of logits that span {spread:.1e}"


def main() -> None:
    """Export, quantise, build, and say how far each engine's file is from PyTorch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", help="folder with DINOv3 weights; nothing is downloaded")
    weights.add_argument("--random-weights", action="store_true", help="for sizes and times only")
    parser.add_argument("--head", help="state dict of the head (keys 0.weight, ..., 2.bias)")
    parser.add_argument("--size", choices=SIZES, default="large", help="with random weights")
    parser.add_argument("--data", help="calibration pictures; default: drawn road scenes")
    parser.add_argument("--samples", type=int, default=16, help="most calibration pictures")
    parser.add_argument("--target", default="sm_89", help="compute capability to build for")
    parser.add_argument("--output", type=Path, default=Path("example-output/dinov3"))
    options = parser.parse_args()
    if options.weights and not options.data:
        parser.error("--weights needs --data: pictures like those that you will serve")
    if options.weights and not options.head:
        print("no --head: its weights are random, so the answers mean nothing yet")

    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    pictures = options.data or dataset(options.samples, seed=1, size=PREPROCESS.height)[0]
    data = batches(pictures, PREPROCESS, CalibrationOptions(batch_size=1, limit=options.samples))
    module = make_model(options)
    samples = np.concatenate([batch for batch, _ in zip(data, range(4), strict=False)])
    wanted = torch.cat([module(torch.from_numpy(x[None])) for x in samples]).numpy()

    print("export: PyTorch -> ONNX, compared with PyTorch")
    exported = export(
        module, ExportOptions(parity_batches=(1, 2)), folder / "dinov3.onnx",
        example=torch.zeros(1, *PREPROCESS.shape), preprocess=PREPROCESS,
    )  # fmt: skip
    del module  # 1.2 GB
    print(f"quantise to INT8 on {data.samples} pictures")
    int8 = quantize(exported, data, QuantizeOptions(method="max"), folder / "dinov3.int8.onnx")
    for precision, model in (("fp16", exported), ("int8", int8)):
        engine = build(
            model,
            BuildOptions("tensorrt_rtx", batch=BATCH, precision=precision, target=options.target),
            store=Store(folder),
        )
        manifest = engine.manifest
        print(
            f"{precision} for {manifest.target}: {manifest.files[0].bytes / 1e6:.0f} MB, built in "
            f"{manifest.build_seconds:.1f} s: {engine.folder}\n"
            f"  against PyTorch: {fidelity(model, samples, wanted)}"
        )


if __name__ == "__main__":
    main()
