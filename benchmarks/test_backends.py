"""ONNX Runtime against OpenVINO on a CPU, each with FP32 and INT8: a convolutional model, two ViTs.

Run with ``pytest benchmarks/test_backends.py``. All four engines take turns in one run, with one
thread each, so that their ratios mean something on a busy machine; medians, and the agreement of
each engine with the FP32 one of ONNX Runtime, stand in the table's extra columns
(``--benchmark-json`` keeps them) and are printed. Needs the extras ``demo`` and ``openvino``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sn72engine import (
    BuildOptions,
    CalibrationOptions,
    ExportOptions,
    OnnxModel,
    Preprocess,
    QuantizeOptions,
    RuntimeOptions,
    Session,
    ShapeRange,
    Store,
    _deps,
    batches,
    build,
    export,
    interleave,
    quantize,
)
from sn72engine.demo.models import preprocess_for, pretrained
from sn72engine.demo.photographs import photographs, views
from sn72engine.roadscenes import dataset, trained
from sn72engine.roadscenes.models import PREPROCESS
from sn72engine.spec import VerifyOptions
from sn72engine.verifier import verify

BACKENDS = ("onnxruntime", "openvino")
IMAGES = 32


@dataclass(frozen=True)
class Subject:
    """One model: how it is made, and images to calibrate it on and to compare with."""

    module: Callable[[], torch.nn.Module]
    preprocess: Preprocess
    images: Callable[[int], Any]


def random_dinov3() -> torch.nn.Module:
    """A small DINOv3 with a one-logit head and random weights: for times, not for accuracy."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768,
            num_register_tokens=4, initializer_range=192**-0.5, attn_implementation="eager",
        )
    )  # fmt: skip
    return Dinov3(backbone).eval().requires_grad_(False)


class Dinov3(torch.nn.Module):
    """Pixels (N, 3, 224, 224) to logits (N, 1)."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Sequential(
            torch.nn.Linear(192, 256), torch.nn.GELU(), torch.nn.Linear(256, 1)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(pixel_values=pixel_values).pooler_output)


SUBJECTS = {
    "lite0": Subject(
        lambda: pretrained("lite0"),
        preprocess_for("lite0"),
        lambda seed: views(photographs(), IMAGES, seed=seed)[0],
    ),
    "small_vit": Subject(
        lambda: trained("small_vit"), PREPROCESS, lambda seed: list(dataset(IMAGES, seed)[0])
    ),
    "small_dinov3": Subject(
        random_dinov3, Preprocess(), lambda seed: list(dataset(IMAGES, seed, size=224)[0])
    ),
}


@dataclass(frozen=True)
class Opened:
    """The four engines of a model, by name, and their mean cosine with the first of them."""

    sessions: dict[str, Session]
    cosines: dict[str, float]


@pytest.fixture(scope="module", params=SUBJECTS)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    if not _deps.available("openvino"):
        pytest.skip("openvino is not installed; extra 'openvino'")
    if request.param == "lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
    subject = SUBJECTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    models = forms(subject, folder)
    store, batch = Store(folder), ShapeRange(1, 8, 32)
    sessions = {
        f"{backend} {name}": Session(
            build(model, BuildOptions(backend=backend, batch=batch), store=store),  # type: ignore[arg-type]
            RuntimeOptions(threads=1),
        )
        for backend in BACKENDS
        for name, model in models.items()
    }
    reference = next(iter(sessions.values()))
    data = batches(subject.images(1), subject.preprocess, CalibrationOptions())
    options = VerifyOptions(min_speedup=None)
    cosines = {
        name: verify(session, reference, data, options=options).outputs[0].cosine_mean
        for name, session in sessions.items()
    }
    yield Opened(sessions, cosines)
    for session in sessions.values():
        session.close()


def forms(subject: Subject, folder: Path) -> dict[str, OnnxModel]:
    """The exported model and its quantised form."""
    exported = export(
        subject.module(),
        ExportOptions(parity_batches=(1,)),
        folder / "fp32.onnx",
        example=torch.zeros(1, *subject.preprocess.shape),
        preprocess=subject.preprocess,
    )
    data = batches(subject.images(0), subject.preprocess, CalibrationOptions())
    quantized = quantize(exported, data, QuantizeOptions(method="max"), folder / "int8.onnx")
    return {"fp32": exported, "int8": quantized}


@pytest.mark.parametrize("batch", [1, 8])
def test_interleaved(
    benchmark: Any,
    opened: Opened,
    batch: int,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The benchmark times OpenVINO INT8; all four are interleaved besides."""
    model = request.node.callspec.params["opened"]
    shape = (batch, *opened.sessions["openvino int8"].inputs[0].shape[1:])
    # The time does not depend on the values.
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = interleave(
        {name: partial(session, x) for name, session in opened.sessions.items()},
        warmup=5,
        repeats=max(12, 60 // batch),
    )
    base = found["onnxruntime fp32"].p50
    with capsys.disabled():
        print()
        for name, latency in found.items():
            gain = base / latency.p50
            benchmark.extra_info[f"{name} p50_ms"] = round(latency.p50, 3)
            benchmark.extra_info[f"{name} speedup"] = round(gain, 3)
            benchmark.extra_info[f"{name} cosine"] = round(opened.cosines[name], 5)
            print(
                f"{model} batch {batch} {name}: p50 {latency.p50:.2f} ms, min {latency.min:.2f}, "
                f"{gain:.2f} times ONNX Runtime FP32, mean cosine {opened.cosines[name]:.5f}"
            )
    benchmark.pedantic(opened.sessions["openvino int8"], args=(x,), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("name", [f"{b} {p}" for b in BACKENDS for p in ("fp32", "int8")])
def test_opening(benchmark: Any, opened: Opened, name: str) -> None:
    """Opening an engine: OpenVINO compiles where ONNX Runtime only optimises."""
    folder = opened.sessions[name].engine.folder
    one = RuntimeOptions(threads=1)
    benchmark.pedantic(lambda: Session(folder, one).close(), rounds=3, warmup_rounds=1)
