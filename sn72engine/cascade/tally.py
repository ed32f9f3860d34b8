"""What is known about each sample of one call, as arrays: scores combined, status, exits.

How stages combine. Each sample has a *vote* and a *floor*, both empty at first.

- ``replace``: the vote becomes this score alone; the floor is emptied.
- ``weighted``: the score joins the vote.
- ``positive_only``: the floor becomes the score where that is higher than the probability so far;
  otherwise nothing changes.

The probability is the weighted mean of the vote, or the floor where that is higher. An empty vote
counts as 0.5, "not known", and an empty floor as 0. This probability is what the stage's
thresholds are applied to, and what the caller gets. A stage that could not score a sample changes
nothing, so the mean is over the stages that did. Sums are kept in float64 and the mean is rounded
to float32, which makes the mean of equal scores exactly that score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sn72engine.cascade.result import Result, Status
from sn72engine.cascade.route import ESCALATE, POSITIVE
from sn72engine.cascade.spec import Combine
from sn72engine.cuda.layout import NO_STAGE, Code
from sn72engine.errors import CascadeError

Indices = NDArray[np.intp]
Floats = NDArray[np.float32]

#: Probability of a sample that no stage could score.
UNKNOWN = np.float32(0.5)

_PENDING, _UNDECIDED, _DONE, _DEADLINE, _FAILED = range(5)
#: By ``cuda.layout.Code``.
_STATUS_OF_CODE = np.array([_PENDING, _DONE, _UNDECIDED, _DEADLINE, _FAILED], np.uint8)
_STATUS = {
    _PENDING: Status.UNDECIDED,  # in a snapshot only
    _UNDECIDED: Status.UNDECIDED,
    _DONE: Status.DONE,
    _DEADLINE: Status.DEADLINE,
    _FAILED: Status.STAGE_FAILED,
}


def _filled(count: int, value: Any, kind: type[np.generic]) -> NDArray[Any]:
    """As np.full, which takes five times as long for the few samples of a call."""
    array = np.empty(count, kind)
    array.fill(value)
    return array


class Tally:
    """State of ``count`` samples. A sample is open until it has left the cascade."""

    def __init__(self, count: int) -> None:
        self._sum = np.zeros(count, np.float64)
        self._weight = np.zeros(count, np.float64)
        self._vote = _filled(count, UNKNOWN, np.float32)  # the mean that these two make
        self._voter = _filled(count, -1, np.int32)
        self._floor = np.zeros(count, np.float32)
        self._raiser = _filled(count, -1, np.int32)
        self._label = _filled(count, -1, np.int64)
        self._route = _filled(count, ESCALATE, np.uint8)
        self._status = _filled(count, _PENDING, np.uint8)
        self._open = np.ones(count, bool)
        self._errors: dict[int, str] = {}

    def open(self, flagged: NDArray[np.bool_] | None = None) -> Indices:
        """Positions of the open samples, of those ``flagged`` where that is given, in order."""
        return np.flatnonzero(self._open if flagged is None else self._open & flagged)

    def is_open(self, index: Indices) -> NDArray[np.bool_]:
        """Which of the samples at these positions are still open."""
        is_open: NDArray[np.bool_] = self._open[index]
        return is_open

    def add(
        self, index: Indices, scores: Floats, stage: int, combine: Combine, weight: float
    ) -> tuple[Indices, Floats]:
        """Take the scores of a stage, all in [0, 1].

        Args:
            index: positions of the samples, none twice.
            scores: one per position, float32.
            stage: number of the stage.
            combine, weight: how the scores count.

        Returns:
            Positions and probabilities of the samples whose answer is now this stage's. With
            ``positive_only`` those it raised; a sample it does not raise stays as it was.
        """
        if combine == "positive_only":
            raised = scores > self.probability(index)
            index, scores = index[raised], scores[raised]
            self._floor[index] = scores
            self._raiser[index] = stage
        else:
            if combine == "replace":
                self._sum[index] = self._weight[index] = self._floor[index] = 0
            total = self._sum[index] + np.float64(weight) * scores
            share = self._weight[index] + weight
            self._sum[index], self._weight[index] = total, share
            self._vote[index] = total / share  # rounded once, to float32
            self._voter[index] = stage
        self._status[index] = _UNDECIDED
        return index, self.probability(index)

    def probability(self, index: Indices) -> Floats:
        """Combined probability, float32 in [0, 1]; 0.5 where there is none yet."""
        probability: Floats = np.maximum(self._vote[index], self._floor[index])
        return probability

    def label(self, index: Indices, labels: NDArray[Any]) -> None:
        """Note class indices."""
        self._label[index] = labels

    def leave(self, index: Indices, routes: NDArray[np.uint8]) -> Indices:
        """Close the samples that are not escalated; returns their positions."""
        sure = routes != ESCALATE
        gone: Indices = index[sure]
        self._route[gone] = routes[sure]
        self._close(gone, _DONE)
        return gone

    def late(self, index: Indices) -> None:
        """Close samples for which time ran out."""
        self._close(index, _DEADLINE)

    def fail(self, position: int, error: str, *, final: bool = False) -> None:
        """Note that a stage could not score a sample; ``final`` when none ever can."""
        self._status[position] = _FAILED
        self._errors[position] = error
        if final:
            self._open[position] = False

    def load(self, index: Indices, samples: NDArray[Any], names: Sequence[str]) -> None:
        """Take over what the GPU knows, in place of what is known here.

        Args:
            index: positions of the samples.
            samples: one ``SAMPLE`` of :mod:`sn72engine.cuda.layout` per position.
            names: of the stages, by number.

        Raises:
            CascadeError: these are no samples, which is a bug of the executor.
        """
        if (samples["status"] >= len(_STATUS_OF_CODE)).any():
            raise CascadeError(f"the GPU has not answered samples {index}; please report this")
        total, share = samples["sum"], samples["weight"]
        self._sum[index], self._weight[index] = total, share
        known = share > 0
        self._vote[index] = np.where(known, total / np.where(known, share, 1.0), UNKNOWN)
        self._floor[index], self._route[index] = samples["floor"], samples["route"]
        for numbers, field in ((self._voter, "voter"), (self._raiser, "raiser")):
            number = samples[field].astype(np.int32)
            numbers[index] = np.where(number == NO_STAGE, -1, number)
        # A sample that no stage has been asked about fails at the end, and not before.
        unasked = (samples["stage"] == NO_STAGE) & (samples["failed"] == 0)
        status = np.where(unasked & (samples["status"] == Code.STAGE_FAILED), 0, samples["status"])
        self._status[index] = _STATUS_OF_CODE[status]
        self._open[index] = samples["open"] != 0
        for at in np.flatnonzero(status == Code.STAGE_FAILED).tolist():
            stage = names[int(samples["failed"][at]).bit_length() - 1]
            self._errors[int(index[at])] = f"{stage}: the score is no probability"

    def results(
        self, names: Sequence[str], decision_threshold: float, *, top1: bool
    ) -> list[Result]:
        """One answer per sample, in order.

        Args:
            names: of the stages, by number.
            decision_threshold: above it an undecided sample is labelled 1.
            top1: labels are class indices; -1 where no stage gave one.

        Raises:
            CascadeError: a sample has no status, which is a bug of the executor.
        """
        probability, author = self._answers()
        unasked = self._open & (author < 0) & (self._status == _PENDING)
        self._status[unasked] = _FAILED
        self._errors |= dict.fromkeys(
            np.flatnonzero(unasked).tolist(), "no stage that applies to this sample scored it"
        )
        if (self._status == _PENDING).any():
            lost = np.flatnonzero(self._status == _PENDING).tolist()
            raise CascadeError(f"samples {lost} have no status after the run; please report this")
        return self._rows(probability, author, names, decision_threshold, top1=top1)

    def snapshot(
        self, names: Sequence[str], decision_threshold: float, *, top1: bool
    ) -> tuple[list[Result], list[bool]]:
        """What is known now, and which samples are settled.

        As :meth:`results`, but a sample that no stage has scored yet is UNDECIDED at 0.5.
        """
        rows = self._rows(*self._answers(), names, decision_threshold, top1=top1)
        return rows, (~self._open).tolist()

    def _rows(
        self,
        probability: Floats,
        author: NDArray[np.int32],
        names: Sequence[str],
        decision_threshold: float,
        *,
        top1: bool,
    ) -> list[Result]:
        side = np.where(
            self._status == _DONE, self._route == POSITIVE, probability > decision_threshold
        )
        labels = self._label if top1 else side.astype(np.int64)
        rows = zip(
            probability.tolist(),
            labels.tolist(),
            author.tolist(),
            self._status.tolist(),
            strict=True,
        )
        return [
            Result(
                p,
                label,
                names[stage] if stage >= 0 else None,
                _STATUS[status],
                self._errors.get(i, "") if status == _FAILED else "",
            )
            for i, (p, label, stage, status) in enumerate(rows)
        ]

    def _answers(self) -> tuple[Floats, NDArray[np.int32]]:
        """Combined probability of each sample, and the number of its stage, -1 for none."""
        raised = self._floor > self._vote
        return (
            np.where(raised, self._floor, self._vote),
            np.where(raised, self._raiser, self._voter),
        )

    def _close(self, index: Indices, status: int) -> None:
        self._status[index] = status
        self._open[index] = False
