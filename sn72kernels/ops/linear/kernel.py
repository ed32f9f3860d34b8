# mypy: ignore-errors
"""Triton kernel of the scaled linear layer: matrix instructions on 8-bit codes, one epilogue."""

import triton
import triton.language as tl

from sn72kernels.ops import fp8_kernel
from sn72kernels.ops.gelu_kernel import gelu


@triton.jit
def linear(
    x, x_scale, w, w_scale, bias, out, rows, units, depth, x_stride, w_stride,
    PER_ROW: tl.constexpr, PER_UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, INTEGER: tl.constexpr, DECODE: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS x UNITS results.

    DECODE turns fp8 codes, given as bytes, into float16, which holds each exactly: for
    architectures without fp8 instructions.
    """
    # One axis of the grid, as the others end at 65535; neighbours share rows.
    across = tl.cdiv(units, UNITS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) % across * UNITS + tl.arange(0, UNITS)
    inside_row, inside_unit = row < rows, unit < units
    x_start = row.to(tl.int64)[:, None] * x_stride
    w_start = unit.to(tl.int64)[:, None] * w_stride
    total = tl.zeros((ROWS, UNITS), tl.int32 if INTEGER else tl.float32)
    for start in range(0, depth, DEPTH):
        col = (start + tl.arange(0, DEPTH))[None, :]
        left = tl.load(x + x_start + col, inside_row[:, None] & (col < depth), other=0.0)
        right = tl.load(w + w_start + col, inside_unit[:, None] & (col < depth), other=0.0)
        if DECODE:
            left = fp8_kernel.decode(left).to(tl.float16)
            right = fp8_kernel.decode(right).to(tl.float16)
        if INTEGER:
            total = tl.dot(left, tl.trans(right), total, out_dtype=tl.int32)
        else:
            # Hopper's fp8 instructions keep few bits of a running sum: add up in float32 per step.
            total = tl.dot(left, tl.trans(right), total, max_num_imprecise_acc=DEPTH)
    value = total.to(tl.float32)
    if PER_ROW:
        value *= tl.load(x_scale + row, inside_row, other=0.0)[:, None]
    else:
        value *= tl.load(x_scale)
    if PER_UNIT:
        value *= tl.load(w_scale + unit, inside_unit, other=0.0)[None, :]
    else:
        value *= tl.load(w_scale)
    if HAS_BIAS:
        value += tl.load(bias + unit, inside_unit, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "none":
        value = gelu(value, ACTIVATION == "gelu_tanh")
    at = row.to(tl.int64)[:, None] * units + unit[None, :]
    inside = inside_row[:, None] & inside_unit[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), inside)
