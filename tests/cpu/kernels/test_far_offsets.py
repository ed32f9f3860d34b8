"""Offsets beyond 2^31 elements, which 32 bits would wrap to somewhere else.

Strides are below 2^31, so that Triton passes them in 32 bits, and their products with an index are
above it. The memory is virtual: pages that nobody touches are not there. It goes on below the
tensor, so that an offset that wraps reads zeros, or writes where it harms nothing, and does not
end the process. The compile-only checks show the same of outputs.
"""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from sn72kernels import testing
from tests.kernel_cases import operators

pytest.importorskip("triton", reason="Triton is not installed")

APART = (1 << 30) + 64
NO_RESERVE = 0x4000  # Linux: address space without a promise of memory

SPECS = operators.specs()

# Operator -> why it needs no case: all of its tensors are made contiguous before the launch.
COPIED = {
    "dequantize_mxfp8": "values and scales are contiguous copies",
    "dequantize_nvfp4": "values and scales are contiguous copies",
    "ensemble_vote": "scores are contiguous copies, and their places are numbered in 64 bits",
}


def far(x: torch.Tensor, place: int) -> torch.Tensor:
    """The same numbers, ``APART`` elements from one index of dimension ``place`` to the next."""
    first = x.movedim(place, 0)
    below = (1 << 31) * x.element_size()
    size = below + (x.shape[place] * APART + x.numel()) * x.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)[below:]
    inner = first[0].contiguous().stride()
    view = memory.view(x.dtype).as_strided(first.shape, (APART, *inner)).movedim(0, place)
    view.copy_(x)
    return view


def cases() -> list[tuple[str, int, int]]:
    """Operator, number of its example, and a dimension that a kernel walks by a stride."""
    found = []
    for name, calls in operators.examples().items():
        leading = {"attention": 3, "rope": 3, "rope_": 3, "preprocess": 4}.get(name, 1)
        if name not in COPIED:
            found += [(name, call, at) for call in range(len(calls)) for at in range(leading)]
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs address space without memory")
@pytest.mark.parametrize(("name", "call", "place"), cases())
def test_rows_far_apart(name: str, call: int, place: int) -> None:
    """All tensors of a call at once that have three rows or more, so that an index reaches two."""
    arguments = operators.examples()[name][call]
    # Scores and thresholds have a stride, and pixels one from channel to channel.
    vectors = name in ("cascade_route", "preprocess")
    if name == "cascade_route" and arguments[0].numel() > 100:
        arguments = (arguments[0][:100], *arguments[1:])  # larger batches read in the same way
    moved = 0

    def change(x: torch.Tensor) -> torch.Tensor:
        nonlocal moved
        walked = x.dim() if vectors else x.dim() - 1
        if place >= walked or x.shape[place] < 3:
            return x
        moved += 1
        return far(x, place)

    given = operators.each_tensor(change, arguments)
    assert moved
    plain = operators.each_tensor(torch.clone, arguments)
    wanted, have = SPECS[name].launch(*plain), SPECS[name].launch(*given)
    if name == "rope_":
        wanted, have = plain[:2], given[:2]
    testing.assert_same(operators.listed(have), operators.listed(wanted))
