"""The engine chosen is the fastest of those that are right, and the choice is remembered."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sn72engine import _deps, cli, selection
from sn72engine.backends import tensorrt
from sn72engine.builder import build
from sn72engine.errors import InputError, OptionError, VerificationError
from sn72engine.latency import Latency
from sn72engine.model import OnnxModel
from sn72engine.selection import Candidate, Selection, select
from sn72engine.session import Session, load
from sn72engine.spec import (
    BuildOptions,
    RuntimeOptions,
    SelectOptions,
    ShapeRange,
    VerifyOptions,
)
from sn72engine.store import Store
from tests import quantized_models, tiny_models

OPENVINO = _deps.available("openvino")
needs_openvino = pytest.mark.skipif(
    not OPENVINO, reason="openvino is not installed; extra 'openvino'"
)

OPTIONS = SelectOptions(
    batch=ShapeRange(1, 2, 4),
    verify=VerifyOptions(min_speedup=None, min_cosine=0.9, min_agreement=0.0, repeats=3),
    runtime=RuntimeOptions(threads=1),
)
ORT_ONLY = dataclasses.replace(OPTIONS, backends=("onnxruntime",))
NAME = "residual_net"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def reference(tmp_path: Path) -> Session:
    engine = build(
        quantized_models.exported(NAME),
        BuildOptions(batch=OPTIONS.batch),
        store=Store(tmp_path / "reference"),
    )
    return load(engine, OPTIONS.runtime)


def both() -> dict[str, OnnxModel]:
    return {"fp32": quantized_models.exported(NAME), "int8": quantized_models.quantized(NAME)}


def data() -> list[np.ndarray]:
    return [quantized_models.images(4, seed) for seed in range(2)]


def fixed_times(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float]) -> None:
    """Let the clock say what the test wants to know the consequence of; the calls are made."""

    def interleave(calls: Any, warmup: int, repeats: int) -> dict[str, Latency]:
        for call in calls.values():
            call()
        return {name: Latency.of([milliseconds[name] / 1e3] * 3) for name in calls}

    monkeypatch.setattr(selection, "interleave", interleave)


@needs_openvino
def test_every_backend_is_tried_on_every_model(store: Store, reference: Session) -> None:
    found = select(both(), reference, data(), options=OPTIONS, store=store)
    assert {c.name for c in found.candidates} == {
        "onnxruntime fp32",
        "onnxruntime int8",
        "openvino fp32",
        "openvino int8",
    }
    assert all(c.milliseconds is not None and not c.refused for c in found.candidates)
    times = [c.milliseconds for c in found.candidates]
    assert times == sorted(times)  # type: ignore[type-var]
    assert found.engine.manifest.key == found.chosen.key
    assert found.engine.manifest.backend == found.chosen.backend
    assert {entry.key for entry in store.entries()} == {c.key for c in found.candidates}
    assert all(
        entry.manifest is not None and (entry.manifest.verification or {})["passed"]
        for entry in store.entries()
    )


@pytest.mark.parametrize("fastest", ["fp32", "int8"])
def test_the_fastest_is_taken(
    store: Store, reference: Session, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    times = {"onnxruntime fp32": 6.0, "onnxruntime int8": 6.0, f"onnxruntime {fastest}": 2.0}
    fixed_times(monkeypatch, times)
    found = select(both(), reference, data(), options=ORT_ONLY, store=store)
    assert found.chosen.model == fastest
    assert found.engine.manifest.precision == fastest
    assert "2.000 ms at batch 1, 3.00 times as fast as" in found.reason
    with load(found.engine, OPTIONS.runtime) as session:
        assert (
            session(quantized_models.images(2)).shape == reference(quantized_models.images(2)).shape
        )


def test_a_faster_engine_that_is_wrong_is_refused_with_its_figure(
    store: Store, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_times(monkeypatch, {"onnxruntime fp32": 6.0})  # a call for the other would be an error
    strict = dataclasses.replace(OPTIONS.verify, max_abs_error=1e-4)
    options = dataclasses.replace(ORT_ONLY, verify=strict)
    found = select(both(), reference, data(), options=options, store=store)
    assert found.chosen.name == "onnxruntime fp32"
    refused = found.candidates[-1]
    assert refused.name == "onnxruntime int8"
    assert "above the bound 0.0001" in refused.refused
    assert refused.milliseconds is None
    assert found.reason == "onnxruntime fp32 is the only one that keeps the bounds; 1 refused"
    assert f"  onnxruntime int8: refused, {refused.refused}" in found.render().splitlines()
    assert json.loads(json.dumps(found.to_dict()))["chosen"] == "onnxruntime fp32"


def test_none_left_is_an_error_with_every_reason(store: Store) -> None:
    def negated(batch: np.ndarray) -> np.ndarray:
        return np.asarray(-batch.mean((1, 2, 3))[:, None].repeat(5, 1))

    model = tiny_models.convolution(store.root.parent / "m.onnx")
    with pytest.raises(VerificationError, match=r"onnxruntime fp32: refused, .*below the bound"):
        select(model, negated, data(), options=ORT_ONLY, store=store)
    assert not list(store.root.glob("selections/*"))


def test_a_model_that_a_backend_cannot_build_is_a_row(
    tmp_path: Path, store: Store, reference: Session
) -> None:
    proto = onnx.load(quantized_models.exported(NAME).path)
    proto.graph.node[0].op_type = "Frobnicate"
    onnx.save(proto, tmp_path / "bad.onnx")
    models = {"bad": OnnxModel.open(tmp_path / "bad.onnx"), "fp32": both()["fp32"]}
    found = select(models, reference, data(), options=ORT_ONLY, store=store)
    assert found.chosen.model == "fp32"
    assert "Frobnicate" in found.candidates[-1].refused


def test_a_backend_that_is_not_installed_is_a_row_with_the_command(
    store: Store, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = _deps.Dependency("no_such_module", ("no-such-package",), "1", "openvino")
    monkeypatch.setitem(_deps.DEPENDENCIES, "openvino", absent)
    monkeypatch.setattr(_deps, "available", lambda module: module != "openvino")
    found = select(both()["fp32"], reference, data(), options=OPTIONS, store=store)
    assert found.chosen.name == "onnxruntime fp32"
    assert "pip install 'sn72engine[openvino]'" in found.candidates[-1].refused


def test_a_backend_without_its_card_is_a_row_with_the_reason(
    store: Store, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "device_target", lambda: None)
    real = _deps.available
    monkeypatch.setattr(_deps, "available", lambda name: name == "tensorrt" or real(name))
    options = dataclasses.replace(ORT_ONLY, backends=("onnxruntime", "tensorrt"))
    found = select(both()["fp32"], reference, data(), options=options, store=store)
    assert found.chosen.name == "onnxruntime fp32"
    assert "no CUDA device is present" in found.candidates[-1].refused
    assert select(both()["fp32"], never, [], options=options, store=store).remembered


@pytest.mark.parametrize(
    ("card", "installed", "expected"),
    [
        (None, {"tensorrt"}, {"onnxruntime", "openvino"}),
        ("sm_90", {"tensorrt"}, {"onnxruntime", "openvino", "tensorrt"}),
        ("sm_90", set(), {"onnxruntime", "openvino"}),
    ],
)
def test_backends_take_part_where_they_can_run(
    monkeypatch: pytest.MonkeyPatch, card: str | None, installed: set[str], expected: set[str]
) -> None:
    monkeypatch.setattr(selection, "device_target", lambda: card)
    monkeypatch.setattr(_deps, "available", lambda name: name in installed)
    # Inductor takes no part: it builds from a program, not from an ONNX file.
    assert set(selection.backends_here()) == expected


def test_a_float_model_is_built_in_half_precision_for_a_card(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BuildOptions] = []
    monkeypatch.setattr(selection, "build", lambda model, wanted, **_: asked.append(wanted))
    for backend in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
        for model in both().values():
            selection._build(model, backend, OPTIONS, store)  # type: ignore[arg-type]
    assert [options.precision for options in asked] == ["fp32", "int8", *["fp16", "int8"] * 2]


def test_labels_decide_too(store: Store, reference: Session) -> None:
    answers = np.concatenate([reference(batch).argmax(1) for batch in data()])
    # Demands more correct answers than the reference, which has all of them, can have.
    bound = dataclasses.replace(OPTIONS.verify, max_top1_drop=-1.0)
    options = dataclasses.replace(ORT_ONLY, verify=bound)
    with pytest.raises(VerificationError, match="top-1 accuracy"):
        select(both()["fp32"], reference, data(), labels=answers, options=options, store=store)
    assert select(both()["fp32"], reference, data(), options=options, store=store).chosen


# ---- memory ---------------------------------------------------------------------------------


def never(batch: np.ndarray) -> np.ndarray:
    raise AssertionError("a remembered choice must not be measured again")


@pytest.fixture
def chosen(store: Store, reference: Session) -> Selection:
    return select(both(), reference, data(), options=ORT_ONLY, store=store)


def test_a_second_call_measures_nothing(store: Store, chosen: Selection) -> None:
    again = select(both(), never, iter(()), options=ORT_ONLY, store=store)
    assert again.remembered
    assert not chosen.remembered
    assert again.engine == chosen.engine
    assert again.candidates == chosen.candidates
    assert "(remembered)" in again.render()


def test_an_evicted_engine_is_built_again_without_measuring(
    store: Store, chosen: Selection
) -> None:
    store.remove(chosen.engine.manifest.key)
    again = select(both(), never, [], options=ORT_ONLY, store=store)
    assert again.engine.manifest.key == chosen.engine.manifest.key
    assert store.check(again.engine.manifest.key) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"fresh": True},
        {"batch": ShapeRange(1, 2, 5)},
        {"runtime": RuntimeOptions(threads=2)},
        {"verify": dataclasses.replace(OPTIONS.verify, min_cosine=0.91)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_options_measure_again(
    store: Store, chosen: Selection, reference: Session, change: dict[str, Any]
) -> None:
    options = dataclasses.replace(ORT_ONLY, **change)
    assert not select(both(), reference, data(), options=options, store=store).remembered


def test_another_version_or_processor_or_model_measures_again(
    store: Store, chosen: Selection, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not select(both()["fp32"], reference, data(), options=ORT_ONLY, store=store).remembered
    assert select(both(), never, [], options=ORT_ONLY, store=store).remembered
    with monkeypatch.context() as patch:
        patch.setattr(selection, "cpu_name", lambda: "another processor")
        assert not select(both(), reference, data(), options=ORT_ONLY, store=store).remembered
    with monkeypatch.context() as patch:
        patch.setattr(selection, "card_name", lambda: "another card")
        assert not select(both(), reference, data(), options=ORT_ONLY, store=store).remembered
    real = _deps.version
    monkeypatch.setattr(_deps, "version", lambda module: f"{real(module)}.post1")
    assert not select(both(), reference, data(), options=ORT_ONLY, store=store).remembered


@pytest.mark.parametrize("text", ["", "{}", '{"format": 0}', '{"format": 1, "candidates": []}'])
def test_a_damaged_memory_is_replaced(
    store: Store, chosen: Selection, reference: Session, text: str
) -> None:
    (path,) = store.root.glob("selections/*.json")
    path.write_text(text)
    assert not select(both(), reference, data(), options=ORT_ONLY, store=store).remembered
    assert select(both(), never, [], options=ORT_ONLY, store=store).remembered


# ---- arguments ------------------------------------------------------------------------------


def test_data_that_can_be_read_once_only_is_refused(store: Store, reference: Session) -> None:
    with pytest.raises(InputError, match="read only once"):
        select(both(), reference, iter(data()), options=ORT_ONLY, store=store)


def test_nothing_to_choose_from_is_refused(store: Store, reference: Session) -> None:
    with pytest.raises(InputError, match="nothing to choose from"):
        select({}, reference, data(), options=ORT_ONLY, store=store)
    with pytest.raises(InputError, match="batches is empty"):
        select(both(), reference, [], options=ORT_ONLY, store=store)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backends": ()}, "at least one"),
        ({"backends": ("openvino", "openvino")}, "none twice"),
        ({"backends": ("magic",)}, "'magic' is not one of onnxruntime, openvino, tensorrt"),
        ({"verify": VerifyOptions()}, "min_speedup=1.0 must be None"),
        ({"batch": ShapeRange(2, 2, 2)}, r"verify\.batch=1 is to be timed"),
        ({"fresh": 1.5}, "fresh=1.5"),
    ],
)
def test_a_bad_option_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SelectOptions(**values)


def test_options_survive_json() -> None:
    assert SelectOptions.from_dict(json.loads(json.dumps(OPTIONS.to_dict()))) == OPTIONS


def test_order_is_by_time_with_the_refused_last() -> None:
    rows = [
        Candidate("a", "onnxruntime", refused="wrong"),
        Candidate("b", "onnxruntime", milliseconds=3.0),
        Candidate("c", "openvino", milliseconds=2.0),
        Candidate("d", "openvino", milliseconds=2.0),
    ]
    assert [c.model for c in sorted(rows, key=selection._by_time)] == ["c", "d", "b", "a"]


# ---- command line ---------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    np.savez(tmp_path / "data.npz", images=quantized_models.images(8))
    return {name: str(model.path) for name, model in both().items()} | {
        "data": str(tmp_path / "data.npz")
    }


def test_the_command_line_chooses(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", files["fp32"], "--backend", "auto", "--quantized", files["int8"]]
    command += ["--data", files["data"], "--batch", "1:2:4", "--threads", "1"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == found["selection"]["engine"]
    assert len(found["selection"]["candidates"]) == 4
    assert cli.main(command) == 0
    assert "(remembered)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--backend", "auto"], "give some with --data"),
        (["--backend", "auto", "--data", "x", "--target", "cuda"], "leave out --target"),
        (["--backend", "auto", "--data", "x", "--precision", "int8"], "chooses the precision"),
        (["--data", "x"], "--data and --quantized belong to --backend auto"),
    ],
)
def test_the_command_line_says_what_is_missing(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert cli.main(["build", files["fp32"], *extra]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_wants_the_float_file(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", files["int8"], "--backend", "auto", "--data", files["data"]]
    assert cli.main(command) == 2
    assert "the Q/DQ file with --quantized" in capsys.readouterr().err
