# mypy: ignore-errors
"""Triton kernel of attention without a mask, with the softmax computed along the way.

Milakov and Gimelshein 2018 (arXiv:1805.02867) and Dao 2023 (arXiv:2307.08691): scores of a block
of queries against one block of keys after the other, rescaling what came before when a larger
score appears. A head of 80 is 64 and 16 columns rather than 128 with 48 empty ones.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(
    base, start, tokens, stride, BLOCK: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """COLS columns from FIRST on of BLOCK tokens; zero outside."""
    token = start + tl.arange(0, BLOCK)
    col = FIRST + tl.arange(0, COLS)
    at = base + token.to(tl.int64)[:, None] * stride + col[None, :]
    if MASK and FIRST + COLS > DEPTH:
        value = tl.load(at, (token < tokens)[:, None] & (col < DEPTH)[None, :], other=0.0)
    elif MASK:
        value = tl.load(at, (token < tokens)[:, None], other=0.0)
    elif FIRST + COLS > DEPTH:
        value = tl.load(at, (col < DEPTH)[None, :], other=0.0)
    else:
        value = tl.load(at)
    return value


@triton.jit
def _step(
    q0, q1, k, v, start, keys, k_token, v_token, scale, top, total, acc0, acc1,
    DEPTH: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys."""
    key = _rows(k, start, keys, k_token, KEYS, 0, COLS, DEPTH, MASK)
    score = tl.dot(q0, tl.trans(key), input_precision=PRECISION)
    if REST > 0:
        key = _rows(k, start, keys, k_token, KEYS, COLS, REST, DEPTH, MASK)
        score = tl.dot(q1, tl.trans(key), score, input_precision=PRECISION)
    score = score * scale
    if MASK:
        score = tl.where((start + tl.arange(0, KEYS) < keys)[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1))
    shrink = tl.exp2(top - new_top)
    weight = tl.exp2(score - new_top[:, None])
    total = total * shrink + tl.sum(weight, axis=1)
    value = _rows(v, start, keys, v_token, KEYS, 0, COLS, DEPTH, MASK)
    weight = weight.to(value.dtype)
    acc0 = tl.dot(weight, value, acc0 * shrink[:, None], input_precision=PRECISION)
    if REST > 0:
        value = _rows(v, start, keys, v_token, KEYS, COLS, REST, DEPTH, MASK)
        acc1 = tl.dot(weight, value, acc1 * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc0, acc1


@triton.jit
def _store(
    out, value, start, tokens, stride, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    token = start + tl.arange(0, BLOCK)
    col = FIRST + tl.arange(0, COLS)
    at = out + token.to(tl.int64)[:, None] * stride + col[None, :]
    inside = (token < tokens)[:, None] & (col < DEPTH)[None, :]
    tl.store(at, value.to(out.dtype.element_ty), inside)


@triton.jit
def attention(
    q, k, v, out, heads, blocks, tokens, keys, scale,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    o_batch, o_head, o_token,
    DEPTH: tl.constexpr, COLS: tl.constexpr, REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of one head; ``scale`` includes log2(e), since powers of two are cheap.

    All programs are on the grid's first axis, as the others end at 65535; neighbours share a head.
    """
    start = tl.program_id(0) % blocks * QUERIES
    which = tl.program_id(0) // blocks
    batch = (which // heads).to(tl.int64)
    head = (which % heads).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    out += batch * o_batch + head * o_head
    q0 = _rows(q, start, tokens, q_token, QUERIES, 0, COLS, DEPTH, True)
    q1 = q0
    acc0 = tl.zeros((QUERIES, COLS), tl.float32)
    acc1 = tl.zeros((QUERIES, 16), tl.float32)
    if REST > 0:
        q1 = _rows(q, start, tokens, q_token, QUERIES, COLS, REST, DEPTH, True)
        acc1 = tl.zeros((QUERIES, REST), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    whole = keys // KEYS * KEYS
    for at in range(0, whole, KEYS):
        top, total, acc0, acc1 = _step(
            q0, q1, k, v, at, keys, k_token, v_token, scale, top, total, acc0, acc1,
            DEPTH, COLS, REST, KEYS, False, PRECISION,
        )  # fmt: skip
    if whole < keys:
        top, total, acc0, acc1 = _step(
            q0, q1, k, v, whole, keys, k_token, v_token, scale, top, total, acc0, acc1,
            DEPTH, COLS, REST, KEYS, True, PRECISION,
        )  # fmt: skip
    _store(out, acc0 / total[:, None], start, tokens, o_token, QUERIES, 0, COLS, DEPTH)
    if REST > 0:
        _store(out, acc1 / total[:, None], start, tokens, o_token, QUERIES, COLS, REST, DEPTH)
