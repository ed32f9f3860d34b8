"""What can be said with confidence about a cascade from a limited number of labels.

**What is guaranteed.** Candidates come from one half of the labels, the certificate from the
other. Candidates are tested on that other half in a fixed order, from the most accurate and
dearest to the cheapest, each at the full error level, up to the first that fails; the last that
passes is chosen. This is fixed-sequence testing within *Learn then Test* (Angelopoulos, Bates,
Candès, Jordan, Lei 2021, "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk
Control", arXiv:2110.01052): the probability that a cascade is certified whose true objective is
below the target is at most ``1 - confidence``, for any number of candidates, any scores and any
number of labels. It holds for samples drawn independently from what the cascade will see; it
says nothing after the world has changed, and nothing about the expected cost, which is a plain
estimate.

**The bounds.** Error rates are bounded by Clopper and Pearson (1934, "The use of confidence or
fiducial limits illustrated in the case of the binomial", Biometrika 26): exact, not asymptotic.

* Accuracy against a number: the lower bound of the share of right answers.
* Accuracy against a stage: the lower bound of the share of samples that only the cascade gets
  right, less the upper bound of the share that only the stage gets right, each at half the error
  level (Bonferroni).
* MCC and reward: upper bounds of the false positive and false negative rate, each at half the
  error level; the objective at that corner, with the classes in the proportion of the labels.
  MCC falls in both rates while they sum to less than 1; beyond, the bound is -1. For the reward
  the corner is the minimum except for windows with a negative MCC or without one class, and the
  mean over windows has its Monte Carlo error, so its certificate is approximate to that degree.
"""

from __future__ import annotations

import math

import numpy as np

from sn72engine.thresholds.objective import Objective
from sn72engine.thresholds.samples import Outcome


def lower_bound(successes: int, trials: int, alpha: float) -> float:
    """Clopper-Pearson lower confidence bound of a proportion at level ``1 - alpha``.

    The p at which ``successes`` or more of ``trials`` have probability ``alpha``.
    """
    if successes == 0:
        return 0.0
    counts = np.arange(successes, trials + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    ways = logs[trials] - logs[counts] - logs[trials - counts]
    low, high = 0.0, successes / trials
    for _ in range(60):
        middle = 0.5 * (low + high)
        with np.errstate(divide="ignore", invalid="ignore"):
            misses = np.where(counts == trials, 0.0, (trials - counts) * math.log1p(-middle))
        tail = float(np.exp(ways + counts * math.log(middle) + misses).sum())
        low, high = (middle, high) if tail < alpha else (low, middle)
    return low


def upper_bound(successes: int, trials: int, alpha: float) -> float:
    """Clopper-Pearson upper confidence bound of a proportion at level ``1 - alpha``."""
    return 1.0 - lower_bound(trials - successes, trials, alpha)


def value_bound(outcome: Outcome, objective: Objective, alpha: float) -> float:
    """Lower confidence bound of the objective at level ``1 - alpha``."""
    if objective.name == "accuracy":
        return lower_bound(int(outcome.correct.sum()), outcome.correct.size, alpha)
    misses = upper_bound(outcome.fn, objective.positives, alpha / 2)
    alarms = upper_bound(outcome.fp, objective.negatives, alpha / 2)
    if misses + alarms >= 1:
        return -1.0 if objective.name == "mcc" else 0.0
    return objective.value(alarms * objective.negatives, misses * objective.positives)


def difference_bound(outcome: Outcome, reference: Outcome, alpha: float) -> float:
    """Lower confidence bound of accuracy less the reference's, on the same samples."""
    count = outcome.correct.size
    gained = int((outcome.correct & ~reference.correct).sum())
    lost = int((~outcome.correct & reference.correct).sum())
    return lower_bound(gained, count, alpha / 2) - upper_bound(lost, count, alpha / 2)
