"""The classifier head: kernel and reference against float64; the route of a logit is exact.

Bound of a logit. The features are rounded once after the norm (u relative) and every float32 sum
of n terms errs by at most n * 2^-24 of the sum of its terms' sizes. GELU's slope stays below 1.13,
so an error e_j of hidden unit j moves the logit by at most 1.13 * |w2_j| * e_j.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sn72kernels
from sn72kernels.errors import ArgumentError, DtypeError, GradientError, ShapeError
from sn72kernels.ops import exact
from sn72kernels.ops.classifier_head import op, reference
from sn72kernels.testing import assert_close

F = torch.nn.functional
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
INF, NAN = float("inf"), float("nan")

pytest.importorskip("triton", reason="Triton is not installed")


def make(rows: int, depth: int, units: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Features, norm weight and bias, w1, b1, w2, b2, scaled so that logits are of size one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    return [
        normal(rows, depth) + 1.5,
        normal(depth) + 1.0,
        normal(depth),
        normal(units, depth, size=depth**-0.5),
        normal(units),
        normal(units, size=units**-0.5),
        normal(),
    ]


def bound(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, roundoff: float) -> float:
    """As in the module's docstring; ``x`` is what enters the first layer, in float64."""
    sizes = (x.abs() @ w1.double().abs().t() + 4.0) * 1.13 * w2.double().abs()
    share = roundoff + (x.shape[1] + w2.shape[0] + 16) * 2.0**-24
    return float(sizes.sum(-1).max()) * share


@given(
    rows=st.sampled_from((0, 1, 5, 17)),
    depth=st.sampled_from((1, 16, 100, 384)),
    units=st.sampled_from((1, 16, 50)),
    dtype=st.sampled_from(tuple(ROUNDOFF)),
    norm=st.booleans(),
    vectors=st.booleans(),
    tanh=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_kernel_against_float64(
    rows: int,
    depth: int,
    units: int,
    dtype: torch.dtype,
    norm: bool,
    vectors: bool,
    tanh: bool,
    strided: bool,
    seed: int,
) -> None:
    x, *rest = make(rows, depth, units, dtype, seed)
    if strided:
        x = torch.cat((x, torch.full_like(x, NAN)), 1)[:, :depth]
    nw, nb, w1, b1, w2, b2 = rest
    bias, last = (b1, b2) if vectors else (None, None)
    weights = (nw, nb) if vectors and norm else (None, None)
    tail = (None, None, 0.3, 0.7, norm, 1e-5, tanh)
    logits, p, routes = op.launch_head(x, *weights, w1, bias, w2, last, *tail)

    wide = [None if t is None else t.double() for t in (x, *weights, w1, bias, w2, last)]
    wanted, _, _ = reference.head(*wide, *tail)
    if rows:
        entry = wide[0]
        if norm:
            entry = F.layer_norm(entry, (depth,), wide[1], wide[2], 1e-5)
        # The norm's own float32 error is within 64 units for a deviation of order one.
        roundoff = (ROUNDOFF[dtype] + 64 * 2.0**-24) if norm else 0.0
        assert_close(
            "logits", logits, wanted, relative=0.0, absolute=bound(entry, w1, w2, roundoff)
        )
    assert torch.equal(p, exact.sigmoid(logits))
    assert torch.equal(routes, exact.route(p, torch.tensor(0.3), torch.tensor(0.7)))


@pytest.mark.parametrize("norm", [False, True])
def test_reference_is_the_module(norm: bool) -> None:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(24, 12), torch.nn.GELU(), torch.nn.Linear(12, 1)]
    if norm:
        layers.insert(0, torch.nn.LayerNorm(24))
    model = torch.nn.Sequential(*layers).double()
    x = torch.randn(7, 24, dtype=torch.float64)
    first, last = model[-3], model[-1]
    given = {"norm_weight": model[0].weight, "norm_bias": model[0].bias} if norm else {}
    arguments = (x, first.weight, first.bias, last.weight, last.bias)
    with pytest.raises(GradientError, match="classifier_head has no backward, and w1 requires"):
        sn72kernels.classifier_head(*arguments, norm=norm, **given)
    with torch.no_grad():
        decision = sn72kernels.classifier_head(*arguments, norm=norm, **given)
    torch.testing.assert_close(decision.logits, model(x)[:, 0], rtol=1e-12, atol=1e-12)


def test_unusable_features_escalate_alone() -> None:
    x, nw, nb, w1, b1, w2, b2 = make(6, 32, 16, torch.float32, 3)
    x[1], x[4, 3] = NAN, INF
    _, p, routes = op.launch_head(
        x, nw, nb, w1, b1, w2, b2, None, None, 0.0, 0.0, True, 1e-5, False
    )
    assert p.isfinite().tolist() == [True, False, True, True, False, True]
    assert routes.tolist() == [1, 2, 1, 1, 2, 1]


def test_thresholds_per_sample() -> None:
    x, nw, nb, w1, b1, w2, b2 = make(4, 32, 16, torch.float32, 4)
    low, high = torch.tensor([0.0, 1.0, NAN, 0.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    have = op.launch_head(x, nw, nb, w1, b1, w2, b2, low, high, 0.0, 0.0, True, 1e-5, False)
    assert have[2].tolist() == [1, 0, 2, 2]
    public = sn72kernels.classifier_head(
        x, w1, b1, w2, b2, low=low, high=high, norm=True, norm_weight=nw, norm_bias=nb
    )
    assert public.routes.tolist() == [1, 0, 2, 2]
    spread = sn72kernels.classifier_head(x, w1, b1, w2[None], b2[None], low=0.0, high=high[0])
    assert spread.routes.tolist() == [1, 1, 1, 1]


def test_no_hidden_units_leave_the_last_bias() -> None:
    x, _, _, w1, b1, w2, b2 = make(3, 32, 16, torch.float32, 7)
    tail = (None, None, 0.3, 0.7, False, 1e-5, False)
    arguments = (x, None, None, w1[:0], b1[:0], w2[:0], b2, *tail)
    for have, want in zip(op.launch_head(*arguments), reference.head(*arguments), strict=True):
        assert torch.equal(have, want)


def test_large_batches_run_the_composed_ops() -> None:
    x, w1 = torch.empty(257, 32), torch.empty(16, 32)
    assert "257 samples are more than 256" in str(op.HEAD.unsupported(x, None, None, w1))
    assert op.HEAD.unsupported(x[:256], None, None, w1) is None
    assert "16385 hidden" in str(op.HEAD.unsupported(x[:1], None, None, torch.empty(16385, 32)))


def test_compile_and_export() -> None:
    torch.use_deterministic_algorithms(False)
    x, _, _, w1, b1, w2, b2 = make(5, 32, 16, torch.float32, 5)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(sn72kernels.classifier_head(x, w1, b1, w2, b2, norm=True))

    want = Model()(x)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")(x)
    batch = {"x": {0: torch.export.Dim("n")}}
    exported = torch.export.export(Model(), (x,), dynamic_shapes=batch).module()(x)
    for have in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_errors_name_the_argument() -> None:
    x, nw, _, w1, b1, w2, b2 = make(4, 32, 16, torch.float32, 6)
    call = sn72kernels.classifier_head
    with pytest.raises(ShapeError, match=r"shape of features: expected \(any, any\)"):
        call(x[0], w1, b1, w2, b2)
    with pytest.raises(DtypeError, match="dtype of w1: expected float32, got float16"):
        call(x, w1.half(), b1, w2, b2)
    with pytest.raises(ShapeError, match=r"shape of b1: expected \(16\), got \(15,\)"):
        call(x, w1, b1[1:], w2, b2)
    with pytest.raises(ShapeError, match=r"shape of w2: expected \(1, 16\), got \(2, 16\)"):
        call(x, w1, b1, w2.expand(2, 16), b2)
    with pytest.raises(ShapeError, match=r"shape of b2: expected \(1\), got \(2,\)"):
        call(x, w1, b1, w2, b2.expand(2))
    with pytest.raises(ArgumentError, match="norm_weight is given without norm=True"):
        call(x, w1, b1, w2, b2, norm_weight=nw)
    with pytest.raises(ArgumentError, match="approximate is 'fast'"):
        call(x, w1, b1, w2, b2, approximate="fast")
    with pytest.raises(ArgumentError, match="eps is -1"):
        call(x, w1, b1, w2, b2, eps=-1.0)
