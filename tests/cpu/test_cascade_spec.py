from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn72engine.cascade.spec import PRESETS, CascadeSpec, StageSpec
from sn72engine.errors import OptionError
from sn72engine.stages.ocr import OcrOptions

FULL = """
deadline: 7.5
max_batch: 16
decision_threshold: 0.43
stages:
  - name: small
    engine: engines/small
    score: sigmoid
  - name: large
    engine: /abs/large
    score: softmax
    positive: 0
    low: 0.3
    high: 0.6
    combine: weighted
    weight: 0.4
  - name: signs
    ocr: {keywords: [road work], min_confidence: 0.7}
    combine: positive_only
    when: text_visible
  - name: vlm
    vlm: {url: "http://127.0.0.1:8000/v1", model: qwen}
    when: is_video
  - name: mine
"""


def test_a_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "road.yaml"
    path.write_text(FULL)
    spec = CascadeSpec.from_yaml(path)
    assert (spec.deadline, spec.max_batch, spec.decision_threshold) == (7.5, 16, 0.43)
    small, large, signs, vlm, mine = spec.stages
    assert small.engine == str(tmp_path / "engines/small")
    assert small.thresholds == (0.15, 0.85)
    assert (large.engine, large.positive, large.thresholds) == ("/abs/large", 0, (0.3, 0.6))
    assert signs.ocr == OcrOptions(("road work",), min_confidence=0.7)
    assert signs.thresholds == (0.0, 0.85)
    assert vlm.vlm is not None
    assert vlm.vlm.model == "qwen"
    assert mine == StageSpec("mine")
    assert spec.triggers == ("text_visible", "is_video")
    assert CascadeSpec.from_yaml(str(path)) == spec


def test_text_is_relative_to_the_current_folder() -> None:
    assert CascadeSpec.from_yaml(FULL).stages[0].engine == str(Path("engines/small").absolute())


def test_a_spec_holds_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "road.yaml").write_text(FULL)
    monkeypatch.chdir(tmp_path)
    spec = CascadeSpec.from_yaml("road.yaml")
    monkeypatch.chdir("/")
    assert spec.stages[0].engine == str(tmp_path / "engines" / "small")


def test_round_trip_through_json() -> None:
    spec = CascadeSpec.from_yaml(FULL)
    assert CascadeSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_yaml_that_is_written_reads_back_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    spec = CascadeSpec.from_yaml(FULL)
    stages = list(spec.stages)
    stages[0] = dataclasses.replace(stages[0], engine=str(tmp_path / "engines/small"))
    spec = dataclasses.replace(spec, stages=tuple(stages))
    text = spec.to_yaml(folder)
    assert "engine: ../engines/small\n" in text
    assert "engine: /abs/large\n" in text
    assert "max_side" not in text  # a default
    path = folder / "road.yaml"
    path.write_text(text)
    again = CascadeSpec.from_yaml(path)
    first = again.stages[0]
    assert first.engine is not None
    assert Path(first.engine).resolve() == (tmp_path / "engines/small").resolve()
    assert again.stages[1:] == spec.stages[1:]
    assert (again.deadline, again.max_batch) == (spec.deadline, spec.max_batch)


def stage(**keys: Any) -> dict[str, Any]:
    return {"name": "b", **keys}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (stage(low=1.5), "cascade.stages[1].low=1.5 must be a finite number in [0.0, 1.0]"),
        (stage(low=math.nan), "cascade.stages[1].low=nan must be a finite number"),
        (stage(high=-0.1), "cascade.stages[1].high=-0.1 must be a finite number"),
        (stage(high=True), "cascade.stages[1].high=True must be a finite number"),
        (stage(low="x"), "cascade.stages[1].low='x' must be a finite number"),
        (stage(low=0.9, high=0.1), "cascade.stages[1].low=0.9 must not exceed high=0.1"),
        (stage(combine="vote"), "cascade.stages[1].combine='vote' is not one of replace, weighted"),
        (stage(weight=0), "cascade.stages[1].weight=0 must be greater than 0"),
        (stage(weight=-1.0), "cascade.stages[1].weight=-1.0 must be greater than 0"),
        (stage(weight=math.inf), "cascade.stages[1].weight=inf must be a finite number"),
        (stage(score="logit", engine="e"), "cascade.stages[1].score='logit' is not one of"),
        (stage(engine="e"), "cascade.stages[1].score=None must say how"),
        (stage(engine="", score="sigmoid"), "cascade.stages[1].engine='' must be the path"),
        (stage(score="sigmoid"), "cascade.stages[1].score='sigmoid' applies to an engine"),
        (stage(positive=-1), "cascade.stages[1].positive=-1 must be an integer >= 0"),
        (stage(when=""), "cascade.stages[1].when='' must be 1 to 64"),
        (stage(when=None), "cascade.stages[1].when=None must be 1 to 64"),
        ({"name": "b b"}, "cascade.stages[1].name='b b' must be 1 to 64"),
        ({"name": 3}, "cascade.stages[1].name=3 must be 1 to 64"),
        ({"name": "a"}, "cascade.stages[1].name='a' is used twice"),
        ({}, "cascade.stages[1]: missing key 'name'"),
        (stage(lo=0.1), "cascade.stages[1]: unknown key 'lo'; known: name, engine"),
        ("b", "cascade.stages[1]: expected a mapping, got str"),
        (
            stage(combine="positive_only", low=0.1),
            "cascade.stages[1].low=0.1 must be 0 with combine='positive_only'",
        ),
        (
            stage(ocr={"keywords": ["road"]}, engine="e", score="sigmoid"),
            "cascade.stages[1].engine= and ocr= exclude each other",
        ),
        (stage(ocr={"keywords": []}), "cascade.stages[1].ocr: keywords=() must be a list"),
        (stage(ocr="road"), "cascade.stages[1].ocr='road' must be a mapping"),
        (stage(vlm={"url": "ftp://x", "model": "m"}), "vlm: url='ftp://x' must start with http"),
        (stage(score="top1"), "cascade.stages[1].score='top1' cannot follow stages[0].score=None"),
    ],
)
def test_a_bad_stage_is_named_in_full(changed: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        CascadeSpec.from_dict({"stages": [{"name": "a"}, changed]})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stages": []}, "cascade.stages=() must hold at least one stage"),
        ({"stages": "a"}, "cascade.stages='a' must hold"),
        ({}, "cascade: missing key 'stages'"),
        ({"stages": [{"name": "a"}], "deadlin": 1}, "cascade: unknown key 'deadlin'"),
        ({"stages": [{"name": "a"}], "deadline": 0}, "cascade.deadline=0 must be greater than 0"),
        ({"stages": [{"name": "a"}], "deadline": "8s"}, "cascade.deadline='8s' must be a finite"),
        ({"stages": [{"name": "a"}], "max_batch": 0}, "cascade.max_batch=0 must be an integer"),
        (
            {"stages": [{"name": "a"}], "decision_threshold": 2},
            "cascade.decision_threshold=2 must be a finite number",
        ),
        (
            {"stages": [{"name": "a", "combine": "positive_only"}]},
            "cascade.stages[0].combine='positive_only' has nothing to raise",
        ),
        (
            {"stages": [{"name": "a", "score": "top1", "combine": "weighted"}]},
            "cascade.stages[0].combine='weighted' must be 'replace'",
        ),
        (
            {"stages": [{"name": "a", "score": "top1", "low": 0.2}]},
            "cascade.stages[0].low=0.2 must be 0 with score='top1'",
        ),
        ({"stages": [{"name": "a"}], "preset": "fast"}, "cascade.preset='fast' is not one of"),
        (
            {"stages": [{"name": "a", "high": 0.7}], "preset": "speed"},
            "cascade.stages[0].high=0.7 cannot stand beside preset='speed'",
        ),
    ],
)
def test_a_bad_cascade_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        CascadeSpec.from_dict(keys)
    assert message in str(caught.value)


def test_python_objects_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(OptionError, match=r"stages\[0\]='a' must be a StageSpec"):
        CascadeSpec(("a",))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="stages="):
        CascadeSpec([StageSpec("a")])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages:\n - name: [\n", "not valid YAML"),
        ("- a\n- b\n", "cascade: expected a mapping, got list"),
        ("\n", "cascade: expected a mapping, got NoneType"),
        ("stages: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_bad_yaml(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CascadeSpec.from_yaml(text)


def test_a_message_about_a_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"absent\.yaml: cannot read"):
        CascadeSpec.from_yaml(tmp_path / "absent.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("stages: [{name: a, low: 2}]")
    with pytest.raises(OptionError, match=r"bad\.yaml: cascade\.stages\[0\]\.low=2 must be"):
        CascadeSpec.from_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="cannot read"):
        CascadeSpec.from_yaml(path)


def test_presets() -> None:
    spec = CascadeSpec.from_yaml(FULL)
    speed = spec.with_preset("speed")
    assert [(s.name, s.thresholds) for s in speed.stages] == [("small", (0.10, 0.90))]
    accuracy = spec.with_preset("accuracy")
    assert [s.name for s in accuracy.stages] == [s.name for s in spec.stages]
    assert {s.thresholds for s in accuracy.stages if s.negative_exit} == {(0.20, 0.80)}
    assert accuracy.stages[2].thresholds == (0.0, 0.80)
    assert accuracy.triggers == spec.triggers
    video = spec.with_preset("video")
    assert video.triggers == ("text_visible",)
    assert video.stages[0].thresholds == (0.15, 0.85)
    assert set(PRESETS) == {"speed", "accuracy", "video"}
    # What a preset does not set stays.
    assert accuracy.deadline == 7.5
    assert accuracy.stages[1].weight == 0.4


def test_a_preset_in_a_file() -> None:
    spec = CascadeSpec.from_yaml("preset: accuracy\nstages: [{name: a}, {name: b}]\n")
    assert [s.thresholds for s in spec.stages] == [(0.2, 0.8)] * 2


def test_specs_are_frozen() -> None:
    spec = CascadeSpec((StageSpec("a"),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.deadline = 1.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.stages[0].low = 0.5  # type: ignore[misc]


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["stages", "name", "low", "high", "ocr", "vlm", "engine", "when"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_plain_data_makes_a_spec_or_an_option_error(values: Any) -> None:
    try:
        spec = CascadeSpec.from_dict(values)
    except OptionError:
        return
    assert CascadeSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    "module", ["cascade.spec", "cascade", "cascade.cascade", "stages.engine", "stages.scoring"]
)
def test_import_is_light(module: str) -> None:
    code = (
        f"import sys, sn72engine.{module}\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'rapidocr', 'cv2', 'tensorrt', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


GROUPED = """
stages:
  - {name: small}
  - {name: left, group: second, low: 0.2, high: 0.8}
  - {name: right, group: second, combine: weighted}
  - {name: signs, group: second, combine: positive_only}
  - {name: large, group: third}
"""


def test_stages_with_the_same_group_run_side_by_side() -> None:
    spec = CascadeSpec.from_yaml(GROUPED)
    assert spec.groups == ((0,), (1, 2, 3), (4,))
    assert CascadeSpec.from_yaml(spec.to_yaml()) == spec
    assert StageSpec("a").group is None


def test_a_preset_sets_the_thresholds_of_a_group_once() -> None:
    spec = CascadeSpec.from_yaml(GROUPED).with_preset("accuracy")
    assert [s.low for s in spec.stages] == [0.2, 0.2, None, None, 0.2]
    assert [s.high for s in spec.stages] == [0.8, 0.8, 0.85, 0.85, 0.8]


def beside(**keys: Any) -> StageSpec:
    return StageSpec("b", group="g", **{"combine": "weighted", **keys})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((StageSpec("a", group="g"), beside(low=0.1)), r"stages\[1\].low=0.1, high=0.85: group"),
        ((StageSpec("a", group="g"), beside(high=0.9)), r"thresholds of stages\[0\]; set them"),
        ((StageSpec("a", group="g"), beside(combine="replace")), r"would discard what stages\[0\]"),
        (
            (StageSpec("a", group="g"), StageSpec("c"), beside()),
            r"stages\[2\].group='g' is used before",
        ),
        (
            (StageSpec("a"), StageSpec("c", group="g", combine="positive_only"), beside()),
            r"put stages\[2\] before it",
        ),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(
    stages: tuple[StageSpec, ...], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        CascadeSpec(stages)


def test_a_group_has_a_short_name() -> None:
    with pytest.raises(OptionError, match="group='a b' must be 1 to 64 letters"):
        StageSpec("a", group="a b")
