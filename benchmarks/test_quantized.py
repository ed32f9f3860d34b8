"""What INT8 gains over FP32 on a CPU: EfficientNet-Lite0 with ImageNet weights, one thread.

Run with ``pytest benchmarks/test_quantized.py``. Both engines take turns in one run, so that the
ratio means something on a busy machine; it and the medians stand in the table's extra columns
(``--benchmark-json`` keeps them) and are printed. Needs the ``demo`` extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from sn72engine import (
    BuildOptions,
    CalibrationOptions,
    ExportOptions,
    QuantizeOptions,
    RuntimeOptions,
    Session,
    ShapeRange,
    Store,
    batches,
    build,
    export,
    interleave,
    quantize,
)
from sn72engine.demo.models import preprocess_for, pretrained
from sn72engine.demo.photographs import photographs, views

MODEL = "lite0"
Engines = dict[str, Session]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """The FP32 and the INT8 engine, each opened with one thread."""
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = tmp_path_factory.mktemp("quantized")
    preprocess = preprocess_for(MODEL)
    pictures, _ = views(photographs(), 32, seed=0)
    exported = export(
        pretrained(MODEL),
        ExportOptions(parity_batches=(1,)),
        folder / "fp32.onnx",
        example=torch.zeros(1, *preprocess.shape),
        preprocess=preprocess,
    )
    data = batches(pictures, preprocess, CalibrationOptions())
    quantized = quantize(exported, data, QuantizeOptions(method="max"), folder / "int8.onnx")
    options, store = BuildOptions(batch=ShapeRange(1, 8, 32)), Store(folder)
    opened = {
        name: Session(build(model, options, store=store), RuntimeOptions(threads=1))
        for name, model in (("fp32", exported), ("int8", quantized))
    }
    yield opened
    for session in opened.values():
        session.close()


def sample(session: Session, batch: int) -> np.ndarray:
    """Random input; the time does not depend on the values."""
    shape = (batch, *session.inputs[0].shape[1:])
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 8])
def test_int8_against_fp32(
    benchmark: Any, engines: Engines, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark times INT8; both are interleaved besides."""
    x = sample(engines["int8"], batch)
    found = interleave(
        {name: partial(session, x) for name, session in engines.items()},
        warmup=5,
        repeats=max(10, 60 // batch),
    )
    gain = found["fp32"].p50 / found["int8"].p50
    for name, latency in found.items():
        benchmark.extra_info[f"{name}_p50_ms"] = round(latency.p50, 3)
    benchmark.extra_info["speedup"] = round(gain, 3)
    with capsys.disabled():
        print()
        for name, latency in found.items():
            print(f"{MODEL} {name} batch {batch}: p50 {latency.p50:.2f} ms, min {latency.min:.2f}")
        print(f"{MODEL} batch {batch}: INT8 is {gain:.2f} times as fast as FP32")
    benchmark.pedantic(engines["int8"], args=(x,), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_opening(benchmark: Any, engines: Engines, name: str) -> None:
    """Opening an engine, with its size on disk beside it."""
    engine = engines[name].engine
    benchmark.extra_info["bytes"] = sum(file.bytes for file in engine.manifest.files)
    one = RuntimeOptions(threads=1)
    benchmark.pedantic(lambda: Session(engine.folder, one).close(), rounds=5, warmup_rounds=1)
