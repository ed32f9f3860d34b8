"""What the cascade itself costs: its overhead beside its stages, and one routing decision.

Run with ``pytest benchmarks/test_cascade.py``. The extra columns of the table say what share of a
call is the cascade's own. Nothing here can fail on a slow machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from sn72engine import BuildOptions, Engine, ShapeRange, Store, build
from sn72engine.cascade import Cascade
from sn72engine.cascade.report import CascadeReport
from sn72engine.cascade.route import compact, route
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.demo.pipeline import export_model

BATCH = 8
STAGE_SECONDS = 0.010


def stage_of(
    seconds: float, scores: np.ndarray, kind: str
) -> Callable[[Sequence[Any]], np.ndarray]:
    """A stage that takes a known time.

    ``busy`` computes, as an engine on a CPU does. ``asleep`` leaves the processor, as one on a
    GPU does; whatever runs after it starts with cold caches and a processor that was idle.
    """

    def call(images: Sequence[Any]) -> np.ndarray:
        if kind == "asleep":
            time.sleep(seconds)
        else:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass
        return scores[: len(images)]

    return call


@pytest.mark.parametrize("deadline", [None, 60.0], ids=["no deadline", "deadline"])
@pytest.mark.parametrize("kind", ["busy", "asleep"])
@pytest.mark.parametrize("stages", [1, 3])
def test_overhead(benchmark: Any, stages: int, kind: str, deadline: float | None) -> None:
    """Every sample goes through every stage: the most work that the cascade can have."""
    unsure = np.full(BATCH, 0.5, np.float32)
    names = [f"s{i}" for i in range(stages)]
    spec = CascadeSpec(tuple(StageSpec(name) for name in names))
    objects = {name: stage_of(STAGE_SECONDS, unsure, kind) for name in names}
    images = [np.zeros((224, 224, 3), np.uint8)] * BATCH
    with Cascade(spec, objects) as cascade:
        results = benchmark(cascade, images, deadline=deadline)
        own_share(benchmark, cascade.report())
    assert len(results) == BATCH


def own_share(benchmark: Any, report: CascadeReport) -> None:
    """What of the calls so far was the cascade's own."""
    elsewhere = sum(stage.counts.seconds for stage in report.stages)
    benchmark.extra_info["own_us_per_call"] = round(1e6 * report.own_seconds / report.calls, 1)
    benchmark.extra_info["own_percent_of_stages"] = round(100 * report.own_seconds / elsewhere, 2)


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> list[Engine]:
    """EfficientNet-Lite0 and Lite2 as FP32 engines."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra 'demo' is not installed")
    folder = tmp_path_factory.mktemp("lite")
    engines = []
    for name in ("lite0", "lite2"):
        model = export_model(name, folder)
        engines.append(build(model, BuildOptions(batch=ShapeRange(1, 8, 8)), store=Store(folder)))
    return engines


@pytest.mark.parametrize("deadline", [None, 60.0], ids=["no deadline", "deadline"])
def test_overhead_of_models(benchmark: Any, lite: list[Engine], deadline: float | None) -> None:
    """As :func:`test_overhead`, with models that take images of 224 and 260 pixels."""
    stages = [
        StageSpec(f"s{i}", engine=str(engine.folder), score="top1", high=1.0)
        for i, engine in enumerate(lite)
    ]
    images = list(np.random.default_rng(0).integers(0, 256, (BATCH, 260, 260, 3), np.uint8))
    with Cascade(CascadeSpec(tuple(stages)), mode="cpu") as cascade:
        benchmark.pedantic(cascade, (images,), {"deadline": deadline}, rounds=20, warmup_rounds=2)
        own_share(benchmark, cascade.report())


@pytest.mark.parametrize("count", [1, 8, 64, 4096])
def test_route_and_compact(benchmark: Any, count: int) -> None:
    scores = np.random.default_rng(0).random(count, np.float32)
    scores[::10] = math.nan

    def decide() -> np.ndarray:
        return compact(route(scores, 0.15, 0.85))

    index = benchmark(decide)
    assert (np.diff(index) > 0).all()
