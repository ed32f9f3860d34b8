"""The ONNX Runtime backend builds files that compute what the model does, or says why not."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sn72engine import fingerprint
from sn72engine.backends import get_backend, onnxruntime_providers
from sn72engine.backends.base import BuiltFiles
from sn72engine.backends.onnxruntime import OnnxRuntimeBackend
from sn72engine.backends.onnxruntime_providers import Setting
from sn72engine.cards import device_target
from sn72engine.engine import Engine, Manifest
from sn72engine.errors import BuildError, OptionError, SessionError
from sn72engine.model import OnnxModel
from sn72engine.spec import BuildOptions, RuntimeOptions, ShapeRange
from sn72engine.store import describe
from tests import tiny_models

BACKEND = OnnxRuntimeBackend()


def engine_of(folder: Path, built: BuiltFiles, model: OnnxModel, options: BuildOptions) -> Engine:
    identity = fingerprint.of(model, options, BACKEND)
    manifest = Manifest(
        key=identity.key,
        backend="onnxruntime",
        backend_version=BACKEND.version(),
        target=BACKEND.target(options),
        precision=options.precision,
        batch=options.batch,
        inputs=built.inputs,
        outputs=built.outputs,
        files=describe(folder, built.names),
        fingerprint=identity.to_dict(),
    )
    return Engine(folder, manifest)


def made(tmp_path: Path, model: OnnxModel, options: BuildOptions | None = None) -> Engine:
    options = options or BuildOptions()
    folder = tmp_path / "engine"
    folder.mkdir()
    return engine_of(folder, BACKEND.build(model, options, folder), model, options)


def test_chosen_by_name() -> None:
    assert isinstance(get_backend("onnxruntime"), OnnxRuntimeBackend)
    with pytest.raises(OptionError, match="'abacus' is not one of onnxruntime, openvino, tensorrt"):
        get_backend("abacus")  # type: ignore[arg-type]


def test_version_and_target() -> None:
    import onnxruntime

    assert BACKEND.version() == onnxruntime.__version__
    assert BACKEND.target(BuildOptions()) == "cpu"
    assert BACKEND.target(BuildOptions(target="cuda")) == "cuda"


@pytest.mark.parametrize("external", [False, True])
def test_computes_what_the_model_does(tmp_path: Path, external: bool) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx", external=external)
    engine = made(tmp_path, model)
    assert [f.name for f in engine.manifest.files] == (
        ["model.onnx", "m.onnx.data"] if external else ["model.onnx"]
    )
    w, b = tiny_models.linear_weights(model)
    model.path.unlink()  # the engine must not need the source any more
    (tmp_path / "m.onnx.data").unlink(missing_ok=True)
    runner = BACKEND.open(engine, RuntimeOptions(threads=1))
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    np.testing.assert_allclose(runner.run({"x": x})["y"], x @ w + b, rtol=1e-5, atol=1e-6)


def test_results_of_earlier_calls_are_not_overwritten(tmp_path: Path) -> None:
    engine = made(tmp_path, tiny_models.linear(tmp_path / "m.onnx"))
    runner = BACKEND.open(engine, RuntimeOptions(threads=1))
    first = runner.run({"x": np.zeros((2, 4), np.float32)})["y"]
    kept = first.copy()
    for value in range(1, 5):
        runner.run({"x": np.full((2, 4), value, np.float32)})
    np.testing.assert_array_equal(first, kept)


def test_results_outlive_the_session(tmp_path: Path) -> None:
    engine = made(tmp_path, tiny_models.linear(tmp_path / "m.onnx"))
    runner = BACKEND.open(engine, RuntimeOptions(threads=1))
    result = runner.run({"x": np.ones((3, 4), np.float32)})["y"]
    kept = result.copy()
    runner.close()
    del runner
    np.testing.assert_array_equal(result, kept)


def test_a_quantised_model_is_lowered_and_stays_close(tmp_path: Path) -> None:
    model = tiny_models.quantised(tmp_path / "q.onnx")
    engine = made(tmp_path, model, BuildOptions(precision="int8"))
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    got = BACKEND.open(engine, RuntimeOptions(threads=1)).run({"pixel_values": x})["logits"]
    plain = tiny_models.convolution(tmp_path / "f.onnx")
    (tmp_path / "float").mkdir()
    want_engine = made(tmp_path / "float", plain)
    want = BACKEND.open(want_engine, RuntimeOptions(threads=1)).run({"pixel_values": x})["logits"]
    cosine = (got * want).sum() / np.sqrt((got**2).sum() * (want**2).sum())
    assert cosine > 0.99
    operators = {node.op_type for node in onnx.load(engine.path).graph.node}
    assert "QuantizeLinear" in operators


def test_fp16_on_a_cpu_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"precision='fp16' on a CPU .* 'int8'"):
        BACKEND.build(model, BuildOptions(precision="fp16"), tmp_path)


def test_cuda_without_its_provider_is_refused(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    model = tiny_models.linear(tmp_path / "m.onnx")
    with pytest.raises(BuildError, match="no CUDA provider; install onnxruntime-gpu"):
        BACKEND.build(model, BuildOptions(target="cuda"), tmp_path)
    engine = made(tmp_path, model)
    moved = Engine(engine.folder, replace(engine.manifest, target="cuda"))
    with pytest.raises(SessionError, match="no CUDA provider"):
        BACKEND.open(moved, RuntimeOptions())


class Claiming:
    """The real library, which claims to have providers that do not load.

    That is how a GPU build behaves where CUDA's libraries are absent: it opens a session for the
    CPU and warns.
    """

    def __init__(self, *names: str) -> None:
        import onnxruntime

        self._real = onnxruntime
        self._names = names
        self.asked: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_available_providers(self) -> list[str]:
        return [*self._names, *self._real.get_available_providers()]

    def InferenceSession(self, *arguments: Any, **named: Any) -> Any:  # noqa: N802
        self.asked.append(named)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return self._real.InferenceSession(*arguments, **named)


def cuda(**options: Any) -> BuildOptions:
    return BuildOptions(target="cuda", batch=ShapeRange(1, 4, 8), **options)


@pytest.mark.skipif(device_target() is not None, reason="checks what happens without a card")
@pytest.mark.parametrize(
    ("provider", "name"),
    [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")],
)
def test_a_provider_that_does_not_load_is_not_replaced_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: Any, name: str
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    library = Claiming("TensorrtExecutionProvider", "CUDAExecutionProvider")
    monkeypatch.setattr("sn72engine.backends.onnxruntime._onnxruntime", lambda: library)
    model = tiny_models.linear(tmp_path / "m.onnx")
    message = rf"could not use {name} on CUDA device 0 and offers CPUExecutionProvider instead"
    (tmp_path / "built").mkdir()
    with pytest.raises(BuildError, match=message):
        BACKEND.build(model, cuda(provider=provider), tmp_path / "built")
    engine = made(tmp_path, model)
    record = {"options": json.dumps({"provider": provider})}
    moved = Engine(engine.folder, replace(engine.manifest, target="cuda", fingerprint=record))
    with pytest.raises(SessionError, match=message):
        BACKEND.open(moved, RuntimeOptions())
    for named in library.asked:
        if named["providers"][0][0] == name:
            assert named["enable_fallback"] == 0


@pytest.mark.parametrize(
    ("present", "provider", "advice"),
    [
        ((), "cuda", "no CUDA provider; install onnxruntime-gpu"),
        (("CUDAExecutionProvider",), "tensorrt", "no TensorRT provider; .*backend='tensorrt'"),
    ],
)
def test_an_absent_provider_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    present: tuple[str, ...],
    provider: Any,
    advice: str,
) -> None:
    library = Claiming(*present)
    monkeypatch.setattr(library._real, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr("sn72engine.backends.onnxruntime._onnxruntime", lambda: library)
    model = tiny_models.linear(tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=advice):
        BACKEND.build(model, cuda(provider=provider), tmp_path)


def test_what_the_tensorrt_provider_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    model = tiny_models.two_by_two(tmp_path / "m.onnx")
    asked = cuda(provider="tensorrt", workspace_bytes=1 << 20, optimization_level=2)
    setting = Setting.of("cuda", "int8", asked.batch, asked.to_dict())
    found = onnxruntime_providers.listed(setting, model, RuntimeOptions(device_index=3))
    assert [name for name, _ in found] == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    told = found[0][1]
    assert told["device_id"] == found[1][1]["device_id"] == "3"
    assert told["trt_profile_min_shapes"] == "a:1x4,b:1x4"
    assert told["trt_profile_opt_shapes"] == "a:4x4,b:4x4"
    assert told["trt_profile_max_shapes"] == "a:8x4,b:8x4"
    assert told["trt_max_workspace_size"] == str(1 << 20)
    assert told["trt_builder_optimization_level"] == "2"
    assert (told["trt_int8_enable"], told["trt_fp16_enable"]) == ("1", "1")
    # What it compiles is kept apart for each model: its own names do not tell weights apart.
    other = tiny_models.linear(tmp_path / "other.onnx")
    elsewhere = onnxruntime_providers.listed(setting, other, RuntimeOptions())[0][1]
    assert told["trt_engine_cache_path"].startswith(str(tmp_path / "cache"))
    assert told["trt_engine_cache_path"] != elsewhere["trt_engine_cache_path"]


def test_an_unknown_operator_is_refused_with_its_name(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Frobnicate", ["x"], ["y"], domain="nowhere", name="bad")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["N", 4])],
        [value("y", onnx.TensorProto.FLOAT, ["N", 4])],
    )
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nowhere", 1)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "m.onnx"
    )
    model = OnnxModel.open(tmp_path / "m.onnx")
    (tmp_path / "engine").mkdir()
    with pytest.raises(BuildError, match=r"Frobnicate.*choose another backend"):
        BACKEND.build(model, BuildOptions(), tmp_path / "engine")


def test_absent_weights_are_named(tmp_path: Path) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx", external=True)
    (tmp_path / "m.onnx.data").unlink()
    (tmp_path / "engine").mkdir()
    with pytest.raises(BuildError, match=r"weight file 'm\.onnx\.data' is absent"):
        BACKEND.build(model, BuildOptions(), tmp_path / "engine")


def test_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx", external=True)
    proto = onnx.load(model.path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.onnx.data"
    onnx.save(proto, model.path)
    (tmp_path / "engine").mkdir()
    with pytest.raises(BuildError, match="must lie beside the ONNX file"):
        BACKEND.build(OnnxModel.open(model.path), BuildOptions(), tmp_path / "engine")


def test_a_broken_file_cannot_be_opened(tmp_path: Path) -> None:
    engine = made(tmp_path, tiny_models.linear(tmp_path / "m.onnx"))
    engine.path.write_bytes(b"no model")
    with pytest.raises(SessionError, match=r"ONNX Runtime refuses model\.onnx"):
        BACKEND.open(engine, RuntimeOptions())


def test_a_failing_run_is_translated(tmp_path: Path) -> None:
    engine = made(tmp_path, tiny_models.linear(tmp_path / "m.onnx"))
    runner = BACKEND.open(engine, RuntimeOptions(threads=1))
    with pytest.raises(SessionError, match="ONNX Runtime failed while running"):
        runner.run({"x": np.zeros((2, 7), np.float32)})


def test_close_twice_then_refuse_to_run(tmp_path: Path) -> None:
    engine = made(tmp_path, tiny_models.linear(tmp_path / "m.onnx"))
    runner = BACKEND.open(engine, RuntimeOptions(threads=1))
    runner.close()
    runner.close()
    with pytest.raises(SessionError, match="closed"):
        runner.run({"x": np.zeros((1, 4), np.float32)})


def test_threads_and_spinning_reach_the_library(tmp_path: Path) -> None:
    engine = made(tmp_path, tiny_models.linear(tmp_path / "m.onnx"))
    for spinning, text in ((False, "0"), (True, "1")):
        runner = BACKEND.open(engine, RuntimeOptions(threads=2, spinning=spinning))
        settings = runner._session.get_session_options()
        assert settings.intra_op_num_threads == 2
        assert settings.get_session_config_entry("session.intra_op.allow_spinning") == text
