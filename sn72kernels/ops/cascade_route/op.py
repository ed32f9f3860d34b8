"""Early-exit routing: checks, launchers and registration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, check_no_gradient, check_tensor
from sn72kernels.ops.cascade_route import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Up to here one program loops over the batch and one launch does it all. Above, one program's
# memory parallelism is too little and two launches over many programs take over.
LOOP_LIMIT = 16384
LARGEST_BATCH = 1 << 24
MOST_BUCKETS = 64


class Routing(NamedTuple):
    """Where every sample goes. All tensors are on the device of the scores.

    Attributes:
        routes: uint8 (n,): 0 negative exit, 1 positive exit, 2 escalate.
        positions: int32 (n,): ``positions[:escalated]`` are the places of the escalated samples
            in their order; the rest is 0, so that padding rows of a bucket read sample 0.
        summary: int32 (4,): number escalated; bucket; number of negative and of positive exits.
            The bucket is the place in ``buckets`` of the smallest size that holds the escalated
            samples, and ``len(buckets)`` when there are none.
        probability: float32 (n,): the scores, after the sigmoid where one was asked for.
    """

    routes: torch.Tensor
    positions: torch.Tensor
    summary: torch.Tensor
    probability: torch.Tensor

    @property
    def escalated(self) -> torch.Tensor:
        """Number of escalated samples, int32, zero-dimensional (a view)."""
        return self.summary[0]

    @property
    def bucket(self) -> torch.Tensor:
        """Chosen bucket, int32, zero-dimensional (a view)."""
        return self.summary[1]


def cascade_route(
    scores: torch.Tensor,
    low: float | torch.Tensor,
    high: float | torch.Tensor,
    *,
    from_logits: bool = False,
    buckets: Sequence[int] = (),
) -> Routing:
    """Decide which samples leave the cascade here, and list the rest in order.

    ``p < low`` leaves negative, ``p > high`` leaves positive, and everything else escalates:
    ties, NaN, infinities, values outside [0, 1], ``low > high`` and NaN thresholds. Comparisons
    are float32 and every implementation gives the same bits, the sigmoid included. Nothing
    waits for the device, and on CUDA the call can be captured in a graph. For inference only: it
    has no backward.

    Args:
        scores: shape (n,), any stride, float32, float16 or bfloat16; n <= 2^24.
        low: threshold, or a tensor of shape (n,) or () on the device of ``scores``. A tensor can
            change between replays of a captured graph; a number is fixed at capture.
        high: likewise.
        from_logits: the scores are logits. A logit that is not finite becomes NaN and escalates.
        buckets: batch sizes of the next stage, ascending, the last >= n; at most 64.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: ``buckets`` is not usable, or the batch is too large.
        GradientError: a tensor requires a gradient, and gradients are being recorded.
    """
    check_tensor("scores", scores, shape=(None,), dtype=DTYPES)
    sizes = _check_buckets(buckets, scores.shape[0])
    check_no_gradient("cascade_route", scores=scores)
    lows, highs, bottom, top = thresholds("cascade_route", scores, low, high)
    return Routing(*_route(scores, lows, highs, bottom, top, from_logits, sizes))


def explain(scores: torch.Tensor, *args: Any, **kwargs: Any) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    choice = library.choose(ROUTE, scores.device, scores)
    if choice.implementation == "reference":
        return choice
    n = scores.shape[0]
    steps = STEPS.explain(scores.device, tuning.power_of_two(n))
    config = {"launches": 1 if n <= LOOP_LIMIT else 2, **steps}
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


# --- configuration and launcher ------------------------------------------------------------


def steps_config(n: int) -> tuning.Block:
    """Samples per step, for at most ``n``: the batch in one step up to 4096."""
    size = min(4096, max(32, tuning.power_of_two(n)))
    return tuning.Block(size, max(1, min(16, size // 128)))


STEPS = tuning.Tunable(
    "cascade_route.steps", steps_config, {"size": (1024, 2048, 4096), "warps": (4, 8, 16)}
)


def launch_route(
    scores: torch.Tensor,
    lows: torch.Tensor | None,
    highs: torch.Tensor | None,
    low: float,
    high: float,
    from_logits: bool,
    buckets: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton counterpart of :func:`reference.route`, same arguments and results."""
    from sn72kernels.ops.cascade_route import kernel

    n = scores.shape[0]
    routes = torch.empty(n, dtype=torch.uint8, device=scores.device)
    positions = torch.empty(n, dtype=torch.int32, device=scores.device)
    summary = torch.empty(4, dtype=torch.int32, device=scores.device)
    probability = torch.empty(n, dtype=torch.float32, device=scores.device)
    strides = (
        scores.stride(0),
        0 if lows is None else lows.stride(0),
        0 if highs is None else highs.stride(0),
    )
    config = STEPS.config(scores.device, tuning.power_of_two(n))
    block = config.size
    flags = {
        "FROM_LOGITS": from_logits,
        "PER_SAMPLE": lows is not None,
        "BLOCK": block,
        "num_warps": config.warps,
        "enable_fp_fusion": False,
    }
    if n <= LOOP_LIMIT:
        library.launch(
            kernel.route_loop, (1,),
            scores, lows, highs, low, high, routes, positions, summary, probability, n, *strides,
            BUCKETS=tuple(buckets), **flags,
        )  # fmt: skip
        return routes, positions, summary, probability
    blocks = -(-n // block)
    counts = torch.empty((3, blocks), dtype=torch.int32, device=scores.device)
    library.launch(
        kernel.route_blocks, (blocks,),
        scores, lows, highs, low, high, routes, counts, probability, n, blocks, *strides,
        **flags,
    )  # fmt: skip
    library.launch(
        kernel.compact_blocks, (blocks,),
        routes, counts, positions, summary, n, blocks,
        BUCKETS=tuple(buckets), BLOCKS=tuning.power_of_two(blocks), BLOCK=block,
        num_warps=flags["num_warps"],
    )  # fmt: skip
    return routes, positions, summary, probability


# --- registration --------------------------------------------------------------------------


def _fake_route(
    scores: torch.Tensor,
    lows: torch.Tensor | None,
    highs: torch.Tensor | None,
    low: float,
    high: float,
    from_logits: bool,
    buckets: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        scores.new_empty(scores.shape, dtype=torch.uint8),
        scores.new_empty(scores.shape, dtype=torch.int32),
        scores.new_empty(4, dtype=torch.int32),
        scores.new_empty(scores.shape, dtype=torch.float32),
    )


ROUTE = library.OpSpec(
    name="cascade_route",
    schema=(
        "(Tensor scores, Tensor? lows, Tensor? highs, float low, float high, bool from_logits, "
        "int[] buckets) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    reference=reference.route,
    launch=launch_route,
    fake=_fake_route,
)
_route = library.register(ROUTE)


# --- checks --------------------------------------------------------------------------------


def thresholds(
    op: str, scores: torch.Tensor, low: float | torch.Tensor, high: float | torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, float, float]:
    """Both thresholds as tensors of shape (n,) where one is a tensor, else both as numbers.

    Args:
        op: public name of the op that asks.
        scores: shape (n,); gives shape and device.
        low: a number, or a float32 tensor of shape (n,) or ().
        high: likewise.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit ``scores``.
        GradientError: a tensor requires a gradient.
    """
    if not isinstance(low, torch.Tensor) and not isinstance(high, torch.Tensor):
        return None, None, float(low), float(high)
    lows, highs = (
        _per_sample(op, name, value, scores) for name, value in (("low", low), ("high", high))
    )
    return lows, highs, 0.0, 0.0


def _per_sample(
    op: str, name: str, value: float | torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return torch.full((), float(value), device=scores.device).expand(scores.shape)
    shape = () if value.dim() == 0 else scores.shape
    check_tensor(name, value, shape=shape, dtype=torch.float32, device=scores.device)
    check_no_gradient(op, **{name: value})
    return value.expand(scores.shape)


def _check_buckets(buckets: Sequence[int], n: int) -> list[int]:
    sizes = [int(size) for size in buckets]
    if n > LARGEST_BATCH:
        raise ArgumentError(f"the batch has {n} samples; split it into batches of {LARGEST_BATCH}")
    if len(sizes) > MOST_BUCKETS:
        raise ArgumentError(f"there are {len(sizes)} buckets; give at most {MOST_BUCKETS}")
    if any(b <= a for a, b in itertools.pairwise([0, *sizes])):
        raise ArgumentError(f"buckets is {sizes}; give positive sizes in ascending order")
    if sizes and sizes[-1] < n:
        raise ArgumentError(
            f"the largest bucket, {sizes[-1]}, cannot hold the {n} samples that may escalate; "
            f"add a bucket >= {n}"
        )
    return sizes


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def tensor(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(n, dtype=dtype, device="meta")

    return {
        "float32 n=256": (
            launch_route, (tensor(256), None, None, 0.15, 0.85, False, [8, 64, 256]),
        ),
        "float16 logits n=4096": (
            launch_route, (tensor(4096, torch.float16), None, None, 0.15, 0.85, True, [4096]),
        ),
        "float32 logits per sample n=1048576": (
            launch_route,
            (tensor(1 << 20), tensor(1 << 20), tensor(1 << 20), 0.0, 0.0, True, [1 << 20]),
        ),
    }  # fmt: skip


def tuning_cases(device: torch.device, rows: int = 1048576) -> list[tuning.Case]:
    """Calls to measure the configurations with."""

    cases = []
    n = min(64, rows)
    while n <= rows:
        args = (torch.randn(n, device=device), None, None, 0.15, 0.85, True, [8, n])
        cases.append(tuning.Case(STEPS, (n,), launch_route, reference.route, args))
        n *= 4
    return cases
