"""Choose a cascade's thresholds from labelled pictures, with a statement of how sure they are.

With your cascade and your labels (a CSV file with ``file`` and ``label`` columns, or a folder per
class)::

    python examples/calibrate_cascade.py --spec road.yaml --data labels.csv

Without them, two small models are trained on drawn road scenes (minutes, once; ``--quick`` trains
for seconds and shows the steps only), and thresholds are chosen on scenes they have not seen::

    python examples/calibrate_cascade.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from sn72engine import (
    BuildOptions,
    CascadeSpec,
    ExportOptions,
    RuntimeOptions,
    ShapeRange,
    StageSpec,
    Store,
    ThresholdOptions,
    build,
    choose,
    export,
    labelled,
)
from sn72engine.cascade.opening import open_stages
from sn72engine.cascade.tuning import score_stages, with_choice
from sn72engine.roadscenes import TrainOptions, trained, write_dataset
from sn72engine.roadscenes.models import PREPROCESS

#: Training for seconds: enough to go through the steps, not enough to learn.
QUICK = TrainOptions(scenes=128, passes=256, joint_passes=32)


def road_cascade(folder: Path, quick: bool) -> CascadeSpec:
    """Two stages, each trained, exported and built for this machine's CPU; cheapest first."""
    store = Store(folder)  # so that road.yaml and engines can be moved together
    stages = []
    for name in ("small_cnn", "small_vit"):
        onnx = export(
            trained(name, QUICK if quick else None),
            ExportOptions(),
            folder / f"{name}.onnx",
            example=torch.zeros(1, *PREPROCESS.shape),
            preprocess=PREPROCESS,
        )
        engine = build(onnx, BuildOptions(batch=ShapeRange(1, 8, 32)), store=store)
        # The models end in one logit. Its thresholds are what is to be found.
        stages.append(StageSpec(name, engine=str(engine.folder), score="sigmoid"))
    return CascadeSpec(tuple(stages))


def main(arguments: Sequence[str] | None = None) -> None:
    """Score every stage on every picture, choose, and write road.yaml and pareto.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spec", type=Path, help="cascade YAML; default: two small models")
    parser.add_argument("--data", type=Path, help="labelled pictures; default: drawn scenes")
    parser.add_argument("--objective", choices=("accuracy", "mcc", "reward"), default="accuracy")
    parser.add_argument("--tolerance", type=float, default=0.01, help="loss that is acceptable")
    parser.add_argument("--scenes", type=int, default=2000, help="how many scenes to draw")
    parser.add_argument("--quick", action="store_true", help="train for seconds")
    parser.add_argument("--output", type=Path, default=Path("example-output/cascade"))
    options = parser.parse_args(arguments)
    if options.spec and not options.data:
        parser.error("--spec needs --data: thresholds for your models come from your pictures")

    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    spec = (
        CascadeSpec.from_yaml(options.spec) if options.spec else road_cascade(folder, options.quick)
    )
    # A seed other than that of training: scenes that the models have not seen.
    data = options.data or write_dataset(
        folder / "scenes", options.scenes, seed=72, difficulty=(0.0, 0.9), size=192
    )

    paths, labels = labelled(data)
    with open_stages(spec, RuntimeOptions(threads=1)) as stages:
        table = score_stages(stages, paths)
    choice = choose(
        table.probabilities,
        labels,
        table.seconds,
        ThresholdOptions(objective=options.objective, tolerance=options.tolerance),
        names=table.names,
    )

    print(f"{len(labels)} pictures, {labels.mean():.0%} with roadwork")
    for name, alone in zip(table.names, choice.singles, strict=True):
        print(f"{name:10} alone: accuracy {alone.accuracy:.2%}, {1e3 * alone.cost:.2f} ms each")
    together = choice.figures
    print(
        f"{'cascade':10}     : accuracy {together.accuracy:.2%}, {1e3 * together.cost:.2f} ms each"
    )
    for stage in choice.stages:
        print(
            f"  {table.names[stage.stage]}: below {stage.low:.4f} no, above {stage.high:.4f} yes; "
            f"{stage.reach:.1%} of the pictures come this far"
        )
    for dropped in choice.dropped:
        print(f"  {table.names[dropped.stage]}: dropped, {dropped.reason}")
    print(f"certificate: {choice.statement}")

    (folder / "road.yaml").write_text(with_choice(spec, choice).to_yaml(folder))
    choice.plot(folder / "pareto.png", names=table.names)
    print(f"wrote {folder / 'road.yaml'} and {folder / 'pareto.png'}")


if __name__ == "__main__":
    main()
