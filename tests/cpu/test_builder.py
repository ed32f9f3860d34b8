"""build() takes what it has, tries what it builds, and keeps nothing that fails."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn72engine import trial
from sn72engine.backends.onnxruntime import OnnxRuntimeBackend
from sn72engine.builder import build, check_batch, resolve_precision
from sn72engine.engine import Engine
from sn72engine.errors import BuildError, InputError
from sn72engine.model import OnnxModel, TensorSpec
from sn72engine.session import Session, load
from sn72engine.spec import BuildOptions, ShapeRange
from sn72engine.store import Store, open_engine
from sn72engine.trial import random_inputs, try_engine
from tests import tiny_models

SMALL = BuildOptions(batch=ShapeRange(1, 2, 4))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that the ONNX Runtime backend was really asked to build."""
    made: list[str] = []
    real = OnnxRuntimeBackend.build

    def counted(self, model, options, folder, *, progress=None):  # type: ignore[no-untyped-def]
        made.append(model.path.name)
        return real(self, model, options, folder, progress=progress)

    monkeypatch.setattr(OnnxRuntimeBackend, "build", counted)
    return made


def test_the_manifest_says_what_was_built(tmp_path: Path, store: Store) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    engine = build(model, SMALL, store=store)
    manifest = engine.manifest
    assert (manifest.backend, manifest.target, manifest.precision) == (
        "onnxruntime",
        "cpu",
        "fp32",
    )
    assert manifest.batch == SMALL.batch
    assert manifest.inputs == model.inputs
    assert manifest.outputs == model.outputs
    assert manifest.preprocess == model.preprocess == tiny_models.IMAGES
    assert manifest.backend_version == OnnxRuntimeBackend().version()
    assert manifest.quantization is None
    assert manifest.build_seconds > 0
    assert datetime.fromisoformat(manifest.created).utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert manifest.fingerprint["model_sha256"] == model.sha256()
    assert open_engine(engine.folder).manifest == manifest


def test_a_second_build_builds_nothing(tmp_path: Path, store: Store, builds: list[str]) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    first = build(model, SMALL, store=store)
    second = build(OnnxModel.open(model.path), SMALL, store=store)
    assert builds == ["m.onnx"]
    assert second == first


def test_whatever_identifies_it_builds_again(
    tmp_path: Path, store: Store, builds: list[str]
) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    keys = {
        build(model, SMALL, store=store).manifest.key,
        build(model, replace(SMALL, batch=ShapeRange(1, 2, 5)), store=store).manifest.key,
        build(replace(model, preprocess=tiny_models.IMAGES), SMALL, store=store).manifest.key,
    }
    proto = onnx.load(model.path)
    weight = next(t for t in proto.graph.initializer if t.name == "b")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros(3, np.float32), "b"))
    onnx.save(proto, model.path)
    keys.add(build(OnnxModel.open(model.path), SMALL, store=store).manifest.key)
    assert len(keys) == len(builds) == 4


def test_a_damaged_engine_is_built_again(tmp_path: Path, store: Store, builds: list[str]) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    engine = build(model, SMALL, store=store)
    engine.path.write_bytes(engine.path.read_bytes()[:-1])
    again = build(model, SMALL, store=store)
    assert len(builds) == 2
    assert load(again.folder)(np.zeros((1, 4), np.float32)).shape == (1, 3)


def test_the_default_store_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    engine = build(tiny_models.linear(tmp_path / "m.onnx"))
    assert engine.folder.is_relative_to(tmp_path / "cache")
    assert engine.manifest.batch == ShapeRange()


def test_a_quantised_model_carries_its_record(tmp_path: Path, store: Store) -> None:
    model = tiny_models.quantised(tmp_path / "m.onnx")
    engine = build(model, replace(SMALL, precision="int8"), store=store)
    assert engine.manifest.precision == "int8"
    assert engine.manifest.quantization == model.quantization
    # The option speaks of float models, so its default is the same build, not another.
    assert build(model, SMALL, store=store) == engine


def test_a_model_that_another_tool_quantised_is_built_as_int8(tmp_path: Path, store: Store) -> None:
    ours = tiny_models.quantised(tmp_path / "m.onnx")
    proto = onnx.load(ours.path)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    foreign = OnnxModel.open(tmp_path / "foreign.onnx")
    engine = build(foreign, SMALL, store=store)
    assert engine.manifest.precision == "int8"
    assert engine.manifest.quantization is None
    assert any("another tool" in note for note in engine.manifest.notes)
    # It was lowered for the CPU, like one of ours.
    assert any("on integers" in note for note in engine.manifest.notes)
    assert build(foreign, replace(SMALL, precision="int8"), store=store) == engine
    assert not any("another tool" in n for n in build(ours, SMALL, store=store).manifest.notes)


def test_precision_that_the_file_cannot_have(tmp_path: Path) -> None:
    plain = tiny_models.linear(tmp_path / "m.onnx")
    quantised = tiny_models.quantised(tmp_path / "q.onnx")
    with pytest.raises(BuildError, match=r"m\.onnx is fp32: run quantize first"):
        resolve_precision(plain, BuildOptions(precision="int8"))
    with pytest.raises(BuildError, match=r"q\.onnx is quantised: build it with precision='int8'"):
        resolve_precision(quantised, BuildOptions(precision="fp16"))
    for weights, precision in (("float16", "fp16"), ("bfloat16", "bf16")):
        typed = replace(plain, weights=weights)
        message = rf"m\.onnx is {weights}: build it with precision='{precision}'"
        with pytest.raises(BuildError, match=message):
            resolve_precision(typed, BuildOptions())
        assert resolve_precision(typed, BuildOptions(precision=precision)).precision == precision
    with pytest.raises(BuildError, match=r"m\.onnx is fp32: export .* \(module\.bfloat16\(\)\)"):
        resolve_precision(plain, BuildOptions(precision="bf16"))


@given(
    fixed=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3).map(sorted),
)
@settings(max_examples=60, deadline=None)
def test_a_fixed_batch_takes_that_batch_only(fixed: int, sizes: list[int]) -> None:
    spec = TensorSpec("x", "float32", (fixed, 4))
    model = OnnxModel(Path("m.onnx"), (spec,), (spec,))
    options = BuildOptions(batch=ShapeRange(*sizes))
    if set(sizes) == {fixed}:
        check_batch(model, options)
    else:
        with pytest.raises(BuildError, match=f"takes batch {fixed} only.*dynamic_batch=True"):
            check_batch(model, options)
    free = TensorSpec("x", "float32", ("N", 4))
    check_batch(OnnxModel(Path("m.onnx"), (free,), (free,)), options)


def test_a_fixed_batch_builds(tmp_path: Path, store: Store) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx", batch=3)
    engine = build(model, BuildOptions(batch=ShapeRange(3, 3, 3)), store=store)
    assert load(engine)(np.zeros((3, 4), np.float32)).shape == (3, 3)


def test_an_engine_that_gives_nan_is_not_kept(tmp_path: Path, store: Store) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    proto = onnx.load(model.path)
    weight = next(t for t in proto.graph.initializer if t.name == "b")
    bad = onnx.numpy_helper.from_array(np.array([0, np.nan, 0], np.float32), "b")
    weight.CopyFrom(bad)
    onnx.save(proto, model.path)
    with pytest.raises(BuildError, match=r"33\.3% NaN or infinite values in output 'y'"):
        build(OnnxModel.open(model.path), SMALL, store=store)
    assert store.entries() == ()


def test_an_engine_of_another_shape_is_not_kept(tmp_path: Path, store: Store) -> None:
    # Declares one row per sample and gives one in all.
    graph = """lies (float[N, 4] x) => (float[N, 4] y) {
        s = ReduceSum <keepdims = 0> (x, axis)
        y = Unsqueeze(s, axis)
    }"""
    weights = {"axis": np.array([0], np.int64)}
    model = tiny_models.save(tmp_path / "m.onnx", graph, weights)
    with pytest.raises(BuildError, match=r"output 'y' of shape \(1, 4\) at batch 4, declared as"):
        build(model, SMALL, store=store)
    assert store.entries() == ()


def test_an_engine_that_fails_at_its_largest_batch_is_not_kept(
    tmp_path: Path, store: Store
) -> None:
    # Works for one sample only: the reshape is fixed.
    graph = "one (float[N, 4] x) => (float[N, 4] y) { y = Reshape(x, shape) }"
    weights = {"shape": np.array([1, 4], np.int64)}
    model = tiny_models.save(tmp_path / "m.onnx", graph, weights)
    with pytest.raises(BuildError, match="the new engine fails at batch 4: ONNX Runtime failed"):
        build(model, SMALL, store=store)
    assert store.entries() == ()


def test_a_slow_engine_is_tried_at_its_smallest_batch_only(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LIMIT_SECONDS", 0.0)
    engine = build(tiny_models.linear(tmp_path / "m.onnx"), SMALL, store=store)
    assert any(note.startswith("not run at batch 4 and more") for note in engine.manifest.notes)


def test_an_engine_with_another_free_axis_is_kept_untried(tmp_path: Path, store: Store) -> None:
    graph = "free (float[N, T] x) => (float[N, T] y) { y = Relu(x) }"
    model = tiny_models.save(tmp_path / "m.onnx", graph, {})
    engine = build(model, SMALL, store=store)
    assert "free axis other than the batch" in engine.manifest.notes[-1]


def test_an_engine_for_another_card_is_not_tried(tmp_path: Path, store: Store) -> None:
    engine = build(tiny_models.linear(tmp_path / "m.onnx"), SMALL, store=store)
    moved = Engine(engine.folder, replace(engine.manifest, backend="tensorrt_rtx", target="sm_999"))
    assert try_engine(moved) == ("not run: it is for sm_999, which this machine does not have",)


def test_every_profile_is_tried(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(tiny_models.linear(tmp_path / "m.onnx"), SMALL, store=store)
    ranges = [{"min": 1, "opt": 1, "max": 1}, {"min": 1, "opt": 3, "max": SMALL.batch.max}]
    record = {"options": json.dumps({"profiles": ranges})}
    profiled = Engine(engine.folder, replace(engine.manifest, fingerprint=record))
    tried: list[int] = []
    monkeypatch.setattr(trial, "Session", lambda _: Session(engine))
    real = trial._run

    def run(session: Session, inputs: dict[str, Any], size: int) -> float:
        tried.append(size)
        return real(session, inputs, size)

    monkeypatch.setattr(trial, "_run", run)
    assert try_engine(profiled) == ()
    assert tried == [1, 3, SMALL.batch.max]


@given(batch=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_random_inputs_have_the_declared_types_and_shapes(batch: int, seed: int) -> None:
    specs = (
        TensorSpec("image", "float32", ("N", 3, 2)),
        TensorSpec("half", "float16", ("N", 2)),
        TensorSpec("ids", "int64", ("N", 5)),
        TensorSpec("fixed", "float32", (7,)),
        TensorSpec("scalar", "float32", ()),
    )
    arrays = random_inputs(specs, batch, seed)
    assert [(n, a.dtype.name, a.shape) for n, a in arrays.items()] == [
        ("image", "float32", (batch, 3, 2)),
        ("half", "float16", (batch, 2)),
        ("ids", "int64", (batch, 5)),
        ("fixed", "float32", (7,)),
        ("scalar", "float32", ()),
    ]
    assert all(np.isfinite(array).all() for array in arrays.values())
    same = random_inputs(specs, batch, seed)
    np.testing.assert_array_equal(arrays["image"], same["image"])


def test_random_inputs_need_sizes() -> None:
    with pytest.raises(InputError, match=r"x: float32\[N, T\] has a free axis other than"):
        random_inputs((TensorSpec("x", "float32", ("N", "T")),), 1)
