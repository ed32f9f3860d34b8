"""Throughput of single-image callers, with and without the batcher, and what the batcher costs.

Run with ``pytest benchmarks/test_batching.py``. The stage stands for a model on an accelerator: a
fixed time for a call plus a little for each image, without using the processor. Nothing here can
fail on a slow machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from sn72engine.batching import BatchingOptions, MicroBatcher
from sn72engine.cascade import Cascade
from sn72engine.cascade.result import Result, Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.metrics import Metrics

CALL_SECONDS = 0.004
IMAGE_SECONDS = 0.0002
IMAGE = np.zeros((224, 224, 3), np.uint8)
PER_CALLER = 8


def stage(images: Sequence[Any]) -> np.ndarray:
    time.sleep(CALL_SECONDS + IMAGE_SECONDS * len(images))
    return np.full(len(images), 0.99, np.float32)


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
@pytest.mark.parametrize("callers", [1, 8, 32])
def test_callers(benchmark: Any, callers: int, batched: bool) -> None:
    """Callers that each wait for an answer before they send the next image."""
    spec = CascadeSpec((StageSpec("model"),))
    with Cascade(spec, {"model": stage}) as cascade:
        with MicroBatcher(cascade, BatchingOptions(max_batch=32, max_wait=0.001)) as batcher:
            ask: Callable[[Any], Result] = batcher if batched else lambda i: cascade([i])[0]
            with ThreadPoolExecutor(callers) as pool:

                def everyone() -> int:
                    def one(_: int) -> int:
                        return sum(ask(IMAGE).label for _ in range(PER_CALLER))

                    return sum(pool.map(one, range(callers)))

                answered = benchmark.pedantic(everyone, rounds=5, warmup_rounds=1)
    assert answered == callers * PER_CALLER
    images = callers * PER_CALLER / benchmark.stats.stats.median
    benchmark.extra_info["images_per_second"] = round(images, 1)


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "metrics"])
@pytest.mark.parametrize("deadline", [None, 60.0], ids=["no deadline", "deadline"])
def test_cost_per_request(benchmark: Any, deadline: float | None, watched: bool) -> None:
    """A model that takes no time: what is left is the batcher."""
    answer = Result(0.5, 0, "model", Status.DONE)
    count = 1000

    def model(images: Sequence[Any], **options: Any) -> list[Result]:
        return [answer] * len(images)

    options = BatchingOptions(max_batch=32, max_wait=0.0, max_queue=count)
    with MicroBatcher(model, options, observe=Metrics() if watched else None) as batcher:

        def burst() -> int:
            futures = [batcher.submit(IMAGE, deadline=deadline) for _ in range(count)]
            return sum(future.result() is answer for future in futures)

        assert benchmark.pedantic(burst, rounds=10, warmup_rounds=1) == count
    benchmark.extra_info["us_per_request"] = round(1e6 * benchmark.stats.stats.median / count, 2)
