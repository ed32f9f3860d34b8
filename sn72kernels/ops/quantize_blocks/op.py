"""nvfp4 and mxfp8 quantisation: checks, launchers and registration."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch

from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, ShapeError, check_no_gradient, check_tensor
from sn72kernels.ops.layout import as_rows, check_rows
from sn72kernels.ops.quantize_blocks import reference

Format = Literal["nvfp4", "mxfp8"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES: dict[str, int] = {"nvfp4": reference.NVFP4_BLOCK, "mxfp8": reference.MXFP8_BLOCK}


class BlockQuantized(NamedTuple):
    """Codes and what to multiply them by.

    Attributes:
        values: nvfp4: uint8 (..., N/2), two e2m1 codes to a byte, the even element in the low
            half; mxfp8: float8_e4m3fn (..., N). Contiguous.
        scale: per block; nvfp4: float8_e4m3fn (..., N/16), mxfp8: float8_e8m0fnu (..., N/32).
        global_scale: nvfp4: float32, shape (); mxfp8: None.
    """

    values: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None


def quantize_blocks(
    x: torch.Tensor, global_scale: torch.Tensor | None = None, *, format: Format = "nvfp4"
) -> BlockQuantized:
    """Quantise with a scale per block of the last axis, the same bits on every device.

    Rounds half to even and saturates. nvfp4: ``x / (scale * global_scale)`` as e2m1, where the
    block scale maps the block's largest finite magnitude to 6 and lies in [2^-9, 448]; NaN
    becomes 0. mxfp8: ``x / scale`` as e4m3, where the scale is the smallest power of two that
    keeps the block within 448; NaN stays. Infinities saturate. It has no backward.

    Args:
        x: shape (..., N), N a multiple of 16 (nvfp4) or 32 (mxfp8); float32, float16, bfloat16.
        global_scale: for nvfp4 only: float32, shape (), >= 2^-100. None: the largest finite
            magnitude of ``x`` over 6 x 448, and 1 where that is zero.
        format: ``"nvfp4"`` or ``"mxfp8"``.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: another ``format``, or a ``global_scale`` with mxfp8.
        GradientError: a tensor requires a gradient, and gradients are being recorded.
    """
    if format not in get_args(Format):
        raise ArgumentError(f"format is {format!r}; give 'nvfp4' or 'mxfp8'")
    check_tensor("x", x, dtype=DTYPES)
    check_rows("x", x)
    size = SIZES[format]
    if x.shape[-1] % size:
        raise ShapeError(
            f"Invalid shape of x: expected (..., N) with N a multiple of {size} for {format}, "
            f"got {tuple(x.shape)}; pad the last axis with zeros."
        )
    check_no_gradient("quantize_blocks", x=x, global_scale=global_scale)
    if format == "mxfp8":
        if global_scale is not None:
            raise ArgumentError("global_scale is given, but mxfp8 has none; leave it out")
        values, scale = _quantize_mxfp8(x)
        return BlockQuantized(values, scale, None)
    if global_scale is None:
        global_scale = reference.global_scale_of(x)
    check_tensor("global_scale", global_scale, shape=(), dtype=torch.float32, device=x.device)
    values, scale = _quantize_nvfp4(x, global_scale)
    return BlockQuantized(values, scale, global_scale)


def dequantize_blocks(
    values: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The numbers that :func:`quantize_blocks` kept, computed in float32, rounded to ``dtype``.

    It has no backward.

    Args:
        values: uint8 (..., N/2) for nvfp4, float8_e4m3fn (..., N) for mxfp8.
        scale: as in :class:`BlockQuantized`.
        global_scale: likewise; exactly for nvfp4.
        dtype: float32, float16 or bfloat16.

    Returns:
        Shape (..., N), contiguous.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: another ``dtype``; ``global_scale`` missing or too much.
        GradientError: ``global_scale`` requires a gradient, and gradients are being recorded.
    """
    check_tensor("values", values, dtype=(torch.uint8, torch.float8_e4m3fn))
    check_rows("values", values)
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype}; give one of {', '.join(map(str, DTYPES))}")
    packed = values.dtype == torch.uint8
    if packed != (global_scale is not None):
        state = "missing, and nvfp4 needs one" if packed else "given, but mxfp8 has none"
        raise ArgumentError(f"global_scale is {state}")
    blocks = values.shape[-1] // (8 if packed else 32)
    check_tensor(
        "scale",
        scale,
        shape=(*values.shape[:-1], blocks),
        dtype=torch.float8_e4m3fn if packed else torch.float8_e8m0fnu,
        device=values.device,
    )
    if values.shape[-1] % (8 if packed else 32):
        raise ShapeError(
            f"Invalid shape of values: expected whole blocks of {8 if packed else 32} along the "
            f"last axis, got {tuple(values.shape)}"
        )
    if global_scale is None:
        return _dequantize_mxfp8(values, scale, dtype)  # type: ignore[no-any-return]
    check_tensor("global_scale", global_scale, shape=(), dtype=torch.float32, device=values.device)
    check_no_gradient("dequantize_blocks", global_scale=global_scale)
    return _dequantize_nvfp4(values, scale, global_scale, dtype)  # type: ignore[no-any-return]


def explain(
    x: torch.Tensor, *_: Any, format: Format = "nvfp4", dtype: torch.dtype | None = None
) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    if x.dtype in DTYPES:
        spec = QUANTIZE_NVFP4 if format == "nvfp4" else QUANTIZE_MXFP8
    else:
        spec = DEQUANTIZE_NVFP4 if x.dtype == torch.uint8 else DEQUANTIZE_MXFP8
    choice = library.choose(spec, x.device, x)
    if choice.implementation == "reference":
        return choice
    config = ELEMENTS.explain(x.device)
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


# --- configuration -------------------------------------------------------------------------


def elements_config() -> tuning.Block:
    """Elements of one program: 16 to a thread, two 128-bit loads of a 16-bit input."""
    return tuning.Block(2048, 4)


ELEMENTS = tuning.Tunable(
    "quantize_blocks.elements", elements_config, {"size": (1024, 2048, 4096), "warps": (2, 4, 8)}
)


# --- launchers -----------------------------------------------------------------------------


def launch_quantize_nvfp4(
    x: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton counterpart of :func:`reference.quantize_nvfp4`."""
    from sn72kernels.ops.quantize_blocks import kernel

    flat, lead = as_rows(x), x.shape[:-1]
    per_row = x.shape[-1] // 16
    values = torch.empty((*lead, per_row * 8), dtype=torch.uint8, device=x.device)
    scale = torch.empty((*lead, per_row), dtype=torch.uint8, device=x.device)
    blocks, grid, config = _grid(scale, 16)
    if blocks:
        library.launch(
            kernel.quantize_nvfp4, grid,
            flat, global_scale, values, scale, blocks, per_row, flat.stride(0),
            BLOCKS=config.size // 16, num_warps=config.warps,
        )  # fmt: skip
    return values, scale.view(torch.float8_e4m3fn)


def launch_quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton counterpart of :func:`reference.quantize_mxfp8`."""
    from sn72kernels.ops.quantize_blocks import kernel

    flat = as_rows(x)
    per_row = x.shape[-1] // 32
    values = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:-1], per_row), dtype=torch.uint8, device=x.device)
    blocks, grid, config = _grid(scale, 32)
    if blocks:
        library.launch(
            kernel.quantize_mxfp8, grid,
            flat, values, scale, blocks, per_row, flat.stride(0),
            BLOCKS=config.size // 32, num_warps=config.warps,
        )  # fmt: skip
    return values.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def launch_dequantize_nvfp4(
    values: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Triton counterpart of :func:`reference.dequantize_nvfp4`."""
    from sn72kernels.ops.quantize_blocks import kernel

    shape = (*values.shape[:-1], values.shape[-1] * 2)
    out = torch.empty(shape, dtype=dtype, device=values.device)
    blocks, grid, config = _grid(scale, 16)
    if blocks:
        library.launch(
            kernel.dequantize_nvfp4, grid,
            values.contiguous(), scale.contiguous().view(torch.uint8), global_scale, out, blocks,
            BLOCKS=config.size // 16, num_warps=config.warps,
        )  # fmt: skip
    return out


def launch_dequantize_mxfp8(
    values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Triton counterpart of :func:`reference.dequantize_mxfp8`."""
    from sn72kernels.ops.quantize_blocks import kernel

    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    blocks, grid, config = _grid(scale, 32)
    if blocks:
        library.launch(
            kernel.dequantize_mxfp8, grid,
            values.contiguous().view(torch.uint8), scale.contiguous().view(torch.uint8), out,
            blocks, BLOCKS=config.size // 32, num_warps=config.warps,
        )  # fmt: skip
    return out


def _grid(scale: torch.Tensor, size: int) -> tuple[int, tuple[int], tuning.Block]:
    """Number of blocks, of programs, and how much a program does."""
    blocks, config = scale.numel(), ELEMENTS.config(scale.device)
    return blocks, (-(-blocks // (config.size // size)),), config


# --- registration --------------------------------------------------------------------------


def _fake_quantize_nvfp4(
    x: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lead, cols = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty((*lead, cols // 2), dtype=torch.uint8),
        x.new_empty((*lead, cols // 16), dtype=torch.float8_e4m3fn),
    )


def _fake_quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], x.shape[-1] // 32)
    return (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty(shape, dtype=torch.float8_e8m0fnu),
    )


def _fake_dequantize_nvfp4(
    values: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return values.new_empty((*values.shape[:-1], values.shape[-1] * 2), dtype=dtype)


def _fake_dequantize_mxfp8(
    values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return values.new_empty(values.shape, dtype=dtype)


QUANTIZE_NVFP4 = library.OpSpec(
    name="quantize_nvfp4",
    schema="(Tensor x, Tensor global_scale) -> (Tensor, Tensor)",
    reference=reference.quantize_nvfp4,
    launch=launch_quantize_nvfp4,
    fake=_fake_quantize_nvfp4,
)
QUANTIZE_MXFP8 = library.OpSpec(
    name="quantize_mxfp8",
    schema="(Tensor x) -> (Tensor, Tensor)",
    reference=reference.quantize_mxfp8,
    launch=launch_quantize_mxfp8,
    fake=_fake_quantize_mxfp8,
)
DEQUANTIZE_NVFP4 = library.OpSpec(
    name="dequantize_nvfp4",
    schema="(Tensor values, Tensor scale, Tensor global_scale, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_nvfp4,
    launch=launch_dequantize_nvfp4,
    fake=_fake_dequantize_nvfp4,
)
DEQUANTIZE_MXFP8 = library.OpSpec(
    name="dequantize_mxfp8",
    schema="(Tensor values, Tensor scale, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_mxfp8,
    launch=launch_dequantize_mxfp8,
    fake=_fake_dequantize_mxfp8,
)
_quantize_nvfp4 = library.register(QUANTIZE_NVFP4)
_quantize_mxfp8 = library.register(QUANTIZE_MXFP8)
_dequantize_nvfp4 = library.register(DEQUANTIZE_NVFP4)
_dequantize_mxfp8 = library.register(DEQUANTIZE_MXFP8)


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, overall = tensor(64, 1024), tensor(dtype=torch.float32)
    e4m3, e8m0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
    packed, fours = tensor(64, 512, dtype=torch.uint8), tensor(64, 64, dtype=e4m3)
    eights = tensor(64, 32, dtype=e8m0)
    return {
        "nvfp4": (launch_quantize_nvfp4, (x, overall)),
        "mxfp8": (launch_quantize_mxfp8, (x,)),
        "nvfp4 back": (launch_dequantize_nvfp4, (packed, fours, overall, torch.float16)),
        "mxfp8 back": (
            launch_dequantize_mxfp8, (tensor(64, 1024, dtype=e4m3), eights, torch.float16),
        ),
    }  # fmt: skip


def tuning_cases(device: torch.device, rows: int = 8192) -> list[tuning.Case]:
    """Calls to measure the configurations with."""

    args = (torch.randn(rows, 1024, device=device).half(), torch.ones((), device=device))
    return [tuning.Case(ELEMENTS, (), launch_quantize_nvfp4, reference.quantize_nvfp4, args)]
