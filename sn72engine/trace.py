"""Writes what happened when as a trace that ``chrome://tracing`` and Perfetto open.

The file is JSON in the Trace Event Format: complete events (``ph`` X) with a start and a duration
in microseconds, and metadata events (``ph`` M) that name the process and its tracks.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sn72engine.cascade.report import StageCounts
from sn72engine.events import BatchEvent, CallEvent, Event, ShadowEvent
from sn72kernels import atomic

_PROCESS = 1

#: By how much the parts of a call may exceed it before they must have run side by side: they are
#: timed apart from the whole.
_SLACK = 1.01


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Attributes:
        name: what it was.
        category: its kind, by which viewers filter.
        start, duration: in microseconds; the start from any fixed point.
        track: name of the row that it is drawn in. Spans of a track lie in one another or apart.
        facts: shown when it is selected; JSON-ready.
    """

    name: str
    category: str
    start: float
    duration: float
    track: str = "main"
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        """When it was over."""
        return self.start + self.duration


def write_trace(path: str | Path, spans: Iterable[Span], *, process: str = "sn72engine") -> Path:
    """Write spans as a trace file and return its path; the first starts at 0.

    Args:
        path: JSON file to write, atomically.
        spans: in any order.
        process: name shown for the process.
    """
    # An outer span first where two start together: viewers nest by order.
    ordered = sorted(spans, key=lambda span: (span.start, -span.duration))
    zero = ordered[0].start if ordered else 0.0
    tracks = {
        name: number for number, name in enumerate(dict.fromkeys(s.track for s in ordered), 1)
    }
    events: list[dict[str, Any]] = [_metadata("process_name", process, 0)]
    events += [_metadata("thread_name", name, number) for name, number in tracks.items()]
    events += [
        {
            "name": span.name,
            "cat": span.category,
            "ph": "X",
            "ts": round(span.start - zero, 3),
            "dur": round(span.duration, 3),
            "pid": _PROCESS,
            "tid": tracks[span.track],
            "args": dict(span.facts),
        }
        for span in ordered
    ]
    path = Path(path)
    atomic.write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
    return path


class TraceRecorder:
    """Records the calls of a cascade, and of what else takes an ``observe``, as spans.

    Give it as ``observe``; any thread may call it. A call tells, for each of its stages, the time
    spent waiting for it, decoding images for it and in it, added up over its batches. The trace
    draws these one after the other, in the order of the stages: durations are measured, and the
    order of batches within a call is not shown. Where they add up to more than the call took, as
    of stages that run side by side, each stage has a row of its own.

    Args:
        limit: most events to keep; later ones are counted only.
    """

    def __init__(self, limit: int = 100_000) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        #: Spans that were not kept.
        self.dropped = 0

    def __call__(self, event: Event) -> None:
        """Take an event; it ends now."""
        now = time.perf_counter() * 1e6
        track = threading.current_thread().name
        if isinstance(event, CallEvent):
            spans = _call_spans(event, now, track)
        elif isinstance(event, BatchEvent):
            facts = {"size": event.size, "waiting": event.waiting, "longest_wait": max(event.waits)}
            spans = [_ending(f"batch of {event.size}", "batch", now, event.seconds, track, facts)]
        elif isinstance(event, ShadowEvent):
            facts = {"samples": event.samples, "differed": event.differed}
            name = f"shadow: {event.outcome}"
            spans = [_ending(name, "shadow", now, event.seconds, track, facts)]
        else:
            return
        with self._lock:
            room = max(self._limit - len(self._spans), 0)
            self._spans += spans[:room]
            self.dropped += len(spans[room:])

    @property
    def spans(self) -> tuple[Span, ...]:
        """What was recorded so far."""
        with self._lock:
            return tuple(self._spans)

    def save(self, path: str | Path) -> Path:
        """Write the trace so far and return its path."""
        return write_trace(path, self.spans)


def _call_spans(event: CallEvent, now: float, track: str) -> list[Span]:
    count = len(event.results)
    call = _ending(f"call of {count}", "cascade", now, event.seconds, track, {"samples": count})
    spans, at = [call], call.start
    parts = (c.waited_seconds + c.decode_seconds + c.seconds for c in event.counts)
    abreast = sum(parts) > event.seconds * _SLACK
    for name, counts in zip(event.stages, event.counts, strict=True):
        row, at = (f"{track}: {name}", call.start) if abreast else (track, at)
        for kind, seconds, facts in (
            ("wait", counts.waited_seconds, {}),
            ("decode", counts.decode_seconds, {}),
            ("stage", counts.seconds, _facts(counts)),
        ):
            if seconds <= 0:
                continue
            label = name if kind == "stage" else f"{kind} for {name}"
            # Rounding must not let one stick out.
            duration = min(seconds * 1e6, call.end - at)
            spans.append(Span(label, kind, at, duration, row, facts))
            at += duration
    return spans


def _facts(counts: StageCounts) -> dict[str, int]:
    names = ("calls", "asked", "negative", "positive", "escalated", "failed", "late")
    return {name: getattr(counts, name) for name in names}


def _ending(
    name: str, kind: str, now: float, seconds: float, track: str, facts: Mapping[str, Any]
) -> Span:
    return Span(name, kind, now - seconds * 1e6, seconds * 1e6, track, facts)


def _metadata(kind: str, name: str, track: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": track, "args": {"name": name}}
