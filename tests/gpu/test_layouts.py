"""Memory that is not as a fresh allocation: misaligned, strided and transposed inputs.

The result is that of the same call on a contiguous copy: to the bit, but for ops that sum in
floating point, whose order of summation may follow the width of a load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sn72kernels
from sn72kernels.ops.rope import tables
from sn72kernels.testing import assert_close, assert_same, poisoned
from tests.gpu.support import DEVICE, seeded, sizes

ROWS, COLS = sizes((67, 1056), (5, 96))


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers one element after a 16-byte border."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = memory[1:].view(x.shape)
    view.copy_(x)
    assert view.data_ptr() % 16
    return view


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in rows that are apart."""
    memory = x.new_full((*x.shape[:-1], x.shape[-1] + 8), 1)
    view = memory[..., : x.shape[-1]]
    view.copy_(x)
    return view


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with the first two dimensions exchanged in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(0)).half().to(DEVICE)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-99, 99, shape, generator=seeded(1)).to(torch.int8).to(DEVICE)


def linear(x: torch.Tensor) -> Any:
    one = torch.ones((), device=DEVICE)
    return sn72kernels.linear(x, one, codes(40, COLS), one, torch.ones(40, device=DEVICE))


def rope(x: torch.Tensor) -> Any:
    cos, sin = tables.axial(3, 4, 64, device=DEVICE)
    return sn72kernels.rope(x, x, cos, sin)


CALLS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[], torch.Tensor]]] = {
    "layernorm_gelu": (sn72kernels.layernorm_gelu, lambda: half(ROWS, COLS)),
    "cascade_route": (
        lambda x: sn72kernels.cascade_route(x, 0.2, 0.8, from_logits=True),
        lambda: half(ROWS),
    ),
    "ensemble_vote": (
        lambda x: sn72kernels.ensemble_vote([x, x], torch.tensor([0.5, 0.5], device=DEVICE)),
        lambda: half(ROWS).sigmoid(),
    ),
    "classifier_head": (
        lambda x: sn72kernels.classifier_head(
            x, half(16, COLS) / COLS**0.5, half(16), half(16) / 4, half(), norm=True
        )[:2],
        lambda: half(ROWS, COLS),
    ),
    "quantize": (
        lambda x: sn72kernels.quantize(x, granularity="token", dtype=torch.int8),
        lambda: half(ROWS, COLS),
    ),
    "dequantize": (
        lambda x: sn72kernels.dequantize(
            x, torch.ones((), device=DEVICE), granularity="tensor", dtype=torch.float16
        ),
        lambda: codes(ROWS, COLS),
    ),
    "quantize_blocks": (
        lambda x: sn72kernels.quantize_blocks(x, format="mxfp8")[:2],
        lambda: half(ROWS, COLS),
    ),
    "linear": (linear, lambda: codes(ROWS, COLS)),
    "rope": (rope, lambda: half(2, 3, 17, 64)),
    "attention": (lambda x: sn72kernels.attention(x, x, x), lambda: half(2, 3, 17, 64)),
    "preprocess": (
        lambda x: sn72kernels.preprocess(x.view(torch.uint8), (24, 20)),
        lambda: codes(2, 40, 50, 3),
    ),
}


SUMS = ("layernorm_gelu", "classifier_head", "attention")


@pytest.mark.parametrize("op", CALLS)
def test_same_as_of_a_contiguous_copy(op: str) -> None:
    call, make = CALLS[op]
    x = make()
    wanted = listed(call(x))
    layouts = [misaligned(x)]
    if x.dim() > 1 and op != "preprocess":
        layouts += [strided(x), transposed(x)]
    if op == "preprocess":
        layouts += [transposed(x)]
    for given in layouts:
        with poisoned():
            have = listed(call(given))
        if op in SUMS:
            for one, other in zip(have, wanted, strict=True):
                assert_close(op, one, other, relative=2.0**-9, absolute=2.0**-10)
        else:
            assert_same([plain(t) for t in have], [plain(t) for t in wanted])


def listed(out: Any) -> list[torch.Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
