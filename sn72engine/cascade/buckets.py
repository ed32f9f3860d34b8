"""Which batch sizes to capture a stage for: few, for each takes memory, but with little padding.

A stage that is captured in CUDA graphs runs at fixed batch sizes, its buckets. ``count`` samples
run in the smallest bucket that holds them, and the rows left over are padding, which costs as much
as samples do. With the time of each bucket, measured, and how often each count occurs, the best
buckets follow: :func:`choose` finds the ones with the smallest expected time exactly, by dynamic
programming over buckets in ascending order.

Powers of two waste more than one expects: of 64 samples with 30% escalated they compute 47% more
rows than there are samples, steps of 8 only 18% more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sn72engine import drawing
from sn72engine.errors import InputError, OptionError
from sn72engine.latency import Call, interleave
from sn72engine.spec import Options, check_int
from sn72engine.trial import random_inputs

if TYPE_CHECKING:
    from sn72engine.session import Session

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BucketOptions(Options):
    """How many buckets, and how much memory.

    Args:
        max_buckets: most buckets.
        memory_bytes: limit of the sum of the buckets' memory; None for no limit.
    """

    max_buckets: int = 6
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        check_int("max_buckets", self.max_buckets, 1)
        if self.memory_bytes is not None:
            check_int("memory_bytes", self.memory_bytes, 0)


@dataclass(frozen=True, slots=True)
class LatencyCurve:
    """What a stage takes at the batch sizes that may become buckets.

    Attributes:
        batches: ascending.
        seconds: of one call at each.
        bytes: of memory that a bucket of each size would hold.
    """

    batches: tuple[int, ...]
    seconds: tuple[float, ...]
    bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.batches or not len(self.batches) == len(self.seconds) == len(self.bytes):
            raise InputError("a latency curve needs one time and one size for each batch, and one")
        for batch, size in zip(self.batches, self.bytes, strict=True):
            check_int("batches", batch, 1)
            check_int("bytes", size, 0)
        if any(a >= b for a, b in itertools.pairwise(self.batches)):
            raise InputError(f"batches={self.batches} must be ascending")
        if not all(math.isfinite(s) and s >= 0 for s in self.seconds):
            raise InputError(f"seconds={self.seconds} must be finite and not negative")


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """Buckets, and what they are expected to cost.

    Attributes:
        buckets: ascending; the last holds every count that occurs.
        seconds: expected time of a call, a call without samples taking none.
        waste: rows of padding for each row with a sample, expected.
        bytes: memory of all buckets.
        curve: what they were chosen from.
        probabilities: of each count, from 0 on.
        options: limits that they keep.
    """

    buckets: tuple[int, ...]
    seconds: float
    waste: float
    bytes: int
    curve: LatencyCurve
    probabilities: tuple[float, ...]
    options: BucketOptions

    def bucket(self, count: int) -> int:
        """The smallest bucket that holds ``count`` samples; 0 for none.

        Raises:
            InputError: there is none.
        """
        if count == 0:
            return 0
        for bucket in self.buckets:
            if count <= bucket:
                return bucket
        raise InputError(f"count={count!r} is more than the largest bucket, {self.buckets[-1]}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "buckets": list(self.buckets),
            "seconds": self.seconds,
            "waste": self.waste,
            "bytes": self.bytes,
            "curve": {
                "batches": list(self.curve.batches),
                "seconds": list(self.curve.seconds),
                "bytes": list(self.curve.bytes),
            },
            "probabilities": list(self.probabilities),
            "options": self.options.to_dict(),
        }

    def explain(self) -> str:
        """The plan as text, beside what other choices would cost."""
        others: dict[str, Sequence[int]] = {
            "this plan": self.buckets,
            "one bucket": self.buckets[-1:],
            "powers of two": [b for b in self.curve.batches if b & (b - 1) == 0],
            "steps of 8": [b for b in self.curve.batches if b % 8 == 0],
            "every size measured": self.curve.batches,
        }
        limit = self.options.memory_bytes
        lines = [
            f"buckets {', '.join(map(str, self.buckets))}: at most {self.options.max_buckets}"
            + ("" if limit is None else f", within {limit / 1e6:.1f} MB"),
            f"{'':<20} {'buckets':>7} {'ms':>9} {'padding':>8} {'MB':>8}",
        ]
        for name, buckets in others.items():
            if not buckets or buckets[-1] < _largest(self.probabilities):
                continue  # does not hold every count
            cost = expected_seconds(buckets, self.curve, self.probabilities)
            lines.append(
                f"{name:<20} {len(buckets):>7} {1e3 * cost:>9.3f} "
                f"{expected_waste(buckets, self.probabilities):>8.1%} "
                f"{_memory(buckets, self.curve) / 1e6:>8.1f}"
            )
        return "\n".join(lines)

    def save_plot(self, path: str | Path) -> Path:
        """Draw the latency curve, the chosen buckets and the counts as a PNG.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        path = Path(path)
        figure = drawing.figure("draw buckets", 8, 4.2)
        axes = figure.add_subplot()
        share = axes.twinx()
        counts = np.arange(1, len(self.probabilities))
        share.bar(counts, self.probabilities[1:], width=0.9, color="#d9dee7", label="how often")
        share.set_ylabel("share of calls")
        axes.set_zorder(share.get_zorder() + 1)
        axes.patch.set_visible(False)
        milliseconds = 1e3 * np.asarray(self.curve.seconds)
        axes.plot(self.curve.batches, milliseconds, color="#7aa6d6", lw=1, label="measured")
        edges = [0, *self.buckets]
        chosen = [1e3 * _seconds_of(self.curve)[bucket] for bucket in self.buckets]
        for low, high, height in zip(edges, self.buckets, chosen, strict=False):
            axes.hlines(height, low, high, color="#1c2330", lw=1.4)
        axes.plot(self.buckets, chosen, "o", color="#1c2330", ms=5, label="chosen")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("samples in a call")
        axes.set_ylabel("milliseconds")
        axes.set_title(
            f"{len(self.buckets)} buckets: {1e3 * self.seconds:.2f} ms a call, "
            f"{self.waste:.0%} padding",
            loc="left",
            fontsize=10,
        )
        axes.spines[["top"]].set_visible(False)
        share.spines[["top"]].set_visible(False)
        axes.legend(loc="upper left", frameon=False)
        return drawing.save(figure, path)


def choose(
    curve: LatencyCurve, probabilities: ArrayLike, options: BucketOptions | None = None
) -> BucketPlan:
    """The buckets with the smallest expected time, exactly; of equals, those with less memory.

    Args:
        curve: the sizes to choose from.
        probabilities: of each count, from 0 on; see :func:`escalation_counts` and
            :func:`observed_counts`.
        options: limits.

    Raises:
        InputError: the probabilities are none, or no size of the curve holds every count.
        OptionError: no choice keeps the memory limit.
    """
    return choose_together([curve], [probabilities], options)[0]


def choose_together(
    curves: Sequence[LatencyCurve],
    probabilities: Sequence[ArrayLike],
    options: BucketOptions | None = None,
) -> list[BucketPlan]:
    """:func:`choose` for stages that share a memory limit: the smallest sum of expected times.

    Args:
        curves, probabilities: of each stage.
        options: limits. The number of buckets is that of each stage, the memory that of all.

    Returns:
        A plan for each stage.

    Raises:
        as :func:`choose` does.
    """
    options = options if options is not None else BucketOptions()
    limit = math.inf if options.memory_bytes is None else options.memory_bytes
    weights = [_checked(one) for one in probabilities]
    together: list[tuple[tuple[int, ...], ...]] = [()]  # buckets of each stage so far
    seconds, sizes = np.zeros(1), np.zeros(1, np.int64)
    for curve, weight in zip(curves, weights, strict=True):
        choices = _choices(curve, weight, options.max_buckets, limit)
        seconds = np.add.outer(seconds, [choice[0] for choice in choices]).ravel()
        sizes = np.add.outer(sizes, np.array([c[1] for c in choices], np.int64)).ravel()
        kept = _undominated(seconds, sizes, limit)
        seconds, sizes = seconds[kept], sizes[kept]
        together = [(*together[k // len(choices)], choices[k % len(choices)][2]) for k in kept]
    if not together:
        least = sum(
            min(size for b, size in zip(c.batches, c.bytes, strict=True) if b >= _largest(w))
            for c, w in zip(curves, weights, strict=True)
        )
        raise OptionError(
            f"memory_bytes={options.memory_bytes!r} is too little: one bucket that holds every "
            f"count takes {least}" + (f", for {len(curves)} stages" if len(curves) > 1 else "")
        )
    return [
        plan_of(buckets, curve, weight, options)
        for buckets, curve, weight in zip(together[0], curves, weights, strict=True)
    ]


def plan_of(
    buckets: tuple[int, ...],
    curve: LatencyCurve,
    probabilities: ArrayLike,
    options: BucketOptions,
) -> BucketPlan:
    """Given buckets as a plan, with what they are expected to cost.

    Raises:
        InputError: a count fits no bucket, or a bucket was not measured.
    """
    weights = _checked(probabilities)
    return BucketPlan(
        buckets,
        expected_seconds(buckets, curve, weights),
        expected_waste(buckets, weights),
        _memory(buckets, curve),
        curve,
        tuple(weights.tolist()),
        options,
    )


def _choices(curve: LatencyCurve, weights: Floats, max_buckets: int, limit: float) -> list[_Choice]:
    """Choices that hold every count, of which none is worse than another in time and memory.

    Raises:
        InputError: no size of the curve holds every count.
    """
    largest, batches = _largest(weights), curve.batches
    if batches[-1] < largest:
        raise InputError(
            f"{largest} samples may come, but the latency curve ends at batch {batches[-1]}; "
            "measure it further"
        )
    below = np.concatenate([[0.0], np.cumsum(weights[1:])])  # share of calls with 1 to c samples

    def between(low: int, high: int) -> float:
        last = len(below) - 1
        return float(below[min(high, last)] - below[min(low, last)])

    # For each largest bucket, the choices that end with it; a round extends each by one bucket.
    complete: list[_Choice] = []
    rounds: dict[int, list[_Choice]] = {
        0: [(0.0, 0, ())]  # ends at size 0: nothing chosen yet
    }
    for _ in range(max_buckets):
        grown: dict[int, list[_Choice]] = {}
        for end, choices in rounds.items():
            for batch, seconds, size in zip(batches, curve.seconds, curve.bytes, strict=True):
                if batch <= end:
                    continue
                cost = between(end, batch) * seconds
                grown.setdefault(batch, []).extend(
                    (spent + cost, held + size, (*buckets, batch))
                    for spent, held, buckets in choices
                )
        rounds = {end: _best(choices, limit) for end, choices in grown.items()}
        complete += [c for end, choices in rounds.items() if end >= largest for c in choices]
    return _best(complete, limit)


_Choice = tuple[float, int, tuple[int, ...]]


def _best(choices: list[_Choice], limit: float) -> list[_Choice]:
    seconds = np.array([choice[0] for choice in choices])
    sizes = np.array([choice[1] for choice in choices], np.int64)
    return [choices[k] for k in _undominated(seconds, sizes, limit)]


def _undominated(seconds: Floats, sizes: NDArray[np.int64], limit: float) -> NDArray[np.intp]:
    """Which choices keep the limit of memory, fastest first, each smaller than those before it."""
    order = np.lexsort((sizes, seconds))
    order = order[sizes[order] <= limit]
    if math.isinf(limit):
        return order[:1]  # memory only breaks ties
    smallest_so_far = np.minimum.accumulate(sizes[order])
    first = np.ones(order.size, bool)
    first[1:] = sizes[order][1:] < smallest_so_far[:-1]
    return order[first]


def expected_seconds(
    buckets: Sequence[int], curve: LatencyCurve, probabilities: ArrayLike
) -> float:
    """Expected time of a call, each count in the smallest bucket that holds it.

    Raises:
        InputError: a count fits no bucket, or a bucket was not measured.
    """
    seconds = _seconds_of(curve)
    if not set(buckets) <= seconds.keys():
        raise InputError(f"buckets={tuple(buckets)} must be among {curve.batches}")
    total = 0.0
    for count, weight in enumerate(_checked(probabilities)):
        if count and weight:
            total += weight * seconds[_smallest(buckets, count)]
    return total


def expected_waste(buckets: Sequence[int], probabilities: ArrayLike) -> float:
    """Expected rows of padding for each expected row with a sample; 0 where none comes.

    Raises:
        InputError: a count fits no bucket.
    """
    weights = _checked(probabilities)
    counts = np.flatnonzero(weights)
    counts = counts[counts > 0]
    rows = sum(float(weights[c]) * _smallest(buckets, int(c)) for c in counts)
    useful = float((weights[counts] * counts).sum())
    # Sums in another order differ in the last bit: no padding must not come out as less than none.
    return max(rows / useful - 1.0, 0.0) if useful else 0.0


def escalation_counts(batch: int, share: float) -> Floats:
    """Probability of each count, 0 to ``batch``, if samples escalate by chance, each for itself.

    Args:
        batch: samples that reach the stage before.
        share: of them that escalate, 0 to 1.
    """
    check_int("batch", batch, 1)
    return escalated(np.eye(1, batch + 1, batch)[0], share)


def escalated(probabilities: ArrayLike, share: float) -> Floats:
    """Probability of each count after a stage, from that before it; see :func:`escalation_counts`.

    Args:
        probabilities: of each count, from 0 on, that reaches the stage.
        share: of the samples that escalate, 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise OptionError(f"share={share!r} must be in [0, 1]")
    # Horner's rule on the generating function, whose argument becomes (1 - share) + share * z:
    # only sums of what is not negative, and no binomial coefficient that could overflow.
    found = np.zeros(1)
    for weight in _checked(probabilities)[::-1]:
        found = np.convolve(found, [1.0 - share, share])
        found[0] += weight
    return found[:-1]


def observed_counts(counts: Sequence[int]) -> Floats:
    """Probability of each count from those that were seen, such as one per call.

    Raises:
        InputError: there are none, or one is negative.
    """
    array = np.asarray(counts)
    if array.size == 0 or array.dtype.kind not in "iu" or array.min() < 0:
        raise InputError("counts must hold at least one integer, none of them negative")
    return np.bincount(array.ravel()) / array.size


def measure_curve(
    make_call: Callable[[int], Call],
    batches: Sequence[int],
    *,
    bytes_at: Callable[[int], int],
    warmup: int = 3,
    repeats: int = 20,
) -> LatencyCurve:
    """Time a stage at several batch sizes, with the calls taking turns; medians.

    Args:
        make_call: gives a call of that many samples, which returns when its work is done.
        batches: ascending.
        bytes_at: memory of a bucket of that size.
        warmup, repeats: rounds, see :func:`sn72engine.latency.interleave`.
    """
    found = interleave({str(b): make_call(b) for b in batches}, warmup, repeats)
    return LatencyCurve(
        tuple(batches),
        tuple(found[str(batch)].p50 / 1e3 for batch in batches),
        tuple(bytes_at(batch) for batch in batches),
    )


def measure_session(
    session: Session, batches: Sequence[int], *, warmup: int = 3, repeats: int = 20
) -> LatencyCurve:
    """:func:`measure_curve` of an engine on random input; memory is that of inputs and outputs.

    Raises:
        InputError: a batch lies outside the engine's range.
    """

    def call(batch: int) -> Call:
        inputs = random_inputs(session.inputs, batch)
        return lambda: session(inputs)

    def size(batch: int) -> int:
        specs = (*session.inputs, *session.outputs)
        return sum(
            np.dtype(spec.dtype).itemsize
            * math.prod(batch if isinstance(axis, str) else axis for axis in spec.shape)
            for spec in specs
        )

    return measure_curve(call, batches, bytes_at=size, warmup=warmup, repeats=repeats)


def _checked(probabilities: ArrayLike) -> Floats:
    weights = np.asarray(probabilities, np.float64)
    if weights.ndim != 1 or not weights.size or not (weights >= 0).all():
        raise InputError("probabilities must be one number for each count from 0 on, none negative")
    if abs(weights.sum() - 1.0) > 1e-6:
        raise InputError(f"probabilities add up to {weights.sum():.6g} instead of 1")
    return weights


def _largest(probabilities: Sequence[float] | Floats) -> int:
    counts = np.flatnonzero(np.asarray(probabilities))
    return int(counts[-1]) if counts.size else 0


def _smallest(buckets: Sequence[int], count: int) -> int:
    for bucket in buckets:
        if count <= bucket:
            return bucket
    raise InputError(f"{count} samples may come, and the largest of {tuple(buckets)} is smaller")


def _seconds_of(curve: LatencyCurve) -> Mapping[int, float]:
    return dict(zip(curve.batches, curve.seconds, strict=True))


def _memory(buckets: Sequence[int], curve: LatencyCurve) -> int:
    sizes = dict(zip(curve.batches, curve.bytes, strict=True))
    return sum(sizes[bucket] for bucket in buckets)
