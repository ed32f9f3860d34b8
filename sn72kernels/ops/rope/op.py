"""Rotary position embedding: checks, launchers and registration."""

from __future__ import annotations

from typing import Any

import torch

from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, ShapeError, check_no_gradient, check_tensor
from sn72kernels.ops.rope import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the last tokens of queries and keys; the tokens before them pass unchanged.

    With ``rotate(x) = concat(-x[D/2:], x[:D/2])``, a rotated token is
    ``x * cos + rotate(x) * sin``, computed in float32 and rounded once. Tables come from
    :mod:`sn72kernels.ops.rope.tables`, or from the model. Differentiable in ``q`` and ``k``.

    Args:
        q: shape (B, H, T, D), D even; any strides; float32, float16, bfloat16 or float64.
        k: shape (B, G, T, D), dtype of ``q``.
        cos: shape (P, D), or (B, P, D), P <= T; any of these dtypes.
        sin: shape of ``cos``.

    Returns:
        New tensors, contiguous, shapes and dtype of ``q`` and ``k``.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        GradientError: a table requires a gradient.
    """
    cos, sin = _check("rope", q, k, cos, sin)
    turned: tuple[torch.Tensor, torch.Tensor]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        turned = _Rope.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    else:
        turned = _rope(q, k, cos, sin)
    return turned


def rope_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rope` in place; prefix tokens are neither read nor written.

    Args:
        q: as for :func:`rope`, with a contiguous last axis and no element twice.
        k: likewise; shares no memory with ``q``.
        cos: as for :func:`rope`.
        sin: likewise.

    Returns:
        ``q`` and ``k``.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: ``q`` or ``k`` cannot be changed in place.
        GradientError: a tensor requires a gradient: :func:`rope` has one.
    """
    cos, sin = _check("rope_", q, k, cos, sin)
    check_no_gradient("rope_", q=q, k=k)
    for name, x in (("q", q), ("k", k)):
        repeated = any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))
        if x.stride(3) != 1 or repeated:
            raise ArgumentError(
                f"{name} has strides {x.stride()}; in place its last axis must be contiguous and "
                f"no element repeated: call rope() instead, or {name}.contiguous() first"
            )
    _rope_(q, k, cos, sin)
    return q, k


def explain(q: torch.Tensor, *_: Any, **__: Any) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    choice = library.choose(ROPE, q.device, q)
    if choice.implementation == "reference":
        return choice
    config = TOKENS.explain(q.device, q.shape[3], q.element_size())
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


# --- configuration -------------------------------------------------------------------------


def tokens_config(depth: int, itemsize: int) -> tuning.Block:
    """Tokens per program, for heads of ``depth`` columns: 4 KiB of 64 columns of float16."""
    return tuning.Block(32, 4)


TOKENS = tuning.Tunable("rope.tokens", tokens_config, {"size": (8, 16, 32, 64), "warps": (2, 4, 8)})


# --- launchers -----------------------------------------------------------------------------


def launch_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton counterpart of :func:`reference.rope`, same arguments and results."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _launch(q, k, q_out, k_out, cos, sin, 0)
    return q_out, k_out


def launch_rope_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Triton counterpart of :func:`reference.rope_`."""
    _launch(q, k, q, k, cos, sin, q.shape[2] - cos.shape[1])


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    first: int,
) -> None:
    from sn72kernels.ops.rope import kernel

    batch, q_heads, tokens, depth = q.shape
    k_heads, half = k.shape[1], depth // 2
    config = TOKENS.config(q.device, depth, q.element_size())
    blocks = -(-(tokens - first) // config.size)
    grid = (blocks * batch * (q_heads + k_heads),)
    if 0 in grid:
        return
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    library.launch(
        kernel.rope, grid,
        q, k, q_out, k_out, cos, sin, q_heads, k_heads, blocks, tokens, first,
        tokens - cos.shape[1],
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
        *cos.stride()[:2],
        HALF=half, WIDTH=tuning.power_of_two(half), TOKENS=config.size, num_warps=config.warps,
    )  # fmt: skip


# --- registration --------------------------------------------------------------------------


def _fake_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_rope_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    return None


ROPE = library.OpSpec(
    name="rope",
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    reference=reference.rope,
    launch=launch_rope,
    fake=_fake_rope,
    unsupported=library.no_float64,
)
ROPE_ = library.OpSpec(
    name="rope_",
    schema="(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()",
    reference=reference.rope_,
    launch=launch_rope_,
    fake=_fake_rope_,
    unsupported=library.no_float64,
)
_rope = library.register(ROPE)
_rope_ = library.register(ROPE_)


class _Rope(torch.autograd.Function):
    """The transpose of a rotation by some angles is the rotation by their negatives."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        turned: tuple[torch.Tensor, torch.Tensor] = _rope(q, k, cos, sin)
        return turned

    @staticmethod
    def backward(
        ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # Transposed, each half meets the sines of the other; equal halves make this -sin.
        back = -sin.roll(sin.shape[-1] // 2, -1)
        return (*_Rope.apply(grad_q, grad_k, cos, back), None, None)  # type: ignore[no-untyped-call]


# --- checks --------------------------------------------------------------------------------


def _check(
    op: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables with a batch axis."""
    check_tensor("q", q, shape=(None, None, None, None), dtype=DTYPES)
    batch, _, tokens, depth = q.shape
    if depth % 2 or depth == 0:
        raise ShapeError(f"Invalid shape of q: expected an even last axis, got {tuple(q.shape)}")
    check_tensor("k", k, shape=(batch, None, tokens, depth), dtype=q.dtype, device=q.device)
    lead = () if cos.dim() == 2 else (batch,)
    check_tensor("cos", cos, shape=(*lead, None, depth), dtype=DTYPES, device=q.device)
    check_tensor("sin", sin, shape=cos.shape, dtype=DTYPES, device=q.device)
    if cos.shape[-2] > tokens:
        raise ShapeError(
            f"Invalid shape of cos: expected at most {tokens} tokens, got {tuple(cos.shape)}"
        )
    check_no_gradient(op, cos=cos, sin=sin)
    shape = (batch, *cos.shape[-2:])
    return cos.expand(shape), sin.expand(shape)


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def case(call: Any, dtype: torch.dtype, depth: int) -> tuple[Any, tuple[Any, ...]]:
        x = torch.empty(2, 201, 12, depth, dtype=dtype, device="meta").transpose(1, 2)
        table = torch.empty(2, 196, depth, dtype=torch.float32, device="meta")
        return call, (x, x, table, table)

    return {
        "float16 D=64": case(launch_rope, torch.float16, 64),
        "in place float32 D=80": case(launch_rope_, torch.float32, 80),
    }


def tuning_cases(device: torch.device, rows: int = 581) -> list[tuning.Case]:
    """Calls to measure the configurations with; ``rows`` are tokens."""

    cases = []
    for depth in (64, 80, 128):
        q, k = (torch.randn(8, 16, rows, depth, device=device).half() for _ in range(2))
        cos, sin = (torch.rand(8, rows, depth, device=device) for _ in range(2))
        key = (depth, q.element_size())
        cases.append(tuning.Case(TOKENS, key, launch_rope, reference.rope, (q, k, cos, sin)))
    return cases
