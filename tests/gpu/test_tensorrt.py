"""TensorRT engines on a card: what the tests without one take on trust from a stand-in."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sn72engine import _deps, inspection
from sn72engine.builder import build
from sn72engine.divergence import CompareOptions, compare
from sn72engine.layer_profile import ProfileOptions, profile
from sn72engine.model import OnnxModel
from sn72engine.pool import SessionPool
from sn72engine.refitter import refit
from sn72engine.session import Session
from sn72engine.spec import BuildOptions, RuntimeOptions, ShapeRange, TensorRTOptions
from sn72engine.store import Store
from tests import tiny_models

BATCH = ShapeRange(1, 4, 16)
LIBRARIES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not _deps.available(name), reason=f"{name} is not installed"),
    )
    for name in ("tensorrt", "tensorrt_rtx")
]

NON_ZERO = """found (float[N, 4] x) => (int64[2, K] places, float[N, 4] same) {
    places = NonZero(x)
    same = Identity(x)
}"""


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    return Store(tmp_path / "store")


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


def expected(model: OnnxModel, store: Store, x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime computes on the CPU."""
    with Session(build(model, BuildOptions(batch=BATCH), store=store)) as session:
        answer: np.ndarray = session(x)
        return answer


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2 * float(np.abs(want).max()))


@pytest.mark.parametrize(
    ("maker", "precision"),
    [
        (tiny_models.convolution, "fp32"),
        (tiny_models.convolution, "fp16"),
        (tiny_models.transformer, "fp16"),
        (tiny_models.quantised, "int8"),
    ],
)
def test_answers_are_the_cpus(
    library: Any, store: Store, tmp_path: Path, maker: Any, precision: Any
) -> None:
    model = maker(tmp_path / "m.onnx")
    options = BuildOptions(backend=library, batch=BATCH, precision=precision)
    with Session(build(model, options, store=store)) as session:
        for count in (1, 5, 16):
            x = images(count, count)
            want = expected(model, store, x)
            close(session(x), want)
            close(session(torch.from_numpy(x).cuda()).cpu().numpy(), want)


def test_profiles_and_scratch(library: Any, store: Store, tmp_path: Path) -> None:
    model = tiny_models.transformer(tmp_path / "m.onnx")
    options = BuildOptions(
        backend=library,
        batch=BATCH,
        precision="fp16",
        profiles=(ShapeRange(1, 1, 1), ShapeRange(1, 8, 16)),
    )
    with Session(build(model, options, store=store)) as session:
        for count in (1, 16, 1, 3):
            close(session(images(count)), expected(model, store, images(count)))
        memory = session.device_memory
        assert memory is not None
        assert 0 < memory.scratch <= max(1, memory.scratch_limit)


@pytest.mark.skipif(not _deps.available("tensorrt"), reason="tensorrt is not installed")
def test_outputs_of_unknown_size(store: Store, tmp_path: Path) -> None:
    # TensorRT-RTX has no operator of such outputs.
    model = tiny_models.save(tmp_path / "m.onnx", NON_ZERO, {})
    options = BuildOptions(backend="tensorrt", batch=ShapeRange(1, 4, 8))
    with Session(build(model, options, store=store)) as session:
        for seed in range(4):
            x = np.random.default_rng(seed).integers(0, 2, (seed + 1, 4)).astype(np.float32)
            places, same = session(x)
            np.testing.assert_array_equal(same, x)
            np.testing.assert_array_equal(places, np.stack(np.nonzero(x)))


def test_threads_of_a_pool(library: Any, store: Store, tmp_path: Path) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    engine = build(model, BuildOptions(backend=library, batch=BATCH), store=store)
    inputs = [images(1 + seed % 8, seed) for seed in range(32)]
    wanted = [expected(model, store, x) for x in inputs]
    wrong: list[int] = []
    with SessionPool(engine, size=3) as pool:

        def work(first: int) -> None:
            mine = range(first, len(inputs), 4)
            right = [np.allclose(pool(inputs[i]), wanted[i], rtol=2e-2, atol=2e-2) for i in mine]
            wrong.extend(i for i, good in zip(mine, right, strict=True) if not good)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert wrong == []


def test_a_launch_in_a_graph(library: Any, store: Store, tmp_path: Path) -> None:
    model = tiny_models.transformer(tmp_path / "m.onnx")
    asked = TensorRTOptions(user_allocation=library == "tensorrt_rtx")
    options = BuildOptions(backend=library, batch=BATCH, precision="fp16", tensorrt=asked)
    with Session(
        build(model, options, store=store), RuntimeOptions(shape_kernels="none")
    ) as session:
        x = torch.from_numpy(images(4)).cuda()
        launch = session.bind({"pixel_values": x})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        for seed in range(3):
            x.copy_(torch.from_numpy(images(4, seed)))
            graph.replay()
            got = launch.outputs["logits"].cpu().numpy()
            close(got, expected(model, store, images(4, seed)))


@pytest.mark.parametrize("budget", [None, 0])
def test_streamed_weights(library: Any, store: Store, tmp_path: Path, budget: int | None) -> None:
    model = tiny_models.transformer(tmp_path / "m.onnx")
    asked = TensorRTOptions(weight_streaming=True)
    options = BuildOptions(backend=library, batch=BATCH, precision="fp16", tensorrt=asked)
    runtime = RuntimeOptions(weight_streaming_bytes=budget)
    with Session(build(model, options, store=store), runtime) as session:
        close(session(images(4)), expected(model, store, images(4)))


def test_weights_left_out_and_put_in(library: Any, store: Store, tmp_path: Path) -> None:
    model = tiny_models.transformer(tmp_path / "m.onnx")
    asked = TensorRTOptions(refit="identical", strip_weights=True)
    options = BuildOptions(backend=library, batch=BATCH, precision="fp16", tensorrt=asked)
    whole = refit(build(model, options, store=store), model, store=store)
    with Session(whole) as session:
        close(session(images(4)), expected(model, store, images(4)))


@pytest.mark.skipif(not _deps.available("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize(
    "runtime", [RuntimeOptions(cuda_graph=True), RuntimeOptions(shape_kernels="eager")]
)
def test_rtx_keeps_its_kernels(store: Store, tmp_path: Path, runtime: RuntimeOptions) -> None:
    model = tiny_models.transformer(tmp_path / "m.onnx")
    options = BuildOptions(backend="tensorrt_rtx", batch=BATCH, precision="fp16")
    engine = build(model, options, store=store)
    for _ in range(2):
        with Session(engine, runtime) as session:
            for _ in range(3):
                close(session(images(4)), expected(model, store, images(4)))
    assert list((tmp_path / "cache" / "runtime").glob("*.runtime"))


@pytest.mark.skipif(not _deps.available("tensorrt"), reason="tensorrt is not installed")
def test_the_plugin_computes_the_pair(store: Store, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    held = {name: rng.standard_normal(64).astype(np.float32) for name in ("w", "b")}
    graph = """pair (float[N, 7, 64] x) => (float[N, 7, 64] y) {
        n = LayerNormalization <axis = -1, epsilon = 0.00001> (x, w, b)
        y = Gelu(n)
    }"""
    model = tiny_models.save(tmp_path / "m.onnx", graph, held)
    asked = TensorRTOptions(plugins=("layernorm_gelu",))
    options = BuildOptions(backend="tensorrt", batch=BATCH, precision="fp16", tensorrt=asked)
    engine = build(model, options, store=store)
    assert any("sn72::layernorm_gelu" in note for note in engine.manifest.notes)
    x = rng.standard_normal((5, 7, 64)).astype(np.float32)
    with Session(engine) as session:
        close(session(x), expected(model, store, x))


def test_layers_and_their_times_are_told(library: Any, store: Store, tmp_path: Path) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    options = BuildOptions(backend=library, batch=BATCH, precision="fp16")
    engine = build(model, options, store=store)
    report = inspection.inspect_engine(engine.folder)
    assert report["layers"], report["layers_from"]
    assert "engine inspector" in report["layers_from"]
    found = profile(engine, ProfileOptions(batch=4, warmup=1, repeats=5))
    assert found.layers_ms > 0
    assert {layer.name for layer in found.layers} <= {layer["name"] for layer in report["layers"]}


def test_an_engine_agrees_with_the_cpu_layer_by_layer(library: Any, tmp_path: Path) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    report = compare(model, model, options=CompareOptions(other_backend=library))
    assert not report.parted, report.render()
    assert len(report.layers) == 5
