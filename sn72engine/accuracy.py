"""How far the outputs of two models are apart, counted batch by batch in flat memory.

* Cosine similarity of each sample's output, in float64. An output with one element per sample has
  only a sign for a direction; its cosine is that of the vector over all samples instead.
* Largest absolute difference of any element.
* Agreement: the share of samples that both put in the same class, by the first output: arg max of
  a vector; for a single value, the side of 0 of a logit or of 0.5 of a probability (the same
  point through a sigmoid). A single value is taken for a logit when the output's name says so or
  when any reference value lies outside [0, 1].
* Top-1 accuracy of both, where labels are given.
* Samples with a NaN or infinity, which no other figure counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sn72engine.errors import InputError

_Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True, slots=True)
class OutputReport:
    """How one output of the candidate compares with the reference's.

    ``cosine_min`` and ``worst_sample`` are of the sample that differs most; for an output of one
    element per sample ``cosine_over`` is ``dataset`` and there is no worst sample. Figures are
    over samples whose outputs are finite, NaN when there are none.
    """

    name: str
    cosine_min: float
    cosine_mean: float
    cosine_over: str
    worst_sample: int | None
    max_abs_error: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; a figure that is not finite is None."""
        return {
            "name": self.name,
            "cosine_min": _finite(self.cosine_min),
            "cosine_mean": _finite(self.cosine_mean),
            "cosine_over": self.cosine_over,
            "worst_sample": self.worst_sample,
            "max_abs_error": _finite(self.max_abs_error),
        }


@dataclass(frozen=True, slots=True)
class ClassReport:
    """How the classes compare. Shares are in [0, 1].

    ``decision`` says how a class was chosen. ``agreement`` is None when the first output gives no
    class; the top-1 accuracies are None without labels.
    """

    decision: str
    agreement: float | None = None
    candidate_top1: float | None = None
    reference_top1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)


class Comparison:
    """Running statistics of a candidate's outputs beside a reference's.

    Args:
        names: of the outputs, in order; the first one gives the class.
        labels: shape (samples,), integer class of each sample in the order they will come.
    """

    def __init__(self, names: Sequence[str], labels: _Array | None = None) -> None:
        self.samples = 0
        self._labels = labels
        self._outputs = [_OutputStatistics(name) for name in names]
        self._classes = _ClassStatistics(names[0])

    def add(self, candidate: Sequence[_Array], reference: Sequence[_Array], count: int) -> None:
        """Count one batch of ``count`` samples; arrays have samples on axis 0.

        Raises:
            InputError: the number or the shapes of the outputs differ, or there are labels and
                too few of them, or no class to compare them with.
        """
        if not len(candidate) == len(reference) == len(self._outputs):
            raise InputError(
                f"the candidate has {len(candidate)} outputs, the reference {len(reference)}"
            )
        for statistics, mine, other in zip(self._outputs, candidate, reference, strict=True):
            if mine.shape != other.shape or mine.shape[:1] != (count,):
                raise InputError(
                    f"output {statistics.name!r}: the candidate gave shape {mine.shape}, the "
                    f"reference {other.shape}, for a batch of {count}"
                )
            statistics.add(mine, other, self.samples)
        labels = None
        if self._labels is not None:
            labels = self._labels[self.samples : self.samples + count]
            if len(labels) < count:
                raise InputError(f"{len(self._labels)} labels, but the data has more samples")
        self._classes.add(candidate[0], reference[0], labels)
        self.samples += count

    def outputs(self) -> tuple[OutputReport, ...]:
        """Figures of each output, over the samples so far."""
        return tuple(statistics.report() for statistics in self._outputs)

    def classes(self) -> ClassReport:
        """Agreement and top-1 accuracy over the samples so far."""
        return self._classes.report(self.samples, labelled=self._labels is not None)

    def not_finite(self) -> list[str]:
        """One sentence for each side of each output that held a NaN or infinity."""
        return [line for statistics in self._outputs for line in statistics.not_finite()]


class _OutputStatistics:
    """Cosine and largest error of one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._max_abs = -math.inf
        self._cosine_min = math.inf
        self._cosine_sum = 0.0
        self._finite = 0
        self._worst: int | None = None
        self._whole = np.zeros(3)  # dot product and squared lengths over all samples
        self._single = True
        self._bad: dict[str, list[int]] = {"candidate": [], "reference": []}  # count, first sample

    def add(self, got: _Array, wanted: _Array, start: int) -> None:
        a = got.reshape(len(got), -1).astype(np.float64)
        b = wanted.reshape(len(wanted), -1).astype(np.float64)
        good = np.ones(len(a), dtype=bool)
        for who, values in (("candidate", a), ("reference", b)):
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                first = start + int(np.argmin(finite))
                count, first = self._bad[who] or (0, first)
                self._bad[who] = [count + int((~finite).sum()), first]
            good &= finite
        self._single = a.shape[1] == 1
        a, b, positions = a[good], b[good], np.flatnonzero(good)
        if a.size == 0:
            return
        self._max_abs = max(self._max_abs, float(np.abs(a - b).max()))
        if self._single:
            self._whole += (a * b).sum(), (a * a).sum(), (b * b).sum()
        # Scaled to a largest element of 1, so that no square over- or underflows.
        a, b = a / _largest(a), b / _largest(b)
        cosine = _cosine((a * b).sum(axis=1), (a * a).sum(axis=1), (b * b).sum(axis=1))
        worst = int(np.argmin(cosine))
        if cosine[worst] < self._cosine_min:
            self._cosine_min = float(cosine[worst])
            self._worst = start + int(positions[worst])
        self._cosine_sum += float(cosine.sum())
        self._finite += len(cosine)

    def not_finite(self) -> list[str]:
        return [
            f"output {self.name!r} of the {who} holds NaN or infinity in {found[0]} samples, "
            f"first in sample {found[1]}"
            for who, found in self._bad.items()
            if found
        ]

    def report(self) -> OutputReport:
        if self._finite == 0:
            return OutputReport(self.name, math.nan, math.nan, "sample", None, math.nan)
        if self._single:
            whole = float(_cosine(*self._whole))
            return OutputReport(self.name, whole, whole, "dataset", None, self._max_abs)
        mean = self._cosine_sum / self._finite
        return OutputReport(self.name, self._cosine_min, mean, "sample", self._worst, self._max_abs)


class _ClassStatistics:
    """Agreement and top-1 accuracy, by one output.

    Whether a single value is a logit or a probability shows only once all data was seen, so both
    readings are counted: element 0 of each count is for logits, element 1 for probabilities.
    """

    def __init__(self, name: str) -> None:
        self._named_logit = "logit" in name.lower()
        self._kind = "none"
        self._outside = False
        self._agree = np.zeros(2, dtype=np.int64)
        self._candidate = np.zeros(2, dtype=np.int64)
        self._reference = np.zeros(2, dtype=np.int64)

    def add(self, got: _Array, wanted: _Array, labels: _Array | None) -> None:
        self._kind = _class_kind(wanted)
        if self._kind == "none":
            if labels is not None:
                raise InputError(
                    "labels need a first output of shape (batch, classes), (batch, 1) or (batch,), "
                    f"got {wanted.shape}"
                )
            return
        mine, other = _classes(got, self._kind), _classes(wanted, self._kind)
        if self._kind == "value":
            self._outside |= bool(((wanted < 0) | (wanted > 1)).any())
        self._agree += (mine == other).sum(axis=1)
        if labels is not None:
            self._candidate += (mine == labels).sum(axis=1)
            self._reference += (other == labels).sum(axis=1)

    def report(self, samples: int, labelled: bool) -> ClassReport:
        reading = 0
        if self._kind == "none":
            return ClassReport("the first output gives no class")
        if self._kind == "vector":
            decision = "arg max"
        elif self._kind == "index":
            decision = "class index"
        elif self._named_logit:
            decision = "side of 0: the output is named a logit"
        elif self._outside:
            decision = "side of 0: some reference values lie outside [0, 1], so these are logits"
        else:
            reading = 1
            decision = "side of 0.5: all reference values lie in [0, 1], so these are probabilities"
        agreement = float(self._agree[reading]) / samples
        if not labelled:
            return ClassReport(decision, agreement)
        return ClassReport(
            decision,
            agreement,
            float(self._candidate[reading]) / samples,
            float(self._reference[reading]) / samples,
        )


def _class_kind(values: _Array) -> str:
    """How an output of samples gives a class: ``vector``, ``value``, ``index`` or ``none``."""
    if values.ndim == 2 and values.shape[1] > 1:
        return "vector"
    if values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1):
        return "index" if values.dtype.kind in "iub" else "value"
    return "none"


def _classes(values: _Array, kind: str) -> _Array:
    """Class of each sample, shape (2, samples): read as logits, read as probabilities."""
    if kind == "vector":
        return np.tile(values.argmax(axis=1), (2, 1))
    flat = values.reshape(-1)
    if kind == "index":
        return np.tile(flat, (2, 1))
    return np.stack([flat >= 0, flat >= 0.5])


def _largest(rows: _Array) -> _Array:
    """Largest magnitude of each row, shape (rows, 1); 1 for a row of zeros."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    return np.where(largest == 0, 1.0, largest)


def _cosine(dot: Any, squared_a: Any, squared_b: Any) -> Any:
    """Cosine from dot product and squared lengths; 1 for two zero vectors, 0 for one."""
    # One root of the product, not a product of roots: equal vectors then give exactly 1.
    length = np.sqrt(squared_a * squared_b)
    both_zero = (squared_a == 0) & (squared_b == 0)
    return np.where(both_zero, 1.0, dot / np.where(length == 0, 1.0, length))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
