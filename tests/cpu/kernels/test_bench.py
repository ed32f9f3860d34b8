"""What of the timer can be seen without a GPU: its arithmetic, its gate's words, its refusal."""

from __future__ import annotations

import pytest
import torch

from sn72kernels import bench
from sn72kernels.errors import NoGpuError


def test_bytes_of() -> None:
    assert bench.bytes_of(torch.zeros(3, 4), torch.zeros(5, dtype=torch.float16)) == 58


def test_enough_copies_to_turn_the_cache_over() -> None:
    l2, memory = 50 << 20, 80 << 30
    assert bench.sets_needed(10 << 20, l2, memory) == 15
    assert bench.sets_needed(1 << 30, l2, memory) == 2
    assert bench.sets_needed(0, l2, memory) == 64
    # Memory is the bound: 8 copies of 5 GB fit in half of 80.
    assert bench.sets_needed(5 << 30, 100 << 30, memory) == 8


def test_table_says_why_a_candidate_was_not_timed() -> None:
    text = bench.format_timings(
        "title",
        [bench.Timing("ours", 0.01, 2000.0, 66.7), bench.Timing("peer", note="wrong result")],
    )
    assert "10.00   2000.0      66.7" in text
    assert "peer not timed: wrong result" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")
def test_no_gpu_is_said_so() -> None:
    with pytest.raises(NoGpuError, match="a CUDA device is needed to time kernels"):
        bench.cold_ms(torch.relu, torch.zeros(3))
    with pytest.raises(NoGpuError, match="a CUDA device is needed to time kernels"):
        bench.compare({}, [], correct=bool, bytes_moved=0)
