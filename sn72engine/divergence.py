"""Finds the first layer at which two engines or ONNX files part, given the same inputs.

Tensors inside both are read by marking them as outputs, and compared by name: quantisation,
conversion to float16 and the rewriting of Q/DQ for a CPU all keep the names of what the layers of
the float model compute. An error spreads forwards only, so the layer to blame is a tensor that is
off while everything it is computed from is right.

Two ways to search. ``all`` measures every tensor, as many at a time as the memory bound allows,
and shows how the error grows through the depth. ``bisect`` narrows down from the outputs and reads
a number of tensors that grows with the logarithm of the depth: for large models.

How much error is too much depends on the arithmetic, so the default bound is chosen by the lower
precision of the two (relative error in the Euclidean norm, over a tensor):

===========  ======  ==============================================================================
arithmetic   bound   why
===========  ======  ==============================================================================
fp32         0.001   sums in another order differ by 1e-6 to 1e-4 after dozens of layers; a wrong
                     weight or attribute is seldom below 0.01
fp16, bf16   0.02    one rounding is 5e-4 (float16), and errors of dozens of layers add up
8 bits       0.3     rounding to 1/127 of the range gives 0.01 to 0.03 in each layer, and a deep
and fewer            network of healthy layers reaches 0.1 to 0.2; 0.3 is a cosine of 0.954
===========  ======  ==============================================================================
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from sn72engine.errors import InputError
from sn72engine.graph_order import Made, ancestors, feeds, made_tensors
from sn72engine.model import OnnxModel
from sn72engine.progress import Progress
from sn72engine.samples import head, spread
from sn72engine.spec import (
    BackendName,
    Options,
    RuntimeOptions,
    check_choice,
    check_int,
    check_number,
)
from sn72engine.tensor_error import TensorError
from sn72engine.tensor_probe import FLOATS, TensorProbe
from sn72engine.text import WIDTH, cut
from sn72engine.trial import random_inputs

if TYPE_CHECKING:
    from sn72engine.engine import Engine

_Array: TypeAlias = "np.ndarray[Any, Any]"

Subject: TypeAlias = "Engine | OnnxModel | str | Path"
Search = Literal["all", "bisect"]

#: Bound on the relative error by precision; what is not listed has 8 bits or fewer.
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-2}
_COARSE = 0.3

#: Backends that run an ONNX file with any of its tensors marked as outputs.
BACKENDS = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")

#: Bytes that a tensor of unknown shape is taken to have.
_UNKNOWN_BYTES = 8 << 20

#: Tensors read in one step of a bisection.
_PROBES = 8


@dataclass(frozen=True, slots=True)
class CompareOptions(Options):
    """How two engines or ONNX files are compared layer by layer.

    Args:
        backend, other_backend: what runs the first and the second where they are ONNX files.
        search: ``all`` or ``bisect``.
        max_relative_error: bound on ``|b - a| / |a|`` of a tensor; None chooses by precision (the
            table is in :mod:`sn72engine.divergence`).
        min_cosine: bound on the cosine; None takes the smallest that a tensor within the other
            bound can have, ``sqrt(1 - max_relative_error ** 2)``.
        ignore_below: root mean square of a difference that never counts, for tensors that are
            zero but for rounding.
        batch: samples per call.
        samples: most samples to compare on, in whole batches, of which there is at least one; the
            worst call counts.
        memory_bytes: bound on the tensors of both that are held at once.
        seed: of the random input, where none is given.
    """

    backend: BackendName = "onnxruntime"
    other_backend: BackendName = "onnxruntime"
    search: Search = "all"
    max_relative_error: float | None = None
    min_cosine: float | None = None
    ignore_below: float = 1e-6
    batch: int = 1
    samples: int = 4
    memory_bytes: int = 512 << 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, BACKENDS)
        check_choice("other_backend", self.other_backend, BACKENDS)
        check_choice("search", self.search, Search)
        if self.max_relative_error is not None:
            check_number("max_relative_error", self.max_relative_error, 0.0)
        if self.min_cosine is not None:
            check_number("min_cosine", self.min_cosine, -1.0, 1.0)
        check_number("ignore_below", self.ignore_below, 0.0)
        check_int("batch", self.batch, 1)
        check_int("samples", self.samples, 1)
        check_int("memory_bytes", self.memory_bytes, 1)
        check_int("seed", self.seed, 0)

    @property
    def needed(self) -> int:
        """Samples to have at hand: ``samples``, and one whole batch at least."""
        return max(self.samples, self.batch)


@dataclass(frozen=True, slots=True)
class LayerError:
    """One tensor that both compute.

    Attributes:
        layer, op: name and type of the node that computes it in the first.
        tensor: its name.
        error: how far the second lies from the first, in the worst call.
        inherited: largest relative error among the measured tensors that it is computed from.
        parted: whether a bound was broken.
    """

    layer: str
    op: str
    tensor: str
    error: TensorError
    inherited: float
    parted: bool

    @property
    def added(self) -> float:
        """Relative error beyond what came in: what the layer itself, or its input's Q/DQ, adds."""
        if math.isinf(self.error.relative):
            return 0.0 if math.isinf(self.inherited) else math.inf
        return max(self.error.relative - self.inherited, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; a figure that is not finite is None."""
        return {
            "layer": self.layer,
            "op": self.op,
            "tensor": self.tensor,
            "relative_error": _finite(self.error.relative),
            "inherited": _finite(self.inherited),
            "cosine": _finite(self.error.cosine),
            "rms_error": _finite(self.error.rms),
            "max_abs_error": _finite(self.error.largest),
            "problem": self.error.problem,
            "parted": self.parted,
        }


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """What was found.

    Attributes:
        names: of the first and the second.
        outputs: the final outputs of both as they run, with nothing marked.
        layers: measured tensors in topological order.
        first_bad: where they part; None where no layer does.
        unmeasured: tensors of the first that the second does not have, or that were not looked at.
        samples: compared.
        max_relative_error, min_cosine: the bounds that were applied.
        search: how was searched.
    """

    names: tuple[str, str]
    outputs: tuple[LayerError, ...]
    layers: tuple[LayerError, ...]
    first_bad: LayerError | None
    unmeasured: int
    samples: int
    max_relative_error: float
    min_cosine: float
    search: Search

    @property
    def parted(self) -> bool:
        """Whether an output, or any layer, broke a bound."""
        return self.first_bad is not None or any(output.parted for output in self.outputs)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        bound = f"relative error {self.max_relative_error:g}"
        if self.first_bad is not None:
            bad = self.first_bad
            what = bad.error.problem or (
                f"relative error {bad.error.relative:.3g} where its inputs have {bad.inherited:.3g}"
            )
            return f"they part at layer {bad.layer!r} ({bad.op}): {what}"
        if any(output.parted for output in self.outputs):
            return (
                "the outputs differ, but no layer does once tensors are marked as outputs: what "
                "differs is a fusion that marking prevents, or a layer that only one of them has"
            )
        if self.search == "bisect":
            return (
                f"the outputs agree (bound: {bound}), so there was nothing to bisect; search='all' "
                "measures every layer"
            )
        return f"no layer parts ({len(self.layers)} compared, bound: {bound})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "a": self.names[0],
            "b": self.names[1],
            "verdict": self.verdict,
            "first_bad": self.first_bad.to_dict() if self.first_bad else None,
            "outputs": [output.to_dict() for output in self.outputs],
            "layers": [layer.to_dict() for layer in self.layers],
            "unmeasured": self.unmeasured,
            "samples": self.samples,
            "max_relative_error": self.max_relative_error,
            "min_cosine": self.min_cosine,
            "search": self.search,
        }

    def render(self, rows: int = 40) -> str:
        """The report as text.

        Args:
            rows: most layers to list: around the first bad one, and those that add most.
        """
        lines = [
            f"a  {self.names[0]}",
            f"b  {self.names[1]}",
            *textwrap.wrap(self.verdict, WIDTH),
            *(
                f"output {o.tensor!r}, nothing marked: "
                + (o.error.problem or f"relative error {o.error.relative:.3g}, ")
                + ("" if o.error.problem else f"cosine {o.error.cosine:.6f}")
                for o in self.outputs
            ),
            "",
        ]
        chosen = self._chosen(rows)
        names = [cut(layer.layer, 32) for layer in self.layers]
        width = max(map(len, names), default=5)
        lines.append(
            f"     # {'layer':{width}} {'operator':18} {'rel. error':>10} {'of inputs':>10} "
            f"{'cosine':>9} {'largest':>9}"
        )
        before = -1
        for index in chosen:
            if index > before + 1:
                lines.append("       ...")
            before = index
            layer = self.layers[index]
            mark = ">>" if layer is self.first_bad else (" !" if layer.parted else "  ")
            lines.append(
                f"{mark}{index:>4} {names[index]:{width}} {layer.op:18.18} "
                + (
                    layer.error.problem
                    or f"{layer.error.relative:10.3g} {layer.inherited:10.3g} "
                    f"{layer.error.cosine:9.6f} {layer.error.largest:9.3g}"
                )
            )
        if chosen and chosen[-1] < len(self.layers) - 1:
            lines.append("       ...")
        if self.unmeasured:
            lines.append(f"tensors of a that were not compared: {self.unmeasured}")
        return "\n".join(lines)

    def save_plot(self, path: str | Path) -> Path:
        """Draw the error through the depth as a PNG and return its path.

        Raises:
            InputError: no layer was measured.
            MissingDependencyError: matplotlib is not installed.
        """
        from sn72engine.divergence_plot import plot

        return plot(self, Path(path))

    def _chosen(self, rows: int) -> list[int]:
        """Places of the layers to list, ascending."""
        count = len(self.layers)
        if count <= rows:
            return list(range(count))
        kept: set[int] = set()
        if self.first_bad is not None:
            at = self.layers.index(self.first_bad)
            kept.update(range(max(at - 5, 0), min(at + 6, count)))
        by_added = sorted(range(count), key=lambda index: -self.layers[index].added)
        for index in by_added:
            if len(kept) >= rows:
                break
            kept.add(index)
        return sorted(kept)


def compare(
    a: Subject,
    b: Subject,
    inputs: Mapping[str, _Array] | _Array | Iterable[_Array] | None = None,
    options: CompareOptions | None = None,
    *,
    runtime: RuntimeOptions | None = None,
    progress: bool | None = None,
) -> ComparisonReport:
    """Run two engines or ONNX files on the same inputs and find the first layer where they part.

    Args:
        a: what is taken to be right: an engine, its folder, an ONNX model or the path of a file.
        b: what is compared with it.
        inputs: arrays by input name; or, for one input, an array or batches of them, with samples
            on axis 0. Random numbers when None: enough to find a fault, not to judge accuracy.
        options: bounds, search and backends; None takes the defaults.
        runtime: how both are run.
        progress: show a progress bar; None shows it on a terminal.

    Returns:
        The report; parting is no error.

    Raises:
        InputError: they take other inputs or give other outputs, have no tensor in common, the
            inputs do not fit, or one of them is a TensorRT engine.
        SessionError: a backend refused or failed.
    """
    options = options if options is not None else CompareOptions()
    with (
        _opened(a, options.backend, options, runtime) as first,
        _opened(b, options.other_backend, options, runtime) as second,
    ):
        batches = _batches(inputs, first, options)
        _check_signatures(first, second)
        bounds = _bounds(options, (_arithmetic(first), _arithmetic(second)))
        comparer = _Comparer(first, second, batches, bounds, options)
        outputs = comparer.outputs()
        with Progress("compare", len(comparer.pairs), unit="tensor", shown=progress) as bar:
            search = comparer.measure_all if options.search == "all" else comparer.bisect
            errors = search(bar)
        layers = comparer.layers(errors)
        by_tensor = {layer.tensor: layer for layer in layers}
        culprit = comparer.origin({layer.tensor for layer in layers if layer.parted})
        return ComparisonReport(
            names=(first.name, second.name),
            outputs=outputs,
            layers=layers,
            first_bad=by_tensor[culprit] if culprit else None,
            unmeasured=comparer.total - len(layers),
            samples=sum(len(next(iter(batch.values()))) for batch in batches),
            max_relative_error=bounds[0],
            min_cosine=bounds[1],
            search=options.search,
        )


class _Comparer:
    """Measures tensors that two probes share."""

    def __init__(
        self,
        first: TensorProbe,
        second: TensorProbe,
        batches: Sequence[Mapping[str, _Array]],
        bounds: tuple[float, float],
        options: CompareOptions,
    ) -> None:
        self._first, self._second, self._batches = first, second, batches
        self._bounds, self._options = bounds, options
        made = [m for m in made_tensors(first.proto) if _is_float(first, m)]
        theirs = {m.tensor for m in made_tensors(second.proto) if _is_float(second, m)}
        self.total = len(made)
        self.pairs = {m.tensor: m for m in made if m.tensor in theirs}
        if not self.pairs:
            raise InputError(
                f"{first.name} and {second.name} have no floating-point tensor of one name: "
                "compare files that were made from one export"
            )
        self._order = {tensor: place for place, tensor in enumerate(self.pairs)}
        self._fed_by = feeds(first.proto, self.pairs)
        # Tensors that were marked with no other beside them. The one to blame must be among them:
        # with a convolution and the activation after it marked together, OpenVINO 2026.4 gives a
        # wrong activation in some quantised networks.
        self._alone: set[str] = set()

    def outputs(self) -> tuple[LayerError, ...]:
        """The final outputs of both, with nothing marked."""
        names = [spec.name for spec in self._first.outputs]
        errors = self._measured((), names)
        ops = {m.tensor: m for m in made_tensors(self._first.proto)}
        return tuple(
            LayerError(
                ops[name].layer if name in ops else name,
                ops[name].op if name in ops else "",
                name,
                error,
                math.nan,
                self._parts(error),
            )
            for name, error in errors.items()
        )

    def measure_all(self, bar: Progress) -> dict[str, TensorError]:
        """Every shared tensor, in runs that keep the memory bound."""
        errors: dict[str, TensorError] = {}
        waiting = list(self.pairs)
        while waiting:
            chunk = self._fitting(waiting)
            waiting = waiting[len(chunk) :]
            errors |= self._measured(chunk, chunk)
            bar.step(len(chunk))
        while True:
            culprit = self.origin(self._wrong(errors))
            if culprit is None or culprit in self._alone:
                return errors
            bar.note(f"again, alone: {culprit}")
            errors |= self._measured([culprit], [culprit])

    def bisect(self, bar: Progress) -> dict[str, TensorError]:
        """Tensors on the way from the outputs to the layer at fault.

        What a right tensor is computed from is taken to be right, so each step leaves only
        candidates between the wrong tensor that comes first and the right ones before it.
        """
        ends = [spec.name for spec in self._first.outputs if spec.name in self.pairs]
        last = next(reversed(self.pairs))
        errors = self._measured(ends or [last], ends or [last])
        while True:
            bar.note(f"{len(errors)} read")
            wrong = self._wrong(errors)
            if not wrong:
                return errors
            first = min(wrong, key=self._order.__getitem__)
            if first not in self._alone:
                errors |= self._measured([first], [first])
                continue
            right = set(errors) - wrong
            clear = right | ancestors(right, self._fed_by) | set(errors)
            left = ancestors([first], self._fed_by) - clear
            if not left:
                # Errors can cancel on the way to a right tensor, so what the tensor to blame is
                # computed from is looked at, and not only taken to be right.
                left = set(self._fed_by[first]) - set(errors)
            if not left:
                return errors
            ordered = sorted(left, key=self._order.__getitem__)
            probes = self._fitting([ordered[place] for place in spread(len(ordered), _PROBES)])
            errors |= self._measured(probes, probes)
            bar.step(len(probes))

    def layers(self, errors: Mapping[str, TensorError]) -> tuple[LayerError, ...]:
        """Measured tensors in topological order, with what each inherits."""
        near = feeds(self._first.proto, errors)
        rows = []
        for tensor in sorted(errors, key=self._order.__getitem__):
            made, error = self.pairs[tensor], errors[tensor]
            inherited = max((errors[name].relative for name in near[tensor]), default=0.0)
            rows.append(
                LayerError(made.layer, made.op, tensor, error, inherited, self._parts(error))
            )
        return tuple(rows)

    def origin(self, wrong: set[str]) -> str | None:
        """The first wrong tensor of which nothing that it is computed from is wrong."""
        for tensor in sorted(wrong, key=self._order.__getitem__):
            if not wrong & ancestors([tensor], self._fed_by):
                return tensor
        return None

    def _wrong(self, errors: Mapping[str, TensorError]) -> set[str]:
        return {tensor for tensor, error in errors.items() if self._parts(error)}

    def _parts(self, error: TensorError) -> bool:
        if error.problem:
            return True
        if error.rms <= self._options.ignore_below:
            return False
        return not (error.relative <= self._bounds[0] and error.cosine >= self._bounds[1])

    def _measured(self, marked: Sequence[str], names: Sequence[str]) -> dict[str, TensorError]:
        if len(marked) == 1:
            self._alone.update(marked)
        worst: dict[str, TensorError] = {}
        runs = zip(
            self._first.run(marked, self._batches),
            self._second.run(marked, self._batches),
            strict=True,
        )
        for mine, theirs in runs:
            for name in names:
                error = TensorError.between(mine[name], theirs[name])
                worst[name] = worst[name].worse(error) if name in worst else error
        return worst

    def _fitting(self, tensors: Sequence[str]) -> list[str]:
        """As many of the tensors, from the first on, as may be held at once; at least one."""
        chosen: list[str] = []
        held = 0
        for tensor in tensors:
            held += _bytes(self._first, tensor) + _bytes(self._second, tensor)
            if chosen and held > self._options.memory_bytes:
                break
            chosen.append(tensor)
        return chosen


def _opened(
    subject: Subject, backend: BackendName, options: CompareOptions, runtime: RuntimeOptions | None
) -> TensorProbe:
    if isinstance(subject, (str, Path)) and Path(subject).is_dir():
        from sn72engine.engine_folder import open_engine

        subject = open_engine(subject)
    return TensorProbe(subject, backend=backend, batch=options.batch, runtime=runtime)


def _batches(
    inputs: Mapping[str, _Array] | _Array | Iterable[_Array] | None,
    first: TensorProbe,
    options: CompareOptions,
) -> list[dict[str, _Array]]:
    """At most ``samples`` samples, in whole batches, by input name."""
    if inputs is None:
        rounds = options.needed // options.batch
        return [
            random_inputs(first.inputs, options.batch, options.seed + turn)
            for turn in range(rounds)
        ]
    if not isinstance(inputs, Mapping):
        if len(first.inputs) != 1:
            listed = ", ".join(spec.name for spec in first.inputs)
            raise InputError(f"{first.name} has the inputs {listed}: give arrays by name")
        count = options.needed
        rows = inputs[:count] if isinstance(inputs, np.ndarray) else head(inputs, count)
        inputs = {first.inputs[0].name: rows}
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) != 1 or min(counts.values()) < options.batch:
        raise InputError(
            f"inputs hold {counts} samples: give every input the same number of them, at least "
            f"batch={options.batch}"
        )
    most = min(min(counts.values()), options.needed)
    return [
        {name: array[start : start + options.batch] for name, array in inputs.items()}
        for start in range(0, most - options.batch + 1, options.batch)
    ]


def _check_signatures(first: TensorProbe, second: TensorProbe) -> None:
    for kind, mine, theirs in (
        ("inputs", first.inputs, second.inputs),
        ("outputs", first.outputs, second.outputs),
    ):
        names, others = ({spec.name for spec in specs} for specs in (mine, theirs))
        if names != others:
            raise InputError(
                f"{first.name} has the {kind} {', '.join(sorted(names))}, {second.name} "
                f"{', '.join(sorted(others))}: rename those of one file so that they agree"
            )


def _bounds(options: CompareOptions, precisions: Iterable[str]) -> tuple[float, float]:
    relative = options.max_relative_error
    if relative is None:
        relative = max(TOLERANCES.get(precision, _COARSE) for precision in precisions)
    cosine = options.min_cosine
    if cosine is None:
        cosine = math.sqrt(1 - relative**2) if relative < 1 else -1.0
        # Rounding of the figures themselves must not break a bound.
        cosine -= 1e-9
    return relative, cosine


def _arithmetic(probe: TensorProbe) -> str:
    """The lowest precision that the file computes in; its inputs may be of a higher one."""
    if probe.precision not in TOLERANCES:
        return probe.precision
    held = {probe.dtype(made.tensor) for made in made_tensors(probe.proto)}
    return "fp16" if held & {"float16", "bfloat16"} else probe.precision


def _is_float(probe: TensorProbe, made: Made) -> bool:
    dtype = probe.dtype(made.tensor)
    if dtype is None:  # of an operator that shape inference does not know
        return made.op not in ("QuantizeLinear", "DynamicQuantizeLinear", "Shape", "Cast")
    return dtype in FLOATS


def _bytes(probe: TensorProbe, tensor: str) -> int:
    shape = probe.shape(tensor)
    if shape is None:
        return _UNKNOWN_BYTES
    return math.prod(shape) * np.dtype(probe.dtype(tensor) or "float32").itemsize


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
