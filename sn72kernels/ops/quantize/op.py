"""int8 and fp8 e4m3 quantisation: checks, configuration, launchers and registration."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch

from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, check_no_gradient, check_tensor
from sn72kernels.ops.layout import as_rows, check_rows
from sn72kernels.ops.quantize import reference

Granularity = Literal["tensor", "channel", "token"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.int8, torch.float8_e4m3fn)


class Quantized(NamedTuple):
    """Codes and what to multiply them by.

    Attributes:
        values: shape of the input, int8 or float8_e4m3fn, contiguous.
        scale: float32; shape () per tensor, (N,) per channel, (...,) per token.
    """

    values: torch.Tensor
    scale: torch.Tensor


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    granularity: Granularity = "tensor",
    dtype: torch.dtype = torch.int8,
) -> Quantized:
    """``x / scale`` rounded half to even and saturated, the same bits on every device.

    int8 is symmetric about zero and saturates to [-128, 127], as ONNX QuantizeLinear does; fp8
    saturates to +-448. Infinities saturate; NaN becomes 0 in int8 and NaN in fp8. It has no
    backward.

    Args:
        x: shape (..., N) with N >= 1, float32, float16 or bfloat16.
        scale: positive, float32, shape () per tensor, (N,) per channel, x.shape[:-1] per token.
            None: the largest finite magnitude over 127 (448 for fp8), and 1 where that is zero.
        granularity: what shares a scale: everything, a position of the last axis (channel), or a
            row of it (token).
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: another ``granularity`` or ``dtype``.
        GradientError: a tensor requires a gradient, and gradients are being recorded.
    """
    check_tensor("x", x, dtype=DTYPES)
    fp8 = _check(x, "x", granularity, dtype)
    check_no_gradient("quantize", x=x, scale=scale)
    if scale is None and granularity == "token":
        return Quantized(*_quantize_token(x, fp8))
    if scale is None:
        scale = reference.scale_of(x, granularity, fp8)
    _check_scale(x, "x", scale, granularity)
    return Quantized(_quantize_static(x, scale, granularity, fp8), scale)


def dequantize(
    values: torch.Tensor,
    scale: torch.Tensor,
    *,
    granularity: Granularity = "tensor",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``values * scale`` in float32, rounded to ``dtype``. It has no backward.

    Args:
        values: shape (..., N), int8 or float8_e4m3fn.
        scale: float32, shape by ``granularity`` as in :func:`quantize`.
        granularity: as given to :func:`quantize`.
        dtype: float32, float16 or bfloat16.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: another ``granularity`` or ``dtype``.
        GradientError: ``scale`` requires a gradient, and gradients are being recorded.
    """
    check_tensor("values", values, dtype=CODES)
    _check(values, "values", granularity, values.dtype)
    _check_scale(values, "values", scale, granularity)
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype}; give one of {', '.join(map(str, DTYPES))}")
    check_no_gradient("dequantize", values=values, scale=scale)
    result: torch.Tensor = _dequantize(values, scale, granularity, dtype)
    return result


def explain(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    granularity: Granularity = "tensor",
    dtype: torch.dtype | None = None,
) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    token = scale is None and granularity == "token"
    spec = DEQUANTIZE if x.dtype in CODES else TOKEN if token else STATIC
    choice = library.choose(spec, x.device, x)
    if choice.implementation == "reference":
        return choice
    if spec is TOKEN:
        config = TOKEN_TILE.explain(x.device, *_token_key(x))
    else:
        config = TILE.explain(x.device, x.shape[-1])
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


# --- configuration and launchers -----------------------------------------------------------


def tile_config(cols: int) -> tuning.RowTile:
    """Tiles for an elementwise pass: no row needs to be whole, so long rows go in chunks."""
    return tuning.row_tile(cols, 2, widest=2048, tile_bytes=8192, thread_bytes=32)


def token_config(cols: int, most_rows: int = tuning.MOST_ROWS) -> tuning.RowTile:
    """Rows for scales per token: whole where they fit registers."""
    return tuning.row_tile(
        cols, 2, widest=16384, tile_bytes=8192, thread_bytes=32, most_rows=most_rows
    )


TILE = tuning.Tunable("quantize.tile", tile_config, tuning.ROW_CHOICES, tuning.fits_registers)
TOKEN_TILE = tuning.Tunable(
    "quantize.token", token_config, tuning.ROW_CHOICES, tuning.fits_registers
)


def _token_key(x: torch.Tensor) -> tuple[int, int]:
    """What :data:`TOKEN_TILE` is looked up by."""
    cols = x.shape[-1]
    return cols, tuning.most_rows(x.numel() // cols, x.device)


def launch_static(
    x: torch.Tensor, scale: torch.Tensor, granularity: str, fp8: bool
) -> torch.Tensor:
    """Triton counterpart of :func:`reference.quantize_static`."""
    from sn72kernels.ops.quantize import kernel

    flat, codes = as_rows(x), torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    config, grid = _tiles(flat)
    if flat.numel():
        library.launch(
            kernel.quantize_static, grid,
            flat, scale.contiguous(), codes, *flat.shape, flat.stride(0),
            GRANULARITY=granularity, FP8=fp8,
            ROWS=config.rows, COLS=config.cols, num_warps=config.warps,
        )  # fmt: skip
    return codes.view(torch.float8_e4m3fn if fp8 else torch.int8)


def launch_token(x: torch.Tensor, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton counterpart of :func:`reference.quantize_token`."""
    from sn72kernels.ops.quantize import kernel

    flat, codes = as_rows(x), torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, cols = flat.shape
    config = TOKEN_TILE.config(x.device, *_token_key(x))
    arguments = (flat, codes, scale, rows, cols, flat.stride(0))
    flags = {"FP8": fp8, "COLS": config.cols, "num_warps": config.warps}
    if rows and config.whole:
        grid = (-(-rows // config.rows),)
        library.launch(kernel.quantize_token, grid, *arguments, ROWS=config.rows, **flags)
    elif rows:
        library.launch(kernel.quantize_token_wide, (rows,), *arguments, **flags)
    return codes.view(torch.float8_e4m3fn if fp8 else torch.int8), scale


def launch_dequantize(
    values: torch.Tensor, scale: torch.Tensor, granularity: str, dtype: torch.dtype
) -> torch.Tensor:
    """Triton counterpart of :func:`reference.dequantize`."""
    from sn72kernels.ops.quantize import kernel

    flat, out = as_rows(values), torch.empty(values.shape, dtype=dtype, device=values.device)
    config, grid = _tiles(flat)
    if flat.numel():
        library.launch(
            kernel.dequantize, grid,
            flat.view(torch.uint8), scale.contiguous(), out, *flat.shape, flat.stride(0),
            GRANULARITY=granularity, FP8=values.dtype == torch.float8_e4m3fn,
            ROWS=config.rows, COLS=config.cols, num_warps=config.warps,
        )  # fmt: skip
    return out


def _tiles(flat: torch.Tensor) -> tuple[tuning.RowTile, tuple[int]]:
    """Configuration, and the number of tiles."""
    rows, cols = flat.shape
    config = TILE.config(flat.device, cols)
    return config, (-(-rows // config.rows) * -(-cols // config.cols),)


# --- registration --------------------------------------------------------------------------


def _fake_static(x: torch.Tensor, scale: torch.Tensor, granularity: str, fp8: bool) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else torch.int8)


def _fake_token(x: torch.Tensor, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_dequantize(
    values: torch.Tensor, scale: torch.Tensor, granularity: str, dtype: torch.dtype
) -> torch.Tensor:
    return values.new_empty(values.shape, dtype=dtype)


STATIC = library.OpSpec(
    name="quantize_static",
    schema="(Tensor x, Tensor scale, str granularity, bool fp8) -> Tensor",
    reference=reference.quantize_static,
    launch=launch_static,
    fake=_fake_static,
)
TOKEN = library.OpSpec(
    name="quantize_token",
    schema="(Tensor x, bool fp8) -> (Tensor, Tensor)",
    reference=reference.quantize_token,
    launch=launch_token,
    fake=_fake_token,
)
DEQUANTIZE = library.OpSpec(
    name="dequantize",
    schema="(Tensor values, Tensor scale, str granularity, ScalarType dtype) -> Tensor",
    reference=reference.dequantize,
    launch=launch_dequantize,
    fake=_fake_dequantize,
)
_quantize_static = library.register(STATIC)
_quantize_token = library.register(TOKEN)
_dequantize = library.register(DEQUANTIZE)


# --- checks --------------------------------------------------------------------------------


def _check(x: torch.Tensor, name: str, granularity: str, dtype: torch.dtype) -> bool:
    """Check what quantising and dequantising share; whether the codes are fp8."""
    check_rows(name, x)
    if granularity not in get_args(Granularity):
        raise ArgumentError(f"granularity is {granularity!r}; give 'tensor', 'channel' or 'token'")
    if dtype not in CODES:
        raise ArgumentError(f"dtype is {dtype}; give torch.int8 or torch.float8_e4m3fn")
    return dtype == torch.float8_e4m3fn


def _check_scale(x: torch.Tensor, name: str, scale: torch.Tensor, granularity: str) -> None:
    shapes = {"tensor": (), "channel": x.shape[-1:], "token": x.shape[:-1]}
    check_tensor("scale", scale, shape=shapes[granularity], dtype=torch.float32, device=x.device)


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    many = 16384
    x, rows, codes = tensor(many, 1024), tensor(many, dtype=torch.float32), torch.float8_e4m3fn
    return {
        "static fp8 per channel": (
            launch_static, (x, tensor(1024, dtype=torch.float32), "channel", True),
        ),
        "static int8 per tensor": (
            launch_static, (x, tensor(dtype=torch.float32), "tensor", False),
        ),
        "token fp8 N=1024": (launch_token, (x, True)),
        "token int8 N=32768": (launch_token, (tensor(8, 32768), False)),
        "dequantize fp8 per token": (
            launch_dequantize, (tensor(many, 1024, dtype=codes), rows, "token", torch.float16),
        ),
    }  # fmt: skip


def tuning_cases(device: torch.device, rows: int = 8192) -> list[tuning.Case]:
    """Calls to measure the configurations with."""

    cases = []
    for cols in tuning.WIDTHS:
        x = torch.randn(rows, cols, device=device).half()
        static = (x, torch.rand(cols, device=device) + 0.01, "channel", True)
        cases.append(tuning.Case(TILE, (cols,), launch_static, reference.quantize_static, static))
        cases.append(
            tuning.Case(
                TOKEN_TILE, _token_key(x), launch_token, reference.quantize_token, (x, True)
            )
        )
    return cases
