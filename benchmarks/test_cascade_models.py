"""A two-stage cascade of real models, end to end; see benchmarks/end_to_end.py.

Run with ``pytest benchmarks/test_cascade_models.py``. Times and speed-ups stand in the extra
columns; a contestant with wrong answers fails the test.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import end_to_end


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> end_to_end.Subjects:
    return end_to_end.Subjects(tmp_path_factory.mktemp("cascade"), largest=64)


@pytest.mark.parametrize("batch", [1, 8, 32, 64])
def test_end_to_end(benchmark: Any, subjects: end_to_end.Subjects, batch: int) -> None:
    race = end_to_end.race(subjects, batch, repeats=max(5, 30 // max(1, batch // 8)))
    for name, ms in race.p50_ms.items():
        benchmark.extra_info[f"{name} p50_ms"] = ms
    for name, gain in race.speedups.items():
        benchmark.extra_info[f"{name} speedup"] = round(gain, 3)
    for name, percent in race.own_percent.items():
        benchmark.extra_info[f"{name} own_percent"] = percent
    benchmark.pedantic(lambda: None, rounds=1)  # what counts are the interleaved medians above
    assert all(race.passed.values()), race.passed
