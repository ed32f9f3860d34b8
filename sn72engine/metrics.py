"""Counters and histograms of a service: what its cascade, batcher and shadow runs did.

Plain objects with no dependency. One :class:`Metrics` may watch any number of cascades and
batchers, and goes on counting when a cascade is replaced by another::

    metrics = Metrics()
    cascade = Cascade(spec, observe=metrics)
    batcher = MicroBatcher(cascade, observe=metrics)

:mod:`sn72engine.prometheus` gives them to Prometheus.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sn72engine.errors import OptionError
from sn72engine.events import BatchEvent, CallEvent, Event, RequestsEvent, ShadowEvent

Labels = tuple[str, ...]
Kind = Literal["counter", "gauge", "histogram"]

#: Upper ends of the buckets, in seconds: 1, 2.5, 5 times powers of ten, 0.1 ms to 10 s.
SECONDS = (*(m * 10.0**e for e in range(-4, 1) for m in (1.0, 2.5, 5.0)), 10.0)
#: Upper ends for numbers of samples.
SIZES = tuple(float(2**e) for e in range(9))
#: Upper ends for differences of probability.
DIFFERENCES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Definition:
    """What a metric is.

    Attributes:
        name: as Prometheus has it, with the unit and without the ``_total`` of counters.
        kind: a counter only grows; a gauge is the latest value; a histogram counts by bucket.
        help: one line.
        labels: names of its labels.
        bounds: of a histogram, the upper ends of its buckets, ascending, without infinity.
    """

    name: str
    kind: Kind
    help: str
    labels: Labels = ()
    bounds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class HistogramValue:
    """A histogram so far.

    Attributes:
        bounds: upper ends of the buckets, the last one infinite.
        counts: values in each bucket: above the bound before it, up to and with its own.
        sum: of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """NaN where there are none."""
        return self.sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """Upper end of the bucket that holds this quantile; NaN where there are no values."""
        if not 0 <= share <= 1:
            raise OptionError(f"share={share!r} must be in [0, 1]")
        if not self.count:
            return math.nan
        wanted, seen = max(share * self.count, 1), 0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            seen += count
            if seen >= wanted:
                return bound
        return math.inf


class _Histogram:
    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, values: Iterable[float]) -> None:
        for value in values:
            self.counts[bisect.bisect_left(self.bounds, value)] += 1
            self.sum += value

    def value(self) -> HistogramValue:
        return HistogramValue((*self.bounds, math.inf), tuple(self.counts), self.sum)


#: Every metric there is. The dashboard in ``docs/grafana-dashboard.json`` is made of these.
DEFINITIONS: Mapping[str, Definition] = {
    d.name: d
    for d in (
        Definition("sn72_calls", "counter", "Calls that cascades answered."),
        Definition("sn72_call_seconds", "histogram", "Time of a cascade's call.", (), SECONDS),
        Definition("sn72_results", "counter", "Answers by status.", ("status",)),
        Definition(
            "sn72_stage_samples",
            "counter",
            "Samples that a stage was asked about, by what became of them: negative and positive "
            "exits, escalated, failed, late.",
            ("stage", "outcome"),
        ),
        Definition(
            "sn72_stage_padding_rows",
            "counter",
            "Rows that a stage computed with no sample in them.",
            ("stage",),
        ),
        Definition(
            "sn72_stage_seconds", "histogram", "Time in a stage, by call.", ("stage",), SECONDS
        ),
        Definition(
            "sn72_stage_decode_seconds",
            "histogram",
            "Time to decode images for a stage, by call.",
            ("stage",),
            SECONDS,
        ),
        Definition(
            "sn72_stage_wait_seconds",
            "histogram",
            "Time that a call waited for other callers of a stage.",
            ("stage",),
            SECONDS,
        ),
        Definition("sn72_batch_size", "histogram", "Requests in a batch.", (), SIZES),
        Definition("sn72_batch_seconds", "histogram", "Time that a batch ran.", (), SECONDS),
        Definition(
            "sn72_queue_wait_seconds", "histogram", "Time from request to batch.", (), SECONDS
        ),
        Definition("sn72_queue_length", "gauge", "Requests in line when the last batch began."),
        Definition(
            "sn72_requests",
            "counter",
            "Requests to a batcher by how they ended: answered, failed, expired, cancelled, "
            "refused, closed.",
            ("outcome",),
        ),
        Definition(
            "sn72_request_seconds",
            "histogram",
            "Time from request to answer, of those answered.",
            (),
            SECONDS,
        ),
        Definition(
            "sn72_shadow_calls",
            "counter",
            "Calls repeated on a candidate: compared, failed, or skipped for want of room.",
            ("outcome",),
        ),
        Definition(
            "sn72_shadow_samples",
            "counter",
            "Samples on which a candidate's label agreed, or differed.",
            ("outcome",),
        ),
        Definition(
            "sn72_shadow_difference",
            "histogram",
            "Difference of probability between a candidate and the answer given.",
            (),
            DIFFERENCES,
        ),
        Definition("sn72_shadow_seconds", "histogram", "Time of a candidate's call.", (), SECONDS),
    )
}


class Metrics:
    """Keeps every metric of :data:`DEFINITIONS`. An observer; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {}
        for definition in DEFINITIONS.values():
            kept: dict[str, Any] = (
                self._histograms if definition.kind == "histogram" else self._numbers
            )
            kept[definition.name] = {}

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        with self._lock:
            match event:
                case CallEvent():
                    self._call(event)
                case BatchEvent():
                    self._batch(event)
                case RequestsEvent():
                    self._requests(event)
                case ShadowEvent():
                    self._shadow(event)

    def value(self, name: str, **labels: str) -> float:
        """A counter or gauge; 0 where nothing was counted yet.

        Raises:
            OptionError: there is no such counter or gauge, or it has other labels.
        """
        key = _key(name, labels, ("counter", "gauge"))
        with self._lock:
            return self._numbers[name].get(key, 0.0)

    def histogram(self, name: str, **labels: str) -> HistogramValue:
        """A histogram so far.

        Raises:
            OptionError: there is no such histogram, or it has other labels.
        """
        key = _key(name, labels, ("histogram",))
        with self._lock:
            found = self._histograms[name].get(key) or _Histogram(DEFINITIONS[name].bounds)
            return found.value()

    def snapshot(self) -> dict[str, dict[Labels, float | HistogramValue]]:
        """Every value by name and label values, all of one moment."""
        with self._lock:
            values: dict[str, dict[Labels, float | HistogramValue]] = {
                name: dict(by_labels) for name, by_labels in self._numbers.items()
            }
            for name, histograms in self._histograms.items():
                values[name] = {key: histogram.value() for key, histogram in histograms.items()}
            return values

    # The rest is called with the lock held.

    def _call(self, event: CallEvent) -> None:
        self._count("sn72_calls", 1)
        self._add("sn72_call_seconds", [event.seconds])
        for status, number in Counter(result.status for result in event.results).items():
            self._count("sn72_results", number, status.value)
        for stage, counts in zip(event.stages, event.counts, strict=True):
            if not counts.asked:
                continue
            for outcome in ("negative", "positive", "escalated", "failed", "late"):
                self._count("sn72_stage_samples", getattr(counts, outcome), stage, outcome)
            self._count("sn72_stage_padding_rows", counts.padded, stage)
            self._add("sn72_stage_wait_seconds", [counts.waited_seconds], stage)
            if counts.seconds:  # the stage ran: the samples could be decoded, and in time
                self._add("sn72_stage_seconds", [counts.seconds], stage)
            self._add("sn72_stage_decode_seconds", [counts.decode_seconds], stage)

    def _batch(self, event: BatchEvent) -> None:
        self._add("sn72_batch_size", [event.size])
        self._add("sn72_batch_seconds", [event.seconds])
        self._add("sn72_queue_wait_seconds", event.waits)
        self._numbers["sn72_queue_length"][()] = event.waiting

    def _requests(self, event: RequestsEvent) -> None:
        self._count("sn72_requests", len(event.seconds), event.outcome)
        if event.outcome == "answered":
            self._add("sn72_request_seconds", event.seconds)

    def _shadow(self, event: ShadowEvent) -> None:
        self._count("sn72_shadow_calls", 1, event.outcome)
        if event.outcome == "compared":
            self._count("sn72_shadow_samples", event.agreed, "agreed")
            self._count("sn72_shadow_samples", event.differed, "differed")
            self._add("sn72_shadow_difference", event.differences)
            self._add("sn72_shadow_seconds", [event.seconds])

    def _count(self, name: str, amount: float, *labels: str) -> None:
        values = self._numbers[name]
        values[labels] = values.get(labels, 0.0) + amount

    def _add(self, name: str, values: Iterable[float], *labels: str) -> None:
        histograms = self._histograms[name]
        histogram = histograms.get(labels)
        if histogram is None:
            histogram = histograms[labels] = _Histogram(DEFINITIONS[name].bounds)
        histogram.add(values)


def _key(name: str, labels: Mapping[str, str], kinds: tuple[Kind, ...]) -> Labels:
    definition = DEFINITIONS.get(name)
    if definition is None or definition.kind not in kinds:
        known = ", ".join(d.name for d in DEFINITIONS.values() if d.kind in kinds)
        raise OptionError(f"{name!r} is no {' or '.join(kinds)}; those are: {known}")
    if set(labels) != set(definition.labels):
        raise OptionError(f"{name} has the labels {list(definition.labels)}, got {sorted(labels)}")
    return tuple(labels[label] for label in definition.labels)
