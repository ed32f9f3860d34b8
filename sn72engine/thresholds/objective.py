"""Accuracy, MCC and the subnet-72 reward as functions of the errors made.

With the labels given, each depends on two counts only: false positives and false negatives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sn72engine.thresholds.options import ObjectiveName, Task

Floats = NDArray[np.float64]

#: The reward looks at the MCC of this many last answers and the accuracy of this many.
MCC_WINDOW, ACCURACY_WINDOW = 100, 10

#: Nodes per axis of the table that the search interpolates the reward from.
_NODES = 33


def accuracy(fp: Floats, fn: Floats, positives: float, negatives: float) -> Floats:
    """Share of right answers."""
    return 1 - (fp + fn) / (positives + negatives)


def mcc(fp: Floats, fn: Floats, positives: Floats | float, negatives: Floats | float) -> Floats:
    """Matthews correlation coefficient; 0 where a class or an answer never occurs.

    B. W. Matthews, "Comparison of the predicted and observed secondary structure of T4 phage
    lysozyme", Biochimica et Biophysica Acta 405 (1975); the 0 is scikit-learn's convention.
    """
    tp, tn = positives - fn, negatives - fp
    product = (tp + fp) * (tn + fn) * positives * negatives
    above = tp * tn - fp * fn
    result: Floats = np.divide(
        above, np.sqrt(product), out=np.zeros_like(above, dtype=np.float64), where=product > 0
    )
    return result


class Objective:
    """One objective on a labelled sample.

    The reward of a miner is ``(0.5 * MCC + 0.5 * accuracy) ** 3``, the MCC over its last 100
    answers and the accuracy over its last 10, answers rounded to 0 or 1 and a negative base
    taken as 0. Its value here is the mean over windows of 100 answers drawn with replacement
    from the labelled sample (a bootstrap of the window, since samples are taken to arrive
    independently and in the proportion of the labels); the last 10 of a window are part of the
    100. A window depends on the sample only through the shares of true and false positives and
    negatives, so each is 100 uniform numbers cut at those shares; the numbers are drawn once
    from the seed and shared by all candidates, which makes comparisons exact and the value
    smooth. The Monte Carlo error of the mean is about ``0.25 / sqrt(windows)``.

    Args:
        name: ``accuracy``, ``mcc`` or ``reward``.
        task: for ``top1`` all errors count as false negatives.
        positives, negatives: number of labelled samples of each class.
        windows, seed: of the reward.
    """

    def __init__(
        self,
        name: ObjectiveName,
        task: Task,
        positives: int,
        negatives: int,
        *,
        windows: int,
        seed: int,
    ) -> None:
        self.name = name
        self.task = task
        self.positives = positives
        self.negatives = negatives
        self._draws: Floats | None = None
        self._table: tuple[Floats, Floats] | None = None
        if name == "reward":
            self._draws = np.random.default_rng(seed).random((windows, MCC_WINDOW))

    def value(self, fp: float, fn: float) -> float:
        """Value for these numbers of errors, which may be fractions."""
        if self.name == "reward":
            return self._reward(fp, fn)
        return float(self.values(np.array([fp], np.float64), np.array([fn], np.float64))[0])

    def values(self, fp: Floats, fn: Floats) -> Floats:
        """Values for arrays of error counts; the reward is interpolated between 33 x 33 nodes."""
        if self.name == "accuracy":
            return accuracy(fp, fn, self.positives, self.negatives)
        if self.name == "mcc":
            return mcc(fp, fn, self.positives, self.negatives)
        if self._table is None:
            self._table = self._tabulated()
        nodes, table = self._table
        row, row_share = _position(nodes, fp / self.negatives)
        column, column_share = _position(nodes, fn / self.positives)
        upper = table[row, column] * (1 - column_share) + table[row, column + 1] * column_share
        lower = (
            table[row + 1, column] * (1 - column_share) + table[row + 1, column + 1] * column_share
        )
        mixed: Floats = upper * (1 - row_share) + lower * row_share
        return mixed

    def _tabulated(self) -> tuple[Floats, Floats]:
        """Error rates, closer together where they are small, and the reward at each pair."""
        nodes = np.linspace(0, 1, _NODES) ** 2
        rows = [
            [self._reward(a * self.negatives, b * self.positives) for b in nodes] for a in nodes
        ]
        return nodes, np.array(rows)

    def _reward(self, fp: float, fn: float) -> float:
        assert self._draws is not None
        total = self.positives + self.negatives
        cuts = (self.positives - fn, self.positives, self.positives + fp)
        below = [self._draws < cut / total for cut in cuts]
        true_positive, positive, flagged = (b.sum(1).astype(np.float64) for b in below)
        correlation = mcc(
            flagged - positive, positive - true_positive, positive, MCC_WINDOW - positive
        )
        recent = [b[:, -ACCURACY_WINDOW:].sum(1) for b in (below[0], below[2])]
        right = (recent[0] + ACCURACY_WINDOW - recent[1]) / ACCURACY_WINDOW
        base = np.clip(0.5 * correlation + 0.5 * right, 0, None)
        return float((base**3).mean())


def _position(nodes: Floats, at: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Index of the node at or below each value, and the share of the way to the next."""
    index = np.clip(np.searchsorted(nodes, at, side="right") - 1, 0, len(nodes) - 2)
    return index, (at - nodes[index]) / (nodes[index + 1] - nodes[index])
