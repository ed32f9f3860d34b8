"""A pool runs calls side by side on one engine, and says so when none is free."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sn72engine import _deps
from sn72engine.builder import build
from sn72engine.engine import Engine
from sn72engine.errors import InputError, OptionError, SessionError
from sn72engine.pool import SessionPool
from sn72engine.session import Session
from sn72engine.spec import BuildOptions, RuntimeOptions, ShapeRange
from sn72engine.store import Store
from tests import tiny_models

ONE_THREAD = RuntimeOptions(threads=1)
BACKENDS = [
    "onnxruntime",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(
            not _deps.available("openvino"), reason="openvino is not installed"
        ),
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pool")


@pytest.fixture(params=BACKENDS)
def engine(folder: Path, request: pytest.FixtureRequest) -> Engine:
    model = tiny_models.linear(folder / "m.onnx")
    options = BuildOptions(backend=request.param, batch=ShapeRange(1, 4, 8))
    return build(model, options, store=Store(folder / "store"))


@pytest.fixture
def pool(engine: Engine) -> Iterator[SessionPool]:
    with SessionPool(engine, ONE_THREAD, size=3, timeout=5.0) as made:
        yield made


def some(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)


def slowly(session: Session, barrier: threading.Barrier) -> None:
    """Make a session's runner wait until as many calls are inside as the barrier has parties."""
    real = session._runner.run

    def run(inputs: Any) -> Any:
        barrier.wait(10)
        return real(inputs)

    session._runner.run = run


def test_as_many_calls_run_at_once_as_there_are_sessions(pool: SessionPool) -> None:
    barrier = threading.Barrier(pool.size)
    sessions = [pool.acquire() for _ in range(pool.size)]
    assert len({id(session) for session in sessions}) == pool.size
    for session in sessions:
        slowly(session, barrier)
        pool.release(session)
    results: dict[int, Any] = {}

    def work(seed: int) -> None:
        results[seed] = pool(some(2, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(pool.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    # Had they taken turns, the first would have waited at the barrier for the others.
    assert sorted(results) == list(range(pool.size))


def test_answers_belong_to_their_questions(pool: SessionPool, folder: Path) -> None:
    w, b = tiny_models.linear_weights(tiny_models.OnnxModel.open(folder / "m.onnx"))
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(40):
            x = some(1 + turn % 8, 1000 * seed + turn)
            if not np.allclose(pool(x), x @ w + b, rtol=1e-4, atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_one_engine_is_loaded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from sn72engine import session

    opened: list[Any] = []
    real = session.get_backend

    def get_backend(name: Any) -> Any:
        backend = real(name)
        inner = backend.open

        def counted(*arguments: Any) -> Any:
            opened.append(arguments)
            return inner(*arguments)

        backend.open = counted  # type: ignore[method-assign]
        return backend

    monkeypatch.setattr(session, "get_backend", get_backend)
    with SessionPool(engine, ONE_THREAD, size=4):
        assert len(opened) == 1


def test_a_full_pool_says_so_in_time(pool: SessionPool) -> None:
    taken = [pool.acquire() for _ in range(3)]
    with pytest.raises(SessionError, match=r"no session came free in 0\.05 s: all 3 are in use"):
        pool.acquire(timeout=0.05)
    pool.release(taken.pop())
    with pool.lease(timeout=0.05) as session:
        assert session(some(1)).shape == (1, 3)
    for session in taken:
        pool.release(session)


def test_a_waiting_thread_gets_the_next_free_one(pool: SessionPool) -> None:
    taken = [pool.acquire() for _ in range(3)]
    got: list[Session] = []
    waiting = threading.Thread(target=lambda: got.append(pool.acquire()))
    waiting.start()
    time.sleep(0.05)
    assert not got
    pool.release(taken[1])
    waiting.join(10)
    assert got == [taken[1]]
    for session in (taken[0], taken[2], got[0]):
        pool.release(session)


def test_a_failed_call_gives_its_session_back(pool: SessionPool) -> None:
    for _ in range(5):
        with pytest.raises(InputError, match="axis 1 must be 4"):
            pool(np.zeros((2, 9), np.float32))
    assert len(pool._idle) == 3


def test_only_loans_can_be_given_back(pool: SessionPool) -> None:
    session = pool.acquire()
    pool.release(session)
    for stranger in (session, pool._idle[0]):
        with pytest.raises(OptionError, match="not on loan"):
            pool.release(stranger)


def test_closing_waits_for_loans_and_turns_others_away(engine: Engine) -> None:
    pool = SessionPool(engine, ONE_THREAD, size=1, timeout=60.0)
    session = pool.acquire()
    refused: list[str] = []

    def wait() -> None:
        try:
            pool.acquire()
        except SessionError as error:
            refused.append(str(error))

    waiting, closing = threading.Thread(target=wait), threading.Thread(target=pool.close)
    waiting.start()
    closing.start()
    waiting.join(10)
    assert refused == ["this pool was closed; make a new one"]
    assert closing.is_alive()
    assert session(some(2)).shape == (2, 3)
    pool.release(session)
    closing.join(10)
    assert not closing.is_alive()
    with pytest.raises(SessionError, match="closed"):
        session(some(2))
    pool.close()


@pytest.mark.parametrize(("size", "timeout"), [(0, 1.0), (1.5, 1.0), (1, -1.0), (1, float("nan"))])
def test_sizes_and_timeouts_are_checked(folder: Path, size: Any, timeout: float) -> None:
    with pytest.raises(OptionError, match=r"size|timeout"):
        SessionPool(folder / "never opened", size=size, timeout=timeout)


def test_a_clone_outlives_its_original(engine: Engine) -> None:
    original = Session(engine, ONE_THREAD)
    twin = original.clone()
    want = original(some(2))
    original.close()
    np.testing.assert_array_equal(twin(some(2)), want)
    twin.close()
    for closed in (original, twin):
        with pytest.raises(SessionError, match="closed"):
            closed.clone()
