"""Refitting gives what building with the weights would have given, or says why it cannot.

The library needs a card to refit, so a stand-in takes its place at that boundary.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sn72engine import fingerprint, refitter
from sn72engine.backends import tensorrt, tensorrt_engine, tensorrt_runner
from sn72engine.backends.tensorrt import TensorRTBackend
from sn72engine.builder import build
from sn72engine.engine import Engine
from sn72engine.errors import BuildError
from sn72engine.model import OnnxModel
from sn72engine.refitter import refit
from sn72engine.session import Session
from sn72engine.spec import BuildOptions, Refit, ShapeRange, TensorRTOptions
from sn72engine.store import Store
from tests import tiny_models
from tests.fake_tensorrt import Arrays, HostDevice, Library, Plan

BATCH = ShapeRange(1, 4, 8)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    def double(inputs: Arrays) -> Arrays:
        return {"y": 2 * inputs["x"][:, :3]}

    made = Library(double)
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(TensorRTBackend, "_library", lambda self: made)
    monkeypatch.setattr(TensorRTBackend, "version", lambda self: "11.4.0")
    monkeypatch.setattr(tensorrt_runner, "Device", HostDevice)
    for module in (tensorrt, tensorrt_engine):
        monkeypatch.setattr(module, "device_target", lambda index=None: "sm_90")
    monkeypatch.setattr("sn72engine.cards.device_target", lambda *_: "sm_90")
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def model(tmp_path: Path) -> OnnxModel:
    return tiny_models.linear(tmp_path / "m.onnx")


def options(kind: Refit = "identical", *, strip: bool = True) -> BuildOptions:
    asked = TensorRTOptions(refit=kind, strip_weights=strip)
    return BuildOptions(backend="tensorrt", batch=BATCH, tensorrt=asked)


def stripped(
    model: OnnxModel, folder: Path, kind: Refit = "identical", **changes: object
) -> Engine:
    """An engine as a machine with the card would have built it, and left its weights out."""
    plan = Plan(
        profiles=[{"x": [[1, 4], [4, 4], [8, 4]]}],
        outputs={"y": ["batch", 3]},
        **changes,  # type: ignore[arg-type]
    )
    backend = TensorRTBackend("tensorrt")
    asked = options(kind)
    whole = build(model, BuildOptions(batch=BATCH), store=Store(folder / "plain"))
    record = fingerprint.of(model, asked, backend)
    (folder / "stripped").mkdir()
    (folder / "stripped" / "model.engine").write_bytes(plan.to_bytes())
    manifest = replace(
        whole.manifest,
        key=record.key,
        backend="tensorrt",
        backend_version="11.4.0",
        target="sm_90",
        files=(replace(whole.manifest.files[0], name="model.engine"),),
        fingerprint=record.to_dict(),
    )
    return Engine(folder / "stripped", manifest)


def test_weights_are_put_in_and_the_engine_kept_as_a_whole_one(
    library: Library, model: OnnxModel, store: Store, tmp_path: Path
) -> None:
    engine = stripped(model, tmp_path)
    assert engine.manifest.stripped
    before = engine.path.read_bytes()
    made = refit(engine, model, store=store)
    assert json.loads(made.path.read_bytes())["weights"] == str(model.path)
    assert not made.manifest.stripped
    wanted = fingerprint.of(model, options(strip=False), TensorRTBackend("tensorrt"))
    assert made.manifest.key == wanted.key
    assert engine.path.read_bytes() == before
    with Session(made) as session:
        x = np.ones((2, 4), np.float32)
        np.testing.assert_array_equal(session(x), np.full((2, 3), 2, np.float32))
    count = len(library.engines)
    assert refit(engine, model, store=store).manifest == made.manifest
    assert len(library.engines) == count  # taken from the store


def test_other_weights_need_an_engine_that_takes_any(
    library: Library, model: OnnxModel, store: Store, tmp_path: Path
) -> None:
    other = tiny_models.linear(tmp_path / "other.onnx", record={"export": {"run": 2}})
    assert other.sha256() != model.sha256()
    with pytest.raises(BuildError, match=r"other\.onnx is not the model .* refit='any'"):
        refit(stripped(model, tmp_path), other, store=store)
    assert store.entries() == ()
    (tmp_path / "any").mkdir()
    engine = stripped(model, tmp_path / "any", "any")
    first, second = (refit(engine, given, store=store) for given in (model, other))
    assert first.manifest.key != second.manifest.key
    assert json.loads(second.path.read_bytes())["weights"] == str(other.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refuse": ["refit_from_file"]}, "do not fit .*weight w has another shape"),
        ({"missing": ["w", "b"]}, r"2 weights of .* are not in the model: b, w"),
        ({"refuse": ["refit_cuda_engine"]}, "cannot be refitted: .*refit failed"),
    ],
)
def test_what_the_library_refuses_is_said(
    library: Library,
    model: OnnxModel,
    store: Store,
    tmp_path: Path,
    changes: dict[str, list[str]],
    message: str,
) -> None:
    with pytest.raises(BuildError, match=message):
        refit(stripped(model, tmp_path, **changes), model, store=store)
    assert store.entries() == ()


def test_an_engine_that_was_not_built_for_it(model: OnnxModel, store: Store) -> None:
    engine = build(model, BuildOptions(batch=BATCH), store=store)
    with pytest.raises(BuildError, match=r"not built to be refitted: .*strip_weights=True"):
        refit(engine, model, store=store)


def test_another_card_is_refused(
    library: Library,
    model: OnnxModel,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = stripped(model, tmp_path)
    monkeypatch.setattr(tensorrt, "device_target", lambda index=None: None)
    with pytest.raises(BuildError, match="refitted on that card, and this machine has none"):
        refit(engine, model, store=store)


def test_refit_is_part_of_the_package() -> None:
    import sn72engine

    assert sn72engine.refit is refitter.refit
