"""TensorRT-RTX builds real engines for cards that are not here, and says what it cannot do."""

from __future__ import annotations

import _thread
import ast
import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sn72engine import _deps
from sn72engine.backends import get_backend, tensorrt, tensorrt_log, tensorrt_runner
from sn72engine.backends.tensorrt import TensorRTBackend, device_target
from sn72engine.backends.tensorrt_log import ADVICE, Message, advise, explain
from sn72engine.builder import build
from sn72engine.errors import BuildError, MissingDependencyError, SessionError
from sn72engine.model import OnnxModel
from sn72engine.session import load
from sn72engine.spec import BuildOptions, ShapeRange
from sn72engine.store import Store
from tests import tiny_models

needs_rtx = pytest.mark.skipif(
    not _deps.available("tensorrt_rtx"), reason="tensorrt_rtx is not installed"
)
needs_no_gpu = pytest.mark.skipif(
    device_target() is not None, reason="checks what is said without a CUDA device"
)

MAKERS = {
    "convolution": tiny_models.convolution,
    "transformer": tiny_models.transformer,
    "quantised": tiny_models.quantised,
}


def rtx(target: str = "sm_89", precision: str = "fp16", **options: Any) -> BuildOptions:
    options.setdefault("batch", ShapeRange(1, 4, 8))
    return BuildOptions(
        backend="tensorrt_rtx",
        target=target,
        precision=precision,  # type: ignore[arg-type]
        **options,
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    return Store(tmp_path / "store")


@needs_rtx
@pytest.mark.parametrize("target", ["sm_89", "sm_120"])
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("convolution", "fp32"),
        ("convolution", "fp16"),
        ("transformer", "fp16"),
        ("quantised", "int8"),
    ],
)
def test_builds_for_a_card_that_is_not_here(
    tmp_path: Path, store: Store, name: str, precision: str, target: str
) -> None:
    model = MAKERS[name](tmp_path / "m.onnx")
    engine = build(model, rtx(target, precision), store=store)
    manifest = engine.manifest
    assert manifest.target == target
    assert manifest.precision == precision
    assert (manifest.inputs, manifest.outputs) == (model.inputs, model.outputs)
    assert engine.path.stat().st_size > 1000
    if device_target() != target:
        assert any(note.startswith(f"not run: it is for {target}") for note in manifest.notes)
    converted = any("converted to float16" in note for note in manifest.notes)
    assert converted == (precision != "fp32")


@needs_rtx
def test_the_target_is_part_of_the_engine(tmp_path: Path, store: Store) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx")
    engines = [build(model, rtx(target), store=store) for target in ("sm_86", "sm_89")]
    assert engines[0].manifest.key != engines[1].manifest.key
    assert engines[0].path.read_bytes() != engines[1].path.read_bytes()


@needs_rtx
def test_workspace_and_effort_reach_the_builder(tmp_path: Path) -> None:
    trt = _deps.require("tensorrt_rtx", purpose="test")
    builder = trt.Builder(tensorrt_log.make_logger(trt))
    config = builder.create_builder_config()
    options = rtx("sm_120", workspace_bytes=1 << 24, optimization_level=1)
    TensorRTBackend("tensorrt_rtx")._configure(trt, config, options, "sm_120")
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 24
    assert config.builder_optimization_level == 1
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM120


@needs_rtx
def test_the_profile_spans_the_batch_range(tmp_path: Path) -> None:
    trt = _deps.require("tensorrt_rtx", purpose="test")
    logger = tensorrt_log.make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    model = tiny_models.two_by_two(tmp_path / "m.onnx")
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(model.path))
    profile = tensorrt._profile(builder, network, model, rtx(batch=ShapeRange(2, 3, 5)))
    for name in ("a", "b"):
        shapes = [tuple(shape) for shape in profile.get_shape(name)]
        assert shapes == [(2, 4), (3, 4), (5, 4)]


@needs_rtx
def test_a_fixed_batch_needs_no_profile(tmp_path: Path, store: Store) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx", batch=2)
    engine = build(model, rtx(batch=ShapeRange(2, 2, 2)), store=store)
    assert engine.manifest.batch == ShapeRange(2, 2, 2)


@needs_rtx
def test_external_weights_are_read(tmp_path: Path, store: Store) -> None:
    model = tiny_models.convolution(tmp_path / "m.onnx", external=True)
    for precision in ("fp32", "fp16"):
        assert build(model, rtx(precision=precision), store=store).path.is_file()


@needs_rtx
def test_other_free_axes_are_refused(tmp_path: Path, store: Store) -> None:
    graph = "free (float[N, T] x) => (float[N, T] y) { y = Relu(x) }"
    model = tiny_models.save(tmp_path / "m.onnx", graph, {})
    with pytest.raises(BuildError, match=r"input x: float32\[N, T\] has a free axis"):
        build(model, rtx(), store=store)


@needs_rtx
def test_a_parser_error_names_the_node(tmp_path: Path, store: Store) -> None:
    node = onnx.helper.make_node("Frobnicate", ["x"], ["y"], domain="nowhere", name="bad")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["N", 4])],
        [value("y", onnx.TensorProto.FLOAT, ["N", 4])],
    )
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nowhere", 1)]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.save(proto, tmp_path / "m.onnx")
    message = r"node 'bad' \(Frobnicate\).*does not know this operator"
    with pytest.raises(BuildError, match=message):
        build(OnnxModel.open(tmp_path / "m.onnx"), rtx(precision="fp32"), store=store)
    assert store.entries() == ()


@needs_rtx
def test_a_builder_error_is_translated(tmp_path: Path, store: Store) -> None:
    model = tiny_models.transformer(tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"sm_75 has no float32 matrix product.*'fp16'"):
        build(model, rtx("sm_75", "fp32"), store=store)
    assert build(model, rtx("sm_75", "fp16"), store=store).manifest.target == "sm_75"


@needs_rtx
def test_hardware_specific_types_are_translated(tmp_path: Path, store: Store) -> None:
    weights = {"s": np.float32(0.1), "w": np.ones((16, 16), np.float32)}
    graph = """fp8 (float[N, 16] x) => (float[N, 16] y) {
        z = Constant <value = float8e4m3fn {0}> ()
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        wq = QuantizeLinear(w, s, z)
        wd = DequantizeLinear(wq, s, z)
        y = MatMul(d, wd)
    }"""
    model = tiny_models.save(tmp_path / "m.onnx", graph, weights)
    build(model, rtx("sm_89", "fp32"), store=store)
    with pytest.raises(BuildError, match=r"target lacks fp8.*FP8 needs sm_89 or later"):
        build(model, rtx("sm_86", "fp32"), store=store)


@needs_rtx
def test_an_unknown_card_lists_the_known_ones(tmp_path: Path, store: Store) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"'sm_90'.*builds for .*sm_89.*backend='tensorrt'"):
        build(model, rtx("sm_90"), store=store)


@needs_no_gpu
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("tensorrt_rtx", "name the card to build for, target='sm_89'"),
        ("tensorrt", "use backend='tensorrt_rtx' with target='sm_89', which needs none"),
    ],
)
def test_no_card_no_cuda_target(name: Any, advice: str) -> None:
    with pytest.raises(BuildError, match="no CUDA device is present") as caught:
        get_backend(name).target(BuildOptions(backend=name))
    assert advice in str(caught.value)


@needs_rtx
@needs_no_gpu
def test_an_engine_for_a_card_cannot_run_here(tmp_path: Path, store: Store) -> None:
    engine = build(tiny_models.linear(tmp_path / "m.onnx"), rtx("sm_89"), store=store)
    with pytest.raises(SessionError, match=r"engine for sm_89 cannot run here: .*no CUDA device"):
        load(engine.folder)


def test_a_library_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_deps, "version", lambda module: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sn72engine\[tensorrt\]'"):
        TensorRTBackend("tensorrt").version()


@needs_rtx
def test_ctrl_c_stops_the_builder_and_leaves_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitors: list[Any] = []
    make_monitor = tensorrt._make_monitor

    def recorded(*arguments: Any) -> Any:
        monitors.append(make_monitor(*arguments))
        return monitors[-1]

    class Interrupting(tensorrt.Progress):
        def step(self, count: int = 1) -> None:
            if not monitors[0].cancelled.is_set():
                _thread.interrupt_main()  # what Ctrl-C does
                # The builder must not reach its end before the main thread has heard of it.
                assert monitors[0].cancelled.wait(30)
            super().step(count)

    monkeypatch.setattr(tensorrt, "_make_monitor", recorded)
    monkeypatch.setattr(tensorrt, "Progress", Interrupting)
    model = tiny_models.transformer(tmp_path / "m.onnx")
    with pytest.raises(KeyboardInterrupt):
        build(model, rtx(), store=store)
    assert monitors[0].cancelled.is_set()
    assert store.entries() == ()
    assert not [path for path in store.root.rglob("*") if path.suffix == ".engine"]
    monkeypatch.undo()
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    assert build(model, rtx(), store=store).path.is_file()


@needs_rtx
def test_the_bar_reaches_its_end(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []

    class Recording(tensorrt.Progress):
        def resize(self, total: int) -> None:
            seen.append(("total", total))

        def step(self, count: int = 1) -> None:
            seen.append(("step", count))

        def note(self, text: str) -> None:
            seen.append(("note", text))

    monkeypatch.setattr(tensorrt, "Progress", Recording)
    build(tiny_models.convolution(tmp_path / "m.onnx"), rtx(), store=store)
    totals = [value for kind, value in seen if kind == "total"]
    assert totals
    assert sum(value for kind, value in seen if kind == "step") == sum(totals)
    assert len({value for kind, value in seen if kind == "note"}) > 3


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "Cannot compile for target(s) sm89, because the model contains HW-specific datatypes: "
            "fp4_e2m1",
            "the target lacks fp4_e2m1",
        ),
        ("Cannot compile operation 'x' for Turing (SM75): FP32 GEMM is not supported.", "'fp16'"),
        ("Attention operation was not supported by a dedicated kernel", "opset below 23"),
        ("cudaError 35: CUDA driver version is insufficient", "target='sm_89'"),
        ("Cuda Runtime (out of memory)", "lower batch.max"),
        ("a message never seen before", ""),
    ],
)
def test_known_messages_become_advice(said: str, expected: str) -> None:
    assert expected in advise(said)
    assert bool(advise(said)) == bool(expected)


def test_every_piece_of_advice_says_something_whole() -> None:
    for _, advice in ADVICE:
        assert len(advice) > 40
        assert not advice.endswith(".")


def test_log_is_counted_and_led_by_the_advice() -> None:
    messages = [Message("WARNING", "odd"), Message("WARNING", "odd"), Message("ERROR", "why\n not")]
    assert tensorrt_log.warnings(messages) == ("odd (2 times)",)
    assert explain(messages) == "TensorRT said: why not"
    assert explain([]) == "TensorRT gave no reason"
    assert explain([Message("ERROR", "cudaError 35")]).startswith("no CUDA device")


# The runner needs a card. What can be held without one: every name that the code takes from the
# library exists in the installed bindings, on the class that it is taken from.
OWNERS = {
    "trt": (None,),
    "builder": ("Builder",),
    "network": ("INetworkDefinition",),
    "config": ("IBuilderConfig",),
    "parser": ("OnnxParser",),
    "error": ("ParserError",),
    "profile": ("IOptimizationProfile",),
    "tensor": ("ITensor",),
    "ours": ("ITimingCache",),
    "context": ("IExecutionContext",),
    "_context": ("IExecutionContext",),
    "_engine": ("ICudaEngine",),
    "_runtime": ("Runtime",),
}
#: In these functions a name of the table means something else.
ELSEWHERE = {"run", "run_device", "_buffer", "warnings", "explain", "_enqueue:tensor"}


def names_used(module: Any) -> set[tuple[str, str]]:
    """(variable, attribute) pairs that a module takes from objects of the library."""
    found = set()
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(function, ast.FunctionDef) or function.name in ELSEWHERE:
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            name = (
                owner.id
                if isinstance(owner, ast.Name)
                else owner.attr
                if isinstance(owner, ast.Attribute)
                else ""
            )
            if name in OWNERS and f"{function.name}:{name}" not in ELSEWHERE:
                found.add((name, node.attr))
    return found


@needs_rtx
@pytest.mark.parametrize("module", [tensorrt, tensorrt_log, tensorrt_runner])
def test_every_name_exists_in_the_bindings(module: Any) -> None:
    trt = _deps.require("tensorrt_rtx", purpose="test")
    used = names_used(module)
    assert used, "the walk found nothing: it checks nothing"
    for variable, attribute in sorted(used):
        for owner in OWNERS[variable]:
            holder = trt if owner is None else getattr(trt, owner)
            assert hasattr(holder, attribute), f"{variable}.{attribute} ({owner})"


@needs_rtx
def test_the_walk_sees_the_calls_that_matter() -> None:
    used = names_used(tensorrt_runner) | names_used(tensorrt)
    for pair in (
        ("context", "execute_async_v3"),
        ("context", "set_tensor_address"),
        ("context", "infer_shapes"),
        ("_runtime", "deserialize_cuda_engine"),
        ("_engine", "create_execution_context"),
        ("builder", "build_serialized_network"),
        ("config", "set_compute_capability"),
        ("config", "create_timing_cache"),
        ("ours", "combine"),
    ):
        assert pair in used


@needs_rtx
def test_every_type_name_is_known() -> None:
    import torch

    trt = _deps.require("tensorrt_rtx", purpose="test")
    for name, numpy in tensorrt_runner._NUMPY_NAMES.items():
        assert hasattr(trt.DataType, name)
        assert isinstance(getattr(torch, numpy), torch.dtype)
        assert tensorrt_runner.numpy_name(getattr(trt.DataType, name)) == numpy


@needs_rtx
def test_timing_cache_entries_merge_and_bad_ones_are_dropped(tmp_path: Path) -> None:
    trt = _deps.require("tensorrt_rtx", purpose="test")
    builder = trt.Builder(tensorrt_log.make_logger(trt))
    config = builder.create_builder_config()
    with warnings.catch_warnings():
        # TensorRT-RTX keeps the calls but says that they do nothing; TensorRT uses them.
        warnings.simplefilter("ignore", DeprecationWarning)
        config.set_timing_cache(config.create_timing_cache(b""), False)
        fresh = tensorrt._merge(config, b"")
        assert fresh
        assert tensorrt._merge(config, fresh) == fresh
        assert tensorrt._merge(config, b"not a timing cache") == fresh


@needs_rtx
@pytest.mark.parametrize("stored", [b"", b"not a timing cache"])
def test_tensorrt_keeps_its_timing_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bytes
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path))
    trt = _deps.require("tensorrt_rtx", purpose="test")
    config = trt.Builder(tensorrt_log.make_logger(trt)).create_builder_config()
    backend = TensorRTBackend("tensorrt")
    monkeypatch.setattr(TensorRTBackend, "version", lambda self: "11.0")
    file = tmp_path / "timing" / "tensorrt-11.0-sm_90.timing"
    file.parent.mkdir()
    file.write_bytes(stored)
    with warnings.catch_warnings():
        # Both libraries have these calls; TensorRT-RTX says that its own do nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = backend._attach_timing_cache(config, "sm_90")
        assert cache is not None
        assert cache.path == file
        assert config.get_timing_cache() is not None
        assert cache.update(lambda found: tensorrt._merge(config, found))
        assert cache.read() == bytes(memoryview(config.get_timing_cache().serialize()))


@needs_rtx
def test_rtx_writes_no_timing_cache(tmp_path: Path, store: Store) -> None:
    build(tiny_models.linear(tmp_path / "m.onnx"), rtx(), store=store)
    assert not (tmp_path / "cache" / "timing").exists()
