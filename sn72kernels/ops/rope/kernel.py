# mypy: ignore-errors
"""Triton kernel of rotary position embedding: queries and keys in one launch."""

import triton
import triton.language as tl


@triton.jit
def _rotate(
    x, out, cos, sin, batch, head, tokens, start, prefix,
    x_batch, x_head, x_token, out_batch, out_head, out_token, table_batch, table_token,
    HALF: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = (start + tl.arange(0, TOKENS))[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens) & (col < HALF)
    at = x + batch * x_batch + head * x_head + token.to(tl.int64) * x_token + col
    low, high = tl.load(at, inside, other=0.0), tl.load(at + HALF, inside, other=0.0)
    turns = inside & (token >= prefix)
    table = batch * table_batch + (token - prefix).to(tl.int64) * table_token + col
    cos_low = tl.load(cos + table, turns, other=1.0).to(tl.float32)
    cos_high = tl.load(cos + table + HALF, turns, other=1.0).to(tl.float32)
    sin_low = tl.load(sin + table, turns, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + table + HALF, turns, other=0.0).to(tl.float32)
    a, b = low.to(tl.float32), high.to(tl.float32)
    # A prefix token passes as it is: infinity times a sine of zero would be NaN.
    new_low = tl.where(turns, a * cos_low - b * sin_low, a)
    new_high = tl.where(turns, b * cos_high + a * sin_high, b)
    to = out + batch * out_batch + head * out_head + token.to(tl.int64) * out_token + col
    tl.store(to, new_low.to(out.dtype.element_ty), inside)
    tl.store(to + HALF, new_high.to(out.dtype.element_ty), inside)


@triton.jit
def rope(
    q, k, q_out, k_out, cos, sin, q_heads, k_heads, blocks, tokens, first, prefix,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    qo_batch, qo_head, qo_token, ko_batch, ko_head, ko_token, table_batch, table_token,
    HALF: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, from ``first`` on, of one head of the queries or of the keys.

    A program reads all that it writes before it writes, so the outputs may be the inputs.
    """
    heads = q_heads + k_heads
    # One axis of the grid, as the others end at 65535.
    start = first + tl.program_id(0) % blocks * TOKENS
    which = tl.program_id(0) // blocks
    batch = (which // heads).to(tl.int64)
    head = (which % heads).to(tl.int64)
    if head < q_heads:
        _rotate(
            q, q_out, cos, sin, batch, head, tokens, start, prefix, q_batch, q_head, q_token,
            qo_batch, qo_head, qo_token, table_batch, table_token, HALF, WIDTH, TOKENS,
        )  # fmt: skip
    else:
        _rotate(
            k, k_out, cos, sin, batch, head - q_heads, tokens, start, prefix,
            k_batch, k_head, k_token, ko_batch, ko_head, ko_token, table_batch, table_token,
            HALF, WIDTH, TOKENS,
        )  # fmt: skip
