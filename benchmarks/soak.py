"""A million requests through a batcher, with faults and swaps: what was lost, what it cost.

    python -m benchmarks.soak --requests 1000000

Callers on several threads send single images to a batcher over a cascade of two stages that fail,
hang and return nonsense now and then. Some images cannot be decoded, some callers are in a hurry,
some take their request back, and the cascade is replaced again and again. Every answer is checked
against the image it is for. The exit code is 1 when a request was lost, ended twice or got
an answer that is not its own, or when memory grew by more than the bound.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import psutil

from sn72engine.batching import BatchingOptions, MicroBatcher
from sn72engine.cascade import Cascade
from sn72engine.cascade.result import Result, Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.errors import CascadeError, OverloadedError, VerificationError
from sn72engine.metrics import Metrics
from sn72engine.shadow import ShadowOptions
from sn72engine.swap import Swappable

NUMBERS = 1000
PICTURES = [np.array([[[n % 256, n // 256, 0]]], np.uint8) for n in range(NUMBERS)]
UNREADABLE = b"no image"
#: Memory may grow by this much after the first tenth: what allocators and histories need.
GROWTH_BYTES = 32 << 20


def first_score(number: int) -> float:
    return float(np.float32(number / NUMBERS))


def second_score(number: int) -> float:
    return float(np.float32(1 - number / (2 * NUMBERS)))


class Stage:
    """Scores pictures by their number, and misbehaves at random."""

    def __init__(self, score: Any, seed: int) -> None:
        self.table = np.array([score(n) for n in range(NUMBERS)])
        self.random = random.Random(seed)

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        pixels = np.array([image[0, 0] for image in images], np.intp)
        scores: np.ndarray = self.table[pixels[:, 0] + 256 * pixels[:, 1]]
        draw = self.random.random()
        if draw < 0.01:
            raise RuntimeError("injected")
        if draw < 0.02:
            scores[self.random.randrange(len(scores))] = np.nan
        elif draw < 0.025:
            return scores[:-1]
        elif draw < 0.03:
            time.sleep(0.005)
        elif draw < 0.0301:
            time.sleep(0.3)
        return scores


def cascade(seed: int, metrics: Metrics) -> Cascade:
    spec = CascadeSpec((StageSpec("first"), StageSpec("second")))
    stages = {"first": Stage(first_score, seed), "second": Stage(second_score, seed + 1)}
    return Cascade(spec, stages, observe=metrics)


class Flaky:
    """Now and then a batch fails as a whole."""

    def __init__(self, service: Swappable, seed: int) -> None:
        self.service = service
        self.random = random.Random(seed)

    @property
    def spec(self) -> CascadeSpec:
        return self.service.spec

    def __call__(self, images: Sequence[Any], **options: Any) -> list[Result]:
        draw = self.random.random()
        if draw < 0.001:
            raise RuntimeError("injected before")
        results = self.service(images, **options)
        if draw < 0.002:
            raise RuntimeError("injected after")
        return results


def is_right(number: int | None, result: Result) -> bool:
    """Whether this can be the answer for this picture, whatever faults there were."""
    if number is None or result.stage is None:
        expected = 0.5
    else:
        expected = (first_score if result.stage == "first" else second_score)(number)
    if result.stage is None and result.status not in (Status.DEADLINE, Status.STAGE_FAILED):
        return False
    return result.probability == expected and result.label == int(expected > 0.5)


class Callers:
    """Sends the requests and keeps account of every one."""

    def __init__(self, batcher: MicroBatcher, requests: int, threads: int, seed: int) -> None:
        self.batcher = batcher
        self.ends = bytearray(requests)
        self.outcomes: Counter[str] = Counter()
        self.wrong = 0
        self.sent = 0
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._send, args=(range(k, requests, threads), seed + k))
            for k in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _send(self, numbers: range, seed: int) -> None:
        draw = random.Random(seed)
        pending: deque[tuple[int | None, Future[Result]]] = deque()
        for request in numbers:
            chance = draw.random()
            number = None if chance < 0.01 else draw.randrange(NUMBERS)
            image = UNREADABLE if number is None else PICTURES[number]
            deadline = draw.choice((0.001, 0.02, 1.0, 60.0)) if chance < 0.2 else None
            try:
                future = self.batcher.submit(image, deadline=deadline, client=seed)
            except OverloadedError:
                self._account(request, "refused")
                while pending:  # as a client should: let it settle
                    self._check(*pending.popleft())
                continue
            future.add_done_callback(lambda f, r=request: self._ended(r))  # type: ignore[misc]
            if 0.2 < chance < 0.22:
                future.cancel()
            pending.append((number, future))
            if len(pending) >= 42:
                self._check(*pending.popleft())
        for item in pending:
            self._check(*item)

    def _ended(self, request: int) -> None:
        self.ends[request] += 1  # of this request alone

    def _account(self, request: int, outcome: str) -> None:
        self._ended(request)
        with self._lock:
            self.outcomes[outcome] += 1
            self.sent += 1

    def _check(self, number: int | None, future: Future[Result]) -> None:
        outcome, right = "cancelled", True
        if not future.cancelled():
            try:
                result = future.result(120)
                outcome, right = result.status.value, is_right(number, result)
            except CascadeError:
                outcome = "error"
            except TimeoutError:
                outcome = "lost"
        with self._lock:
            self.outcomes[outcome] += 1
            self.sent += 1
            self.wrong += not right


def swap(service: Swappable, seed: int, metrics: Metrics) -> str:
    """Promote or drop the candidate, and load the next one."""
    try:
        service.promote()
        outcome = "promoted"
    except VerificationError:
        service.drop()
        outcome = "dropped"
    except CascadeError:
        outcome = "loaded"
    service.load(lambda: cascade(seed, metrics))
    return outcome


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # there is one for every fault

    metrics = Metrics()
    # Faults differ from run to run, so the candidate cannot answer all that the current one did.
    bounds = ShadowOptions(share=0.05, min_agreement=0.9)
    swaps: Counter[str] = Counter()
    memory: list[int] = []
    begin = time.perf_counter()
    with Swappable(cascade(arguments.seed, metrics), bounds, observe=metrics) as service:
        options = BatchingOptions(max_batch=32, max_wait=0.001, max_queue=320, workers=2)
        with MicroBatcher(Flaky(service, 1), options, observe=metrics) as batcher:
            callers = Callers(batcher, arguments.requests, arguments.callers, arguments.seed)
            callers.start()
            while callers.alive():
                time.sleep(0.05)
                if callers.sent >= arguments.requests * (len(memory) + 1) // 20:
                    memory.append(resident())
                    swaps[swap(service, 1000 + len(memory), metrics)] += 1
                    print(
                        f"{callers.sent:>9} requests, {time.perf_counter() - begin:6.1f} s, "
                        f"{memory[-1] / 2**20:.1f} MiB, {threading.active_count()} threads",
                        flush=True,
                    )
    seconds = time.perf_counter() - begin
    memory.append(resident())

    ended = Counter(callers.ends)
    lost = ended[0] + callers.outcomes["lost"]
    twice = sum(count for times, count in ended.items() if times > 1)
    early = memory[1] if len(memory) > 2 else memory[0]
    growth = memory[-1] - early
    print(f"requests        {arguments.requests} in {seconds:.1f} s")
    print(f"per second      {arguments.requests / seconds:.0f}")
    print(f"outcomes        {dict(callers.outcomes.most_common())}")
    print(f"lost            {lost}")
    print(f"ended twice     {twice}")
    print(f"wrong           {callers.wrong}")
    print(f"cascades        {dict(swaps)}")
    print(f"batch size      {metrics.histogram('sn72_batch_size').mean:.1f} on average")
    for share in (0.5, 0.99):
        bound = metrics.histogram("sn72_request_seconds").quantile(share)
        print(f"answered within {1e3 * bound:.1f} ms: {100 * share:.0f} %")
    print(
        f"memory          {early / 2**20:.1f} MiB at a tenth, {memory[-1] / 2**20:.1f} at the end"
    )
    good = not lost and not twice and not callers.wrong and growth <= GROWTH_BYTES
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
