"""LayerNorm+GELU: the whole grid of 128 to 16384 rows by 256 to 8192 columns, and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import sn72kernels
from benchmarks.kernels import gates, peers, work
from benchmarks.kernels.harness import Case

ROWS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COLS = (256, 512, 1024, 2048, 4096, 8192)
DTYPES = (torch.float16, torch.bfloat16)
# Large ones first, so that a run that is cut off has the shapes of the stated goal.
GRID = [(rows, cols) for rows in reversed(ROWS) for cols in reversed(COLS)]
CPU_GRID = [(1024, 1024), (128, 256)]
TRAINING = [(16384, 1024), (4096, 4096)]
CPU_TRAINING = [(128, 256)]


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Forward over the grid; forward and backward, and a residual, at a few sizes."""
    gpu = device.type == "cuda"
    for rows, cols in TRAINING if gpu else CPU_TRAINING:
        yield f"{rows}x{cols} residual", partial(residual, device, rows, cols, torch.float16)
        yield f"{rows}x{cols} training", partial(training, device, rows, cols, torch.float16)
    for rows, cols in GRID if gpu else CPU_GRID:
        for dtype in DTYPES:
            name = f"{rows}x{cols} {str(dtype).removeprefix('torch.')}"
            yield name, partial(forward, device, rows, cols, dtype)


def fused(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return sn72kernels.layernorm_gelu(x, w, b)


def eager(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (x.shape[-1],), w, b))


def forward(device: torch.device, rows: int, cols: int, dtype: torch.dtype) -> Case:
    """``gelu(layer_norm(x) * w + b)``; parameters also in float32, for whom wants them so."""
    x, w, b = _tensors(device, rows, cols, dtype)
    others, absent = peers.others(
        device,
        eager,
        {"liger-kernel, then GELU": peers.lazily(_liger), "quack, then GELU": peers.lazily(_quack)},
    )
    return Case(
        op="layernorm_gelu",
        label=f"{rows} x {cols}",
        dtype=str(dtype).removeprefix("torch."),
        shape=(rows, cols),
        ours=fused,
        others=others,
        absent=absent,
        arguments=(x, w, b, w.float(), b.float()),
        correct=gates.close(eager(x.double(), w.double(), b.double()), dtype=dtype),
        work=work.layernorm_gelu(rows, cols, x.element_size()),
    )


def residual(device: torch.device, rows: int, cols: int, dtype: torch.dtype) -> Case:
    """The sum ``x + r``, which is returned too, and the forward of it."""

    def ours(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        return sn72kernels.layernorm_gelu(x, w, b, residual=r, return_total=True)

    def plain(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        total = x + r
        return eager(total, w, b), total

    x, w, b = _tensors(device, rows, cols, dtype)
    r = torch.randn_like(x)
    total = x + r
    others, absent = peers.others(device, plain)
    return Case(
        op="layernorm_gelu",
        label=f"{rows} x {cols}, residual",
        dtype=str(dtype).removeprefix("torch."),
        shape=(rows, cols),
        ours=ours,
        others=others,
        absent=absent,
        arguments=(x, r, w, b),
        correct=gates.close(
            eager(total.double(), w.double(), b.double()), total.double(), dtype=dtype
        ),
        work=work.layernorm_gelu(rows, cols, x.element_size(), residual=True),
    )


def training(device: torch.device, rows: int, cols: int, dtype: torch.dtype) -> Case:
    """Forward, and the gradients of the input and of both parameters."""

    def step(op: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> Any:
        *inputs, grad = arguments
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = op(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    x, w, b = _tensors(device, rows, cols, dtype)
    grad = torch.randn_like(x)
    others, absent = peers.others(device, eager)
    wanted = step(eager, *(t.double() for t in (x, w, b, grad)))
    return Case(
        op="layernorm_gelu",
        label=f"{rows} x {cols}, training",
        dtype=str(dtype).removeprefix("torch."),
        shape=(rows, cols),
        ours=partial(step, sn72kernels.layernorm_gelu),
        others={name: partial(step, call) for name, call in others.items()},
        absent=absent,
        arguments=(x, w, b, grad),
        correct=gates.close(*wanted, dtype=dtype),
        # The unfused form rounds the normalised values, and what comes back to them, to 16 bits.
        near=gates.close(*wanted, dtype=dtype, roundings=8),
        work=work.layernorm_gelu_training(rows, cols, x.element_size()),
    )


def _tensors(
    device: torch.device, rows: int, cols: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w, b = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, cols), cols, cols)
    )
    return x, w, b


def _liger() -> Callable[..., torch.Tensor]:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, w, b, *_: torch.nn.functional.gelu(liger_layer_norm(x, w, b, 1e-5))


def _quack() -> Callable[..., torch.Tensor]:
    from quack.rmsnorm import layernorm_fwd

    # quack takes parameters in float32 only.
    return lambda x, _, __, w, b: torch.nn.functional.gelu(layernorm_fwd(x, w, b, 1e-5))
