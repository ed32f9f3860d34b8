"""Shared by the kernel benchmarks.

Run with ``pytest benchmarks/kernels``. With a CUDA device each benchmark prints a table of cold-L2
times; without one it times the reference paths on the CPU and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch

from sn72kernels import bench

Runner = Callable[..., None]


@pytest.fixture
def race(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Runner:
    """``race(title, candidates, arguments, correct, bytes_moved)``; the first candidate is ours."""

    def run(
        title: str,
        candidates: Mapping[str, Callable[..., Any]],
        arguments: Sequence[Any],
        correct: Callable[[Any], bool],
        bytes_moved: int,
    ) -> None:
        ours = next(iter(candidates.values()))
        assert correct(ours(*arguments))
        if torch.cuda.is_available():
            timings = bench.compare(candidates, arguments, correct=correct, bytes_moved=bytes_moved)
            benchmark.extra_info["timings"] = [asdict(timing) for timing in timings]
            with capsys.disabled():
                print("\n" + bench.format_timings(title, timings))
        else:
            with capsys.disabled():
                print(f"\n{title}: no GPU is present; this is the reference path on the CPU")
        benchmark.extra_info["title"] = title
        benchmark.extra_info["gpu"] = torch.cuda.is_available()
        benchmark(ours, *arguments)

    return run


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
