"""Inductor engines beside eager PyTorch and ``torch.compile``, in TFLOP/s and share of the peak.

Run with ``pytest benchmarks/test_inductor.py``. On a GPU: ViT-L/16 at 384 px in bfloat16 and fp8,
batch 1, 8 and 32, against eager and ``torch.compile(mode="max-autotune")`` in bfloat16; the peak is
that of a matrix product measured in the same process. On a CPU, which says nothing about a GPU:
a small ViT in float32, with ONNX Runtime besides. Calls take turns; medians stand in the extra
columns. Every engine must agree with the float32 module, or it has no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.vit import LARGE, SMALL, vit
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
SIZE = LARGE if GPU else SMALL
TYPE = torch.bfloat16 if GPU else torch.float32
PRECISIONS = ("bf16", "fp8") if GPU else ("fp32", "bf16")
COSINE = {"fp32": 0.99999, "bf16": 0.99, "fp8": 0.98}
PEAKS = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
BATCH = ShapeRange(1, 8, 32)


@dataclass(frozen=True)
class Contestant:
    call: Callable[[torch.Tensor], torch.Tensor]
    precision: str


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return vit(SIZE)


@pytest.fixture(scope="module")
def contestants(
    module: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Contestant]]:
    folder, example = tmp_path_factory.mktemp("engines"), torch.zeros(1, 3, SIZE.image, SIZE.image)
    plain = vit(SIZE).to(DEVICE, TYPE)
    mode = {"mode": "max-autotune"} if GPU else {"dynamic": True}
    own = "bf16" if GPU else "fp32"
    found = {
        "eager": Contestant(lambda x: plain(x.to(TYPE)), own),
        "torch.compile": Contestant(_compiled(torch.compile(plain, **mode)), own),  # type: ignore[call-overload]
    }
    with ExitStack() as opened:
        if not GPU:
            model = export(module, ExportOptions(), folder / "vit.onnx", example=example)
            engine = build(model, BuildOptions(batch=BATCH), store=Store(folder))
            found["onnxruntime fp32"] = Contestant(opened.enter_context(load(engine)), "fp32")
        for precision in PRECISIONS:
            session = opened.enter_context(_engine(module, precision, folder, example))
            found[f"inductor {precision}"] = Contestant(session, precision)
        yield found


def _compiled(
    call: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    # A captured graph gives the same memory at every call.
    return lambda x: call(x.to(TYPE)).clone()


def _engine(
    module: torch.nn.Module, precision: str, folder: Path, example: torch.Tensor
) -> Session:
    program = export_program(
        module,
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


def _agrees(call: Contestant, x: torch.Tensor, wanted: np.ndarray) -> float:
    with torch.no_grad():
        got = call.call(x).float().cpu().numpy().ravel()
    return float(got @ wanted / (np.linalg.norm(got) * np.linalg.norm(wanted)))


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_engines(
    benchmark: Any,
    module: torch.nn.Module,
    contestants: dict[str, Contestant],
    batch: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    x = torch.randn(batch, 3, SIZE.image, SIZE.image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = module(x).numpy().ravel()
    x = x.to(DEVICE)

    def timed(contestant: Contestant) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                contestant.call(x)
            if GPU:
                torch.cuda.synchronize()

        return call

    cosines = {name: _agrees(one, x, wanted) for name, one in contestants.items()}
    right = {name for name in contestants if cosines[name] >= COSINE[contestants[name].precision]}
    peaks = bench.measure_peaks(DEVICE).tflop_s
    found = interleave(
        {name: timed(contestants[name]) for name in contestants}, 5, max(8, 60 // batch)
    )
    with capsys.disabled():
        print(f"\n{'' if GPU else 'no GPU: small ViT on the CPU, '}batch {batch}")
        for name, latency in found.items():
            rate = batch * SIZE.flops / latency.p50 / 1e9
            peak = peaks.get(PEAKS[contestants[name].precision])
            share = "" if peak is None else f", {rate / peak:.0%} of the measured peak"
            gain = found["eager"].p50 / latency.p50 if name in right else None
            benchmark.extra_info[f"{name} p50_ms"] = round(latency.p50, 3)
            benchmark.extra_info[f"{name} tflop_s"] = round(rate, 4)
            benchmark.extra_info[f"{name} of_peak"] = (
                None if peak is None else round(rate / peak, 3)
            )
            benchmark.extra_info[f"{name} cosine"] = round(cosines[name], 6)
            benchmark.extra_info[f"{name} speedup"] = None if gain is None else round(gain, 3)
            told = "wrong answers" if gain is None else f"{gain:.2f} times eager"
            print(f"  {name:<18} {latency.p50:>9.2f} ms, {rate:.3g} TFLOP/s{share}, {told}")
    benchmark.pedantic(lambda: None, rounds=1)  # what counts are the interleaved medians above
    assert right == set(contestants), cosines
