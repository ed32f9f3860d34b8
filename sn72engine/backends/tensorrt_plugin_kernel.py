# mypy: ignore-errors
"""Triton entry point of the LayerNorm+GELU plugin.

TensorRT passes a plugin's inputs first, then its numbers, then its outputs; this puts the
arguments of the kernel in that order. What can be known when the engine is built is a constant.
"""

import triton
import triton.language as tl

from sn72kernels.ops.layernorm_gelu.kernel import forward_tile


@triton.jit
def layernorm_gelu(
    x,
    weight,
    bias,
    rows,
    out,
    cols: tl.constexpr,
    eps: tl.constexpr,
    tanh: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
):
    """One block of whole rows; neither a residual nor what a gradient would need."""
    forward_tile(
        x, x, weight, bias, out, out, out,
        rows, cols, cols, cols, eps,
        False, True, True, False, False, tanh,
        block_rows, block_cols,
    )  # fmt: skip
