"""DINOv3 ViT-L/16 with an MLP head, 1024 -> 256 -> 1: PyTorch to engines for cards elsewhere.

FP16, INT8 and FP8 engines are built by TensorRT-RTX for an RTX 4090 (sm_89) and an NVFP4 engine for
an RTX 5090 (sm_120), on a machine that needs no GPU. With your weights, a folder as
``save_pretrained`` writes it, and pictures like those you will serve::

    python examples/build_dinov3.py --weights dinov3-vitl16/ --head head.pt --data photos/

Without weights, for sizes and build times; the answers then mean nothing::

    python examples/build_dinov3.py --random-weights                 # 6 minutes measured, 7.0 GB
    python examples/build_dinov3.py --random-weights --size small    # a minute or two

The fidelity that is printed compares with PyTorch what a CPU computes from the file that the
builder is given: FP16 as such, INT8 by integer kernels, FP8 and NVFP4 emulated. No card takes part.
"""

from __future__ import annotations

import argparse
import gc
import resource
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
    Store,
    batches,
    build,
    export,
    quantize,
)
from sn72engine.half import to_half
from sn72engine.qdq import lower_for_cpu
from sn72engine.roadscenes import dataset
from sn72engine.spec import DINOV3_BATCH

#: The whole frame, squashed to a square, as DINOv3's own image processor does it.
PREPROCESS = Preprocess(height=384, width=384, fit="squash", interpolation="bilinear")

#: Precision to the card that it is for.
CARDS = {"fp16": "sm_89", "int8": "sm_89", "fp8": "sm_89", "nvfp4": "sm_120"}

#: The patch embedding stays in float, and so does the head, which is small and decides.
FLOAT = {"head.*": "float"}

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


def fidelity(model: OnnxModel, samples: np.ndarray, wanted: np.ndarray, folder: Path) -> str:
    """How near PyTorch's logits a CPU comes with the file that the builder is given."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        runnable = Path(scratch) / "model.onnx"
        (lower_for_cpu if model.quantised else to_half)(model.path, runnable)
        import onnxruntime  # after sn72engine, which keeps it from sending usage data

        session = onnxruntime.InferenceSession(str(runnable), providers=["CPUExecutionProvider"])
        answers = [session.run(None, {"pixel_values": sample[None]})[0] for sample in samples]
    got, wanted = np.concatenate(answers).ravel(), wanted.ravel()
    cosine = got @ wanted / (np.linalg.norm(got) * np.linalg.norm(wanted))
    error, spread = np.abs(got - wanted).max(), np.ptp(wanted)
    return f"cosine {cosine:.5f}, largest error {error:.1e} of logits that span {spread:.1e}"


def say(text: str) -> None:
    """Print a line with the most memory that this process has held so far."""
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    print(f"[peak {peak:.1f} GB] {text}", flush=True)


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
    parser.add_argument("--samples", type=int, default=8, help="most calibration pictures")
    parser.add_argument(
        "--precisions", nargs="+", choices=CARDS, default=list(CARDS), metavar="PRECISION"
    )
    parser.add_argument("--target", help="build all for this card, such as sm_89")
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
    samples = np.concatenate([batch for batch, _ in zip(data, range(2), strict=False)])
    wanted = torch.cat([module(torch.from_numpy(x[None])) for x in samples]).numpy()

    exported = export(
        # Weights in a file of their own are mapped into memory instead of copied.
        module, ExportOptions(parity_batches=(1,), external_data_bytes=64 << 20),
        folder / "dinov3.onnx", example=torch.zeros(1, *PREPROCESS.shape), preprocess=PREPROCESS,
    )  # fmt: skip
    say("exported: PyTorch -> ONNX, compared with PyTorch")
    models = {}
    for precision in options.precisions:
        if precision == "fp16":
            models[precision] = exported
            continue
        how = QuantizeOptions(precision=precision, method="max", overrides=FLOAT)
        path = folder / f"dinov3.{precision}.onnx"
        models[precision] = quantize(exported, data, how, path, module=module)
        count = models[precision].quantization["quantised"]
        say(f"{precision}: {count} layers quantised with {data.samples} pictures")
    del module  # 1.2 GB
    for precision, model in models.items():
        target = options.target or CARDS[precision]
        asked = "fp16" if precision == "fp16" else "fp32"  # a quantised file says what it is
        manifest = build(
            model,
            BuildOptions("tensorrt_rtx", batch=DINOV3_BATCH, precision=asked, target=target),
            store=Store(folder),
        ).manifest
        say(
            f"{precision} for {manifest.target}: {manifest.files[0].bytes / 1e6:.0f} MB, built in "
            f"{manifest.build_seconds:.1f} s, batch {manifest.batch}"
        )
        say(f"{precision} against PyTorch: {fidelity(model, samples, wanted, folder)}")


if __name__ == "__main__":
    main()
