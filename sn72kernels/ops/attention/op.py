"""Attention: the choice of implementation, checks, configuration, launcher and registration."""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from sn72kernels import library, tuning
from sn72kernels.errors import ArgumentError, ShapeError, check_no_gradient, check_tensor
from sn72kernels.ops.attention import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# float32 in tensor cores takes three products each, more than the registers hold.
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
LARGEST_DEPTH = 128  # of the Triton kernel
FLASH_DEPTH = 256  # of flash-attn

Implementation = Literal["auto", "flash_attn", "triton", "sdpa"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """``softmax(q k^T * scale) v``, with no mask and no dropout.

    ``"auto"`` takes, for float16 and bfloat16, flash-attn where it is installed, else the Triton
    kernel for heads up to 128; for all else ``scaled_dot_product_attention``.
    ``sn72kernels.explain("attention", q, k, v)`` says which runs and why. Sums and the softmax
    are float32. Where a gradient is wanted, ``"auto"`` runs SDPA, which PyTorch differentiates;
    the other kernels here have no backward.

    Args:
        q: shape (B, H, T, D); any strides; float32, float16, bfloat16 or float64.
        k: shape (B, H, S, D), S >= 1, dtype of ``q``.
        v: shape (B, H, S, D), likewise.
        scale: factor of the scores; ``1 / sqrt(D)`` when None.
        implementation: ``"auto"``, or one to insist on.

    Returns:
        Shape (B, H, T, D), in memory (B, T, H, D): ``out.transpose(1, 2).flatten(2)`` joins the
        heads without a copy.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit; the message names it.
        ArgumentError: no such ``implementation``, or it cannot run these arguments here.
        GradientError: a gradient is wanted of an ``implementation`` that has none.
    """
    _check(q, k, v)
    _check_known(implementation)
    factor = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if implementation in ("auto", "sdpa") and _wants_gradient(q, k, v):
        return reference.attention(q, k, v, factor, "sdpa")
    check_no_gradient(f"attention(implementation={implementation!r})", q=q, k=k, v=v)
    out: torch.Tensor = _attention(q, k, v, factor, implementation)
    return out


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> library.Choice:
    """Which implementation a call with these arguments would run, and why."""
    choice = _choice(q, k, v, implementation)
    if implementation in ("auto", "sdpa") and _wants_gradient(q, k, v):
        return library.Choice(choice.op, "sdpa", "a gradient is wanted, and the kernels have none")
    if choice.implementation != "triton":
        return choice
    config = SCORES.explain(q.device, q.shape[3], q.element_size())
    return library.Choice(choice.op, choice.implementation, choice.reason, config)


def _choice(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, implementation: str
) -> library.Choice:
    """What runs where no gradient is wanted, without the configuration."""
    _check_known(implementation)
    choice = library.choose(ATTENTION, q.device, q, k, v, 1.0, implementation)
    if choice.implementation == "reference":
        return library.Choice(choice.op, "sdpa", choice.reason)
    kernel, reason = _kernel(q, k, v, implementation)
    return library.Choice(choice.op, kernel, reason)


@functools.cache
def flash_available() -> bool:
    """Whether flash-attn can be found; it is not imported."""
    return importlib.util.find_spec("flash_attn") is not None


def _kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, implementation: str
) -> tuple[str, str]:
    """Which of the two kernels runs on CUDA tensors, and why."""
    if implementation != "triton":
        if not flash_available():
            why = "flash-attn is not installed"
        elif q.shape[3] > FLASH_DEPTH or q.shape[3] % 8:
            why = f"flash-attn does not take heads of {q.shape[3]}"
        elif q.numel() == 0:
            why = "flash-attn does not take empty tensors"
        elif not all(_in_vectors(t) for t in (q, k, v)):
            why = "flash-attn reads 16 bytes at a time, and not all rows begin at a multiple of 16"
        else:
            return "flash_attn", "flash-attn is installed and takes these tensors"
    else:
        why = "it was asked for"
    return "triton", why


def _in_vectors(x: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes; one that is copied first does.

    The beginning of the memory itself is aligned, as all allocators of PyTorch have it.
    """
    if x.stride(3) != 1:
        return True
    steps = (step for step, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1)
    return all(step * x.element_size() % 16 == 0 for step in (x.storage_offset(), *steps))


# --- configuration and launcher ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """How the scores are cut.

    Attributes:
        queries: queries per program.
        keys: keys per step.
        cols: columns of a head in the first part, a power of two.
        rest: columns in the second part, a power of two, or 0.
        warps: warps per program.
        stages: steps whose loads are in flight.
    """

    queries: int
    keys: int
    cols: int
    rest: int
    warps: int
    stages: int


@functools.cache
def attention_config(depth: int, itemsize: int) -> AttentionConfig:
    """Configuration for heads of ``depth`` columns of ``itemsize`` bytes.

    A head is a power of two and a rest, each at least 16, the least of a matrix instruction.
    Shared memory of two stages stays below the 99 KiB of the smallest supported part.
    """
    cols = max(16, 1 << (depth.bit_length() - 1))
    rest = max(16, tuning.power_of_two(depth - cols)) if depth > cols else 0
    if itemsize == 4:
        return AttentionConfig(32, 32, cols, rest, 4, 2)
    if depth <= 64:
        return AttentionConfig(128, 64, cols, rest, 8, 3)
    return AttentionConfig(128, 64, cols, rest, 8, 2)


SCORES = tuning.Tunable(
    "attention.scores",
    attention_config,
    {"queries": (64, 128), "keys": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)},
)


def launch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, implementation: str
) -> torch.Tensor:
    """CUDA counterpart of :func:`reference.attention`: flash-attn, or Triton."""
    kernel, reason = _kernel(q, k, v, implementation)
    if implementation not in ("auto", kernel):
        raise _cannot(implementation, reason)
    if kernel == "flash_attn":
        return _flash(q, k, v, scale)
    return launch_triton(q, k, v, scale)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, implementation: str
) -> torch.Tensor:
    """:func:`reference.attention`, which must not stand in for what was insisted on.

    Checked here, inside the operator, since the choice asks for what a tracer cannot follow.
    """
    if implementation not in ("auto", "sdpa"):
        raise _cannot(implementation, _choice(q, k, v, implementation).reason)
    return reference.attention(q, k, v, scale, implementation)


def _cannot(implementation: str, reason: str) -> ArgumentError:
    return ArgumentError(f"implementation={implementation!r} cannot run here: {reason}")


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_func

    tokens_first = (t.transpose(1, 2) for t in (q, k, v))
    out: torch.Tensor = flash_attn_func(*tokens_first, softmax_scale=scale)
    return out.transpose(1, 2)


def launch_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The Triton kernel."""
    from sn72kernels.ops.attention import kernel

    batch, heads, tokens, depth = q.shape
    out = torch.empty((batch, tokens, heads, depth), dtype=q.dtype, device=q.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    config = SCORES.config(q.device, depth, q.element_size())
    blocks = -(-tokens // config.queries)
    library.launch(
        kernel.attention, (blocks * batch * heads,),
        q, k, v, out, heads, blocks, tokens, k.shape[2], scale * math.log2(math.e),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        DEPTH=depth, COLS=config.cols, REST=config.rest,
        QUERIES=config.queries, KEYS=config.keys,
        PRECISION="ieee",
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


# --- registration --------------------------------------------------------------------------


def _fake_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, implementation: str
) -> torch.Tensor:
    batch, heads, tokens, depth = q.shape
    return q.new_empty((batch, tokens, heads, depth)).transpose(1, 2)


def _unsupported(*args: Any) -> str | None:
    q, k, v, _, implementation = args
    if implementation == "sdpa":
        return "it was asked for"
    if q.dtype not in KERNEL_DTYPES:
        return f"SDPA is the better kernel for {q.dtype}"
    kernel, why = _kernel(q, k, v, implementation)
    if kernel == "triton" and q.shape[3] > LARGEST_DEPTH:
        return f"heads of {q.shape[3]} are wider than {LARGEST_DEPTH}, and {why}"
    return None


ATTENTION = library.OpSpec(
    name="attention",
    schema="(Tensor q, Tensor k, Tensor v, float scale, str implementation) -> Tensor",
    reference=_sdpa,
    launch=launch_attention,
    fake=_fake_attention,
    unsupported=_unsupported,
)
_attention = library.register(ATTENTION)


# --- checks --------------------------------------------------------------------------------


def _wants_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check_known(implementation: str) -> None:
    known = get_args(Implementation)
    if implementation not in known:
        raise ArgumentError(f"implementation is {implementation!r}; give one of {', '.join(known)}")


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check_tensor("q", q, shape=(None, None, None, None), dtype=DTYPES)
    batch, heads, _, depth = q.shape
    check_tensor("k", k, shape=(batch, heads, None, depth), dtype=q.dtype, device=q.device)
    check_tensor("v", v, shape=k.shape, dtype=q.dtype, device=q.device)
    if k.shape[2] == 0 or depth == 0:
        raise ShapeError(
            f"Invalid shape of k: expected at least one key and one column, got {tuple(k.shape)}"
        )


def compile_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Launcher calls that between them reach every kernel, for compile-only checks."""

    def case(dtype: torch.dtype, depth: int) -> tuple[Any, tuple[Any, ...]]:
        x = torch.empty(2, 581, 16, depth, dtype=dtype, device="meta").transpose(1, 2)
        return launch_triton, (x, x, x, 0.125)

    return {
        "float16 D=64": case(torch.float16, 64),
        "float16 D=80": case(torch.float16, 80),
        "bfloat16 D=128": case(torch.bfloat16, 128),
    }


def tuning_cases(device: torch.device, rows: int = 581) -> list[tuning.Case]:
    """Calls to measure the configurations with; ``rows`` are tokens."""

    cases = []
    for depth in (64, 80, 128):
        q, k, v = (torch.randn(8, 16, rows, depth, device=device).half() for _ in range(3))
        args = (q, k, v, 1.0 / math.sqrt(depth), "triton")
        key = (depth, q.element_size())
        cases.append(tuning.Case(SCORES, key, launch_attention, reference.attention, args))
    return cases
