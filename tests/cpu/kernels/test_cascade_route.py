"""Routing: every implementation must give the same bits, so comparisons here are exact."""

from __future__ import annotations

from collections.abc import Iterable

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
from tests.kernel_cases import routing

pytest.importorskip("triton", reason="Triton is not installed")

NAN, INF = routing.NAN, routing.INF
THRESHOLDS = st.sampled_from(routing.THRESHOLDS)


def make(n: int, seed: int) -> torch.Tensor:
    return routing.values(np.random.default_rng(seed), n, logits=False)


def assert_same(have: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for name, one, other in zip(Routing._fields, have, want, strict=True):
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)


def plain_route(p: float, low: float, high: float) -> int:
    """The semantics once more, in plain Python on float32 values."""
    if not (0.0 <= p <= 1.0) or not (low <= high):
        return 2
    return 0 if p < low else 1 if p > high else 2


def check(batches: Iterable[routing.Batch]) -> None:
    for batch in batches:
        assert_same(op.launch_route(*batch), reference.route(*batch))


def test_kernel_gives_the_bits_of_the_reference_for_300_random_batches() -> None:
    """Ties, NaN, infinities, thresholds per sample; tests/gpu does 10^5 of them on a card."""
    check(routing.batches(300, 0, largest=300))


def test_kernel_gives_the_bits_of_the_reference_around_every_limit() -> None:
    """Several blocks, and two launches."""
    check(routing.batches(30, 1, border=1.0))


def test_random_batches_hold_what_they_must() -> None:
    batches = list(routing.batches(300, 2, border=0.3))
    scores = torch.cat([batch.scores.float() for batch in batches])
    assert scores.isnan().any()
    assert scores.isposinf().any()
    assert scores.isneginf().any()
    assert any((b.lows == b.scores.float()).any() for b in batches if b.lows is not None)
    assert any((b.scores == b.low).any() for b in batches if b.lows is None)
    assert {b.scores.dtype for b in batches} == set(routing.DTYPES)
    assert {b.from_logits for b in batches} == {b.lows is None for b in batches} == {True, False}
    sizes = {b.scores.numel() for b in batches}
    assert {0, 1, 4096, 4097, 16385} <= sizes
    again = routing.batches(300, 2, border=0.3)
    assert all(
        torch.equal(a.scores.isnan(), b.scores.isnan()) for a, b in zip(batches, again, strict=True)
    )


@given(n=st.integers(0, 300), thresholds=THRESHOLDS, seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_reference_against_plain_python(n: int, thresholds: tuple[float, float], seed: int) -> None:
    scores = make(n, seed)
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
    grid = make(200, 5).view(100, 2)
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


def test_compile() -> None:
    torch.use_deterministic_algorithms(False)
    scores = torch.rand(50)

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
    scores = make(77, 2)
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
