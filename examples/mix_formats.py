"""Give each layer the cheapest number format that the answers allow, and draw what that cost.

With your exported model, pictures to calibrate, and other pictures to judge by::

    python examples/mix_formats.py --model model.onnx --data photos/ --check other/

Without them, the small vision transformer of the road scenes is trained (minutes, once) and mixed
on drawn scenes, in 5 to 7 minutes on two cores. ``--quick`` shows the steps in two, with a model
that has learned nothing::

    python examples/mix_formats.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from sn72engine import (
    CalibrationOptions,
    ExportOptions,
    MixOptions,
    OnnxModel,
    VerifyOptions,
    batches,
    export,
    mix,
)
from sn72engine.calibration import CalibrationData
from sn72engine.mixing.cost import CARDS
from sn72engine.roadscenes import TrainOptions, dataset, trained
from sn72engine.roadscenes.models import PREPROCESS

#: Training for seconds: enough to go through the steps, not enough to learn.
QUICK = TrainOptions(scenes=128, passes=256, joint_passes=32)


def drawn(
    scenes: int, quick: bool, folder: Path
) -> tuple[OnnxModel, CalibrationData, CalibrationData, np.ndarray]:
    """The small vision transformer, scenes to calibrate and to judge it by, and their labels."""
    model = export(
        trained("small_vit", QUICK if quick else None),
        ExportOptions(),
        folder / "small_vit.onnx",
        example=torch.zeros(1, *PREPROCESS.shape),
        preprocess=PREPROCESS,
    )
    options = CalibrationOptions()
    # Seeds other than that of training: scenes that the model has not seen.
    data, _ = dataset(64, seed=101)
    check, labels = dataset(scenes, seed=202)
    return model, batches(data, PREPROCESS, options), batches(check, PREPROCESS, options), labels


def main() -> None:
    """Mix, print the table, and write the file and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="float ONNX file made by sn72engine export")
    parser.add_argument("--data", type=Path, help="calibration pictures")
    parser.add_argument("--check", type=Path, help="pictures that the formats are judged on")
    parser.add_argument("--card", choices=tuple(CARDS), default="rtx5090")
    parser.add_argument("--min-cosine", type=float, default=0.9995, help="the bound to keep")
    parser.add_argument("--samples", type=int, default=128, help="most pictures to judge by")
    parser.add_argument("--quick", action="store_true", help="train for seconds, 8 scenes")
    parser.add_argument("--output", type=Path, default=Path("example-output/mix"))
    options = parser.parse_args()
    if options.model and not (options.data and options.check):
        parser.error("--model needs --data and --check: pictures like those that you will serve")

    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    labels = None
    if options.model:
        model = OnnxModel.open(options.model)
        if model.preprocess is None:
            parser.error(f"{options.model} holds no preprocessing; export it with one")
        limits = CalibrationOptions(limit=options.samples)
        data = batches(options.data, model.preprocess, limits)
        check = batches(options.check, model.preprocess, limits)
    else:
        count = 8 if options.quick else options.samples
        model, data, check, labels = drawn(count, options.quick, folder)

    bound = VerifyOptions(min_cosine=options.min_cosine, min_speedup=None)
    mixture = mix(
        model,
        data,
        check,
        MixOptions(card=options.card, verify=bound),
        folder / "mixed.onnx",
        labels=labels,
    )
    mixture.save_plot(folder / "mix.png")
    print(mixture.render())
    print(f"{mixture.taken} of {len(mixture.steps)} steps taken, {len(mixture.trials)} measured")
    print(f"wrote {mixture.model.path} and {folder / 'mix.png'}")


if __name__ == "__main__":
    main()
