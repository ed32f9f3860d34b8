"""Inductor engines beside eager PyTorch and ``torch.compile``, in TFLOP/s and share of the peak.

Run with ``pytest benchmarks/test_inductor.py``. On a GPU: ViT-L/16 at 384 px in bfloat16 and fp8,
batch 1, 8 and 32, against eager and ``torch.compile(mode="max-autotune")`` in bfloat16, compiled
for each batch; the peak is that of a matrix product measured in the same process. On a CPU, which
says nothing about a GPU: a tiny ViT, the engines in float32 and bfloat16, with ONNX Runtime
besides, in about a minute. Calls take turns; medians stand in the extra columns. What does not
agree with the float32 module has no speed-up; what cannot be built fails the test at its end, when
the others have their figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.vit import LARGE, TINY, vit
from sn72engine import (
    BuildOptions,
    ExportOptions,
    ProgramOptions,
    Session,
    ShapeRange,
    Store,
    build,
    export,
    export_program,
    interleave,
    load,
)
from sn72kernels import bench

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SIZE = LARGE if GPU else TINY
TYPE = torch.bfloat16 if GPU else torch.float32
PRECISIONS = ("bf16", "fp8") if GPU else ("fp32", "bf16")
COSINE = {"fp32": 0.99999, "bf16": 0.999, "fp8": 0.99}
PEAKS = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
BATCH = ShapeRange(1, 8, 32)

pytestmark = [
    pytest.mark.timeout(1500),  # the first test builds everything
    pytest.mark.filterwarnings("default"),  # what a rival warns of is not ours to fail for
]

Say = Callable[[str], None]


def _module() -> torch.nn.Module:
    return vit(SIZE, outputs=256)


@dataclass(frozen=True)
class Contestant:
    call: Callable[[torch.Tensor], torch.Tensor]
    precision: str


@dataclass(frozen=True)
class Field:
    """Who takes part, and why others do not."""

    contestants: dict[str, Contestant]
    failures: dict[str, str]


@pytest.fixture(scope="module")
def say(request: pytest.FixtureRequest) -> Say:
    """Tells of progress past pytest's capture, for building takes minutes."""
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(text, flush=True)

    return say


@pytest.fixture(scope="module")
def field(say: Say, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    folder, example = tmp_path_factory.mktemp("engines"), torch.zeros(1, 3, SIZE.image, SIZE.image)
    plain, own = _module().to(DEVICE, TYPE), "bf16" if GPU else "fp32"
    found = Field({"eager": Contestant(lambda x: plain(x.to(TYPE)), own)}, {})
    found.contestants["torch.compile"] = Contestant(_compiled(plain), own)
    kinds = [f"inductor {precision}" for precision in PRECISIONS]
    with ExitStack() as opened:
        for name in kinds if GPU else ["onnxruntime fp32", *kinds]:
            kind, _, precision = name.partition(" ")
            begun = time.monotonic()
            try:
                session = opened.enter_context(_session(kind, precision, folder, example))
            except Exception as error:
                found.failures[name] = f"{type(error).__name__}: {error}"
            else:
                found.contestants[name] = Contestant(session, precision)
            say(f"{name}: {found.failures.get(name, 'built')}, {time.monotonic() - begun:.0f} s")
        yield found


def _compiled(plain: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """``torch.compile`` at its best on a GPU, for each batch anew; for any batch on a CPU."""
    mode = {"mode": "max-autotune", "dynamic": False} if GPU else {"dynamic": True}
    call = torch.compile(plain, **mode)  # type: ignore[call-overload]
    # A captured graph gives the same memory at every call.
    return lambda x: call(x.to(TYPE)).clone()


def _session(kind: str, precision: str, folder: Path, example: torch.Tensor) -> Session:
    if kind == "onnxruntime":
        model = export(_module(), ExportOptions(), folder / "vit.onnx", example=example)
        return load(build(model, BuildOptions(batch=BATCH), store=Store(folder)))
    program = export_program(
        _module(),
        ProgramOptions(precision=precision, parity_batches=(2,)),  # type: ignore[arg-type]
        folder / f"{precision}.pt2",
        example=example,
    )
    options = BuildOptions(
        backend="inductor",
        batch=BATCH,
        precision=precision,  # type: ignore[arg-type]
        target=DEVICE.type,
        optimization_level=3,
    )
    return load(build(program, options, store=Store(folder)))


def _cosine(got: torch.Tensor, wanted: np.ndarray) -> float:
    one = got.float().cpu().numpy().ravel()
    return float(one @ wanted / (np.linalg.norm(one) * np.linalg.norm(wanted)))


@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.no_grad()
def test_engines(benchmark: Any, field: Field, say: Say, batch: int) -> None:
    x = torch.randn(batch, 3, SIZE.image, SIZE.image, generator=torch.Generator().manual_seed(0))
    x = x.to(DEVICE)
    wanted = _module().to(DEVICE)(x).cpu().numpy().ravel()
    cosines, right = {}, {}
    for name, one in field.contestants.items():
        begun = time.monotonic()
        try:
            cosines[name] = _cosine(one.call(x), wanted)
        except Exception as error:
            field.failures[f"{name}, batch {batch}"] = f"{type(error).__name__}: {error}"
            continue
        right[name] = cosines[name] >= COSINE[one.precision]
        say(f"batch {batch}, {name}: first call {time.monotonic() - begun:.1f} s")

    def timed(contestant: Contestant) -> Callable[[], None]:
        def call() -> None:
            contestant.call(x)
            if GPU:
                torch.cuda.synchronize()

        return call

    peaks = bench.measure_peaks(DEVICE).tflop_s
    rounds = (5, max(8, 60 // batch)) if GPU else (1, max(3, 12 // batch))
    found = interleave({name: timed(field.contestants[name]) for name in cosines}, *rounds)
    say(f"\n{'' if GPU else 'no GPU: tiny ViT on the CPU, '}batch {batch}")
    for name, latency in found.items():
        rate = batch * SIZE.flops / latency.p50 / 1e9
        peak = peaks.get(PEAKS[field.contestants[name].precision])
        share = None if peak is None else rate / peak
        gain = found["eager"].p50 / latency.p50 if right[name] else None
        benchmark.extra_info |= {
            f"{name} p50_ms": round(latency.p50, 3),
            f"{name} tflop_s": round(rate, 4),
            f"{name} of_peak": None if share is None else round(share, 3),
            f"{name} cosine": round(cosines[name], 6),
            f"{name} speedup": None if gain is None else round(gain, 3),
        }
        of_peak = "" if share is None else f", {share:.0%} of the measured peak"
        told = "wrong answers" if gain is None else f"{gain:.2f} times eager"
        say(f"  {name:<18} {latency.p50:>9.2f} ms, {rate:.3g} TFLOP/s{of_peak}, {told}")
    benchmark.pedantic(lambda: None, rounds=1)  # what counts are the interleaved medians above
    assert all(right.values()), cosines
    assert not field.failures
