"""The batcher under many callers: each request ends once, in order, in time."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sn72engine.batching import BatchingOptions, MicroBatcher
from sn72engine.cascade import Cascade
from sn72engine.cascade.result import Result, Status
from sn72engine.cascade.spec import CascadeSpec, StageSpec
from sn72engine.errors import CascadeError, OptionError, OverloadedError
from sn72engine.events import BatchEvent, Event, RequestsEvent

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "sn72engine")


def answer_of(image: int) -> Result:
    """The answer of a number, from which the number can be told."""
    return Result(image / 1_000_000, 0, "only", Status.DONE)


class Model:
    """Answers numbers; waits at a gate, counts what it saw, and fails as told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        self.deadlines: list[float] = []
        self.fault: Callable[[list[int]], Any] = lambda images: None
        self.inside = 0
        self.most_inside = 0

    def __call__(
        self,
        images: Sequence[int],
        *,
        deadline: float,
        progress: Callable[[list[Result], list[bool]], None],
    ) -> Any:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.batches.append(list(images))
        self.deadlines.append(deadline)
        self.entered.set()
        try:
            assert self.gate.wait(60)
            instead = self.fault(list(images))
        finally:
            self.inside -= 1
        return [answer_of(image) for image in images] if instead is None else instead

    def hold(self, batcher: MicroBatcher) -> Future[Result]:
        """Keep the worker busy with request 0, so that what comes next has to wait in line."""
        self.entered.clear()
        self.gate.clear()
        first = batcher.submit(0, deadline=math.inf)
        assert self.entered.wait(60)
        return first


class Log:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def outcomes(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for event in self.events:
            if isinstance(event, RequestsEvent):
                counts[event.outcome] += len(event.seconds)
        return counts


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model()
    yield model
    model.gate.set()


# ---------------------------------------------------------------- forming batches


def test_what_arrives_while_a_batch_runs_is_the_next_batch(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_batch=4, max_wait=0.0)) as batcher:
        first = model.hold(batcher)
        futures = [batcher.submit(i) for i in range(1, 10)]
        model.gate.set()
        assert [f.result(60) for f in [first, *futures]] == [answer_of(i) for i in range(10)]
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_a_full_batch_does_not_wait(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_batch=3, max_wait=3600.0)) as batcher:
        futures = [batcher.submit(i) for i in range(3)]
        assert [f.result(60) for f in futures] == [answer_of(i) for i in range(3)]
        lonely = batcher.submit(9)
        batcher.close()  # a batcher that closes has nothing to wait for
        assert lonely.result(0) == answer_of(9)
    assert model.batches == [[0, 1, 2], [9]]


def test_a_lonely_request_is_run_after_max_wait(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_wait=0.01)) as batcher:
        assert batcher(7, deadline=60.0) == answer_of(7)


def test_workers_run_side_by_side(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_batch=1, workers=2)) as batcher:
        model.hold(batcher)
        second = batcher.submit(1)
        while model.inside < 2:
            assert not second.done()
            time.sleep(0.001)
        model.gate.set()
    assert model.most_inside == 2


def test_one_worker_runs_one_batch_at_a_time(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_batch=2, max_wait=0.0)) as batcher:
        for future in [batcher.submit(i) for i in range(100)]:
            future.result(60)
    assert model.most_inside == 1


# ---------------------------------------------------------------- order


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    clients=st.lists(st.sampled_from("abcd"), min_size=1, max_size=40),
    max_batch=st.integers(1, 7),
    cancelled=st.sets(st.integers(0, 39)),
)
def test_clients_take_turns_and_each_keeps_its_order(
    clients: list[str], max_batch: int, cancelled: set[int]
) -> None:
    model = Model()
    with MicroBatcher(model, BatchingOptions(max_batch=max_batch, max_wait=0.0)) as batcher:
        model.hold(batcher)
        futures = [batcher.submit(i, client=c) for i, c in enumerate(clients, 1)]
        lines: dict[str, list[int]] = {}
        for i, client in enumerate(clients):
            if i in cancelled:
                assert futures[i].cancel()
            else:
                lines.setdefault(client, []).append(i + 1)
        assert batcher.waiting == sum(map(len, lines.values()))
        model.gate.set()
    order = [image for batch in model.batches[1:] for image in batch]
    assert sorted(order) == sorted(i for line in lines.values() for i in line)
    for line in lines.values():
        assert [i for i in order if i in line] == line
    # A client is never served twice while another one waits: until the shortest line is empty,
    # every round has each client once.
    if lines:
        shortest = min(map(len, lines.values()))
        for k in range(shortest):
            turn = order[k * len(lines) : (k + 1) * len(lines)]
            assert {clients[i - 1] for i in turn} == set(lines)


def test_a_busy_client_does_not_hold_up_a_quiet_one(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_batch=2, max_wait=0.0)) as batcher:
        model.hold(batcher)
        for i in range(1, 20):
            batcher.submit(i, client="busy")
        quiet = batcher.submit(100, client="quiet")
        model.gate.set()
        assert quiet.result(60) == answer_of(100)
    assert model.batches[1] == [1, 100]


# ---------------------------------------------------------------- back-pressure


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(model: Model) -> None:
    log = Log()
    options = BatchingOptions(max_batch=1, max_queue=3, max_wait=0.0)
    with MicroBatcher(model, options, observe=log) as batcher:
        model.hold(batcher)
        waiting = [batcher.submit(i) for i in (1, 2, 3)]
        with pytest.raises(OverloadedError, match=r"3 requests are waiting.*max_queue"):
            batcher.submit(4)
        with pytest.raises(OverloadedError):
            batcher(4)
        assert waiting[1].cancel()
        fifth = batcher.submit(5)  # the cancelled one gave up its place at once
        model.gate.set()
        assert fifth.result(60) == answer_of(5)
    assert log.outcomes() == {"answered": 4, "refused": 2, "cancelled": 1}
    assert model.batches == [[0], [1], [3], [5]]


def test_a_client_may_have_a_share_of_the_queue(model: Model) -> None:
    options = BatchingOptions(max_batch=8, max_queue_per_client=2, max_wait=0.0)
    with MicroBatcher(model, options) as batcher:
        model.hold(batcher)
        for i in (1, 2):
            batcher.submit(i, client="greedy")
        with pytest.raises(OverloadedError, match="2 requests of client 'greedy'"):
            batcher.submit(3, client="greedy")
        other = batcher.submit(4, client="modest")
        model.gate.set()
        assert other.result(60) == answer_of(4)


def test_requests_that_expire_in_line_give_up_their_place(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_queue=2, max_wait=0.0)) as batcher:
        model.hold(batcher)
        for round_ in range(20):  # far more than the queue holds, behind a model that hangs
            futures = [batcher.submit(round_, deadline=0.002) for _ in range(2)]
            assert {f.result(60).status for f in futures} == {Status.DEADLINE}
        assert batcher.waiting == 0
        model.gate.set()
    assert model.batches == [[0]]


# ---------------------------------------------------------------- cancellation


def test_a_cancelled_request_is_not_run(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_wait=0.0)) as batcher:
        running = model.hold(batcher)
        futures = [batcher.submit(i) for i in (1, 2, 3)]
        assert futures[1].cancel()
        assert futures[1].cancel()  # as for any future
        assert not running.cancel()
        assert wait([futures[1]], timeout=60).done == {futures[1]}
        with pytest.raises(CancelledError):
            futures[1].result()
        model.gate.set()
    assert model.batches == [[0], [1, 3]]


def test_a_cancelled_task_is_not_run(model: Model) -> None:
    async def main(batcher: MicroBatcher) -> None:
        task = asyncio.create_task(batcher.predict(1))
        while not batcher.waiting:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert batcher.waiting == 0
        model.gate.set()
        assert await batcher.predict(2) == answer_of(2)

    with MicroBatcher(model, BatchingOptions(max_wait=0.0)) as batcher:
        model.hold(batcher)
        asyncio.run(main(batcher))
    assert model.batches == [[0], [2]]


def test_an_interrupted_caller_leaves_the_line(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, timeout: float | None = None) -> Any:
        raise KeyboardInterrupt

    with MicroBatcher(model, BatchingOptions(max_wait=0.0)) as batcher:
        model.hold(batcher)
        with monkeypatch.context() as patch:
            patch.setattr("sn72engine.batching._Request.result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                batcher(1)
        assert batcher.waiting == 0
        model.gate.set()
    assert model.batches == [[0]]


# ---------------------------------------------------------------- deadlines


def test_each_request_has_its_own_deadline(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_wait=0.0)) as batcher:
        model.hold(batcher)
        tight, loose, free = (
            batcher.submit(i, deadline=d) for i, d in [(1, 0.1), (2, 60), (3, None)]
        )
        model.entered.clear()
        model.gate.set()
        assert model.entered.wait(60)
        # Whether it was still in line or in a batch by then, time up is time up.
        assert tight.result(60).status in (Status.DEADLINE, Status.DONE)
        assert loose.result(60) == answer_of(2)
        assert free.result(60) == answer_of(3)


def test_a_request_that_expires_in_a_batch_is_answered_while_the_batch_goes_on(
    model: Model,
) -> None:
    with MicroBatcher(model, BatchingOptions(max_batch=2, max_wait=3600)) as batcher:
        model.gate.clear()
        tight = batcher.submit(1, deadline=0.5)
        loose = batcher.submit(2, deadline=600.0)
        assert model.entered.wait(60)
        assert tight.result(60) == Result(0.5, 0, None, Status.DEADLINE)
        assert not loose.done()
        model.gate.set()
        assert loose.result(60) == answer_of(2)
    assert model.batches == [[1, 2]]
    assert 500 < model.deadlines[0] <= 600  # the latest one


@pytest.mark.parametrize("deadline", [0.0, -1.0])
def test_a_deadline_that_is_over_is_not_run(model: Model, deadline: float) -> None:
    with MicroBatcher(model, BatchingOptions(max_wait=0.0)) as batcher:
        assert batcher(1, deadline=deadline).status is Status.DEADLINE
    assert model.batches == []


@pytest.mark.parametrize("deadline", [math.nan, "soon", True, -math.inf])
def test_a_deadline_that_is_no_number_is_refused(model: Model, deadline: Any) -> None:
    with MicroBatcher(model) as batcher, pytest.raises(OptionError, match="deadline="):
        batcher.submit(1, deadline=deadline)


def test_an_earlier_deadline_wakes_the_clock(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_wait=0.0)) as batcher:
        model.hold(batcher)
        late = batcher.submit(1, deadline=3600.0)
        soon = batcher.submit(2, deadline=0.02)
        assert soon.result(60).status is Status.DEADLINE
        assert not late.done()
        model.gate.set()


def test_the_clock_forgets_requests_that_have_ended(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(max_batch=8, max_wait=0.0)) as batcher:
        for _ in range(50):
            for future in [batcher.submit(i, deadline=3600.0) for i in range(8)]:
                future.result(60)
        assert len(batcher._alarms) <= 64 + 2 * 8 + 1


# ---------------------------------------------------------------- failures


def raising(error: BaseException) -> Callable[[Any], Any]:
    def fault(images: list[int]) -> Any:
        raise error

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (raising(ValueError("no")), "the batch of 2 failed: ValueError: no"),
        (raising(SystemExit(3)), "SystemExit"),
        (lambda images: [answer_of(1)], "for 2 images"),
        (lambda images: [0.5, 0.5], "0.5 instead of a Result"),
        (lambda images: 3, "returned 3 for 2 images"),
    ],
)
def test_a_failed_batch_is_an_error_for_its_requests_only(
    model: Model, fault: Any, message: str
) -> None:
    with MicroBatcher(model, BatchingOptions(max_batch=2, max_wait=3600)) as batcher:
        model.fault = fault
        futures = [batcher.submit(i) for i in (1, 2)]
        errors = [f.exception(60) for f in futures]
        assert all(isinstance(e, CascadeError) and message in str(e) for e in errors)
        assert errors[0] is not errors[1]
        model.fault = lambda images: None
        futures = [batcher.submit(i) for i in (3, 4)]
        assert [f.result(60) for f in futures] == [answer_of(3), answer_of(4)]


def test_an_observer_that_raises_costs_no_answer(model: Model) -> None:
    def broken(event: Event) -> None:
        raise ValueError("observer")

    with MicroBatcher(model, BatchingOptions(max_wait=0.0), observe=broken) as batcher:
        assert batcher(1) == answer_of(1)


def test_callbacks_may_call_the_batcher(model: Model) -> None:
    seen: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
    with MicroBatcher(model, BatchingOptions(max_wait=0.0)) as batcher:
        model.hold(batcher)
        batcher.submit(1).add_done_callback(lambda f: seen.put(batcher.submit(2)))
        model.gate.set()
        assert seen.get(timeout=60).result(60) == answer_of(2)


# ---------------------------------------------------------------- closing


def test_close_drains(model: Model) -> None:
    batcher = MicroBatcher(model, BatchingOptions(max_batch=2, max_wait=3600))
    futures = [batcher.submit(i) for i in range(5)]
    batcher.close()
    batcher.close()
    assert [f.result(0) for f in futures] == [answer_of(i) for i in range(5)]
    for call in (batcher, batcher.submit):
        with pytest.raises(CascadeError, match="closed"):
            call(1)


def test_close_can_refuse_what_is_in_line(model: Model) -> None:
    log = Log()
    batcher = MicroBatcher(model, BatchingOptions(max_batch=1), observe=log)
    running = model.hold(batcher)
    waiting = [batcher.submit(i, deadline=3600.0) for i in (1, 2)]
    closer = threading.Thread(target=lambda: batcher.close(drain=False))
    closer.start()
    for future in waiting:
        assert "closed before" in str(future.exception(60))
    assert not running.done()
    model.gate.set()
    closer.join(60)
    assert running.result(0) == answer_of(0)
    assert log.outcomes() == {"answered": 1, "closed": 2}


def test_close_leaves_a_hanging_model_behind_but_no_request(model: Model) -> None:
    batcher = MicroBatcher(model, BatchingOptions(max_batch=1))
    hanging = model.hold(batcher)
    waiting = batcher.submit(1, deadline=3600.0)
    batcher.close(patience=0.02)
    for future in (hanging, waiting):
        assert "no answer within 0.02 s" in str(future.exception(0))
    model.gate.set()  # its late answer goes nowhere
    for thread in batcher._workers:
        thread.join(60)


def test_threads_end(model: Model) -> None:
    with MicroBatcher(model, BatchingOptions(workers=3, max_wait=0.0)) as batcher:
        batcher(1, deadline=60.0)
        threads = [*batcher._workers, batcher._clock]
        assert len(threads) == 4
    assert not any(t is not None and t.is_alive() for t in threads)


def test_images_are_let_go(model: Model) -> None:
    import weakref

    class Image:
        pass

    def answer(images: Any, **options: Any) -> list[Result]:
        return [answer_of(1) for _ in images]

    with MicroBatcher(answer, BatchingOptions(max_wait=0.0)) as batcher:
        image = Image()
        gone = weakref.ref(image)
        future = batcher.submit(image, deadline=3600.0)
        assert future.result(60) == answer_of(1)
        del image
        end = time.monotonic() + 30
        while gone() is not None and time.monotonic() < end:
            time.sleep(0.001)
        assert gone() is None


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_wait": -0.1},
        {"max_wait": math.nan},
        {"max_queue": 0},
        {"max_queue_per_client": 0},
        {"workers": 0},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        BatchingOptions(**options)
    assert BatchingOptions.from_dict(BatchingOptions().to_dict()) == BatchingOptions()


def test_something_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(OptionError, match="answer is a int"):
        MicroBatcher(3)  # type: ignore[arg-type]


# ---------------------------------------------------------------- with a cascade


def picture(number: int) -> np.ndarray:
    return np.array([[[number % 256, number // 256, 0]]], np.uint8)


def scores_of(images: Sequence[np.ndarray]) -> np.ndarray:
    """A number below 1000, as a probability."""
    return np.array([(int(i[0, 0, 0]) + 256 * int(i[0, 0, 1])) / 1000 for i in images])


def two_stages(second: Any, **options: Any) -> Cascade:
    spec = CascadeSpec((StageSpec("first"), StageSpec("second")), **options)
    return Cascade(spec, {"first": scores_of, "second": second})


def test_a_cascade_answers_as_it_does_without_the_batcher() -> None:
    with two_stages(lambda images: scores_of(images) ** 2) as cascade:
        numbers = random.Random(0).sample(range(1000), 200)
        expected = cascade([picture(n) for n in numbers])
        with MicroBatcher(cascade, BatchingOptions(max_batch=16)) as batcher:
            futures = [batcher.submit(picture(n)) for n in numbers]
            assert [f.result(60) for f in futures] == expected
        assert {r.stage for r in expected} == {"first", "second"}


def test_an_image_that_cannot_be_decoded_leaves_its_batch_unharmed() -> None:
    with two_stages(scores_of) as cascade:
        with MicroBatcher(cascade, BatchingOptions(max_batch=2, max_wait=3600)) as batcher:
            bad, good = batcher.submit(b"no image"), batcher.submit(picture(990))
            assert bad.result(60).status is Status.STAGE_FAILED
            assert good.result(60).status is Status.DONE


def test_sure_samples_are_answered_before_the_next_stage_runs() -> None:
    release = threading.Event()

    def slow(images: Sequence[np.ndarray]) -> np.ndarray:
        assert release.wait(60)
        return np.full(len(images), 0.9)

    with two_stages(slow) as cascade:
        with MicroBatcher(cascade, BatchingOptions(max_batch=3, max_wait=3600)) as batcher:
            sure, unsure, late = (
                batcher.submit(picture(n), deadline=d)
                for n, d in [(990, None), (400, None), (300, 1.0)]
            )
            assert sure.result(60) == Result(pytest.approx(0.99), 1, "first", Status.DONE)
            assert not unsure.done()
            # The best that is known, though the batch goes on.
            assert late.result(60) == Result(pytest.approx(0.3), 0, "first", Status.DEADLINE)
            assert not unsure.done()
            release.set()
            assert unsure.result(60) == Result(pytest.approx(0.9), 1, "second", Status.DONE)


@pytest.mark.parametrize(("threshold", "label"), [(0.5, 0), (0.4, 1)])
def test_what_expires_in_line_is_labelled_as_the_cascade_would(
    threshold: float, label: int
) -> None:
    with two_stages(scores_of, deadline=1e-9, decision_threshold=threshold) as cascade:
        with MicroBatcher(cascade) as batcher:  # the specification's deadline
            assert batcher(picture(1)) == Result(0.5, label, None, Status.DEADLINE)


def test_what_expires_in_line_has_no_class() -> None:
    spec = CascadeSpec((StageSpec("only", score="top1"),))
    with Cascade(spec, {"only": scores_of}) as cascade, MicroBatcher(cascade) as batcher:
        assert batcher(picture(1), deadline=0.0).label == -1


# ---------------------------------------------------------------- everything at once


class Faulty(Model):
    """Now and then slow, or broken in one of the ways a model can be broken."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.seen: Counter[int] = Counter()
        self.lock = threading.Lock()

    def __call__(self, images: Sequence[int], *, deadline: float, progress: Any) -> Any:
        with self.lock:
            self.seen.update(images)
            draw = self.random.random()
        results = [answer_of(image) for image in images]
        if draw < 0.05:
            time.sleep(0.01)
        elif draw < 0.10:
            raise RuntimeError("injected")
        elif draw < 0.13:
            return results[:-1]
        elif draw < 0.2:
            progress(results, [image % 2 == 0 for image in images])
            if draw < 0.16:
                raise RuntimeError("injected half way")
        return results


class Tracker:
    """Counts how often each request came to an end, and how."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends: Counter[int] = Counter()
        self.how: Counter[str] = Counter()

    def end(self, number: int, outcome: Result | BaseException | None) -> None:
        with self.lock:
            self.ends[number] += 1
            if isinstance(outcome, Result):
                if outcome.status is Status.DONE:
                    assert outcome == answer_of(number), "somebody else's answer"
                    self.how["answered"] += 1
                else:
                    assert outcome.status is Status.DEADLINE
                    self.how["expired"] += 1
            elif isinstance(outcome, OverloadedError):
                self.how["refused"] += 1
            elif isinstance(outcome, CascadeError):
                self.how["failed"] += 1
            else:
                self.how["cancelled"] += 1


@pytest.mark.parametrize("workers", [1, 3])
def test_thousands_of_callers_with_faults(workers: int) -> None:
    """Threads that wait, futures, tasks and cancellations, all on one batcher."""
    model, log, tracker = Faulty(workers), Log(), Tracker()
    options = BatchingOptions(max_batch=16, max_wait=0.001, max_queue=300, workers=workers)
    per_thread, threads, tasks = 90, 40, 2500
    batcher = MicroBatcher(model, options, observe=log)

    def sync_caller(thread: int) -> None:
        draw = random.Random(thread)
        for k in range(per_thread):
            number = 1 + thread * per_thread + k
            deadline = draw.choice([None, 60.0, 0.004, 0.0])
            try:
                if k % 3 == 0:
                    future = batcher.submit(number, deadline=deadline, client=thread % 5)
                    if k % 2 == 0:
                        future.cancel()
                    outcome: Any = future.result(60)
                else:
                    outcome = batcher(number, deadline=deadline, client=thread % 5)
            except (CascadeError, CancelledError) as error:
                outcome = error
            tracker.end(number, outcome)

    async def async_caller(number: int, draw: random.Random) -> None:
        await asyncio.sleep(draw.random() * 0.3)
        task = asyncio.ensure_future(
            batcher.predict(number, deadline=draw.choice([None, 0.003]), client=number % 7)
        )
        if draw.random() < 0.1:
            await asyncio.sleep(0)
            task.cancel()
        try:
            outcome: Any = await asyncio.wait_for(task, 60)
        except CascadeError as error:
            outcome = error
        except asyncio.CancelledError:
            outcome = None
        tracker.end(number, outcome)

    async def main() -> None:
        draw = random.Random(99)
        start = 1 + threads * per_thread
        await asyncio.gather(*(async_caller(n, draw) for n in range(start, start + tasks)))

    pool = [threading.Thread(target=sync_caller, args=(t,)) for t in range(threads)]
    for thread in pool:
        thread.start()
    asyncio.run(main())
    for thread in pool:
        thread.join(60)
        assert not thread.is_alive(), "a caller still waits: its request was lost"
    batcher.close()

    total = threads * per_thread + tasks
    assert len(tracker.ends) == total
    assert set(tracker.ends.values()) == {1}
    assert set(model.seen.values()) == {1}, "a request was run twice"
    # What the callers saw is what the batcher says it did, but for tasks that were cancelled when
    # a batch had taken the request already: there the answer had nobody to go to.
    told = log.outcomes()
    assert told["refused"] == tracker.how["refused"]
    assert sum(told.values()) == total
    assert told["cancelled"] <= tracker.how["cancelled"]
    for how in ("answered", "failed", "expired"):
        assert told[how] >= tracker.how[how] > 0, tracker.how
    sizes = [event.size for event in log.events if isinstance(event, BatchEvent)]
    assert sum(sizes) == sum(model.seen.values())
    assert max(sizes) <= options.max_batch
    assert batcher.waiting == 0
    assert not batcher._running


STEPS = st.sampled_from(["submit", "submit", "submit", "brief", "cancel", "stop", "go", "fail"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    # All is drawn beforehand: what the batcher does in between depends on timing.
    steps=st.lists(st.tuples(STEPS, st.integers(0, 24)), max_size=25),
    options=st.builds(
        BatchingOptions,
        max_batch=st.integers(1, 4),
        max_wait=st.sampled_from([0.0, 0.001]),
        max_queue=st.integers(1, 6),
        workers=st.integers(1, 2),
    ),
    drain=st.booleans(),
)
def test_any_order_of_events_ends_every_request_once(
    steps: list[tuple[str, int]], options: BatchingOptions, drain: bool
) -> None:
    """Submissions, cancellations, expiries, gates and the close, in every order."""
    model, log = Model(), Log()
    batcher = MicroBatcher(model, options, observe=log)
    ends: Counter[int] = Counter()
    futures: list[Future[Result]] = []
    refused = 0
    for number, (step, which) in enumerate(steps):
        if step in ("submit", "brief"):
            try:
                future = batcher.submit(number, deadline=0.001 if step == "brief" else None)
            except OverloadedError:
                refused += 1
                continue
            future.add_done_callback(lambda f, n=number: ends.update([n]))  # type: ignore[misc]
            futures.append(future)
        elif step == "cancel" and futures:
            futures[which % len(futures)].cancel()
        elif step == "fail":
            model.fault = raising(RuntimeError("injected"))
        elif step == "stop":
            model.gate.clear()
        elif step == "go":
            model.gate.set()
            model.fault = lambda images: None
    closer = threading.Thread(target=lambda: batcher.close(drain=drain))
    closer.start()
    model.gate.set()
    closer.join(60)
    assert not closer.is_alive()
    assert wait(futures, timeout=60).not_done == set()
    assert len(ends) == len(futures)
    assert set(ends.values()) <= {1}
    told = log.outcomes()
    assert told["refused"] == refused
    assert sum(told.values()) == refused + len(futures)
