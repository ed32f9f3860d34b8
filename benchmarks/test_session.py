"""What a session costs on top of the library it wraps, and what starting one costs.

Run with ``pytest benchmarks/test_session.py``. The model computes next to nothing, so that what is
timed is the way there and back. ``interleaved`` prints both sides of one run, which is the figure
to quote; the single benchmarks show where the time goes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sn72engine.builder import build
from sn72engine.engine import Engine
from sn72engine.latency import interleave
from sn72engine.session import Session, load
from sn72engine.spec import BuildOptions, RuntimeOptions, ShapeRange
from sn72engine.store import Store
from tests import tiny_models

ONE_THREAD = RuntimeOptions(threads=1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("bench")
    model = tiny_models.linear(folder / "m.onnx")
    return build(model, BuildOptions(batch=ShapeRange(1, 1, 8)), store=Store(folder / "store"))


@pytest.fixture(scope="module")
def session(engine: Engine) -> Iterator[Session]:
    with load(engine, ONE_THREAD) as opened:
        yield opened


@pytest.fixture(scope="module")
def raw(engine: Engine) -> Any:
    """The library's own session with the same settings."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        str(engine.path), settings, providers=["CPUExecutionProvider"]
    )


X = np.zeros((1, 4), np.float32)


def test_raw_library(benchmark: Any, raw: Any) -> None:
    benchmark(lambda: raw.run(None, {"x": X}))


def test_session_with_an_array(benchmark: Any, session: Session) -> None:
    benchmark(lambda: session(X))


def test_session_with_a_mapping(benchmark: Any, session: Session) -> None:
    feed = {"x": X}
    benchmark(lambda: session(feed))


def test_session_with_a_tensor(benchmark: Any, session: Session) -> None:
    tensor = torch.from_numpy(X)
    benchmark(lambda: session(tensor))


def test_interleaved(session: Session, raw: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tensor = torch.from_numpy(X)
    found = interleave(
        {
            "raw library": lambda: raw.run(None, {"x": X}),
            "session, array": lambda: session(X),
            "session, tensor": lambda: session(tensor),
        },
        warmup=200,
        repeats=3000,
    )
    with capsys.disabled():
        print()
        for name, latency in found.items():
            print(f"{name:16} p50 {latency.p50 * 1e3:6.1f} us  p99 {latency.p99 * 1e3:6.1f} us")


def test_warm_open_of_a_checked_folder(benchmark: Any, engine: Engine) -> None:
    benchmark.pedantic(lambda: load(engine.folder, ONE_THREAD).close(), rounds=30, warmup_rounds=2)


def test_build_that_is_stored(benchmark: Any, tmp_path: Path) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    store = Store(tmp_path / "store")
    build(model, store=store)
    benchmark.pedantic(lambda: build(model, store=store), rounds=30, warmup_rounds=2)


def test_cold_start_in_a_new_process(benchmark: Any, engine: Engine) -> None:
    code = (
        "import numpy as np\n"
        "from sn72engine.session import load\n"
        f"load({str(engine.folder)!r})(np.zeros((1, 4), np.float32))\n"
    )
    benchmark.pedantic(
        lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True),
        rounds=4,
        warmup_rounds=1,
    )
