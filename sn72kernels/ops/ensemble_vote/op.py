"""Weighted vote of several models: checks, launcher and registration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, check_no_gradient, check_tensor
from sn72kernels.ops.ensemble_vote import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_MODELS = 8


def ensemble_vote(
    scores: torch.Tensor | Sequence[torch.Tensor],
    weights: torch.Tensor | Sequence[float],
    *,
    from_logits: bool = False,
) -> torch.Tensor:
    """Weighted mean of the models' probabilities, over those that did not abstain.

    A model abstains on a sample by a score that is NaN, infinite or outside [0, 1]. Where all
    abstain the vote is NaN, which :func:`sn72kernels.cascade_route` escalates. A weight that is
    not positive and finite takes its model out. Every implementation gives the same bits. For
    inference only: it has no backward.

    Args:
        scores: one tensor of shape (n,) per model, 1 to 8 models, float32, float16 or bfloat16,
            which may differ; or one tensor of shape (models, n).
        weights: shape (models,), float32, on the device of the scores; or numbers >= 0, which
            are copied to it on every call, so give a tensor where a graph is captured.
        from_logits: the scores are logits.

    Returns:
        Shape (n,), float32, in [0, 1] or NaN.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: no models or more than 8, or a weight that is negative or not finite.
        GradientError: a tensor requires a gradient, and gradients are being recorded.
    """
    columns = _columns(scores)
    return _vote(columns, _weights(weights, columns), from_logits)  # type: ignore[no-any-return]


def explain(scores: torch.Tensor | Sequence[torch.Tensor], *_: Any, **__: Any) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    columns = _columns(scores)
    device = columns[0].device
    choice = library.choose(VOTE, device)
    if choice.implementation == "reference":
        return choice
    config = SAMPLES.explain(device, len(columns))
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


# --- configuration and launcher ------------------------------------------------------------


def samples_config(models: int) -> tuning.Block:
    """Samples per program: 8 to a thread, whatever the number of models."""
    return tuning.Block(1024, 4)


SAMPLES = tuning.Tunable(
    "ensemble_vote.samples", samples_config, {"size": (256, 512, 1024, 2048), "warps": (2, 4, 8)}
)


def launch_vote(
    scores: Sequence[torch.Tensor], weights: torch.Tensor, from_logits: bool
) -> torch.Tensor:
    """Triton counterpart of :func:`reference.vote`, same arguments and result."""
    from sn72kernels.ops.ensemble_vote import kernel

    n = scores[0].shape[0]
    out = torch.empty(n, dtype=torch.float32, device=scores[0].device)
    if n == 0:
        return out
    rows = [score.contiguous() for score in scores]
    config = SAMPLES.config(out.device, len(rows))
    padded = rows + [None] * (MOST_MODELS - len(rows))
    library.launch(
        kernel.vote, (-(-n // config.size),), *padded, weights.contiguous(), out, n,
        MODELS=len(rows), FROM_LOGITS=from_logits, BLOCK=config.size,
        num_warps=config.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


# --- registration --------------------------------------------------------------------------


def _fake_vote(
    scores: Sequence[torch.Tensor], weights: torch.Tensor, from_logits: bool
) -> torch.Tensor:
    return scores[0].new_empty(scores[0].shape, dtype=torch.float32)


VOTE = library.OpSpec(
    name="ensemble_vote",
    schema="(Tensor[] scores, Tensor weights, bool from_logits) -> Tensor",
    reference=reference.vote,
    launch=launch_vote,
    fake=_fake_vote,
)
_vote = library.register(VOTE)


# --- checks --------------------------------------------------------------------------------


def _columns(scores: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if isinstance(scores, torch.Tensor):
        check_tensor("scores", scores, shape=(None, None))
    columns = list(scores.unbind(0) if isinstance(scores, torch.Tensor) else scores)
    if not 1 <= len(columns) <= MOST_MODELS:
        raise ArgumentError(f"there are {len(columns)} models; give 1 to {MOST_MODELS}")
    for place, column in enumerate(columns):
        name = f"scores[{place}]"
        check_tensor(name, column, shape=(None,), dtype=DTYPES)
        check_tensor(name, column, shape=columns[0].shape, device=columns[0].device)
        check_no_gradient("ensemble_vote", **{name: column})
    return columns


def _weights(
    weights: torch.Tensor | Sequence[float], columns: Sequence[torch.Tensor]
) -> torch.Tensor:
    device = columns[0].device
    if isinstance(weights, torch.Tensor):
        check_tensor("weights", weights, shape=(len(columns),), dtype=torch.float32, device=device)
        check_no_gradient("ensemble_vote", weights=weights)
        return weights
    if len(weights) != len(columns):
        raise ArgumentError(f"there are {len(weights)} weights for {len(columns)} models")
    if any(not (math.isfinite(w) and w >= 0.0) for w in weights):
        raise ArgumentError(f"weights is {list(weights)}; give finite numbers >= 0")
    return torch.tensor(list(weights), dtype=torch.float32, device=device)


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def tensor(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(n, dtype=dtype, device="meta")

    return {
        "8 x float32": (launch_vote, ([tensor(4096)] * 8, tensor(8), False)),
        "3 x float16 logits": (
            launch_vote, ([tensor(4096, torch.float16)] * 3, tensor(3), True),
        ),
    }  # fmt: skip


def tuning_cases(device: torch.device, rows: int = 65536) -> list[tuning.Case]:
    """Calls to measure the configurations with."""

    return [
        tuning.Case(
            SAMPLES, (models,), launch_vote, reference.vote,
            ([torch.rand(rows, device=device) for _ in range(models)],
             torch.rand(models, device=device), False),
        )
        for models in range(2, MOST_MODELS + 1)
    ]  # fmt: skip
