"""TensorRT-RTX builds real engines for cards that are not here, and says what it cannot do."""

from __future__ import annotations

import _thread
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sn72engine import _deps
from sn72engine.backends import get_backend, tensorrt, tensorrt_build, tensorrt_config, tensorrt_log
from sn72engine.backends.tensorrt import TensorRTBackend
from sn72engine.backends.tensorrt_log import ADVICE, Message, advise, explain
from sn72engine.builder import build
from sn72engine.cards import device_target, runs_on
from sn72engine.errors import BuildError, MissingDependencyError, SessionError
from sn72engine.model import OnnxModel
from sn72engine.progress import Progress
from sn72engine.session import load
from sn72engine.spec import BuildOptions, ShapeRange, TensorRTOptions
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
def test_one_file_for_several_cards(tmp_path: Path, store: Store) -> None:
    model = tiny_models.transformer(tmp_path / "m.onnx")
    engine = build(model, rtx("sm_120,sm_86,sm_89"), store=store)
    assert engine.manifest.target == "sm_86,sm_89,sm_120"
    again = build(model, rtx("sm_89,sm_120,sm_86"), store=store)
    assert again.manifest == engine.manifest
    with pytest.raises(BuildError, match=r"'sm_90'.*builds for .*sm_89"):
        build(model, rtx("sm_89,sm_90"), store=store)


@pytest.mark.parametrize(
    ("target", "present", "expected"),
    [
        ("sm_89", "sm_89", True),
        ("sm_89", "sm_90", False),
        ("sm_86,sm_89", "sm_89", True),
        ("sm_86,sm_89", "sm_8", False),
        ("sm_80+", "sm_120", True),
        ("sm_80+", "sm_75", False),
        ("sm_89", None, False),
    ],
)
def test_which_cards_run_an_engine(target: str, present: str | None, expected: bool) -> None:
    assert runs_on(target, present) is expected


def test_an_engine_for_all_later_cards_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = TensorRTOptions(hardware_compatibility="ampere_plus")
    options = BuildOptions(backend="tensorrt", tensorrt=asked)
    backend = TensorRTBackend("tensorrt")
    for card in ("sm_86", "sm_120"):
        monkeypatch.setattr(tensorrt, "device_target", lambda card=card: card)
        assert backend.target(options) == "sm_80+"
        assert backend.target(BuildOptions(backend="tensorrt")) == card
    monkeypatch.setattr(tensorrt, "device_target", lambda: "sm_75")
    with pytest.raises(BuildError, match=r"from sm_80 on .* this one is sm_75"):
        backend.target(options)


class Builder:
    """A real builder, network and configuration of TensorRT-RTX."""

    def __init__(self, model: OnnxModel | None = None) -> None:
        self.trt = _deps.require("tensorrt_rtx", purpose="test")
        self.log = tensorrt_log.make_logger(self.trt)
        self.builder = self.trt.Builder(self.log)
        self.config = self.builder.create_builder_config()
        self.network = self.builder.create_network(
            1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        if model is not None:
            self.parser = self.trt.OnnxParser(self.network, self.log)
            assert self.parser.parse_from_file(str(model.path))

    def configure(self, options: BuildOptions) -> Any:
        tensorrt_config.configure(
            self.trt, self.config, options.backend, options, options.resolved_target, self.log
        )
        return self.config


@needs_rtx
def test_every_limit_reaches_the_builder() -> None:
    asked = Builder()
    trt = asked.trt
    config = asked.configure(
        rtx(
            "sm_120,sm_89",
            workspace_bytes=1 << 24,
            optimization_level=1,
            tensorrt=TensorRTOptions(
                tactic_bytes=1 << 23,
                max_tactics=3,
                tactic_sources=("JIT_CONVOLUTIONS",),
                tiling="moderate",
                l2_tiling_bytes=1 << 20,
                aux_streams=0,
                profiling="layer_names",
            ),
        )
    )
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 24
    assert config.get_memory_pool_limit(trt.MemoryPoolType.TACTIC_DRAM) == 1 << 23
    assert config.builder_optimization_level == 1
    assert config.max_num_tactics == 3
    assert config.get_tactic_sources() == 1 << int(trt.TacticSource.JIT_CONVOLUTIONS)
    assert config.tiling_optimization_level == trt.TilingOptimizationLevel.MODERATE
    assert config.l2_limit_for_tiling == 1 << 20
    assert config.max_aux_streams == 0
    assert config.profiling_verbosity == trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    assert config.num_compute_capabilities == 2
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89
    assert config.get_compute_capability(1) == trt.ComputeCapability.SM120


@needs_rtx
def test_what_is_not_asked_for_stays_as_the_library_has_it() -> None:
    untouched, asked = Builder(), Builder()
    config, plain = asked.configure(rtx()), untouched.config
    trt = asked.trt
    assert config.flags == plain.flags
    assert config.get_tactic_sources() == plain.get_tactic_sources()
    for pool in (trt.MemoryPoolType.WORKSPACE, trt.MemoryPoolType.TACTIC_DRAM):
        assert config.get_memory_pool_limit(pool) == plain.get_memory_pool_limit(pool)
    for name in ("builder_optimization_level", "max_num_tactics", "max_aux_streams"):
        assert getattr(config, name) == getattr(plain, name)
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


@needs_rtx
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (
            {"version_compatible": True, "exclude_lean_runtime": True},
            {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"},
        ),
        ({"weight_streaming": True}, {"WEIGHT_STREAMING"}),
        ({"user_allocation": True}, {"REQUIRE_USER_ALLOCATION"}),
        ({"refit": "any"}, {"REFIT"}),
        ({"refit": "identical", "strip_weights": True}, {"REFIT_IDENTICAL", "STRIP_PLAN"}),
    ],
)
def test_every_flag_reaches_the_builder(options: dict[str, Any], flags: set[str]) -> None:
    untouched, asked = Builder(), Builder()
    config = asked.configure(rtx(tensorrt=TensorRTOptions(**options)))
    members = asked.trt.BuilderFlag.__members__
    on = {name for name, flag in members.items() if config.get_flag(flag)}
    before = {name for name, flag in members.items() if untouched.config.get_flag(flag)}
    assert on - before == flags


@needs_rtx
@pytest.mark.parametrize(
    "options",
    [
        {"version_compatible": True, "exclude_lean_runtime": True},
        {"weight_streaming": True},
        {"user_allocation": True},
        {"tiling": "full", "tactic_sources": (), "profiling": "none"},
    ],
)
def test_engines_that_need_no_card_build(
    tmp_path: Path, store: Store, options: dict[str, Any]
) -> None:
    model = tiny_models.transformer(tmp_path / "m.onnx")
    engine = build(model, rtx(tensorrt=TensorRTOptions(**options)), store=store)
    recorded = engine.manifest.build_options["tensorrt"]
    assert {name: recorded[name] for name in options} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
    }
    assert engine.manifest.key != build(model, rtx(), store=store).manifest.key


def no_library(*_: Any, **__: Any) -> Any:
    raise AssertionError("the library was loaded before the options were checked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit": "any"}, "on the card, and no CUDA device is present"),
        ({"refit": "identical", "strip_weights": True}, "leave refit at 'none'"),
        ({"version_compatible": True}, "give exclude_lean_runtime=True too"),
        ({"hardware_compatibility": "ampere_plus"}, "target='sm_86,sm_89'"),
        ({"plugins": ("layernorm_gelu",)}, "takes no plugins"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_build(
    tmp_path: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(tensorrt, "device_target", lambda: None)
    monkeypatch.setattr(TensorRTBackend, "_library", no_library)
    monkeypatch.setattr(TensorRTBackend, "version", lambda self: "1.7")
    model = tiny_models.linear(tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=message):
        build(model, rtx(tensorrt=TensorRTOptions(**options)), store=store)
    assert store.entries() == ()


def test_tensorrt_promises_nothing_about_allocation() -> None:
    options = BuildOptions(backend="tensorrt", tensorrt=TensorRTOptions(user_allocation=True))
    with pytest.raises(BuildError, match="can be captured as they are"):
        tensorrt_config.refuse("tensorrt", options, "sm_90")


@needs_rtx
@needs_no_gpu
@pytest.mark.parametrize("flag", ["REFIT", "STRIP_PLAN", "REFIT_IDENTICAL"])
def test_refittable_engines_need_a_card_as_the_check_says(tmp_path: Path, flag: str) -> None:
    """The reason for refusing them first: what the builder says does not help anyone."""
    asked = Builder(tiny_models.transformer(tmp_path / "m.onnx"))
    config = asked.configure(rtx())
    config.set_flag(getattr(asked.trt.BuilderFlag, flag))
    model = OnnxModel.open(tmp_path / "m.onnx")
    tensorrt_config.add_profiles(asked.builder, asked.network, config, model, rtx(), asked.log)
    assert asked.builder.build_serialized_network(asked.network, config) is None
    assert "refittable engines are compiled on the card" in explain(asked.log.messages)


@needs_rtx
def test_settings_that_the_library_does_not_know_are_named() -> None:
    options = TensorRTOptions(tactic_sources=("CUBLAS",))
    with pytest.raises(BuildError, match=r"TacticSource\.CUBLAS.*JIT_CONVOLUTIONS"):
        Builder().configure(rtx(tensorrt=options))


@needs_rtx
def test_a_flag_that_is_dropped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The library logs an error and leaves the flag out when its companion is not set.
    monkeypatch.setattr(tensorrt_config, "FLAGS", {"weight_streaming": "EXCLUDE_LEAN_RUNTIME"})
    with pytest.raises(BuildError, match=r"refuses EXCLUDE_LEAN_RUNTIME: .*kVERSION_COMPATIBLE"):
        Builder().configure(rtx(tensorrt=TensorRTOptions(weight_streaming=True)))


@needs_rtx
def test_profiles_span_their_ranges(tmp_path: Path) -> None:
    model = tiny_models.two_by_two(tmp_path / "m.onnx")
    asked = Builder(model)
    ranges = (ShapeRange(1, 1, 1), ShapeRange(2, 3, 5), ShapeRange(4, 8, 16))
    options = rtx(batch=ShapeRange(1, 8, 16), profiles=ranges)
    seen = []

    class Recording:
        def create_optimization_profile(self) -> Any:
            seen.append(asked.builder.create_optimization_profile())
            return seen[-1]

    tensorrt_config.add_profiles(
        Recording(), asked.network, asked.config, model, options, asked.log
    )
    assert asked.config.num_optimization_profiles == 3
    for profile, batch in zip(seen, ranges, strict=True):
        for name in ("a", "b"):
            shapes = [tuple(shape) for shape in profile.get_shape(name)]
            assert shapes == [(batch.min, 4), (batch.opt, 4), (batch.max, 4)]


@needs_rtx
def test_an_engine_with_several_profiles(tmp_path: Path, store: Store) -> None:
    model = tiny_models.transformer(tmp_path / "m.onnx")
    ranges = (ShapeRange(1, 1, 1), ShapeRange(1, 16, 32))
    options = rtx(batch=ShapeRange(1, 16, 32), profiles=ranges)
    engine = build(model, options, store=store)
    assert engine.manifest.build_options["profiles"] == [r.to_dict() for r in ranges]
    one = build(model, rtx(batch=ShapeRange(1, 16, 32)), store=store)
    assert engine.path.stat().st_size > one.path.stat().st_size


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
    with pytest.raises(BuildError, match=r": sm86 lacks fp8.*FP8 needs sm_89 or later"):
        build(model, rtx("sm_86", "fp32"), store=store)


@needs_rtx
def test_an_unknown_card_lists_the_known_ones(tmp_path: Path, store: Store) -> None:
    model = tiny_models.linear(tmp_path / "m.onnx")
    with pytest.raises(
        BuildError, match=r"'sm_90'.*builds for sm_75, .*sm_89, .*backend='tensorrt'"
    ):
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
    make_monitor = tensorrt_build.make_monitor

    def recorded(*arguments: Any) -> Any:
        monitors.append(make_monitor(*arguments))
        return monitors[-1]

    class Interrupting(Progress):
        def step(self, count: int = 1) -> None:
            if not monitors[0].cancelled.is_set():
                _thread.interrupt_main()  # what Ctrl-C does
                # The builder must not reach its end before the main thread has heard of it.
                assert monitors[0].cancelled.wait(30)
            super().step(count)

    monkeypatch.setattr(tensorrt_build, "make_monitor", recorded)
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

    class Recording(Progress):
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
            "sm89 lacks fp4_e2m1",
        ),
        ("Cannot compile operation 'x' for Turing (SM75): FP32 GEMM is not supported.", "'fp16'"),
        ("Attention operation was not supported by a dedicated kernel", "opset below 23"),
        ("cudaError 35: CUDA driver version is insufficient", "target='sm_89'"),
        ("Cuda Runtime (out of memory)", "lower batch.max"),
        ("NonZero plugin creator version 1 was not found in plugin registry", "exclude it"),
        ("layer_nms has no runners that implement it", "does not know this operator"),
        ("Unable to load library: libnvinfer_lean.so.1", "exclude_lean_runtime=True"),
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


@needs_rtx
def test_timing_cache_entries_merge_and_bad_ones_are_dropped(tmp_path: Path) -> None:
    trt = _deps.require("tensorrt_rtx", purpose="test")
    builder = trt.Builder(tensorrt_log.make_logger(trt))
    config = builder.create_builder_config()
    with warnings.catch_warnings():
        # TensorRT-RTX keeps the calls but says that they do nothing; TensorRT uses them.
        warnings.simplefilter("ignore", DeprecationWarning)
        config.set_timing_cache(config.create_timing_cache(b""), False)
        fresh = tensorrt_build.merge(config, b"")
        assert fresh
        assert tensorrt_build.merge(config, fresh) == fresh
        assert tensorrt_build.merge(config, b"not a timing cache") == fresh


@needs_rtx
@pytest.mark.parametrize("stored", [b"", b"not a timing cache"])
def test_tensorrt_keeps_its_timing_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bytes
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path))
    trt = _deps.require("tensorrt_rtx", purpose="test")
    config = trt.Builder(tensorrt_log.make_logger(trt)).create_builder_config()
    file = tmp_path / "timing" / "tensorrt-11.0-sm_90.timing"
    file.parent.mkdir()
    file.write_bytes(stored)
    with warnings.catch_warnings():
        # Both libraries have these calls; TensorRT-RTX says that its own do nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = tensorrt_build.attach_timing_cache(config, "tensorrt", "11.0", "sm_90")
        assert cache is not None
        assert cache.path == file
        assert config.get_timing_cache() is not None
        assert cache.update(lambda found: tensorrt_build.merge(config, found))
        assert cache.read() == bytes(memoryview(config.get_timing_cache().serialize()))


@needs_rtx
def test_rtx_writes_no_timing_cache(tmp_path: Path, store: Store) -> None:
    build(tiny_models.linear(tmp_path / "m.onnx"), rtx(), store=store)
    assert not (tmp_path / "cache" / "timing").exists()
