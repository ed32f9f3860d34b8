"""Tensors of more than 2^31 elements: the last row is as right as the first.

An offset of 32 bits would wrap and read or write elsewhere. Only the ends are filled and checked.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sn72kernels import testing
from sn72kernels.ops.attention import op as attention
from sn72kernels.ops.layernorm_gelu import op as layernorm_gelu
from sn72kernels.ops.linear import op as linear
from sn72kernels.ops.preprocess import op as preprocess
from sn72kernels.ops.quantize import op as quantize
from sn72kernels.ops.quantize_blocks import op as quantize_blocks
from sn72kernels.ops.rope import op as rope
from sn72kernels.ops.rope import tables
from tests.gpu.support import DEVICE, free_bytes, seeded, sizes

MANY = sizes(2**31, 2**9)


def tall(per_row: tuple[int, ...], dtype: torch.dtype, copies: float) -> torch.Tensor:
    """More than 2^31 elements, zeros but for random first and last rows.

    Args:
        per_row: shape of a row.
        dtype: of the elements.
        copies: tensors of this size that the call needs in all.
    """
    width = 1
    for size in per_row:
        width *= size
    rows = MANY // width + 3
    needed = int(copies * rows * width * dtype.itemsize)
    if free_bytes() < needed:
        pytest.skip(f"needs {needed >> 30} GiB of device memory, {free_bytes() >> 30} are free")
    x = torch.zeros((rows, *per_row), dtype=dtype, device=DEVICE)
    for place in (0, -1):
        row = torch.randint(-100, 100, per_row, generator=seeded(place + 1))
        x[place] = row.to(DEVICE).to(dtype) if dtype != torch.uint8 else row.abs().to(DEVICE)
    assert x.numel() > MANY
    return x


def check(call: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], x: torch.Tensor) -> None:
    """The ends of a call on all rows are what a call on the ends alone gives."""
    have = call(x)
    for place in (slice(0, 1), slice(-1, None)):
        want = call(x[place].clone())
        for whole, part in zip(have, want, strict=True):
            if part.dtype == torch.float16:
                testing.assert_close("end", whole[place], part, relative=2.0**-9, absolute=2.0**-10)
            else:
                testing.assert_same([_codes(whole[place])], [_codes(part)])


def _codes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def test_layernorm_gelu() -> None:
    x = tall((1024,), torch.float16, 2.5)
    check(
        lambda t: (
            layernorm_gelu.launch_forward(t, None, None, None, 1e-5, False, False, False)[0],
        ),
        x,
    )


def test_quantize_token() -> None:
    check(lambda t: quantize.launch_token(t, True), tall((1024,), torch.float16, 2.0))


def test_dequantize() -> None:
    x = tall((1024,), torch.int8, 5.0)
    one = torch.ones((), device=DEVICE)
    check(lambda t: (quantize.launch_dequantize(t, one, "tensor", torch.float16),), x)


def test_quantize_blocks() -> None:
    check(lambda t: tuple(quantize_blocks.launch_quantize_mxfp8(t)), tall((1024,), torch.half, 2.0))


def test_linear() -> None:
    x = tall((1024,), torch.int8, 2.0)
    w = torch.ones((16, 1024), dtype=torch.int8, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    check(lambda t: (linear.launch_linear(t, one, w, one, None, "none", torch.float32),), x)


def test_rope() -> None:
    x = tall((2, 20, 64), torch.float16, 4.0)
    few = torch.zeros((x.shape[0], 1, 20, 64), dtype=torch.float16, device=DEVICE)

    def call(q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cos, sin = (t[None].to(DEVICE) for t in tables.axial(4, 4, 64))
        n = q.shape[0]
        tables_of_all = (t.expand(n, -1, -1) for t in (cos, sin))
        return (rope.launch_rope(q, few[:n], *tables_of_all)[0],)

    check(call, x)


def test_attention() -> None:
    x = tall((2, 16, 64), torch.float16, 3.0)
    check(lambda t: (attention.launch_triton(t, t, t, 0.125),), x)


def test_preprocess() -> None:
    side, small = sizes((64, 16), (16, 8))
    images = tall((side, side, 3), torch.uint8, 1.5)
    rest = ([small, small], (0.5,) * 3, (0.25,) * 3, "squash", 1.0, "bilinear", torch.float16)
    check(lambda t: (preprocess.launch_preprocess(t, *rest),), images)
