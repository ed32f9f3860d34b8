"""nvfp4 and mxfp8 in plain PyTorch: the definition that the kernels must match bit for bit.

nvfp4: e2m1 values in blocks of 16, an e4m3 scale per block and one float32 scale per tensor
(NVIDIA, cuDNN and TensorRT documentation of NVFP4). mxfp8: e4m3 values in blocks of 32 and an
e8m0 scale per block (Open Compute Project, OCP Microscaling Formats v1.0), the scale rounded up
as NVIDIA's conversions do, so that the largest value of a block does not saturate.
"""

from __future__ import annotations

import torch

NVFP4_BLOCK = 16
MXFP8_BLOCK = 32
E2M1_MAX = 6.0
E4M3_MAX = 448.0
# Smallest e4m3 number: a block scale is never zero.
E4M3_TINY = 2.0**-9
# Below this a global scale times a block scale would not be a normal float32.
SMALLEST_GLOBAL = 2.0**-100
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def global_scale_of(x: torch.Tensor) -> torch.Tensor:
    """Scale that maps the largest finite magnitude to 6 x 448; 1 where that is zero.

    Args:
        x: any shape.

    Returns:
        float32, shape ().
    """
    size = _finite_size(x)
    amax = size.amax() if size.numel() else size.new_zeros(())
    # A tensor: by a number, PyTorch on CUDA multiplies with the reciprocal, which rounds twice.
    scale = amax / torch.full_like(amax, E2M1_MAX * E4M3_MAX)
    return torch.where(scale >= SMALLEST_GLOBAL, scale, torch.ones_like(scale))


def quantize_nvfp4(
    x: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two to a byte with the even element in the low half, and block scales.

    Args:
        x: shape (..., N) with N a multiple of 16.
        global_scale: float32, shape ().

    Returns:
        uint8 (..., N/2); float8_e4m3fn (..., N/16).
    """
    blocks = _in_blocks(x.float(), NVFP4_BLOCK)
    wanted = _finite_size(blocks).amax(-1) / (global_scale * E2M1_MAX)
    scale = wanted.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    value = blocks / (scale.float() * global_scale).unsqueeze(-1)
    codes = _encode_e2m1(value).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale


def quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales.

    Args:
        x: shape (..., N) with N a multiple of 32.

    Returns:
        float8_e4m3fn (..., N); float8_e8m0fnu (..., N/32).
    """
    blocks = _in_blocks(x.float(), MXFP8_BLOCK)
    bits = _finite_size(blocks).amax(-1).view(torch.int32)
    # Exponent of the largest magnitude over 448 = 1.75 * 2^8, rounded up.
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000)
    exponent = exponent.clamp(min=0)
    # A power of two, so this multiplication is the division.
    value = blocks * ((254 - exponent) << 23).view(torch.float32).unsqueeze(-1)
    value = value.clamp(-E4M3_MAX, E4M3_MAX)
    # One NaN, with its sign bit clear, whatever bits it came with.
    value = torch.where(value.isnan(), torch.full_like(value, float("nan")), value)
    scale = exponent.to(torch.uint8).view(torch.float8_e8m0fnu)
    return value.to(torch.float8_e4m3fn).flatten(-2), scale


def dequantize_nvfp4(
    values: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``value * (scale * global_scale)`` in float32, rounded to ``dtype``.

    Args:
        values: uint8 (..., N/2).
        scale: float8_e4m3fn (..., N/16).
        global_scale: float32, shape ().
        dtype: of the result, shape (..., N).
    """
    codes = torch.stack((values & 15, values >> 4), -1).flatten(-2).int()
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=values.device)
    blocks = _in_blocks(table[codes], NVFP4_BLOCK)
    factor = (scale.float() * global_scale).unsqueeze(-1)
    return (blocks * factor).flatten(-2).to(dtype)


def dequantize_mxfp8(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value * scale`` in float32, rounded to ``dtype``.

    Args:
        values: float8_e4m3fn (..., N).
        scale: float8_e8m0fnu (..., N/32).
        dtype: of the result, shape (..., N).
    """
    blocks = _in_blocks(values.float(), MXFP8_BLOCK)
    return (blocks * _decode_e8m0(scale).unsqueeze(-1)).flatten(-2).to(dtype)


def _in_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _finite_size(x: torch.Tensor) -> torch.Tensor:
    size = x.float().abs()
    return torch.where(size.isfinite(), size, torch.zeros_like(size))


def _encode_e2m1(value: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 as uint8, half to even, saturated; NaN becomes 0."""
    value = torch.where(value.isnan(), torch.zeros_like(value), value)
    table = torch.tensor(_E2M1, device=value.device)
    middle = (table[:-1] + table[1:]) / 2
    size = value.abs()
    # The number of middles below; a tie with the middle above an odd code goes up to an even one.
    code = torch.bucketize(size, middle)
    tie = size == middle[code.clamp(max=6)]
    code = code + (tie & (code % 2 == 1))
    return (code | (value.signbit().long() << 3)).to(torch.uint8)


def _decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    code = scale.view(torch.uint8).int()
    bits = torch.where(code == 0, 1 << 22, code << 23)  # 2^-127 is subnormal
    bits = torch.where(code == 255, 0x7FC00000, bits)
    return bits.to(torch.int32).view(torch.float32)
