"""The scaled linear layer: checks, configuration, launcher and registration."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from sn72kernels import device as devices
from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, check_no_gradient, check_tensor
from sn72kernels.ops.layout import as_rows, as_vector, check_rows
from sn72kernels.ops.linear import reference

CODES = (torch.int8, torch.float8_e4m3fn)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_ARCH = 89  # the first with fp8 matrix instructions
# Codes to a row whose products fit a 32-bit sum, whatever they are.
MOST_INT8 = (2**31 - 1) // 128**2

Activation = Literal["none", "gelu", "gelu_tanh"]


def linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation = "none",
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """``activation((x w^T) * x_scale * w_scale + bias)`` on codes of :func:`sn72kernels.quantize`.

    Codes quantised per tensor or per token fit: a token of ``x`` is a row, and of ``w`` an output.
    int8 adds up exactly; fp8 in float32. For inference only: it has no backward.

    Args:
        x: shape (..., K), int8 or float8_e4m3fn.
        x_scale: float32, shape () or x.shape[:-1].
        w: shape (N, K), dtype of ``x``, as in ``torch.nn.Linear``.
        w_scale: float32, shape () or (N,).
        bias: shape (N,), float32, float16 or bfloat16; or None.
        activation: ``"none"``, ``"gelu"`` or ``"gelu_tanh"``.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        Shape (..., N), contiguous.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: another ``activation`` or ``dtype``.
        GradientError: a tensor requires a gradient, and gradients are being recorded.
    """
    check_tensor("x", x, dtype=CODES)
    check_rows("x", x)
    units, device = w.shape[0] if w.dim() else 0, x.device
    check_tensor("w", w, shape=(None, x.shape[-1]), dtype=x.dtype, device=device)
    lead = () if x_scale.dim() == 0 else x.shape[:-1]
    check_tensor("x_scale", x_scale, shape=lead, dtype=torch.float32, device=device)
    shape = () if w_scale.dim() == 0 else (units,)
    check_tensor("w_scale", w_scale, shape=shape, dtype=torch.float32, device=device)
    if bias is not None:
        check_tensor("bias", bias, shape=(units,), dtype=DTYPES, device=device)
    if activation not in get_args(Activation):
        raise ArgumentError(
            f"activation is {activation!r}; give one of {', '.join(get_args(Activation))}"
        )
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype}; give one of {', '.join(map(str, DTYPES))}")
    check_no_gradient("linear", x_scale=x_scale, w_scale=w_scale, bias=bias)
    scale = x_scale.reshape(-1) if x_scale.dim() else x_scale
    out: torch.Tensor = _linear(as_rows(x), scale, w, w_scale, bias, activation, dtype)
    return out.reshape(*x.shape[:-1], units)


def explain(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, *_: Any, **__: Any
) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    choice = library.choose(LINEAR, x.device, x)
    if choice.implementation == "reference":
        return choice
    config = PRODUCT.explain(x.device, *_key(x.numel() // x.shape[-1], w))
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


# --- configuration and launcher ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How the matrix product is cut.

    Attributes:
        rows: rows of ``x`` per program.
        units: outputs per program.
        depth: codes per step, 128 bytes of a row.
        warps: warps per program.
        stages: steps whose loads are in flight.
    """

    rows: int
    units: int
    depth: int
    warps: int
    stages: int


def linear_config(rows: int, units: int, depth: int, codes: str) -> LinearConfig:
    """Configuration for ``rows`` rows, whatever the layer's size.

    Few rows are a matter of reading the weights: small blocks spread them over many programs,
    each with several loads in flight.

    Args:
        rows: rows of ``x``.
        units: outputs.
        depth: inputs.
        codes: ``"int8"``, ``"fp8"``, or ``"decoded"``: fp8 that becomes float16 in registers.
    """
    if rows <= 16:
        return LinearConfig(16, 32, 128, 4, 4)
    if rows <= 64:
        return LinearConfig(64, 32, 128, 4, 4)
    if codes == "decoded":
        return LinearConfig(64, 64, 128, 8, 3)
    return LinearConfig(128, 64, 128, 8, 3)


# Looked up by the next power of two of the rows, since batches vary; by the layer's exact size.
PRODUCT = tuning.Tunable(
    "linear.product",
    linear_config,
    {"rows": (16, 64, 128), "units": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
)


def _key(rows: int, w: torch.Tensor) -> tuple[int, int, int, str]:
    """What :data:`PRODUCT` is looked up by, for ``rows`` rows and weights ``w``."""
    decode = devices.arch(w.device) < FP8_ARCH
    codes = "int8" if w.dtype == torch.int8 else "decoded" if decode else "fp8"
    return tuning.power_of_two(rows), *w.shape, codes


def launch_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Triton counterpart of :func:`reference.linear`, same arguments and result."""
    from sn72kernels.ops.linear import kernel

    (rows, depth), units = x.shape, w.shape[0]
    out = torch.empty((rows, units), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    flat, weight, bias = as_rows(x), as_rows(w), as_vector(bias)
    key = _key(rows, w)
    codes = key[-1]
    if codes == "decoded":
        flat, weight = flat.view(torch.uint8), weight.view(torch.uint8)
    config = PRODUCT.config(x.device, *key)
    library.launch(
        kernel.linear, (-(-units // config.units) * -(-rows // config.rows),),
        flat, x_scale.contiguous(), weight, w_scale.contiguous(), bias, out, rows, units, depth,
        flat.stride(0), weight.stride(0),
        PER_ROW=x_scale.dim() == 1, PER_UNIT=w_scale.dim() == 1, HAS_BIAS=bias is not None,
        ACTIVATION=activation, INTEGER=codes == "int8", DECODE=codes == "decoded",
        ROWS=config.rows, UNITS=config.units, DEPTH=config.depth,
        # A fused multiply-add of scale and bias would round once where the definition does twice.
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


# --- registration --------------------------------------------------------------------------


def _fake_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)


def _unsupported(*args: Any) -> str | None:
    x = args[0]
    if x.dtype == torch.int8 and x.shape[-1] > MOST_INT8:
        return f"a sum of {x.shape[-1]} products of int8 may not fit 32 bits"
    return None


LINEAR = library.OpSpec(
    name="linear",
    schema=(
        "(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, str activation, "
        "ScalarType dtype) -> Tensor"
    ),
    reference=reference.linear,
    launch=launch_linear,
    fake=_fake_linear,
    unsupported=_unsupported,
)
_linear = library.register(LINEAR)


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def case(rows: int, dtype: torch.dtype) -> tuple[Any, tuple[Any, ...]]:
        def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        row, unit = (tensor(n, dtype=torch.float32) for n in (rows, 1024))
        x, w = tensor(rows, 1024), tensor(1024, 1024)
        return launch_linear, (x, row, w, unit, unit, "gelu", torch.float16)

    return {
        "int8 M=16": case(16, torch.int8),
        "fp8 M=64": case(64, torch.float8_e4m3fn),
        "int8 M=512": case(512, torch.int8),
        "fp8 M=512": case(512, torch.float8_e4m3fn),
    }


# Outputs and inputs of the layers that are measured: the MLPs of ViT-B and ViT-L.
LAYERS = ((3072, 768), (768, 3072), (4096, 1024), (1024, 4096))


def tuning_cases(device: torch.device, rows: int = 1024) -> list[tuning.Case]:
    """Calls to measure the configurations with."""

    counts = [n for n in (1, 4, 16, 64, 256, 1024) if n <= rows]
    cases = []
    for count, (units, depth), dtype in itertools.product(counts, LAYERS, CODES):
        x, w = (
            torch.randint(-99, 100, (n, depth), device=device).float().to(dtype)
            for n in (count, units)
        )
        scale, w_scale, bias = (torch.rand(n, device=device) for n in (count, units, units))
        args = (x, scale / 1e4, w, w_scale, bias, "gelu", torch.float16)
        key = _key(count, w)
        cases.append(tuning.Case(PRODUCT, key, launch_linear, reference.linear, args))
    return cases
