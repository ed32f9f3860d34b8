"""Routing: every implementation must give the same bits, so comparisons here are exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sn72kernels
from sn72kernels.errors import ArgumentError, DtypeError, ShapeError
from sn72kernels.ops import exact
from sn72kernels.ops.cascade_route import op, reference
from sn72kernels.ops.cascade_route.op import Routing

pytest.importorskip("triton", reason="Triton is not installed")

NAN, INF = math.nan, math.inf
DTYPES = st.sampled_from((torch.float32, torch.float16, torch.bfloat16))
# Ties with the usual thresholds, both ends, neighbours of the ends, and everything unusable.
SPECIAL = (
    0.15, 0.85, 0.5, 0.0, -0.0, 1.0, 1.0000001, -1e-9, 1e-45, NAN, -NAN, INF, -INF, 3.0, -2.0,
)  # fmt: skip
THRESHOLDS = st.sampled_from(
    ((0.15, 0.85), (0.5, 0.5), (0.0, 1.0), (0.9, 0.1), (NAN, 0.5), (0.5, NAN), (-1.0, 2.0))
)
# Empty, one, around the block and the loop limits, several blocks, two launches.
SIZES = st.sampled_from((0, 1, 2, 31, 33, 1000, 4096, 4097, 16384, 16385, 40000))


def make(n: int, dtype: torch.dtype, logits: bool, seed: int) -> torch.Tensor:
    """Random scores of which about a third are special values."""
    rng = np.random.default_rng(seed)
    data = rng.normal(0, 4, n) if logits else rng.random(n)
    special = rng.choice(np.array(SPECIAL), n)
    chosen = np.where(rng.random(n) < 0.3, special, data)
    return torch.from_numpy(chosen.astype(np.float32)).to(dtype)


def assert_same(have: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for name, one, other in zip(Routing._fields, have, want, strict=True):
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)


def plain_route(p: float, low: float, high: float) -> int:
    """The semantics once more, in plain Python on float32 values."""
    if not (0.0 <= p <= 1.0) or not (low <= high):
        return 2
    return 0 if p < low else 1 if p > high else 2


@given(
    n=SIZES,
    dtype=DTYPES,
    logits=st.booleans(),
    thresholds=THRESHOLDS,
    per_sample=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_kernel_gives_the_bits_of_the_reference(
    n: int,
    dtype: torch.dtype,
    logits: bool,
    thresholds: tuple[float, float],
    per_sample: bool,
    seed: int,
) -> None:
    scores = make(n, dtype, logits, seed)
    low, high = thresholds
    lows = make(n, torch.float32, False, seed + 1) if per_sample else None
    highs = make(n, torch.float32, False, seed + 2) if per_sample else None
    arguments = (scores, lows, highs, low, high, logits, [7, 64, max(65, n)])
    assert_same(op.launch_route(*arguments), reference.route(*arguments))


@given(n=st.integers(0, 300), thresholds=THRESHOLDS, seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_reference_against_plain_python(n: int, thresholds: tuple[float, float], seed: int) -> None:
    scores = make(n, torch.float32, False, seed)
    low, high = (float(np.float32(t)) for t in thresholds)
    buckets = (1, 5, 50, 300)
    routing = sn72kernels.cascade_route(scores, low, high, buckets=buckets)
    wanted = [plain_route(p, low, high) for p in scores.tolist()]
    assert routing.routes.tolist() == wanted
    escalated = [place for place, route in enumerate(wanted) if route == 2]
    assert int(routing.escalated) == len(escalated)
    assert routing.positions.tolist() == escalated + [0] * (n - len(escalated))
    fits = [place for place, size in enumerate(buckets) if size >= len(escalated)]
    assert int(routing.bucket) == (fits[0] if escalated else len(buckets))
    assert routing.summary[2:].tolist() == [wanted.count(0), wanted.count(1)]


def test_strided_scores_and_zero_dimensional_thresholds() -> None:
    grid = make(200, torch.float32, False, 5).view(100, 2)
    low, high = torch.tensor(0.2), torch.tensor(0.7)
    have = sn72kernels.cascade_route(grid[:, 1], low, high)
    assert_same(have, sn72kernels.cascade_route(grid[:, 1].contiguous(), 0.2, 0.7))
    # A thresholds tensor with stride 0, as the public function makes it, through the kernel.
    spread = (low.expand(100), high.expand(100))
    arguments = (grid[:, 1], *spread, 0.0, 0.0, False, [])
    assert_same(op.launch_route(*arguments), have)
    mixed = sn72kernels.cascade_route(grid[:, 1], 0.2, high)
    assert_same(mixed, have)


def test_overflowed_logits_escalate() -> None:
    logits = torch.tensor([INF, -INF, NAN, 80.0, -80.0, 3e38, -3e38])
    routing = sn72kernels.cascade_route(logits, 0.15, 0.85, from_logits=True)
    assert routing.routes.tolist() == [2, 2, 2, 1, 0, 1, 0]
    assert routing.probability[:3].isnan().all()
    assert routing.probability[3:].isfinite().all()


def test_sigmoid_is_accurate_monotone_and_symmetric() -> None:
    x = torch.linspace(-79.0, 79.0, 50001)
    p = exact.sigmoid(x)
    wanted = torch.sigmoid(x.double())
    # exp: half a unit for each of about six roundings that matter; then an addition and a
    # division: within 4e-7 relative, as documented.
    assert float(((p.double() - wanted).abs() / wanted).max()) < 4e-7
    # Rounding may turn a pair of neighbours around by one unit in the last place, no more.
    assert float(((p[:-1] - p[1:]) / p[1:]).max()) <= 2.0**-22
    assert float((exact.sigmoid(-x).double() + p.double() - 1.0).abs().max()) < 2e-7
    assert exact.sigmoid(torch.tensor([0.0, -0.0])).tolist() == [0.5, 0.5]


def test_opcheck_and_compile() -> None:
    torch.use_deterministic_algorithms(False)
    scores = torch.rand(50)  # without NaN, which opcheck would find unequal to itself
    torch.library.opcheck(
        torch.ops.sn72.cascade_route.default, (scores, None, None, 0.1, 0.9, False, [10, 50])
    )
    torch.library.opcheck(
        torch.ops.sn72.cascade_route.default, (scores, scores, scores, 0.0, 0.0, True, [])
    )

    def call(scores: torch.Tensor) -> Routing:
        return sn72kernels.cascade_route(scores, 0.15, 0.85, buckets=(8, 64))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled(scores), call(scores))


def test_export() -> None:
    torch.use_deterministic_algorithms(False)

    class Model(torch.nn.Module):
        def forward(self, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(sn72kernels.cascade_route(scores, 0.15, 0.85))

    program = torch.export.export(
        Model(),
        (torch.rand(5),),
        dynamic_shapes={"scores": {0: torch.export.Dim("n", max=op.LARGEST_BATCH)}},
    )
    scores = make(77, torch.float32, False, 2)
    assert_same(program.module()(scores), sn72kernels.cascade_route(scores, 0.15, 0.85))


def test_errors_name_the_argument() -> None:
    scores = torch.rand(8)
    with pytest.raises(ShapeError, match=r"shape of scores: expected \(any\), got \(8, 1\)"):
        sn72kernels.cascade_route(scores[:, None], 0.1, 0.9)
    with pytest.raises(DtypeError, match="dtype of scores"):
        sn72kernels.cascade_route(scores.double(), 0.1, 0.9)
    with pytest.raises(ShapeError, match=r"shape of high: expected \(8\), got \(3,\)"):
        sn72kernels.cascade_route(scores, 0.1, torch.rand(3))
    with pytest.raises(DtypeError, match="dtype of low: expected float32, got float16"):
        sn72kernels.cascade_route(scores, torch.tensor(0.1).half(), 0.9)
    with pytest.raises(ArgumentError, match="positive sizes in ascending order"):
        sn72kernels.cascade_route(scores, 0.1, 0.9, buckets=(4, 4, 8))
    with pytest.raises(ArgumentError, match=r"largest bucket, 4, cannot hold the 8 samples"):
        sn72kernels.cascade_route(scores, 0.1, 0.9, buckets=(2, 4))
    with pytest.raises(ArgumentError, match="give at most 64"):
        sn72kernels.cascade_route(scores, 0.1, 0.9, buckets=range(1, 80))
