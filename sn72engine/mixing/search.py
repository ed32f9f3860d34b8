"""In which order layers are quantised: what is saved for what is spoilt.

To choose one format for each layer with the least cost within a budget of damage is a
multiple-choice knapsack problem. Its linear relaxation is solved exactly by a greedy rule (Sinha
and Zoltners, 1979): keep of each layer the formats on the lower convex hull of cost over damage,
and take the steps along all hulls in the order of cost saved per damage. Every prefix of that
order is the best choice for the damage that it does. Damage is known only roughly (layers are
measured one at a time), so the whole order is made, and how far to go is decided by measuring.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """A layer in one format: what it costs, and the damage that it alone does."""

    precision: str
    cost: float
    damage: float


@dataclass(frozen=True, slots=True)
class Step:
    """One layer goes to a cheaper format.

    Attributes:
        layer: its name.
        point: what it becomes.
        saved: cost that this saves.
        added: damage that this adds; may be negative.
    """

    layer: str
    point: Point
    saved: float
    added: float

    @property
    def rate(self) -> float:
        """Cost saved per damage; infinite for a step that does none."""
        return self.saved / self.added if self.added > 0 else math.inf


def hull(start: Point, others: list[Point]) -> list[Point]:
    """The points of the lower convex hull from ``start`` on, each cheaper than the one before.

    A format that costs no less than one that does no more damage is left out, and so is one whose
    damage is not finite.
    """
    kept = [start]
    rest = [p for p in others if p.cost < start.cost and math.isfinite(p.damage)]
    while rest:
        last = kept[-1]
        # Steepest first; of equally steep ones the cheapest, which the others lie on the way to.
        best = max(rest, key=lambda p: (_rate(last, p), -p.cost, -p.damage, p.precision))
        kept.append(best)
        rest = [point for point in rest if point.cost < best.cost]
    return kept


def order(layers: Mapping[str, tuple[Point, list[Point]]]) -> list[Step]:
    """All steps of all layers, best first; steps of one layer stay in order.

    Args:
        layers: name to its float form and its other forms. Equal rates keep this order.
    """
    steps = []
    for name, (start, others) in layers.items():
        points = hull(start, others)
        for before, after in itertools.pairwise(points):
            saved, added = before.cost - after.cost, after.damage - before.damage
            steps.append(Step(name, after, saved, added))
    # Rates along a hull fall, and the sort is stable.
    return sorted(steps, key=lambda step: -step.rate)


def assignment(steps: Sequence[Step]) -> dict[str, str]:
    """Layer to format after these steps; layers that are not named stay in float."""
    return {step.layer: step.point.precision for step in steps}


def furthest(count: int, holds: Callable[[int], bool]) -> int:
    """The largest number of steps that ``holds``, found by bisection.

    Args:
        count: of all steps.
        holds: whether the bound is kept after so many steps; taken as true of none, and to be
            false from some number on. Called with about log2(count) numbers.

    Returns:
        A number for which ``holds`` was true and for whose successor it was false, or ``count``;
        0 when it was true for none that was tried.
    """
    if count == 0 or holds(count):
        return count
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def _rate(last: Point, point: Point) -> float:
    added = point.damage - last.damage
    return (last.cost - point.cost) / added if added > 0 else math.inf
