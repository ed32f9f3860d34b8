"""The gate an engine passes before it may replace another: accuracy and speed, in one run.

Quantised engines are often no faster than the float engine they replace, and sometimes wrong. The
gate therefore measures both on the same inputs and in the same run, and refuses either fault.

Accuracy is measured against the first reference, as :mod:`sn72engine.accuracy` describes. Speed is
the ratio of median latencies of calls that take turns, so that a change of clock or load hits all
of them alike. A NaN or infinity in any output fails, whatever the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sn72engine import _deps
from sn72engine.accuracy import ClassReport, Comparison, OutputReport
from sn72engine.errors import InputError, VerificationError
from sn72engine.spec import VerifyOptions

if TYPE_CHECKING:
    from sn72engine.session import Session

_Array: TypeAlias = "np.ndarray[Any, Any]"

#: A session, or any callable from a batch to an array, a sequence or a mapping of arrays.
Model: TypeAlias = "Session | Callable[[_Array], Any]"

CANDIDATE = "candidate"
REFERENCE = "reference"

_WARMUP = 5


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """Median latencies, in milliseconds, of interleaved calls against one reference."""

    reference: str
    candidate_ms: float
    reference_ms: float

    @property
    def speedup(self) -> float:
        """Throughput of the candidate over the reference's; above 1 is faster."""
        return self.reference_ms / self.candidate_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "reference": self.reference,
            "candidate_ms": self.candidate_ms,
            "reference_ms": self.reference_ms,
            "speedup": self.speedup,
        }


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was measured, against which bounds, and every bound that was broken.

    ``speed`` holds one entry per reference, none when speed was not asked for. An empty
    ``failures`` means passed.
    """

    samples: int
    outputs: tuple[OutputReport, ...]
    classes: ClassReport
    speed: tuple[SpeedReport, ...]
    options: VerifyOptions
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every bound was kept."""
        return not self.failures

    @property
    def speedup(self) -> float | None:
        """Smallest speed-up over any reference; None when speed was not measured."""
        return min((entry.speedup for entry in self.speed), default=None)

    def check(self) -> None:
        """Refuse an engine that broke a bound.

        Raises:
            VerificationError: the message lists every broken bound with its figure.
        """
        if self.failures:
            raise VerificationError("the engine is refused: " + "; ".join(self.failures))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; a figure that is not finite is None."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "samples": self.samples,
            "outputs": [output.to_dict() for output in self.outputs],
            **self.classes.to_dict(),
            "speed": [entry.to_dict() for entry in self.speed],
            "options": self.options.to_dict(),
        }

    def render(self) -> str:
        """The report as text, a line per figure."""
        lines = [f"{'passed' if self.passed else 'REFUSED'}: {self.samples} samples"]
        lines += [
            f"  {o.name}: cosine {o.cosine_min:.5f} min, {o.cosine_mean:.5f} mean "
            f"(per {o.cosine_over}); largest error {o.max_abs_error:.4g}"
            for o in self.outputs
        ]
        c = self.classes
        if c.agreement is not None:
            lines.append(f"  agreement {c.agreement:.2%} ({c.decision})")
        if c.candidate_top1 is not None and c.reference_top1 is not None:
            lines.append(f"  top-1 {c.candidate_top1:.2%}, reference {c.reference_top1:.2%}")
        lines += [
            f"  {s.speedup:.2f} times as fast as {s.reference}: {s.candidate_ms:.3f} ms against "
            f"{s.reference_ms:.3f} ms at batch {self.options.batch}"
            for s in self.speed
        ]
        lines += [f"  refused: {failure}" for failure in self.failures]
        return "\n".join(lines)


def verify(
    candidate: Model,
    reference: Model | Mapping[str, Model],
    batches: Iterable[_Array],
    *,
    labels: _Array | None = None,
    options: VerifyOptions | None = None,
) -> VerifyReport:
    """Compare an engine with what it would replace.

    Data is read once, batch by batch; only ``options.batch`` samples of it are kept, for the
    timed calls.

    Args:
        candidate: session under test, or any callable from a batch to its outputs: an array, a
            sequence of arrays or a mapping of name to array, samples on axis 0.
        reference: what to compare with, in the same form. A mapping of name to reference compares
            accuracy with the first and speed with each, so that an INT8 engine is timed beside
            FP32 and FP16 in one run.
        batches: arrays with samples on axis 0, of any size: sessions take them in chunks that fit
            their engine. They are cast to the input type that a session declares, outside the
            timed calls.
        labels: shape (samples,), integer class of every sample, in the order of ``batches``.
        options: bounds; None takes the defaults.

    Returns:
        The report. Broken bounds are in its ``failures``; ``check()`` raises on them.

    Raises:
        InputError: no data, labels that do not fit the data, or outputs whose number or shapes
            differ between candidate and reference.
    """
    options = options or VerifyOptions()
    references = dict(reference) if isinstance(reference, Mapping) else {REFERENCE: reference}
    _check_arguments(references, labels)
    judge = next(iter(references.values()))
    comparison: Comparison | None = None
    kept: list[_Array] = []
    for batch in batches:
        if len(batch) == 0:
            continue
        if (missing := options.batch - sum(map(len, kept))) > 0:
            # A copy: the data source may hand out one buffer again and again.
            kept.append(np.array(batch[:missing]))
        names, got, wanted = _paired(_run(candidate, batch), _run(judge, batch))
        if comparison is None:
            comparison = Comparison(names, labels)
        comparison.add(got, wanted, len(batch))
    if comparison is None:
        raise InputError("no data to verify with: batches is empty")
    if labels is not None and len(labels) != comparison.samples:
        raise InputError(f"{len(labels)} labels for {comparison.samples} samples")
    speed = () if options.min_speedup is None else _time(candidate, references, kept, options)
    outputs, classes = comparison.outputs(), comparison.classes()
    failures = (
        *comparison.not_finite(),
        *_output_failures(outputs, options),
        *_class_failures(classes, options),
        *_speed_failures(speed, options),
    )
    return VerifyReport(comparison.samples, outputs, classes, speed, options, failures)


def torch_reference(module: Any, device: str = "cpu") -> Callable[[_Array], Any]:
    """A PyTorch module as a reference: a callable from a NumPy batch to NumPy outputs.

    The module is moved to ``device``.

    Raises:
        InputError: the module is in training mode, where dropout and batch statistics would make
            the reference change from call to call.
    """
    torch = _deps.require("torch", purpose="run a PyTorch reference")
    if module.training:
        raise InputError(f"{type(module).__name__} is in training mode; call .eval() first")
    module = module.to(device)

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        if value.dtype == torch.bfloat16:  # NumPy has no such type
            value = value.float()
        return value.cpu().numpy()

    def call(batch: _Array) -> Any:
        # PyTorch warns about arrays that it may not write to; only those are copied.
        writable = np.require(batch, requirements=["C", "W"])
        with torch.inference_mode():
            return plain(module(torch.from_numpy(writable).to(device)))

    return call


# ---- calls ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Outputs of one call; ``names`` is empty when the model does not name them."""

    names: tuple[str, ...]
    arrays: tuple[_Array, ...]


def _run(model: Model, batch: _Array) -> _Outputs:
    # A session takes batches of its own range only, which need not be that of the data.
    run = getattr(model, "infer_rows", model)
    value = run(_cast(model, batch))
    if isinstance(value, Mapping):
        return _Outputs(tuple(value), tuple(np.asarray(array) for array in value.values()))
    values = value if isinstance(value, (tuple, list)) else (value,)
    names = tuple(spec.name for spec in getattr(model, "outputs", ()))
    return _Outputs(names, tuple(np.asarray(array) for array in values))


def _paired(
    got: _Outputs, wanted: _Outputs
) -> tuple[tuple[str, ...], tuple[_Array, ...], tuple[_Array, ...]]:
    """Names and arrays of both: matched by name where both have the same names, else by place."""
    names = got.names or wanted.names or tuple(f"output{i}" for i in range(len(got.arrays)))
    if set(got.names) == set(wanted.names) and len(wanted.names) == len(wanted.arrays):
        by_name = dict(zip(wanted.names, wanted.arrays, strict=True))
        return names, got.arrays, tuple(by_name[name] for name in got.names)
    return names, got.arrays, wanted.arrays


def _cast(model: Model, batch: _Array) -> _Array:
    """The batch in the type that a session declares; as it is for other callables."""
    specs = getattr(model, "inputs", ())
    return batch.astype(specs[0].dtype, copy=False) if specs else batch


def _time(
    candidate: Model, references: Mapping[str, Model], kept: list[_Array], options: VerifyOptions
) -> tuple[SpeedReport, ...]:
    from sn72engine.latency import interleave

    samples = np.concatenate(kept)
    batch = samples[np.arange(options.batch) % len(samples)]  # repeated when the data is short

    def prepared(model: Model) -> Callable[[], object]:
        data = _cast(model, batch)
        return lambda: model(data)

    calls = {name: prepared(model) for name, model in {CANDIDATE: candidate, **references}.items()}
    found = interleave(calls, warmup=_WARMUP, repeats=options.repeats)
    return tuple(
        SpeedReport(name, float(found[CANDIDATE].p50), float(found[name].p50))
        for name in references
    )


# ---- bounds ---------------------------------------------------------------------------------


def _check_arguments(references: Mapping[str, Model], labels: _Array | None) -> None:
    if not references:
        raise InputError("reference={} holds nothing to compare with")
    if CANDIDATE in references:
        raise InputError(f"a reference may not be named {CANDIDATE!r}")
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iub"):
        raise InputError(
            f"labels must be integers of shape (samples,), got {labels.dtype} of shape "
            f"{labels.shape}"
        )


def _output_failures(outputs: tuple[OutputReport, ...], options: VerifyOptions) -> list[str]:
    failures = []
    for output in outputs:
        # Written so that NaN breaks the bounds too.
        where = "the data set" if output.worst_sample is None else f"sample {output.worst_sample}"
        checks = [("mean cosine", output.cosine_mean, options.min_cosine)]
        if options.min_worst_cosine is not None:
            checks.append((f"cosine of {where}", output.cosine_min, options.min_worst_cosine))
        failures += [
            f"output {output.name!r}: {what} {value:.5f}, {bound - value:.5f} below the bound "
            f"{bound:g}"
            for what, value, bound in checks
            if not value >= bound
        ]
        largest = options.max_abs_error
        if largest is not None and not output.max_abs_error <= largest:
            failures.append(
                f"output {output.name!r}: largest error {output.max_abs_error:.4g}, "
                f"{output.max_abs_error - largest:.4g} above the bound {largest:g}"
            )
    return failures


def _class_failures(classes: ClassReport, options: VerifyOptions) -> list[str]:
    failures = []
    agreement, bound = classes.agreement, options.min_agreement
    if agreement is not None and agreement < bound:
        failures.append(
            f"agreement {agreement:.2%} ({classes.decision}), "
            f"{(bound - agreement) * 100:.2f} points below the bound {bound:.2%}"
        )
    mine, other = classes.candidate_top1, classes.reference_top1
    if mine is not None and other is not None:
        drop = (other - mine) * 100
        # The shares are ratios of counts; their difference may miss the bound by rounding only.
        if drop > options.max_top1_drop + 1e-9:
            failures.append(
                f"top-1 accuracy {mine:.2%} against {other:.2%}: {drop:.2f} points lost, "
                f"{drop - options.max_top1_drop:.2f} more than the bound {options.max_top1_drop:g}"
            )
    return failures


def _speed_failures(speed: tuple[SpeedReport, ...], options: VerifyOptions) -> list[str]:
    bound = options.min_speedup
    return [
        f"{entry.speedup:.2f} times as fast as {entry.reference} ({entry.candidate_ms:.3f} ms "
        f"against {entry.reference_ms:.3f} ms, medians of {options.repeats} calls at batch "
        f"{options.batch}), {bound - entry.speedup:.2f} below the bound {bound:g}"
        for entry in speed
        if bound is not None and entry.speedup < bound
    ]
