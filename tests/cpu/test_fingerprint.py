"""A fingerprint must change with everything that matters, and with nothing else."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn72engine import fingerprint
from sn72engine.errors import EngineMismatchError, OptionError
from sn72engine.fingerprint import Fingerprint, canonical_json, check, compare
from sn72engine.model import OnnxModel
from sn72engine.spec import BuildOptions, Preprocess, ShapeRange, TensorRTOptions

SHA256 = st.text("0123456789abcdef", min_size=64, max_size=64)
TEXT = st.text(min_size=1, max_size=12)
NUMBER = st.integers(-10, 10) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
BUILD = st.dictionaries(st.sampled_from(["batch", "precision", "level"]), JSON).map(canonical_json)
VERSION = st.from_regex(r"\d{1,2}(\.\d{1,2}){0,3}(\.post1|\+cu13)?", fullmatch=True)
BACKEND = st.sampled_from(["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "other"])
FINGERPRINT = st.builds(
    Fingerprint, SHA256, SHA256, BUILD, BACKEND, VERSION, TEXT, st.integers(0, 3)
)


class StubBackend:
    """The three answers that a fingerprint asks of a backend."""

    name = "onnxruntime"

    def __init__(self, version: str = "1.31.1") -> None:
        self._version = version

    def version(self) -> str:
        return self._version

    def target(self, options: BuildOptions) -> str:
        return options.resolved_target


@pytest.fixture
def model(tmp_path: Path) -> OnnxModel:
    return save_onnx(tmp_path / "model.onnx", weight=1.0)


def save_onnx(path: Path, weight: float, *, external: bool = False) -> OnnxModel:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.full((4, 4), weight, np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weights])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save_model(proto, path, save_as_external_data=external, location="w.bin", size_threshold=0)
    return OnnxModel.open(path)


@given(FINGERPRINT)
def test_survives_json(stored: Fingerprint) -> None:
    read = Fingerprint.from_dict(json.loads(json.dumps(stored.to_dict())))
    assert read == stored
    assert read.key == stored.key
    assert len(read.key) == 32
    assert set(read.key) <= set("0123456789abcdef")


@given(FINGERPRINT, FINGERPRINT)
def test_keys_are_equal_exactly_when_there_is_no_mismatch(a: Fingerprint, b: Fingerprint) -> None:
    assert (a.key == b.key) == (a == b) == (compare(a, b) == ())
    assert compare(a, a) == ()


@given(FINGERPRINT, FINGERPRINT, st.sampled_from(dataclasses.fields(Fingerprint)))
def test_any_one_field_changes_the_key_and_is_explained(
    a: Fingerprint, b: Fingerprint, field: dataclasses.Field[object]
) -> None:
    old, new = getattr(a, field.name), getattr(b, field.name)
    changed = dataclasses.replace(a, **{field.name: new})
    assert (changed.key != a.key) == (old != new)
    for mismatch in compare(a, changed):
        assert mismatch.field.split(".")[0] == field.name
        assert mismatch.stored in mismatch.message
        assert mismatch.wanted in mismatch.message
        assert "build again" in mismatch.message or "may be used" in mismatch.message
        assert mismatch.kind == "hard" or field.name == "backend_version"


@pytest.mark.parametrize(
    ("backend", "stored", "wanted", "kind"),
    [
        ("onnxruntime", "1.31.1", "1.31.2", "soft"),
        ("onnxruntime", "1.31.1", "1.31", "soft"),
        ("onnxruntime", "1.31.1", "1.31.1+cpu", "soft"),
        ("onnxruntime", "1.30.1", "1.31.1", "hard"),
        ("onnxruntime", "2.31.1", "1.31.1", "hard"),
        ("openvino", "2026.4.0", "2026.4.1", "soft"),
        ("openvino", "2026.3.0", "2026.4.0", "hard"),
        ("tensorrt", "10.13.2.6", "10.13.3.9", "hard"),
        ("tensorrt", "10.13.3", "10.13.3.9", "hard"),
        ("tensorrt", "10.13.3.9", "10.13.3.9.post1", "soft"),
        ("tensorrt", "10.13.3.9", "11.0.0.1", "hard"),
        ("tensorrt_rtx", "1.7.1.116", "1.7.2.1", "hard"),
        ("tensorrt_rtx", "1.7.1.116", "1.7.1.116+cu13", "soft"),
        ("unheard_of", "1.0.0", "1.0.1", "hard"),
        ("onnxruntime", "nightly", "1.31.1", "hard"),
    ],
)
def test_version_rules(backend: str, stored: str, wanted: str, kind: str) -> None:
    old = Fingerprint("a" * 64, "b" * 64, "{}", backend, stored, "cpu-linux-x86_64")
    new = dataclasses.replace(old, backend_version=wanted)
    for mismatches in (compare(old, new), compare(new, old)):
        assert [m.kind for m in mismatches] == [kind]
    if kind == "hard":
        with pytest.raises(EngineMismatchError, match=f"{stored}.*{wanted}".replace("+", r"\+")):
            check(old, new)
    else:
        assert check(old, new) == compare(old, new)


def test_another_backend_with_an_equal_version_number_is_hard() -> None:
    old = Fingerprint("a" * 64, "b" * 64, "{}", "tensorrt", "1.7.1", "sm_89-linux-x86_64")
    new = dataclasses.replace(old, backend="tensorrt_rtx")
    assert [(m.field, m.kind) for m in compare(old, new)] == [("backend", "hard")]
    newer = dataclasses.replace(new, backend_version="1.7.1+cu13")
    assert all(m.kind == "hard" for m in compare(old, newer))


def test_option_mismatch_names_the_option() -> None:
    old = Fingerprint("a" * 64, "b" * 64, '{"batch":1,"level":true}', "b", "1", "cpu")
    new = dataclasses.replace(old, options='{"level":1,"precision":"fp16"}')
    assert [(m.field, m.stored, m.wanted) for m in compare(old, new)] == [
        ("options.batch", "1", "absent"),
        ("options.level", "true", "1"),
        ("options.precision", "absent", '"fp16"'),
    ]


@given(NUMBER, NUMBER)
def test_equal_numbers_have_one_text(a: float, b: float) -> None:
    assert (canonical_json([a]) == canonical_json([b])) == (a == b)


@given(st.dictionaries(TEXT, JSON))
def test_canonical_json_ignores_key_order(values: dict[str, object]) -> None:
    assert canonical_json(dict(reversed(values.items()))) == canonical_json(values)
    assert canonical_json(json.loads(canonical_json(values))) == canonical_json(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_json_lacks(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_sha256", "A" * 64),
        ("model_sha256", "a" * 63),
        ("preprocess_sha256", None),
        ("options", "{ }"),
        ("options", "{"),
        ("options", None),
        ("backend", ""),
        ("backend_version", 1),
        ("target", ""),
        ("format", True),
        ("format", -1),
    ],
)
def test_refuses_fields_of_the_wrong_kind(field: str, value: object) -> None:
    good = Fingerprint("a" * 64, "b" * 64, "{}", "onnxruntime", "1.31.1", "cpu")
    with pytest.raises(OptionError, match=field):
        Fingerprint.from_dict({**good.to_dict(), field: value})


def test_of_equal_inputs_is_equal(model: OnnxModel, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.onnx"
    copy.write_bytes(model.path.read_bytes())
    first = fingerprint.of(model, BuildOptions(), StubBackend())
    second = fingerprint.of(OnnxModel.open(copy), BuildOptions(target="cpu"), StubBackend())
    assert first == second
    assert first.key == second.key
    assert first.target == f"cpu-{platform.system()}-{platform.machine()}".lower()


def test_of_holds_whole_floats_and_integers_equal(model: OnnxModel) -> None:
    def key(mean: tuple[float, float, float]) -> str:
        made = dataclasses.replace(model, preprocess=Preprocess(mean=mean))
        return fingerprint.of(made, BuildOptions(), StubBackend()).key

    assert key((127, 127, 127)) == key((127.0, 127.0, 127.0))
    assert key((127, 127, 127)) != key((127, 127, 127.5))


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("options.batch", BuildOptions(batch=ShapeRange(1, 4, 16))),
        ("options.precision", BuildOptions(precision="fp16")),
        ("options.workspace_bytes", BuildOptions(workspace_bytes=1 << 30)),
        ("options.optimization_level", BuildOptions(optimization_level=5)),
        ("target", BuildOptions(target="cuda")),
    ],
)
def test_of_tells_build_options_apart(model: OnnxModel, field: str, options: BuildOptions) -> None:
    stored = fingerprint.of(model, BuildOptions(), StubBackend())
    wanted = fingerprint.of(model, options, StubBackend())
    assert [m.field for m in compare(stored, wanted)] == [field]


#: A value for each option that differs from its default; the others must go with it.
TENSORRT = {
    "tactic_bytes": {"tactic_bytes": 1 << 20},
    "max_tactics": {"max_tactics": 3},
    "tactic_sources": {"tactic_sources": ()},
    "tiling": {"tiling": "fast"},
    "l2_tiling_bytes": {"l2_tiling_bytes": 1},
    "aux_streams": {"aux_streams": 0},
    "hardware_compatibility": {"hardware_compatibility": "ampere_plus"},
    "version_compatible": {"version_compatible": True},
    "exclude_lean_runtime": {"version_compatible": True, "exclude_lean_runtime": True},
    "weight_streaming": {"weight_streaming": True},
    "refit": {"refit": "any"},
    "strip_weights": {"refit": "any", "strip_weights": True},
    "profiling": {"profiling": "none"},
    "user_allocation": {"user_allocation": True},
    "plugins": {"plugins": ("layernorm_gelu",)},
}


def test_every_tensorrt_option_makes_another_engine(model: OnnxModel) -> None:
    assert set(TENSORRT) == {f.name for f in dataclasses.fields(TensorRTOptions)}
    default = BuildOptions(backend="tensorrt")
    ranges = (ShapeRange(1, 1, 1), ShapeRange(2, 8, 32))
    asked = [
        default,
        dataclasses.replace(default, profiles=ranges),
        *(
            dataclasses.replace(default, tensorrt=TensorRTOptions(**values))  # type: ignore[arg-type]
            for values in TENSORRT.values()
        ),
    ]
    keys = {fingerprint.of(model, options, StubBackend()).key for options in asked}
    assert len(keys) == len(asked)


def test_the_provider_makes_another_engine(model: OnnxModel) -> None:
    stored, wanted = (
        fingerprint.of(model, BuildOptions(target="cuda", provider=name), StubBackend())
        for name in ("cuda", "tensorrt")
    )
    assert [m.field for m in compare(stored, wanted)] == ["options.provider"]


@pytest.mark.parametrize(
    ("compatible", "old", "new", "kind"),
    [
        (True, "10.13.2", "10.16.1", "soft"),
        (True, "10.16.1", "10.13.2", "hard"),
        (True, "10.16.1", "11.0.0", "hard"),
        (False, "10.13.2", "10.16.1", "hard"),
    ],
)
def test_version_compatible_engines_may_be_used_by_later_releases(
    compatible: bool, old: str, new: str, kind: str
) -> None:
    options = canonical_json({"tensorrt": {"version_compatible": compatible}})
    stored = Fingerprint("a" * 64, "b" * 64, options, "tensorrt", old, "sm_89")
    (found,) = compare(stored, dataclasses.replace(stored, backend_version=new))
    assert (found.field, found.kind) == ("backend_version", kind)


def test_every_build_option_is_in_the_fingerprint(model: OnnxModel) -> None:
    recorded = set(json.loads(fingerprint.of(model, BuildOptions(), StubBackend()).options))
    options = {f.name for f in dataclasses.fields(BuildOptions)}
    assert recorded | {"backend", "target"} == options


def test_of_tells_models_preprocessing_and_versions_apart(model: OnnxModel, tmp_path: Path) -> None:
    stored = fingerprint.of(model, BuildOptions(), StubBackend())
    other = save_onnx(tmp_path / "other.onnx", weight=2.0)
    images = dataclasses.replace(model, preprocess=Preprocess())
    cases = {
        "model_sha256": fingerprint.of(other, BuildOptions(), StubBackend()),
        "preprocess_sha256": fingerprint.of(images, BuildOptions(), StubBackend()),
        "backend_version": fingerprint.of(model, BuildOptions(), StubBackend("1.32.0")),
    }
    for field, wanted in cases.items():
        assert [m.field for m in compare(stored, wanted)] == [field]
    assert len({stored.key, *(f.key for f in cases.values())}) == 4


def test_of_reads_external_weights(tmp_path: Path) -> None:
    model = save_onnx(tmp_path / "model.onnx", weight=1.0, external=True)
    weights = tmp_path / "w.bin"
    assert model.external_files() == (weights,)
    before = fingerprint.of(model, BuildOptions(), StubBackend())
    data = bytearray(weights.read_bytes())
    data[5] ^= 1
    weights.write_bytes(data)
    after = fingerprint.of(model, BuildOptions(), StubBackend())
    assert [m.field for m in compare(before, after)] == ["model_sha256"]
