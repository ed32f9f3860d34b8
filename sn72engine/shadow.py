"""Runs a candidate on a share of the traffic and compares it with the answers that were given.

The callers have their answers by then: the candidate runs on a thread of its own, from a queue of
bounded length. What does not fit is skipped and counted.
"""

from __future__ import annotations

import logging
import math
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sn72engine.cascade.result import Result, Status
from sn72engine.events import Observe, ShadowEvent, notify
from sn72engine.spec import Options, check_int, check_number

if TYPE_CHECKING:
    from sn72engine.cascade.cascade import Cascade

log = logging.getLogger("sn72engine.shadow")

#: Calls whose latency is remembered.
_RECENT = 1000

_ANSWERED = (Status.DONE, Status.UNDECIDED)


@dataclass(frozen=True, slots=True)
class ShadowOptions(Options):
    """How much is compared, and what a candidate must show to be promoted.

    Args:
        share: of the calls that are repeated on the candidate, in [0, 1].
        max_waiting: most calls that wait for the candidate or run on it; their images are held.
        min_samples: compared at least.
        min_agreement: smallest share of samples with the same label. Samples that only the
            candidate could not answer count as not agreed.
        max_slowdown: largest quotient of median latencies, candidate over current, by call; None
            for no bound. The candidate shares the machine with the current cascade, so neither is
            as fast as alone.
    """

    share: float = 0.1
    max_waiting: int = 4
    min_samples: int = 100
    min_agreement: float = 0.98
    max_slowdown: float | None = None

    def __post_init__(self) -> None:
        check_number("share", self.share, 0.0, 1.0)
        check_int("max_waiting", self.max_waiting, 1)
        check_int("min_samples", self.min_samples, 0)
        check_number("min_agreement", self.min_agreement, 0.0, 1.0)
        if self.max_slowdown is not None:
            check_number("max_slowdown", self.max_slowdown, 0.0)


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """A candidate beside the current cascade, so far.

    Attributes:
        calls: repeated on the candidate, failed ones included.
        skipped_calls: for want of room.
        failed_calls: on which the candidate raised.
        compared: samples that both answered.
        agreed: of these, with the same label.
        lost: samples that only the candidate could not answer.
        mean_difference, max_difference: absolute, of probability, of the samples compared; NaN
            where there are none.
        current_seconds, candidate_seconds: medians of the latest calls; NaN where there are none.
    """

    calls: int
    skipped_calls: int
    failed_calls: int
    compared: int
    agreed: int
    lost: int
    mean_difference: float
    max_difference: float
    current_seconds: float
    candidate_seconds: float

    @property
    def agreement(self) -> float:
        """Share of samples with the same label; NaN where nothing was compared."""
        total = self.compared + self.lost
        return self.agreed / total if total else math.nan

    def failures(self, options: ShadowOptions) -> tuple[str, ...]:
        """Every bound that is broken, with its figure; empty where the candidate is good."""
        broken = []
        samples = self.compared + self.lost
        if samples < options.min_samples:
            broken.append(
                f"{samples} samples compared, fewer than min_samples={options.min_samples}"
            )
        if samples and self.agreement < options.min_agreement:
            broken.append(
                f"agreement {self.agreement:.4f} on {samples} samples is below "
                f"min_agreement={options.min_agreement}"
            )
        slowdown = self.candidate_seconds / (self.current_seconds or math.nan)
        if options.max_slowdown is not None and not slowdown <= options.max_slowdown:
            broken.append(
                f"median latency {1e3 * self.candidate_seconds:.3f} ms against "
                f"{1e3 * self.current_seconds:.3f} ms is more than "
                f"max_slowdown={options.max_slowdown} times"
            )
        return tuple(broken)

    def __str__(self) -> str:
        return (
            f"{self.calls} calls ({self.skipped_calls} skipped, {self.failed_calls} failed), "
            f"{self.compared} samples compared, {self.lost} lost: agreement {self.agreement:.4f}, "
            f"difference mean {self.mean_difference:.4f} max {self.max_difference:.4f}; median "
            f"{1e3 * self.candidate_seconds:.3f} ms, current {1e3 * self.current_seconds:.3f} ms"
        )


@dataclass(slots=True)
class _Call:
    """One call to repeat: its images and arguments, what was answered, and how quickly."""

    images: Any
    arguments: Mapping[str, Any]
    results: Sequence[Result]
    seconds: float


class Shadow:
    """Repeats calls on a candidate. Thread-safe; :meth:`stop` ends its thread.

    Args:
        cascade: the candidate.
        options: how much is compared.
        observe: is told of every call that was repeated or skipped.
    """

    def __init__(
        self, cascade: Cascade, options: ShadowOptions, observe: Observe | None = None
    ) -> None:
        self._cascade = cascade
        self._options = options
        self._observe = observe
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._waiting = 0
        self._owed = 0.0  # grows by the share with each call; 1 buys a repetition
        self._stopped = False
        self._skipped = self._failed = self._repeated = 0
        self._compared = self._agreed = self._lost = 0
        self._difference_sum = self._difference_max = 0.0
        self._latencies: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self._thread = threading.Thread(target=self._work, name="sn72-shadow", daemon=True)
        self._thread.start()

    def offer(
        self,
        images: Any,
        arguments: Mapping[str, Any],
        results: Sequence[Result],
        seconds: float,
    ) -> None:
        """Take a call that was answered, if it is its turn and there is room; returns at once.

        Args:
            images: as they were given. Arrays and Pillow images are copied, because the caller may
                change them from now on; a Pillow JPEG has been decoded by now, no larger than the
                current cascade needs it.
            arguments: of the call.
            results: what the caller got.
            seconds: how long that took.
        """
        with self._lock:
            if self._stopped:
                return
            self._owed += self._options.share
            if self._owed < 1:
                return
            self._owed -= 1
            room = self._waiting < self._options.max_waiting
            if room:
                self._waiting += 1
            else:
                self._skipped += 1
        if not room:
            notify(self._observe, ShadowEvent("skipped", len(results)))
            return
        try:
            copies = _copied(images)
        except BaseException:  # an image that was closed, or no memory
            with self._lock:
                self._waiting -= 1
            raise
        self._calls.put(_Call(copies, arguments, results, seconds))

    def report(self) -> ShadowReport:
        """The comparison so far."""
        with self._lock:
            pairs = list(self._latencies)
            return ShadowReport(
                self._repeated,
                self._skipped,
                self._failed,
                self._compared,
                self._agreed,
                self._lost,
                self._difference_sum / self._compared if self._compared else math.nan,
                self._difference_max if self._compared else math.nan,
                statistics.median(p[0] for p in pairs) if pairs else math.nan,
                statistics.median(p[1] for p in pairs) if pairs else math.nan,
            )

    def stop(self) -> None:
        """Take no more calls and forget those waiting; one that runs is left to end by itself."""
        with self._lock:
            self._stopped = True
        self._calls.put(None)

    def join(self) -> None:
        """Wait for the call that runs; only after :meth:`stop`."""
        self._thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if not self._stopped:
                self._repeat(call)
            with self._lock:
                self._waiting -= 1
            del call  # it holds images

    def _repeat(self, call: _Call) -> None:
        begin = time.perf_counter()
        try:
            results = self._cascade(call.images, **call.arguments)
        except Exception:
            log.warning("the candidate failed on %d samples", len(call.results), exc_info=True)
            with self._lock:
                self._repeated += 1
                self._failed += 1
                self._lost += sum(result.status in _ANSWERED for result in call.results)
            notify(self._observe, ShadowEvent("failed", len(call.results)))
            return
        seconds = time.perf_counter() - begin
        pairs = list(zip(call.results, results, strict=True))
        lost = sum(a.status in _ANSWERED and b.status not in _ANSWERED for a, b in pairs)
        both = [(a, b) for a, b in pairs if a.status in _ANSWERED and b.status in _ANSWERED]
        agreed = sum(a.label == b.label for a, b in both)
        differences = tuple(abs(a.probability - b.probability) for a, b in both)
        with self._lock:
            self._repeated += 1
            self._compared += len(both)
            self._agreed += agreed
            self._lost += lost
            self._difference_sum += sum(differences)
            self._difference_max = max((self._difference_max, *differences))
            self._latencies.append((call.seconds, seconds))
        event = ShadowEvent(
            "compared", len(pairs), agreed, len(both) - agreed, differences, seconds
        )
        notify(self._observe, event)


def _copied(images: Any) -> Any:
    if isinstance(images, np.ndarray):
        return images.copy()
    return [_copied_image(image) for image in images]


def _copied_image(image: Any) -> Any:
    if isinstance(image, memoryview):
        return bytes(image)
    return image.copy() if hasattr(image, "copy") else image
