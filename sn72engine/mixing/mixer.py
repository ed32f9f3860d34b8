"""Float ONNX file -> Q/DQ file in which each layer has the cheapest format that accuracy allows.

1. One calibration by the method ``max``, whose ranges hold for every format.
2. Each layer alone in each format: how much the answers change (:mod:`.sensitivity`).
3. What each format costs (:mod:`.cost`), and the order of steps that this gives (:mod:`.search`).
4. The largest number of steps whose file keeps the bound, measured by the gate of
   :func:`sn72engine.verify`, by bisection.

Nothing is random and nothing is timed: the same model, data and options give the same file.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from sn72engine import layers, onnx_file
from sn72engine.errors import InputError, OptionError, QuantizationError
from sn72engine.layers import Choice
from sn72engine.mixing import cost, search, sensitivity
from sn72engine.mixing.mixture import FLOAT, LayerMix, Mixture, Trial
from sn72engine.mixing.options import MixOptions
from sn72engine.mixing.search import Point, Step
from sn72engine.model import OnnxModel
from sn72engine.progress import Progress
from sn72engine.quantizer import Batches, Calibration, calibrate, choose, write
from sn72engine.spec import QuantizedPrecision, QuantizeOptions
from sn72engine.verifier import VerifyReport, verify

if TYPE_CHECKING:
    import torch

Costs = Mapping[str, Mapping[str, float]]
"""Node name to format to seconds; ``float`` is a format too."""

_LEFT = "left in float by the mix"


def mix(
    model: OnnxModel,
    data: Batches,
    check: Batches,
    options: MixOptions,
    path: str | Path,
    *,
    labels: np.ndarray | None = None,
    module: torch.nn.Module | None = None,
    costs: Costs | None = None,
    progress: bool | None = None,
) -> Mixture:
    """Choose a format for every layer and write the file.

    The file is built and run about once per layer and format, on the CPU: minutes for a small
    network, hours for a large one. A small ``check`` set shortens it.

    Args:
        model: a float32 ONNX model with one input.
        data: what calibrates it.
        check: what the formats are judged on; other samples than ``data``, for a fair judgement.
        options: formats, what to minimise, and the bound.
        path: of the file; written whole or not at all.
        labels: shape (check.samples,), integer classes, for the bound on top-1 accuracy.
        module: what ``model`` was exported from, as in :func:`sn72engine.quantize`.
        costs: measured times, in place of the model of latency.
        progress: show a bar; None shows it on a terminal only.

    Returns:
        The file with the figures that led to it.

    Raises:
        QuantizationError: the model cannot be quantised, no step keeps the bound (the message has
            the figure that broke it), or the cost of a layer is not known.
        CalibrationError, MissingDependencyError: as for :func:`sn72engine.quantize`.
        InputError: ``check`` holds no data, or ``labels`` does not fit it.
        OptionError: ``costs`` lacks a node or a format, or comes with ``minimise="bytes"``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if labels is not None and len(labels) != check.samples:
        raise InputError(f"{len(labels)} labels for {check.samples} samples of check")
    choices = _choices(model, options)
    # The format that takes most nodes takes those of all others; INT8 also needs ranges that the
    # others do not, and MXFP8 none at all.
    widest = max(
        choices,
        key=lambda name: (len(choices[name].precisions), name == "int8", name != "mxfp8"),
    )
    wide, base = _quantize_options(options, widest), choices[widest]
    prices = _prices(model, choices, options, costs)
    found = calibrate(model, data, wide, base, module=module, folder=path.parent, progress=progress)
    with tempfile.TemporaryDirectory(prefix=".sn72.", dir=path.parent) as folder:
        bench = _Bench(model, wide, base, found, Path(folder) / path.name)
        mixed = _measured(bench, _groups(choices, base), prices, check, progress)
        steps = search.order(
            {layer.name: (layer.points[0], list(layer.points[1:])) for layer in mixed}
        )
        taken, trials = _walk(bench, mixed, steps, check, labels, options, progress)
    mixed = _chosen(mixed, steps[:taken])
    record = {**found.record, "check_sha256": check.data_sha256(), "given_costs": costs is not None}
    told = dataclasses.replace(found, record={**record, "mix": options.to_dict()})
    return Mixture(
        write(model, wide, _assigned(base, mixed), told, path),
        mixed,
        tuple(steps),
        taken,
        tuple(trials),
        options,
        record,
    )


def _quantize_options(options: MixOptions, precision: str) -> QuantizeOptions:
    return QuantizeOptions(
        precision=cast(QuantizedPrecision, precision),
        method="max",
        op_types=options.op_types,
        exclude=options.exclude,
    )


def _choices(model: OnnxModel, options: MixOptions) -> dict[str, Choice]:
    """For each format the nodes that can have it; formats that no node can have are left out.

    Raises:
        QuantizationError: there is no format left.
    """
    found: dict[str, Choice] = {}
    refusals = []
    for precision in options.resolved_formats:
        try:
            found[precision] = choose(model, _quantize_options(options, precision))
        except QuantizationError as error:
            refusals.append(f"{precision}: {error}")
    if not found:
        raise QuantizationError("; ".join(refusals))
    return found


def _groups(choices: Mapping[str, Choice], base: Choice) -> list[tuple[tuple[str, ...], list[str]]]:
    """Nodes that read the same tensor, in graph order, and the formats that all of them can have.

    Called after the calibration, which may have found that some nodes have no range.
    """
    by_input: dict[str, list[str]] = {}
    for node in base.precisions:
        by_input.setdefault(base.inputs[node], []).append(node)
    groups = []
    for nodes in by_input.values():
        formats = [name for name, c in choices.items() if all(n in c.precisions for n in nodes)]
        groups.append((tuple(nodes), formats))
    return groups


def _prices(
    model: OnnxModel, choices: Mapping[str, Choice], options: MixOptions, costs: Costs | None
) -> Costs:
    """Cost of every node in every format that it can have, and in float.

    Raises:
        OptionError: the costs given lack one, or are not asked for.
        QuantizationError: a latency cannot be modelled.
    """
    wanted: dict[str, list[str]] = {}
    for precision, choice in choices.items():
        for node in choice.precisions:
            wanted.setdefault(node, [FLOAT]).append(precision)
    if costs is not None:
        if options.minimise != "latency":
            raise OptionError(f"costs are times, and minimise={options.minimise!r}")
        for node, formats in wanted.items():
            for precision in formats:
                if precision not in costs.get(node, {}):
                    raise OptionError(f"costs lacks node {node!r} in {precision!r}")
        return costs
    proto = onnx_file.skeleton(model.path)
    layers.name_nodes(proto)
    sizes, card = cost.products(proto, options.batch), cost.CARDS[options.card]
    return {
        node: {
            precision: sizes[node].bytes(precision)
            if options.minimise == "bytes"
            else sizes[node].seconds(precision, card)
            for precision in formats
        }
        for node, formats in wanted.items()
    }


class _Bench:
    """Writes a file with any assignment of formats, in the same place over and over."""

    def __init__(
        self,
        model: OnnxModel,
        options: QuantizeOptions,
        base: Choice,
        found: Calibration,
        path: Path,
    ) -> None:
        self.model, self.base = model, base
        self._options, self._found, self._path = options, found, path

    def write(self, precisions: Mapping[str, str]) -> OnnxModel:
        """The file in which these nodes have these formats and all others stay in float."""
        choice = _assign(self.base, precisions)
        return write(self.model, self._options, choice, self._found, self._path)


def _assign(base: Choice, precisions: Mapping[str, str]) -> Choice:
    """The choice with other formats; graph order stays."""
    kept = {node: precisions[node] for node in base.precisions if node in precisions}
    left = {node: _LEFT for node in base.precisions if node not in precisions}
    return dataclasses.replace(
        base,
        precisions=kept,
        skipped={**base.skipped, **left},
        unasked=base.unasked | left.keys(),
    )


def _assigned(base: Choice, mixed: tuple[LayerMix, ...]) -> Choice:
    return _assign(base, _by_node(mixed, {layer.name: layer.chosen for layer in mixed}))


def _by_node(mixed: Sequence[LayerMix], formats: Mapping[str, str]) -> dict[str, str]:
    """Node to format, for the layers that get another than float."""
    return {
        node: formats[layer.name]
        for layer in mixed
        if formats.get(layer.name, FLOAT) != FLOAT
        for node in layer.nodes
    }


def _chosen(mixed: tuple[LayerMix, ...], steps: Sequence[Step]) -> tuple[LayerMix, ...]:
    formats = search.assignment(steps)
    return tuple(
        dataclasses.replace(layer, chosen=formats.get(layer.name, FLOAT)) for layer in mixed
    )


def _measured(
    bench: _Bench,
    groups: Sequence[tuple[tuple[str, ...], list[str]]],
    prices: Costs,
    check: Batches,
    progress: bool | None,
) -> tuple[LayerMix, ...]:
    """Every layer alone in every format that it can have."""
    wanted = sensitivity.answers(bench.model, check)
    mixed = []
    total = sum(len(formats) for _, formats in groups)
    with Progress("sensitivity", total, unit="run", shown=progress) as bar:
        for nodes, formats in groups:
            points = [Point(FLOAT, sum(prices[node][FLOAT] for node in nodes), 0.0)]
            for precision in formats:
                bar.note(f"{nodes[0]} {precision}")
                written = bench.write(dict.fromkeys(nodes, precision))
                damage = sensitivity.damage(sensitivity.answers(written, check), wanted)
                price = sum(prices[node][precision] for node in nodes)
                points.append(Point(precision, price, damage))
                bar.step()
            modules = tuple(bench.base.modules[n] for n in nodes if n in bench.base.modules)
            mixed.append(LayerMix(nodes[0], nodes, modules, FLOAT, tuple(points)))
    return tuple(mixed)


def _walk(
    bench: _Bench,
    mixed: tuple[LayerMix, ...],
    steps: Sequence[Step],
    check: Batches,
    labels: np.ndarray | None,
    options: MixOptions,
    progress: bool | None,
) -> tuple[int, list[Trial]]:
    """How many steps the bound allows, and what was measured on the way.

    Raises:
        QuantizationError: it allows none, or no step saves anything.
    """
    if not steps:
        raise QuantizationError(
            f"no layer is cheaper in {', '.join(options.resolved_formats)} than in float16 by "
            f"minimise={options.minimise!r}; its model has nothing to gain"
        )
    trials: list[Trial] = []
    with (
        Progress("mix", len(steps).bit_length() + 1, unit="trial", shown=progress) as bar,
        sensitivity.opened(bench.model) as reference,
    ):

        def holds(count: int) -> bool:
            bar.note(f"{count} of {len(steps)} steps")
            written = bench.write(_by_node(mixed, search.assignment(steps[:count])))
            with sensitivity.opened(written) as candidate:
                report = verify(candidate, reference, check, labels=labels, options=options.verify)
            trials.append(_trial(mixed, steps[:count], report))
            bar.step()
            return report.passed

        taken = search.furthest(len(steps), holds)
    if not taken:
        first = min(trials, key=lambda trial: trial.steps)
        raise QuantizationError(
            f"no assignment keeps the bound: already with {first.steps} of {len(steps)} steps, "
            f"{'; '.join(first.report.failures)}"
        )
    return taken, trials


def _trial(mixed: tuple[LayerMix, ...], steps: Sequence[Step], report: VerifyReport) -> Trial:
    after = [layer.point(layer.chosen) for layer in _chosen(mixed, steps)]
    return Trial(
        len(steps),
        sum(point.cost for point in after),
        sum(point.damage for point in after),
        report,
    )
