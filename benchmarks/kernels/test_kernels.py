"""Every op beside PyTorch eager, ``torch.compile`` and what else is installed.

``pytest benchmarks/kernels`` with any of pytest-benchmark's options; ``-k rope`` chooses an op.
With a CUDA device a race is run on it, cold; without one the reference paths are timed on the CPU,
and every table says so. ``--kernel-record FILE`` keeps JSON lines for
``python -m benchmarks.kernels.report``, ``--kernel-minutes N`` starts no race after that time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import harness
from benchmarks.kernels.cases import every
from sn72kernels import bench

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> harness.Record:
    """The file that was asked for, with its header."""
    path = request.config.getoption("kernel_record", default=None)
    kept = harness.Record(None if path is None else Path(path))
    kept.add(harness.header(bench.measure_peaks(DEVICE)))
    return kept


@pytest.fixture(scope="session")
def deadline(request: pytest.FixtureRequest) -> float:
    minutes = request.config.getoption("kernel_minutes", default=None)
    return float("inf") if minutes is None else time.monotonic() + 60 * minutes


@pytest.mark.parametrize("build", [pytest.param(make, id=name) for name, make in every(DEVICE)])
def test_race(
    build: Callable[[], harness.Case],
    benchmark: Any,
    record: harness.Record,
    deadline: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if time.monotonic() > deadline:
        pytest.skip("the minutes given with --kernel-minutes are over")
    case = build()
    race, table = harness.run(case, bench.measure_peaks(DEVICE))
    record.add(race.to_dict())
    benchmark.extra_info["race"] = race.to_dict()
    with capsys.disabled():
        print("\n" + table)
    assert not race.wrong, race.wrong

    def call() -> None:
        case.ours(*case.arguments)
        if race.gpu:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
