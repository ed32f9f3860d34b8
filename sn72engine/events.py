"""What the serving parts tell whoever watches them: one frozen object per thing that happened.

A cascade, a batcher and a shadow run each take an optional ``observe``, a callable that gets these
objects, on the thread where they happened. :class:`sn72engine.metrics.Metrics` is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sn72engine.cascade.report import StageCounts
    from sn72engine.cascade.result import Result

log = logging.getLogger("sn72engine.events")

#: What became of a request to a batcher: a result; an error; its time ran out (in line or in a
#: batch); its caller took it back; the queue was full; the batcher closed before it was run.
Outcome = Literal["answered", "failed", "expired", "cancelled", "refused", "closed"]


@dataclass(frozen=True, slots=True)
class CallEvent:
    """A cascade answered one call.

    Attributes:
        seconds: how long the call took.
        results: one per sample.
        stages: names, in order.
        counts: what this call did in each stage.
    """

    seconds: float
    results: Sequence[Result]
    stages: tuple[str, ...]
    counts: Sequence[StageCounts]


@dataclass(frozen=True, slots=True)
class BatchEvent:
    """A batcher ran one batch.

    Attributes:
        size: requests in it.
        seconds: how long it ran.
        waits: seconds that each of them had waited in line.
        waiting: requests still in line when it began.
    """

    size: int
    seconds: float
    waits: tuple[float, ...]
    waiting: int


@dataclass(frozen=True, slots=True)
class RequestsEvent:
    """Requests to a batcher came to an end.

    Attributes:
        outcome: how.
        seconds: from submission to the end, one number per request.
    """

    outcome: Outcome
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ShadowEvent:
    """A shadow run was compared with the answers that were given, or could not be.

    Attributes:
        outcome: ``compared``; ``failed``, the candidate raised; ``skipped``, too many were waiting.
        samples: in the call.
        agreed, differed: samples with the same label and with another one; the rest had no
            answer on one side, because a stage failed or time ran out.
        differences: absolute difference of probability of the samples that were compared.
        seconds: of the candidate's call.
    """

    outcome: Literal["compared", "failed", "skipped"]
    samples: int
    agreed: int = 0
    differed: int = 0
    differences: tuple[float, ...] = ()
    seconds: float = 0.0


Event = CallEvent | BatchEvent | RequestsEvent | ShadowEvent
Observe = Callable[[Event], None]


def notify(observe: Observe | None, event: Event) -> None:
    """Tell the observer, if there is one. An observer that raises must not cost an answer."""
    if observe is None:
        return
    try:
        observe(event)
    except Exception:
        log.exception("the observer failed on %s", type(event).__name__)
