"""``sn72engine calibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sn72engine.cli.outcome import Outcome
from sn72engine.cli.outcome import table as table_text
from sn72engine.errors import OptionError
from sn72engine.spec import RuntimeOptions
from sn72kernels import atomic

if TYPE_CHECKING:
    from sn72engine.thresholds import ThresholdChoice

SUMMARY = "choose a cascade's thresholds from labelled images"
EXAMPLES = """\
  sn72engine calibrate road.yaml --data labels.csv -o road.tuned.yaml
  sn72engine calibrate road.yaml --data labels.csv --objective reward --pareto pareto.png \\
      -o road.tuned.yaml
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("spec", type=Path, help="cascade YAML; its thresholds are replaced")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="labelled images: a CSV with file and label columns, or a folder per class",
    )
    parser.add_argument("--split", help="rows of the CSV with this value in the split column")
    parser.add_argument(
        "--objective",
        choices=("accuracy", "mcc", "reward"),
        default="accuracy",
        help="what must be kept; reward is the subnet's formula; default %(default)s",
    )
    parser.add_argument("--target", type=float, help="value to reach; default: the best stage's")
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="of the certificate; default %(default)s"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("-o", "--output", type=Path, help="cascade YAML to write")
    parser.add_argument("--pareto", type=Path, metavar="PNG", help="write the Pareto curve")


def execute(options: argparse.Namespace) -> Outcome:
    """Score every stage on every image, choose, and write the cascade."""
    from sn72engine.cascade.opening import open_stages
    from sn72engine.cascade.spec import ALWAYS, CascadeSpec
    from sn72engine.cascade.tuning import score_stages, with_choice
    from sn72engine.image_files import labelled
    from sn72engine.thresholds import ThresholdOptions, choose

    spec = CascadeSpec.from_yaml(options.spec)
    for stage in spec.stages:
        if stage.combine != "replace" or stage.when != ALWAYS:
            raise OptionError(
                f"stage {stage.name!r} has combine={stage.combine!r}, when={stage.when!r}: "
                "thresholds can be chosen for stages that replace and always run"
            )
    # Checked before the work that they come after.
    threshold_options = ThresholdOptions(
        objective=options.objective,
        target=options.target,
        confidence=options.confidence,
        task="top1" if spec.top1 else "binary",
    )
    paths, labels = labelled(options.data, options.split)
    with open_stages(spec, RuntimeOptions(threads=options.threads)) as stages:
        table = score_stages(stages, paths)
    choice = choose(
        list(table.probabilities),
        labels,
        table.seconds,
        threshold_options,
        stage_labels=None if table.labels is None else list(table.labels),
        names=table.names,
    )
    tuned = with_choice(spec, choice)
    if options.output is not None:
        atomic.write_text(options.output, tuned.to_yaml(options.output.parent))
    if options.pareto is not None:
        choice.plot(options.pareto, names=table.names)
    data = {"choice": choice.to_dict(), "spec": tuned.to_dict()}
    return Outcome(data, render(choice, table.names))


def render(choice: ThresholdChoice, names: tuple[str, ...]) -> str:
    """The choice as text for a person."""
    rows: list[tuple[str, object]] = [
        (
            names[stage.stage],
            f"low {stage.low:.4g}, high {stage.high:.4g}; reached by {stage.reach:.1%}, "
            f"{stage.cost * 1e3:.2f} ms per image",
        )
        for stage in choice.stages
    ]
    rows += [(names[d.stage], f"dropped: {d.reason}") for d in choice.dropped]
    rows += [
        ("accuracy", f"{choice.accuracy:.2%} on {choice.certified_on} held-out images"),
        *(
            (f"{name} alone", f"{s.accuracy:.2%}, {s.cost * 1e3:.2f} ms")
            for name, s in zip(names, choice.singles, strict=True)
        ),
        ("cost", f"{choice.expected_cost * 1e3:.2f} ms per image expected"),
        ("guarantee", choice.statement),
    ]
    return table_text(rows)
