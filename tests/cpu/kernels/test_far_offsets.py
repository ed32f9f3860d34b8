"""Rows more than 2^31 elements apart: offsets of 32 bits would wrap and read elsewhere.

The memory is virtual: pages that nobody touches are not there.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sn72kernels import testing

pytest.importorskip("triton", reason="Triton is not installed")

APART = (1 << 31) + 64


def far(rows: torch.Tensor) -> torch.Tensor:
    """Two rows of 8 or 16 bits an element, ``APART`` elements apart."""
    count = APART + rows.shape[1]
    memory = np.zeros(count * rows.element_size(), np.uint8)
    view = torch.from_numpy(memory).view(rows.dtype).as_strided(rows.shape, (APART, 1))
    view.copy_(rows)
    assert view.stride(0) > 2**31
    return view


def test_layernorm_gelu() -> None:
    from sn72kernels.ops.layernorm_gelu import op

    x = torch.randn(2, 64).half()
    rest = (None, None, None, 1e-5, False, False, False)
    testing.assert_same(op.launch_forward(far(x), *rest), op.launch_forward(x, *rest))


def test_quantize() -> None:
    from sn72kernels.ops.quantize import op

    x = torch.randn(2, 64).half()
    testing.assert_same(op.launch_token(far(x), False), op.launch_token(x, False))
    scale = torch.ones(())
    have, want = (op.launch_static(t, scale, "tensor", False) for t in (far(x), x))
    testing.assert_same([have], [want])


def test_linear() -> None:
    from sn72kernels.ops.linear import op

    x, w = (torch.randint(-9, 10, (2, 64)).to(torch.int8) for _ in range(2))
    scale = torch.ones(2)
    have, want = (
        op.launch_linear(a, scale, b, scale, None, "none", torch.float32)
        for a, b in ((far(x), far(w)), (x, w))
    )
    testing.assert_same([have], [want])


def test_quantize_blocks() -> None:
    from sn72kernels.ops.quantize_blocks import op

    x = torch.randn(2, 64).half()
    have, want = (op.launch_quantize_mxfp8(t) for t in (far(x), x))
    testing.assert_same([t.view(torch.uint8) for t in have], [t.view(torch.uint8) for t in want])
