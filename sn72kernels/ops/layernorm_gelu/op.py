"""LayerNorm then GELU: checks, launch configuration, launchers, registration and autograd."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, GradientError, check_tensor
from sn72kernels.ops.layernorm_gelu import reference
from sn72kernels.ops.layout import as_rows, as_vector, check_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Approximate = Literal["none", "tanh"]


@overload
def layernorm_gelu(
    x: torch.Tensor,
    weight: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    *,
    residual: torch.Tensor | None = ...,
    eps: float = ...,
    approximate: Approximate = ...,
    return_total: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def layernorm_gelu(
    x: torch.Tensor,
    weight: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    *,
    residual: torch.Tensor | None = ...,
    eps: float = ...,
    approximate: Approximate = ...,
    return_total: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layernorm_gelu(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    approximate: Approximate = "none",
    return_total: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``gelu(layer_norm(x + residual) * weight + bias)`` over the last axis, in one pass.

    Statistics are float32 whatever the dtype of ``x``. Rows may be strided; where the last axis
    is not contiguous, or the leading axes do not fold into one, a copy is made first.
    Differentiable once in ``x``, ``residual``, ``weight`` and ``bias``. float64 runs the
    reference on every device.

    Args:
        x: shape (..., N) with N >= 1; float32, float16, bfloat16 or float64.
        weight: shape (N,), any of these dtypes; None for ones.
        bias: shape (N,), likewise; None for zeros.
        residual: shape and dtype of ``x``; added before the norm.
        eps: added to the variance.
        approximate: ``"none"`` for the exact GELU (to the rounding of float32), ``"tanh"`` for
            the tanh form, as in ``torch.nn.functional.gelu``.
        return_total: also return ``x + residual``, in the dtype of ``x``.

    Returns:
        The output, shape and dtype of ``x``, contiguous; with ``return_total`` also the sum.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: ``approximate`` or ``eps`` is not usable, or ``return_total`` is set
            without ``residual``.
        GradientError: on the way back, a second derivative is wanted (``create_graph=True``).
    """
    _check(x, weight, bias, residual, eps, approximate, return_total)
    tanh = approximate == "tanh"
    inputs = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        out, total = _LayerNormGelu.apply(*inputs, eps, tanh, return_total)  # type: ignore[no-untyped-call]
    else:
        out, total, _ = _forward(*inputs, eps, tanh, return_total, False)
    return (out, total) if return_total else out


def explain(x: torch.Tensor, *args: Any, **kwargs: Any) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    choice = library.choose(FORWARD, x.device, x)
    if choice.implementation == "reference":
        return choice
    config = FORWARD_TILE.explain(x.device, *_key(x))
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


# --- configuration -------------------------------------------------------------------------


def tile_config(cols: int, itemsize: int, most_rows: int = tuning.MOST_ROWS) -> tuning.RowTile:
    """Forward configuration for rows of ``cols`` elements of ``itemsize`` bytes."""
    return tuning.row_tile(
        cols, itemsize, widest=16384, tile_bytes=8192, thread_bytes=32, most_rows=most_rows
    )


def backward_config(cols: int) -> tuning.RowTile:
    """Backward configuration: two more rows live in registers, so tiles are narrower."""
    return tuning.row_tile(cols, 4, widest=8192, tile_bytes=8192, thread_bytes=32)


FORWARD_TILE = tuning.Tunable(
    "layernorm_gelu.forward", tile_config, tuning.ROW_CHOICES, tuning.fits_registers
)
BACKWARD_TILE = tuning.Tunable(
    "layernorm_gelu.backward", backward_config, tuning.ROW_CHOICES, tuning.fits_registers
)


def _key(x: torch.Tensor) -> tuple[int, int, int]:
    """What :data:`FORWARD_TILE` is looked up by."""
    cols = x.shape[-1]
    return cols, x.element_size(), tuning.most_rows(x.numel() // cols, x.device)


# --- launchers -----------------------------------------------------------------------------


def launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    tanh: bool,
    keep_total: bool,
    keep_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton counterpart of :func:`reference.forward`, same arguments and results."""
    from sn72kernels.ops.layernorm_gelu import kernel

    flat = as_rows(x)
    rows, cols = flat.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape if keep_total else 0, dtype=x.dtype, device=x.device)
    stats = torch.empty((2, rows) if keep_stats else 0, dtype=torch.float32, device=x.device)
    if rows == 0:
        return out, total, stats
    other = None if residual is None else as_rows(residual)
    weight, bias = as_vector(weight), as_vector(bias)
    config = FORWARD_TILE.config(x.device, *_key(x))
    arguments = (
        flat, other, weight, bias, out, total, stats,
        rows, cols, flat.stride(0), 0 if other is None else other.stride(0), eps,
    )  # fmt: skip
    flags = {
        "HAS_RESIDUAL": other is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "KEEP_TOTAL": keep_total,
        "KEEP_STATS": keep_stats,
        "TANH": tanh,
        "COLS": config.cols,
        "num_warps": config.warps,
    }
    if config.whole:
        grid = (-(-rows // config.rows),)
        library.launch(kernel.forward_tile, grid, *arguments, ROWS=config.rows, **flags)
    else:
        library.launch(kernel.forward_wide, (rows,), *arguments, **flags)
    return out, total, stats


def launch_backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tanh: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton counterpart of :func:`reference.backward`, same arguments and results."""
    from sn72kernels.ops.layernorm_gelu import kernel

    flat, up, stats = as_rows(total), as_rows(grad), stats.contiguous()
    up_total = None if grad_total is None else as_rows(grad_total)
    weight, bias = as_vector(weight), as_vector(bias)
    rows, cols = flat.shape
    config = BACKWARD_TILE.config(total.device, cols)
    # As many programs as fit the device at once (three to a multiprocessor, by their registers), so
    # that their partial sums stay few.
    programs = max(1, min(-(-rows // config.rows), 3 * tuning.sms(total.device)))
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    partial_weight = _partial(programs, cols, weight)
    partial_bias = _partial(programs, cols, bias)
    flags = {
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "TANH": tanh,
        "num_warps": config.warps,
    }
    has_grad_total = up_total is not None
    total_stride = 0 if up_total is None else up_total.stride(0)
    if config.whole:
        library.launch(
            kernel.backward_tile, (programs,),
            up, up_total, flat, stats, weight, bias, grad_x, partial_weight, partial_bias,
            rows, cols, up.stride(0), total_stride, flat.stride(0),
            HAS_GRAD_TOTAL=has_grad_total, ROWS=config.rows, COLS=config.cols, **flags,
        )  # fmt: skip
    else:
        if rows:
            library.launch(
                kernel.backward_wide, (rows,),
                up, up_total, flat, stats, weight, bias, grad_x,
                rows, cols, up.stride(0), total_stride, flat.stride(0),
                HAS_GRAD_TOTAL=has_grad_total, COLS=config.cols, **flags,
            )  # fmt: skip
        if weight is not None or bias is not None:
            block = tuning.COLUMN_BLOCK
            library.launch(
                kernel.backward_columns, (-(-cols // block.cols), programs),
                up, flat, stats, weight, bias, partial_weight, partial_bias,
                rows, cols, up.stride(0), flat.stride(0),
                ROWS=block.rows, COLS=block.cols, **{**flags, "num_warps": block.warps},
            )  # fmt: skip
    return grad_x, _reduce(partial_weight, weight, total), _reduce(partial_bias, bias, total)


def _partial(programs: int, cols: int, like: torch.Tensor | None) -> torch.Tensor | None:
    if like is None:
        return None
    return torch.empty((programs, cols), dtype=torch.float32, device=like.device)


def _reduce(
    partial: torch.Tensor | None, like: torch.Tensor | None, total: torch.Tensor
) -> torch.Tensor:
    if partial is None or like is None:
        return total.new_empty(0)
    return partial.sum(0).to(like.dtype)


# --- registration --------------------------------------------------------------------------


def _fake_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    tanh: bool,
    keep_total: bool,
    keep_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stats_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if keep_total else 0),
        x.new_empty((2, rows) if keep_stats else 0, dtype=stats_dtype),
    )


def _fake_backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tanh: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        total.new_empty(total.shape),
        total.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        total.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


FORWARD = library.OpSpec(
    name="layernorm_gelu_forward",
    schema=(
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool tanh, "
        "bool keep_total, bool keep_stats) -> (Tensor, Tensor, Tensor)"
    ),
    reference=reference.forward,
    launch=launch_forward,
    fake=_fake_forward,
    unsupported=library.no_float64,
)
BACKWARD = library.OpSpec(
    name="layernorm_gelu_backward",
    schema=(
        "(Tensor grad, Tensor? grad_total, Tensor total, Tensor stats, Tensor? weight, "
        "Tensor? bias, bool tanh) -> (Tensor, Tensor, Tensor)"
    ),
    reference=reference.backward,
    launch=launch_backward,
    fake=_fake_backward,
    unsupported=library.no_float64,
)
_forward = library.register(FORWARD)
_backward = library.register(BACKWARD)


class _LayerNormGelu(torch.autograd.Function):
    """Keeps what was normalised and its statistics; GELU's input is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        tanh: bool,
        return_total: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        added = residual is not None
        out, total, stats = _forward(x, residual, weight, bias, eps, tanh, added, True)
        ctx.save_for_backward(total if added else x, stats, weight, bias)
        ctx.tanh = tanh
        ctx.added = added
        return out, total if return_total else None

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, grad_total: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        # Compilers trace this with gradients on, and refuse a second derivative themselves.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise GradientError(
                "layernorm_gelu has no second derivative; call backward() or autograd.grad() "
                "without create_graph"
            )
        total, stats, weight, bias = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _backward(
            grad, grad_total, total, stats, weight, bias, ctx.tanh
        )
        return (
            grad_x,
            grad_x if ctx.added else None,
            None if weight is None else grad_weight,
            None if bias is None else grad_bias,
            None,
            None,
            None,
        )


# --- checks --------------------------------------------------------------------------------


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    approximate: str,
    return_total: bool,
) -> None:
    check_tensor("x", x, dtype=DTYPES)
    check_rows("x", x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(name, vector, shape=(x.shape[-1],), dtype=DTYPES, device=x.device)
    if residual is not None:
        check_tensor("residual", residual, shape=x.shape, dtype=x.dtype, device=x.device)
    elif return_total:
        raise ArgumentError("return_total is set without residual: the sum would be x itself")
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f"approximate is {approximate!r}; give 'none' or 'tanh'")
    if not eps >= 0.0:
        raise ArgumentError(f"eps is {eps}; give a number >= 0")


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    cases: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for dtype, cols in ((torch.float16, 768), (torch.float32, 1024), (torch.bfloat16, 32768)):
        x, vector = tensor(16384, cols, dtype=dtype), tensor(cols, dtype=dtype)
        stats = tensor(2, 16384, dtype=torch.float32)
        label = f"{str(dtype).removeprefix('torch.')} N={cols}"
        cases[f"forward {label}"] = (
            launch_forward, (x, x, vector, vector, 1e-5, False, True, True),
        )  # fmt: skip
        cases[f"backward {label}"] = (
            launch_backward, (x, x, x, stats, vector, vector, False),
        )  # fmt: skip
    for rows, cols in ((16384, 16384), (64, 768), (16384, 256)):
        x, vector = tensor(rows, cols), tensor(cols)
        cases[f"forward tanh float16 N={cols}, {rows} rows"] = (
            launch_forward, (x, None, vector, vector, 1e-5, True, False, False),
        )  # fmt: skip
    return cases


def tuning_cases(device: torch.device, rows: int = 8192) -> list[tuning.Case]:
    """Calls to measure the configurations with."""

    cases = []
    for cols in tuning.WIDTHS:
        x = torch.randn(rows, cols, device=device).half()
        w, b = (torch.randn(cols, device=device).half() for _ in range(2))
        forward = (x, None, w, b, 1e-5, False, False, True)
        stats = reference.forward(*forward)[2]
        backward = (torch.randn_like(x), None, x, stats, w, b, False)
        key = _key(x)
        cases.append(tuning.Case(FORWARD_TILE, key, launch_forward, reference.forward, forward))
        cases.append(
            tuning.Case(BACKWARD_TILE, (cols,), launch_backward, reference.backward, backward)
        )
    return cases
