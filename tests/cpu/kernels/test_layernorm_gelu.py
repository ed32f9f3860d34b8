"""LayerNorm+GELU: reference against torch.nn.functional, kernels against float64.

Bounds. With u the unit roundoff of the output dtype, one rounding of the result is within u
relative. The float32 arithmetic before it errs by a few times 2^-24 relative to the size of the
*summands*, not of the result: GELU multiplies z by 1 + erf, which cancels for negative z, and the
gradient subtracts two means; so the bound has an absolute part, scaled by the size of the values
that cancel.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sn72kernels
from sn72kernels.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    GradientError,
    ShapeError,
)
from sn72kernels.ops.layernorm_gelu import op, reference
from sn72kernels.testing import assert_close

F = torch.nn.functional
FLOAT32 = 2.0**-24
ROUNDOFF = {torch.float32: FLOAT32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

pytest.importorskip("triton", reason="Triton is not installed")
DTYPES = st.sampled_from((torch.float32, torch.float16, torch.bfloat16))
# One element; not a power of two; exact powers; one past a tile; several passes.
COLUMNS = st.sampled_from((1, 2, 3, 31, 64, 100, 257, 768, 1000, 1024))
WIDE_COLUMNS = st.sampled_from((16384, 16385, 20001))


def make(rows: int, cols: int, dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    """A (rows, cols) tensor with a mean well away from zero, in an awkward layout."""
    generator = torch.Generator().manual_seed(seed)
    data = (torch.randn(rows, cols, generator=generator) * 2 + 1.5).to(dtype)
    if layout == "contiguous":
        return data
    if layout == "strided rows":
        return torch.cat((data, torch.full_like(data, float("nan"))), 1)[:, :cols]
    if layout == "misaligned":
        room = torch.full((rows * cols + 1,), float("nan"), dtype=dtype)
        room[1:] = data.flatten()
        return room[1:].view(rows, cols)
    assert layout == "transposed"
    return data.t().contiguous().t()


LAYOUTS = st.sampled_from(("contiguous", "strided rows", "misaligned", "transposed"))


def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()


@given(
    rows=st.sampled_from((0, 1, 2, 5)),
    cols=COLUMNS | WIDE_COLUMNS,
    dtype=DTYPES,
    layout=LAYOUTS,
    tanh=st.booleans(),
    residual=st.booleans(),
    weight=st.booleans(),
    bias=st.booleans(),
    keep=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_forward_kernel_against_float64(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    layout: str,
    tanh: bool,
    residual: bool,
    weight: bool,
    bias: bool,
    keep: bool,
    seed: int,
) -> None:
    x = make(rows, cols, dtype, layout, seed)
    r = make(rows, cols, dtype, layout, seed + 1) if residual else None
    w = make(1, cols, dtype, "contiguous", seed + 2)[0] if weight else None
    b = make(1, cols, dtype, "contiguous", seed + 3)[0] if bias else None

    out, total, stats = op.launch_forward(x, r, w, b, 1e-5, tanh, keep, keep)

    # The oracle starts from the rounded sum, which is part of the definition.
    summed = x if r is None else x + r
    if keep:
        assert torch.equal(total, summed)
    wanted, _, wanted_stats = reference.forward(
        summed.double(), None, wide(w), wide(b), 1e-5, tanh, False, True
    )
    # Values are below 16 in size; a row of one element has no spread and is exactly its bias.
    assert_close(
        "out", out, wanted, relative=2 * ROUNDOFF[dtype], absolute=64 * FLOAT32 * spread(wanted)
    )
    if keep and rows:
        mean, rstd = stats
        assert_close("mean", mean, wanted_stats[0], relative=4 * FLOAT32, absolute=16 * FLOAT32)
        # The deviation inherits the mean's error once for each unit of mean over deviation.
        assert_close("rstd", rstd, wanted_stats[1], relative=64 * FLOAT32, absolute=0.0)
    elif not keep:
        assert total.numel() == 0
        assert stats.numel() == 0


def spread(values: torch.Tensor) -> float:
    return max(1.0, float(values.abs().max())) if values.numel() else 1.0


@given(
    rows=st.sampled_from((0, 1, 3, 9)),
    cols=COLUMNS,
    dtype=DTYPES,
    layout=LAYOUTS,
    tanh=st.booleans(),
    grad_total=st.booleans(),
    weight=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_backward_kernel_against_float64(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    layout: str,
    tanh: bool,
    grad_total: bool,
    weight: bool,
    bias: bool,
    seed: int,
) -> None:
    check_backward(rows, cols, dtype, layout, tanh, grad_total, weight, bias, seed)


@pytest.mark.parametrize("options", [(True, True, True), (False, False, False)])
def test_backward_kernel_in_several_passes(options: tuple[bool, bool, bool]) -> None:
    check_backward(3, 8193, torch.float32, "strided rows", True, *options, seed=0)


def check_backward(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    layout: str,
    tanh: bool,
    grad_total: bool,
    weight: bool,
    bias: bool,
    seed: int,
) -> None:
    total = make(rows, cols, dtype, layout, seed)
    grad = make(rows, cols, dtype, layout, seed + 1)
    other = make(rows, cols, dtype, layout, seed + 4) if grad_total else None
    w = make(1, cols, dtype, "contiguous", seed + 2)[0] if weight else None
    b = make(1, cols, dtype, "contiguous", seed + 3)[0] if bias else None
    stats = reference.forward(total, None, w, b, 1e-5, tanh, False, True)[2]

    grad_x, grad_w, grad_b = op.launch_backward(grad, other, total, stats, w, b, tanh)

    wanted_x, wanted_w, wanted_b = reference.backward(
        grad.double(), wide(other), total.double(), stats.double(), wide(w), wide(b), tanh
    )
    # Summands of the input gradient: |grad * slope * weight| * rstd, some 50 * 1.2 * 10 * rstd.
    # A row whose elements are nearly equal has a huge rstd, which scales the error with it.
    scale = 64.0 * max(1.0, float(stats[1].max())) if rows else 1.0
    assert_close(
        "grad_x", grad_x, wanted_x, relative=2 * ROUNDOFF[dtype], absolute=64 * FLOAT32 * scale
    )
    # A float32 sum of `rows` terms errs by at most rows - 1 roundings of the largest partial sum.
    for name, have, want in (("grad_weight", grad_w, wanted_w), ("grad_bias", grad_b, wanted_b)):
        assert_close(
            name, have, want, relative=2 * ROUNDOFF[dtype], absolute=64 * FLOAT32 * (rows + 16) * 4
        )


@given(mean=st.sampled_from((1e2, 1e3, 1e4)), cols=st.sampled_from((100, 768, 20001)))
@settings(max_examples=9, deadline=None)
def test_large_mean_does_not_cancel(mean: float, cols: int) -> None:
    """sum(x^2) - n * mean^2 in float32 would lose the variance here entirely."""
    x = (torch.randn(2, cols, generator=torch.Generator().manual_seed(0)) + mean).float()
    out, _, _ = op.launch_forward(x, None, None, None, 1e-5, False, False, False)
    wanted = F.gelu(F.layer_norm(x.double(), (cols,), eps=1e-5))
    # The mean itself is only known to half a unit in the last place of `mean`.
    assert_close("out", out, wanted, relative=8 * FLOAT32, absolute=8 * mean * FLOAT32)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_reference_is_torch_layer_norm_and_gelu(approximate: str) -> None:
    x, r = torch.randn(2, 3, 40, dtype=torch.float64), torch.randn(2, 3, 40, dtype=torch.float64)
    w, b = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    out, total = sn72kernels.layernorm_gelu(
        x, w, b, residual=r, eps=1e-3, approximate=approximate, return_total=True
    )
    torch.testing.assert_close(total, x + r, rtol=0, atol=0)
    wanted = F.gelu(F.layer_norm(x + r, (40,), w, b, 1e-3), approximate=approximate)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("return_total", [False, True])
def test_gradients_are_the_derivatives(approximate: str, return_total: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = ((3, 7), (3, 7), (7,), (7,))
    x, r, w, b = (
        torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes
    )

    def call(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> object:
        return sn72kernels.layernorm_gelu(
            x, w, b, residual=r, approximate=approximate, return_total=return_total
        )

    assert torch.autograd.gradcheck(call, (x, r, w, b))


def test_gradient_without_optional_arguments() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sn72kernels.layernorm_gelu, (x,))


def test_a_second_derivative_is_refused() -> None:
    """Rather than to leave this op's part of it out in silence."""
    x = torch.randn(2, 4, requires_grad=True)
    loss = op.layernorm_gelu(x).square().sum()
    with pytest.raises(GradientError, match="layernorm_gelu has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_compile_full_graph_forward_and_backward() -> None:
    torch.use_deterministic_algorithms(False)
    tensors = [torch.randn(2, 5, 16), torch.randn(16), torch.randn(16), torch.randn(2, 5, 16)]

    def loss(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        out, total = sn72kernels.layernorm_gelu(x, w, b, residual=r, return_total=True)
        return out.sum() + (total * total).sum()

    def gradients(function: object) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        function(*leaves).backward()  # type: ignore[operator]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for have, want in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(have, want)


def test_export_keeps_one_op_and_a_dynamic_batch() -> None:
    torch.use_deterministic_algorithms(False)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sn72kernels.layernorm_gelu(x)

    program = torch.export.export(
        Model(), (torch.randn(4, 8),), dynamic_shapes={"x": {0: torch.export.Dim("n")}}
    )
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.sn72.layernorm_gelu_forward.default in calls
    x = torch.randn(9, 8)
    torch.testing.assert_close(program.module()(x), sn72kernels.layernorm_gelu(x))


def test_configuration_covers_every_row_length() -> None:
    for cols in (1, 7, 64, 768, 16384, 16385, 1 << 20):
        for itemsize in (2, 4):
            config = op.tile_config(cols, itemsize)
            assert config.whole == (config.cols >= cols)
            assert config.rows >= 1
            assert 1 <= config.warps <= 16


def test_errors_name_the_argument() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(DtypeError, match=r"Invalid dtype of x: expected float32 or .* got int32"):
        sn72kernels.layernorm_gelu(x.int())
    with pytest.raises(ShapeError, match=r"shape of weight: expected \(4\), got \(5,\)"):
        sn72kernels.layernorm_gelu(x, torch.zeros(5))
    with pytest.raises(ShapeError, match=r"shape of residual: expected \(2, 4\), got \(1, 4\)"):
        sn72kernels.layernorm_gelu(x, residual=x[:1])
    with pytest.raises(DtypeError, match="dtype of residual: expected float32, got float16"):
        sn72kernels.layernorm_gelu(x, residual=x.half())
    with pytest.raises(DeviceError, match="Invalid device of bias: expected cpu, got meta"):
        sn72kernels.layernorm_gelu(x, bias=torch.zeros(4, device="meta"))
    with pytest.raises(ShapeError, match=r"shape of x: expected \(\.\.\., N\) with N >= 1"):
        sn72kernels.layernorm_gelu(torch.zeros(3, 0))
    with pytest.raises(ArgumentError, match="approximate is 'fast'; give 'none' or 'tanh'"):
        sn72kernels.layernorm_gelu(x, approximate="fast")
    with pytest.raises(ArgumentError, match="eps is -1"):
        sn72kernels.layernorm_gelu(x, eps=-1.0)
    with pytest.raises(ArgumentError, match="return_total is set without residual"):
        sn72kernels.layernorm_gelu(x, return_total=True)
