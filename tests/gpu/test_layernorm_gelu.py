"""LayerNorm+GELU on the card, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import sn72kernels
from sn72kernels.ops.layernorm_gelu import op, reference
from sn72kernels.testing import assert_close, poisoned
from tests.gpu.support import DEVICE, check_graph_and_streams, compiled, seeded, sizes

# Output rounding, doubled for the approximate division and exponential of the hardware.
RELATIVE = {torch.float32: 2.0**-21, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


ROWS, COLS = sizes((4099, 768), (37, 48))


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    return (torch.randn(*shape, generator=generator) * 2 + 1.5).to(dtype).to(DEVICE)


def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu().double()


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize(
    "shape",
    sizes(
        [(0, 64), (1, 1), (3, 7), (577, 768), (64, 1000), (9, 16384), (3, 20001)],
        [(0, 64), (3, 7), (2, 20001)],
    ),
)
def test_forward_and_backward(shape: tuple[int, int], tanh: bool, dtype: torch.dtype) -> None:
    x, r, grad, grad_total = (make(*shape, dtype=dtype, seed=seed) for seed in range(4))
    w, b = (make(shape[1], dtype=dtype, seed=seed) for seed in (4, 5))
    runs = sn72kernels.explain("layernorm_gelu", x).implementation
    assert runs == sizes("triton", "reference")
    with poisoned():
        out, total, stats = op.launch_forward(x, r, w, b, 1e-5, tanh, True, True)
        grads = op.launch_backward(grad, grad_total, total, stats, w, b, tanh)
    torch.testing.assert_close(total, x + r, rtol=0, atol=0)
    exact, _, exact_stats = reference.forward(
        total.cpu().double(), None, wide(w), wide(b), 1e-5, tanh, False, True
    )
    assert_close("out", out, exact, relative=RELATIVE[dtype], absolute=2e-5)
    exact_grads = reference.backward(
        grad.cpu().double(), wide(grad_total), total.cpu().double(), exact_stats, wide(w), wide(b),
        tanh,
    )  # fmt: skip
    rstd = float(exact_stats[1].max()) if shape[0] else 1.0
    for name, have, want, absolute in zip(
        ("grad_x", "grad_weight", "grad_bias"),
        grads,
        exact_grads,
        (5e-4 * max(1.0, rstd), 2e-5 * (shape[0] + 16), 2e-5 * (shape[0] + 16)),
        strict=True,
    ):
        assert_close(name, have, want, relative=RELATIVE[dtype], absolute=absolute)


def test_gradient_sums_are_the_same_every_time() -> None:
    x, grad, w = make(ROWS, COLS), make(ROWS, COLS, seed=1), make(COLS, seed=2)
    stats = op.launch_forward(x, None, w, w, 1e-5, False, False, True)[2]
    first = op.launch_backward(grad, None, x, stats, w, w, False)
    for _ in range(5):
        again = op.launch_backward(grad, None, x, stats, w, w, False)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)


def call(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sn72kernels.layernorm_gelu(x, w, residual=r, return_total=True)


def test_graph_and_streams() -> None:
    first = (make(64, 768), make(768, seed=1), make(64, 768, seed=2))
    second = (make(64, 768, seed=3), make(768, seed=4), make(64, 768, seed=5))
    check_graph_and_streams(call, first, second)


def test_torch_compile_of_a_training_step() -> None:
    """Forward and backward through autograd, compiled as one graph each."""

    def step(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return sn72kernels.layernorm_gelu(x, w, b).square().sum()

    plain, traced = (
        [
            make(*shape, seed=seed).requires_grad_()
            for seed, shape in enumerate(((64, 768), (768,), (768,)))
        ]
        for _ in range(2)
    )
    step(*plain).backward()
    compiled(step)(*traced).backward()
    for have, want in zip(traced, plain, strict=True):
        assert_close("gradient", have.grad, want.grad, relative=2.0**-16, absolute=2.0**-10)


def test_torch_compile() -> None:
    arguments = (make(64, 768), make(768, seed=1), make(64, 768, seed=2))
    for have, want in zip(compiled(call)(*arguments), call(*arguments), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)
