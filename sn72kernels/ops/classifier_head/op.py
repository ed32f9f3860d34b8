"""The classifier head: checks, configuration, launcher and registration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, check_no_gradient, check_tensor
from sn72kernels.ops.cascade_route.op import thresholds
from sn72kernels.ops.classifier_head import reference
from sn72kernels.ops.layout import as_rows, as_vector, check_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Above, the first layer is a matrix product worth a tuned library, and launches no longer count.
LARGEST_BATCH = 256
# One program adds this many partial logits per row.
MOST_PARTS = 1024

Approximate = Literal["none", "tanh"]


class Decision(NamedTuple):
    """What the head says of every sample. All tensors are on the device of the features.

    Attributes:
        logits: float32 (n,); float64 for float64 features.
        probability: float32 (n,): sigmoid of the logits; NaN where one is not finite.
        routes: uint8 (n,): 0 negative exit, 1 positive exit, 2 escalate.
    """

    logits: torch.Tensor
    probability: torch.Tensor
    routes: torch.Tensor


def classifier_head(
    features: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    low: float | torch.Tensor = 0.15,
    high: float | torch.Tensor = 0.85,
    norm: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    approximate: Approximate = "none",
) -> Decision:
    """``linear -> GELU -> linear -> sigmoid -> route`` of features, with LayerNorm before if asked.

    Two launches for up to 256 samples; above that, PyTorch ops. Given the logits, probabilities
    and routes are the same bits on every device, by the rules of
    :func:`sn72kernels.cascade_route`; the logits themselves carry the rounding of their sums.
    For inference only: it has no backward.

    Args:
        features: shape (n, D); float32, float16, bfloat16 or float64.
        w1: shape (H, D), dtype of ``features``, as in ``torch.nn.Linear``.
        b1: shape (H,), or None.
        w2: shape (1, H) or (H,).
        b2: shape (1,) or (), or None.
        low: threshold, or a float32 tensor of shape (n,) or ().
        high: likewise.
        norm: apply LayerNorm to the features first.
        norm_weight: shape (D,); None for ones.
        norm_bias: shape (D,); None for zeros.
        eps: added to the variance.
        approximate: ``"none"`` for the exact GELU, ``"tanh"`` for the tanh form.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: ``approximate`` or ``eps`` is not usable, or ``norm_weight`` or
            ``norm_bias`` is given without ``norm``.
        GradientError: a tensor requires a gradient, and gradients are being recorded.
    """
    _check(features, w1, b1, norm, norm_weight, norm_bias, eps, approximate)
    device, units = features.device, w1.shape[0]
    shape: tuple[int, ...] = (units,) if w2.dim() == 1 else (1, units)
    check_tensor("w2", w2, shape=shape, dtype=DTYPES, device=device)
    if b2 is not None:
        shape = () if b2.dim() == 0 else (1,)
        check_tensor("b2", b2, shape=shape, dtype=DTYPES, device=device)
    check_no_gradient(
        "classifier_head", features=features, w1=w1, b1=b1, w2=w2, b2=b2,
        norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    lows, highs, bottom, top = thresholds("classifier_head", features[:, 0], low, high)
    last = None if b2 is None else b2.reshape(())
    return Decision(
        *_head(
            features, norm_weight, norm_bias, w1, b1, w2.reshape(units), last, lows, highs,
            bottom, top, norm, eps, approximate == "tanh",
        )
    )  # fmt: skip


def explain(features: torch.Tensor, w1: torch.Tensor, *_: Any, **__: Any) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    choice = library.choose(HEAD, features.device, features, None, None, w1)
    if choice.implementation == "reference":
        return choice
    config = HEAD_TILE.explain(features.device, features.shape[1], features.element_size())
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


# --- configuration and launcher ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """How the first layer is cut.

    Attributes:
        rows: samples per program, the least that a matrix instruction takes.
        units: hidden units per program: few, so that many programs share the weights.
        depth: features per step, 128 bytes or more of a row of the weights.
        warps: warps per program.
    """

    rows: int
    units: int
    depth: int
    warps: int


def head_config(depth: int, itemsize: int) -> HeadConfig:
    """Configuration for ``depth`` features of ``itemsize`` bytes."""
    widest = 128 if itemsize == 2 else 64
    return HeadConfig(16, 16, max(16, min(widest, tuning.power_of_two(depth))), 4)


# More units than the rule's would do; fewer would allow fewer of them in all (see MOST_PARTS).
HEAD_TILE = tuning.Tunable(
    "classifier_head.hidden", head_config, {"units": (16, 32), "depth": (64, 128), "warps": (2, 4)}
)


def launch_head(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    lows: torch.Tensor | None,
    highs: torch.Tensor | None,
    low: float,
    high: float,
    norm: bool,
    eps: float,
    tanh: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton counterpart of :func:`reference.head`, same arguments and results."""
    from sn72kernels.ops.classifier_head import kernel

    rows, depth = x.shape
    units = w1.shape[0]
    logits = torch.empty(rows, dtype=torch.float32, device=x.device)
    probability = torch.empty_like(logits)
    routes = torch.empty(rows, dtype=torch.uint8, device=x.device)
    if rows == 0:
        return logits, probability, routes
    flat, weight = as_rows(x), as_rows(w1)
    norm_weight, norm_bias, b1 = as_vector(norm_weight), as_vector(norm_bias), as_vector(b1)
    config = HEAD_TILE.config(x.device, depth, x.element_size())
    parts = -(-units // config.units)
    partial = torch.empty((rows, parts), dtype=torch.float32, device=x.device)
    if parts:
        library.launch(
            kernel.hidden, (-(-rows // config.rows), parts),
            flat, norm_weight, norm_bias, weight, b1, w2.contiguous(), partial,
            rows, depth, units, flat.stride(0), weight.stride(0), eps,
            NORM=norm, HAS_NORM_WEIGHT=norm_weight is not None,
            HAS_NORM_BIAS=norm_bias is not None, HAS_B1=b1 is not None, TANH=tanh,
            ROWS=config.rows, UNITS=config.units, DEPTH=config.depth, num_warps=config.warps,
        )  # fmt: skip
    library.launch(
        kernel.finish, (-(-rows // config.rows),),
        partial, b2, lows, highs, low, high, logits, probability, routes, rows, parts,
        0 if lows is None else lows.stride(0), 0 if highs is None else highs.stride(0),
        HAS_B2=b2 is not None, PER_SAMPLE=lows is not None,
        ROWS=config.rows, PARTS=tuning.power_of_two(parts), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return logits, probability, routes


# --- registration --------------------------------------------------------------------------


def _fake_head(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.shape[:1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(rows, dtype=wide),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.uint8),
    )


def _unsupported(*args: Any) -> str | None:
    x, w1 = args[0], args[3]
    if reason := library.no_float64(x):
        return reason
    if x.shape[0] > LARGEST_BATCH:
        return (
            f"{x.shape[0]} samples are more than {LARGEST_BATCH}, where separate matrix products "
            "are the better choice"
        )
    most = MOST_PARTS * head_config(x.shape[1], x.element_size()).units
    if w1.shape[0] > most:
        return f"{w1.shape[0]} hidden units are more than {most}"
    return None


HEAD = library.OpSpec(
    name="classifier_head",
    schema=(
        "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor w1, Tensor? b1, Tensor w2, "
        "Tensor? b2, Tensor? lows, Tensor? highs, float low, float high, bool norm, float eps, "
        "bool tanh) -> (Tensor, Tensor, Tensor)"
    ),
    reference=reference.head,
    launch=launch_head,
    fake=_fake_head,
    unsupported=_unsupported,
)
_head = library.register(HEAD)


# --- checks --------------------------------------------------------------------------------


def _check(
    features: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    norm: bool,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    approximate: str,
) -> None:
    check_tensor("features", features, shape=(None, None), dtype=DTYPES)
    check_rows("features", features)
    depth, device = features.shape[1], features.device
    check_tensor("w1", w1, shape=(None, depth), dtype=features.dtype, device=device)
    if b1 is not None:
        check_tensor("b1", b1, shape=w1.shape[:1], dtype=DTYPES, device=device)
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is None:
            continue
        if not norm:
            raise ArgumentError(f"{name} is given without norm=True, so it would do nothing")
        check_tensor(name, vector, shape=(depth,), dtype=DTYPES, device=device)
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f"approximate is {approximate!r}; give 'none' or 'tanh'")
    if not eps >= 0.0:
        raise ArgumentError(f"eps is {eps}; give a number >= 0")


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def case(dtype: torch.dtype, norm: bool) -> tuple[Any, tuple[Any, ...]]:
        vector = tensor(1024, dtype=dtype) if norm else None
        x, w1 = tensor(64, 1024, dtype=dtype), tensor(256, 1024, dtype=dtype)
        b1, b2 = tensor(256, dtype=dtype), tensor(dtype=dtype)
        rest = (None, None, 0.15, 0.85, norm, 1e-5, False)
        return launch_head, (x, vector, vector, w1, b1, b1, b2, *rest)

    return {"float16 norm": case(torch.float16, True), "float32": case(torch.float32, False)}


def tuning_cases(device: torch.device, rows: int = 64) -> list[tuning.Case]:
    """Calls to measure the configurations with."""

    cases = []
    for depth in tuning.WIDTHS:
        x, w1 = (torch.randn(n, depth, device=device).half() for n in (rows, 256))
        b1, w2 = (torch.randn(256, device=device).half() for _ in range(2))
        head = (None, None, w1 / depth**0.5, b1, w2, None)
        args = (x, *head, None, None, 0.15, 0.85, True, 1e-5, False)
        key = (depth, x.element_size())
        # Routes follow from the logits, whose last bits depend on the configuration.
        cases.append(tuning.Case(HEAD_TILE, key, launch_head, reference.head, args, outputs=2))
    return cases
