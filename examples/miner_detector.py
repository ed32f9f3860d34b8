"""A roadwork detector in the shape that StreetVision miners load, and what it takes to make one.

With a cascade of your own::

    python examples/miner_detector.py --config road.yaml photo.jpg

Without one, two small models are trained on drawn road scenes (minutes, the first time), exported,
built into engines for this machine's CPU and joined by a YAML file. That shows every step; it does
not make a detector for real roads::

    python examples/miner_detector.py
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import numpy as np
from PIL import Image

from sn72engine import (
    BuildOptions,
    CascadeSpec,
    ExportOptions,
    RoadworkDetector,
    ShapeRange,
    StageSpec,
    build,
    export,
)


def build_cascade(folder: Path) -> Path:
    """Train, export and build two stages; write the cascade that joins them.

    Returns:
        The YAML file.
    """
    import torch

    from sn72engine.roadscenes import trained
    from sn72engine.roadscenes.models import PREPROCESS

    folder.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(1, *PREPROCESS.shape)
    stages = []
    for name in ("small_cnn", "small_vit"):
        onnx = export(
            trained(name), ExportOptions(), folder / f"{name}.onnx",
            example=example, preprocess=PREPROCESS,
        )  # fmt: skip
        engine = build(onnx, BuildOptions(batch=ShapeRange(1, 1, 8)))
        # The models end in one logit. These thresholds are a starting point: choose yours from
        # labelled pictures with `sn72engine calibrate`.
        stages.append(StageSpec(name, engine=str(engine.folder), score="sigmoid"))
    path = folder / "road.yaml"
    path.write_text(CascadeSpec(tuple(stages)).to_yaml(folder))
    return path


def drawn_pictures(count: int) -> list[tuple[str, Image.Image]]:
    """Scenes that the models have not seen, half of them with roadwork."""
    from sn72engine.roadscenes import scene

    return [
        (
            f"scene {i} ({'roadwork' if i % 2 else 'clear'})",
            Image.fromarray(np.asarray(scene(i, i % 2))),
        )
        for i in range(count)
    ]


async def answer_together(detector: RoadworkDetector, pictures: list[Image.Image]) -> list[float]:
    """What a miner does that awaits its requests: stages of different requests overlap."""
    return await asyncio.gather(*(detector.predict(picture) for picture in pictures))


def main() -> None:
    """Load the detector and ask it about pictures, one by one and together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", nargs="*", type=Path, help="pictures; default: drawn scenes")
    parser.add_argument("--config", type=Path, help="cascade YAML; default: build one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("example-output/miner_detector"))
    options = parser.parse_args()

    config = options.config or build_cascade(options.folder)
    named = [(str(path), Image.open(path)) for path in options.images] or drawn_pictures(8)
    with RoadworkDetector(str(config), options.device) as detector:
        for name, picture in named:
            begin = time.perf_counter()
            probability = detector(picture)
            milliseconds = 1e3 * (time.perf_counter() - begin)
            print(f"{probability:.3f}  {milliseconds:7.1f} ms  {name}")
        together = asyncio.run(answer_together(detector, [picture for _, picture in named]))
        print(f"awaited together: {' '.join(f'{p:.3f}' for p in together)}")
        print(detector.report())


if __name__ == "__main__":
    main()
