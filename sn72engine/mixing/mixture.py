"""What an automatic choice of formats found: the file, the layers, and how it got there."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sn72engine.mixing.options import MixOptions
from sn72engine.mixing.search import Point, Step
from sn72engine.model import OnnxModel
from sn72engine.spec import LayerPrecision
from sn72engine.text import Column, table
from sn72engine.verifier import VerifyReport

FLOAT = "float"


@dataclass(frozen=True, slots=True)
class LayerMix:
    """Products that read the same tensor, and so share its quantisation and their format.

    Attributes:
        name: of the first node.
        nodes: all of them.
        modules: paths of the modules that made them, where the file tells.
        chosen: format of the result.
        points: cost and damage in every format; ``float`` first.
    """

    name: str
    nodes: tuple[str, ...]
    modules: tuple[str, ...]
    chosen: str
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """What to call it in a table."""
        return ", ".join(self.modules) or ", ".join(self.nodes)

    def point(self, precision: str) -> Point:
        """Its cost and damage in one format."""
        return next(point for point in self.points if point.precision == precision)


@dataclass(frozen=True, slots=True)
class Trial:
    """One number of steps that was measured: did the answers keep the bound?"""

    steps: int
    cost: float
    damage: float
    report: VerifyReport


@dataclass(frozen=True, slots=True)
class Mixture:
    """A file with a format for each layer, and the figures that chose them.

    Attributes:
        model: the quantised file.
        layers: every layer that could have been quantised, in the order in which they run.
        steps: every step towards cheaper formats, best first; the first ``taken`` were taken.
        taken: number of them.
        trials: what was measured, in order.
        options: what was asked for.
        record: the calibration, the hash of the data that judged the formats, and whether the
            costs were given.
    """

    model: OnnxModel
    layers: tuple[LayerMix, ...]
    steps: tuple[Step, ...]
    taken: int
    trials: tuple[Trial, ...]
    options: MixOptions
    record: Mapping[str, Any]

    @property
    def overrides(self) -> dict[str, LayerPrecision]:
        """For :class:`~sn72engine.spec.QuantizeOptions`: the same file again from the same data.

        With ``method="max"``, and any of the formats as ``precision``.
        """
        return {
            glob.escape(node): cast(LayerPrecision, layer.chosen)
            for layer in self.layers
            for node in layer.nodes
        }

    @property
    def unit(self) -> str:
        """Of costs: ``s`` or ``bytes``."""
        return "bytes" if self.options.minimise == "bytes" else "s"

    @property
    def report(self) -> VerifyReport:
        """The measured accuracy of the result."""
        return next(trial.report for trial in self.trials if trial.steps == self.taken)

    @property
    def cost(self) -> float:
        """Of the result's layers, in ``unit``."""
        return sum(layer.point(layer.chosen).cost for layer in self.layers)

    @property
    def float_cost(self) -> float:
        """Of the same layers in 16 bits."""
        return sum(layer.point(FLOAT).cost for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; a damage that is not finite is None."""
        return {
            "path": str(self.model.path),
            "options": self.options.to_dict(),
            "unit": self.unit,
            "cost": self.cost,
            "float_cost": self.float_cost,
            "taken": self.taken,
            "layers": [
                {
                    "nodes": list(layer.nodes),
                    "modules": list(layer.modules),
                    "chosen": layer.chosen,
                    "formats": {
                        point.precision: {
                            "cost": point.cost,
                            "damage": point.damage if math.isfinite(point.damage) else None,
                        }
                        for point in layer.points
                    },
                }
                for layer in self.layers
            ],
            "steps": [
                {
                    "layer": s.layer,
                    "precision": s.point.precision,
                    "saved": s.saved,
                    "added": s.added,
                }
                for s in self.steps
            ],
            "trials": [
                {
                    "steps": trial.steps,
                    "cost": trial.cost,
                    "damage": trial.damage,
                    "report": trial.report.to_dict(),
                }
                for trial in self.trials
            ],
            "record": dict(self.record),
        }

    def render(self) -> str:
        """The choice as text: a line per layer, then the measured accuracy."""
        formats = self.options.resolved_formats
        columns = [
            Column("layer", 44),
            Column("chosen", 6),
            *(Column(f"{name} damage", 12, right=True) for name in formats),
        ]
        rows = []
        for layer in self.layers:
            damages = {point.precision: f"{point.damage:.2e}" for point in layer.points}
            rows.append((layer.label, layer.chosen, *(damages.get(name, "-") for name in formats)))
        lines = table(columns, rows)
        return "\n".join(
            [
                *lines,
                f"{self.described(self.cost)} against {self.described(self.float_cost)} in float16",
                self.report.render(),
            ]
        )

    def described(self, cost: float) -> str:
        """A cost with its unit."""
        if self.unit == "bytes":
            return f"{cost / 1e6:.2f} MB of weights"
        origin = "given" if self.record["given_costs"] else f"modelled on {self.options.card}"
        return f"{cost * 1e6:.1f} µs in these layers ({origin})"

    def save_plot(self, path: str | Path) -> Path:
        """Draw what each layer would cost in accuracy, and the way to the result, as PNG.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from sn72engine.mixing.plot import plot

        return plot(self, Path(path))
