"""Weighted vote: kernel and reference give the same bits; the reference is the plain formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sn72kernels
from sn72kernels.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from sn72kernels.ops.ensemble_vote import op, reference

pytest.importorskip("triton", reason="Triton is not installed")

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(n: int, dtype: torch.dtype, logits: bool, seed: int) -> torch.Tensor:
    """Random scores of which about a third abstain or sit at an end."""
    rng = np.random.default_rng(seed)
    data = rng.normal(0, 4, n) if logits else rng.random(n)
    special = rng.choice(np.array((NAN, INF, -INF, -0.5, 1.5, 0.0, 1.0)), n)
    return torch.from_numpy(np.where(rng.random(n) < 0.35, special, data).astype(np.float32)).to(
        dtype
    )


def assert_same(have: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


@given(
    n=st.sampled_from((0, 1, 100, 1024, 1025, 3000)),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=8),
    weights=st.lists(
        st.sampled_from((0.4, 0.15, 0.25, 0.1, 0.0, -1.0, NAN, INF, 3e38)), min_size=8, max_size=8
    ),
    logits=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_kernel_gives_the_bits_of_the_reference(
    n: int, dtypes: list[torch.dtype], weights: list[float], logits: bool, seed: int
) -> None:
    scores = [make(n, dtype, logits, seed + place) for place, dtype in enumerate(dtypes)]
    vector = torch.tensor(weights[: len(scores)])
    assert_same(op.launch_vote(scores, vector, logits), reference.vote(scores, vector, logits))


@given(models=st.integers(1, 8), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_reference_is_the_mean_over_those_that_vote(models: int, seed: int) -> None:
    scores = [make(40, torch.float32, False, seed + place) for place in range(models)]
    weights = np.random.default_rng(seed).random(models).round(3) + 0.001
    vote = sn72kernels.ensemble_vote(scores, weights.tolist()).tolist()
    for place in range(40):
        column = [float(score[place]) for score in scores]
        pairs = [(w, p) for w, p in zip(weights, column, strict=True) if 0.0 <= p <= 1.0]
        if not pairs:
            assert math.isnan(vote[place])
            continue
        wanted = sum(w * p for w, p in pairs) / sum(w for w, _ in pairs)
        # At most 8 products, 14 sums and a division in float32, all of positive numbers.
        assert vote[place] == pytest.approx(wanted, rel=24 * 2.0**-24)
        assert 0.0 <= vote[place] <= 1.0


def test_all_abstain_escalates() -> None:
    vote = sn72kernels.ensemble_vote([torch.tensor([NAN, 2.0]), torch.tensor([-1.0, INF])], [1, 1])
    assert sn72kernels.cascade_route(vote, 0.15, 0.85).routes.tolist() == [2, 2]


def test_one_matrix_is_one_row_per_model() -> None:
    scores = torch.rand(3, 50)
    weights = torch.tensor([0.5, 0.3, 0.2])
    assert_same(
        sn72kernels.ensemble_vote(scores, weights),
        sn72kernels.ensemble_vote(list(scores), weights),
    )
    # Columns of a (n, models) matrix are strided.
    turned = scores.t().contiguous().t()
    assert_same(
        op.launch_vote(list(turned), weights, False), op.launch_vote(list(scores), weights, False)
    )


def test_compile_and_export() -> None:
    torch.use_deterministic_algorithms(False)
    scores, weights = [torch.rand(9), torch.rand(9)], torch.tensor([0.6, 0.4])

    def call(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return sn72kernels.ensemble_vote([a, b], weights)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*scores, weights), call(*scores, weights))

    class Model(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return call(a, b, w)

    program = torch.export.export(Model(), (*scores, weights))
    assert_same(program.module()(*scores, weights), call(*scores, weights))


def test_errors_name_the_argument() -> None:
    score = torch.rand(4)
    with pytest.raises(ArgumentError, match="there are 9 models; give 1 to 8"):
        sn72kernels.ensemble_vote([score] * 9, [1.0] * 9)
    with pytest.raises(ArgumentError, match="there are 0 models"):
        sn72kernels.ensemble_vote([], [])
    with pytest.raises(ShapeError, match=r"shape of scores\[1\]: expected \(4\), got \(3,\)"):
        sn72kernels.ensemble_vote([score, score[:3]], [1.0, 1.0])
    with pytest.raises(DtypeError, match=r"dtype of scores\[0\]"):
        sn72kernels.ensemble_vote([score.double()], [1.0])
    with pytest.raises(ArgumentError, match="there are 1 weights for 2 models"):
        sn72kernels.ensemble_vote([score, score], [1.0])
    with pytest.raises(ArgumentError, match="give finite numbers >= 0"):
        sn72kernels.ensemble_vote([score], [-1.0])
    with pytest.raises(ShapeError, match=r"shape of weights: expected \(1\), got \(2,\)"):
        sn72kernels.ensemble_vote([score], torch.ones(2))
    with pytest.raises(DeviceError, match=r"device of scores\[1\]: expected cpu, got meta"):
        sn72kernels.ensemble_vote([score, torch.rand(4, device="meta")], [1.0, 1.0])
