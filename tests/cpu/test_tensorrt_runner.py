"""The TensorRT runner, against a stand-in for the library and the device: see tests/gpu for cards.

What is held here is what the runner asks of the library, in which order, and what it makes of the
answers; that the library really has these calls is held by ``test_tensorrt_contract``.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sn72engine import _deps, fingerprint
from sn72engine.backends import get_backend, tensorrt, tensorrt_engine, tensorrt_runner
from sn72engine.backends.base import DeviceMemory
from sn72engine.backends.tensorrt import TensorRTBackend
from sn72engine.backends.tensorrt_engine import LoadedEngine, Profile, nearest
from sn72engine.builder import build
from sn72engine.cards import device_target
from sn72engine.engine import Engine, EngineFile, Manifest
from sn72engine.errors import InputError, SessionError
from sn72engine.introspection import layers_of, timed_runs
from sn72engine.introspection.layer import Layer, LayerRun
from sn72engine.layer_profile import ProfileOptions
from sn72engine.layer_profile import profile as profile_layers
from sn72engine.model import TensorSpec
from sn72engine.pool import SessionPool
from sn72engine.session import Session
from sn72engine.spec import BuildOptions, RuntimeOptions, ShapeRange, TensorRTOptions
from sn72engine.store import Store
from tests import fake_tensorrt, tiny_models
from tests.contract.surface import surfaces
from tests.fake_tensorrt import Arrays, HostDevice, Library, Plan

X = TensorSpec("x", "float32", ("N", 3))
DOUBLED = TensorSpec("doubled", "float32", ("N", 3))
POSITIVE = TensorSpec("positive", "float32", ("found",))


def double(inputs: Arrays) -> Arrays:
    return {"doubled": 2 * inputs["x"]}


def profile(low: int, tuned: int, high: int) -> dict[str, list[list[int]]]:
    return {"x": [[low, 3], [tuned, 3], [high, 3]]}


def plan(**changes: Any) -> Plan:
    made = Plan(profiles=[profile(1, 4, 8)], outputs={"doubled": ["batch", 3]})
    return replace(made, **changes)


Opened = Callable[..., Session]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Open an engine of the fake, through the real backend and session."""
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tensorrt_runner, "Device", HostDevice)
    for module in (tensorrt, tensorrt_engine):
        monkeypatch.setattr(module, "device_target", lambda index=None: "sm_89")
    monkeypatch.setattr(TensorRTBackend, "version", lambda self: "1.7.1")

    def open_(
        held: Plan,
        *,
        library: Library | None = None,
        outputs: tuple[TensorSpec, ...] = (DOUBLED,),
        options: RuntimeOptions | None = None,
        backend: str = "tensorrt_rtx",
        built: TensorRTOptions | None = None,
    ) -> Session:
        library = library or Library(double)
        monkeypatch.setattr(TensorRTBackend, "_library", lambda self: library)
        engine = engine_of(tmp_path, held, outputs, backend, built or TensorRTOptions())
        session = Session(engine, options)
        session.library = library  # type: ignore[attr-defined]
        return session

    return open_


def engine_of(
    folder: Path,
    held: Plan,
    outputs: tuple[TensorSpec, ...],
    backend: Any,
    built: TensorRTOptions,
) -> Engine:
    folder.mkdir(exist_ok=True)
    (folder / "model.engine").write_bytes(held.to_bytes())
    batch = ShapeRange(1, 4, max(p["x"][2][0] for p in held.profiles))
    options = BuildOptions(backend=backend, batch=batch, tensorrt=built).to_dict()
    del options["backend"], options["target"]
    record = fingerprint.Fingerprint(
        model_sha256="0" * 64,
        preprocess_sha256="0" * 64,
        options=fingerprint.canonical_json(options),
        backend=backend,
        backend_version="1.7.1",
        target="sm_89",
    )
    record = fingerprint.here(record, get_backend(backend))
    manifest = Manifest(
        key=record.key,
        backend=backend,
        backend_version="1.7.1",
        target="sm_89",
        precision="fp16",
        batch=batch,
        inputs=(X,),
        outputs=outputs,
        files=(EngineFile("model.engine", 0, ""),),
        fingerprint=record.to_dict(),
    )
    return Engine(folder, manifest)


def some(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 3)).astype(np.float32)


def library_of(session: Session) -> Library:
    return session.library  # type: ignore[attr-defined,no-any-return]


# The fake is like the real thing


@pytest.mark.parametrize("surface", surfaces(), ids=lambda s: f"{s.library}-{s.version}")
def test_the_fake_has_the_names_and_parameters_of_the_library(surface: Any) -> None:
    library = Library(double)
    for kind in (
        fake_tensorrt.EngineInspector,
        fake_tensorrt.ICudaEngine,
        fake_tensorrt.IExecutionContext,
        fake_tensorrt.IRuntimeConfig,
        fake_tensorrt.IRuntimeCache,
        fake_tensorrt.ISerializationConfig,
        fake_tensorrt.Refitter,
        fake_tensorrt.OnnxParserRefitter,
        library.Runtime,  # type: ignore[attr-defined]
    ):
        if not surface.concerns(kind.__name__):
            continue
        for name, member in vars(kind).items():
            path = f"{kind.__name__}.{name}"
            if name.startswith("_") or not surface.concerns(path):
                continue
            recorded = surface.find(path)
            if inspect.isfunction(member):
                own = [p for p in inspect.signature(member).parameters if p != "self"]
                known = [[p.rstrip("=") for p in parameters] for parameters in recorded]
                assert own in known, f"{path}{own}: {known}"
    made = fake_tensorrt.ICudaEngine(library, plan(), None)
    for name in vars(made):
        assert name.startswith("_") or surface.has(f"ICudaEngine.{name}")
    for name in ("ExecutionContextAllocationStrategy", "CudaGraphStrategy"):
        if surface.concerns(name):
            assert {m.name for m in getattr(Library, name)} == set(surface.find(name))


def test_the_fake_device_has_what_the_real_one_has() -> None:
    from sn72engine.backends.tensorrt_device import Device

    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    made = HostDevice(0)
    assert public(HostDevice) == public(Device) - {"stream", "callers_stream"}
    assert made.stream != made.callers_stream


# Running


def test_answers_come_back_and_belong_to_the_caller(opened: Opened) -> None:
    with opened(plan()) as session:
        first, second = some(2, 1), some(5, 2)
        one = session(first)
        two = session(second)
        np.testing.assert_array_equal(one, 2 * first)
        np.testing.assert_array_equal(two, 2 * second)


def test_read_only_input_is_copied(opened: Opened) -> None:
    x = some(2)
    x.setflags(write=False)
    with opened(plan()) as session:
        np.testing.assert_array_equal(session(x), 2 * x)


def test_tensors_of_the_device_are_bound_as_they_are(opened: Opened) -> None:
    with opened(plan()) as session:
        x = torch.from_numpy(some(3))
        results = session._runner.run_device({"x": x})
        torch.testing.assert_close(results["doubled"], 2 * x)
        assert library_of(session).contexts[0]._addresses["x"] == x.data_ptr()
        again = session._runner.run_device({"x": x})
        assert again["doubled"].data_ptr() != results["doubled"].data_ptr()


# Profiles


def test_each_batch_runs_in_the_profile_tuned_nearest_to_it(opened: Opened) -> None:
    held = plan(profiles=[profile(1, 1, 1), profile(1, 16, 32)], scratch=[64, 512])
    with opened(held) as session:
        contexts = library_of(session).contexts
        for rows in (1, 20, 1, 2, 32):
            np.testing.assert_array_equal(session(some(rows)), 2 * some(rows))
        launches = {c.active_optimization_profile: c.launches for c in contexts}
        assert launches == {0: 2, 1: 3}
        # A context keeps its profile: one each, made when first needed.
        assert len(contexts) == 2


def test_contexts_are_made_only_when_needed(opened: Opened) -> None:
    held = plan(profiles=[profile(1, 1, 1), profile(1, 16, 32)])
    with opened(held) as session:
        session(some(1))
        assert len(library_of(session).contexts) == 1


def test_no_profile_for_a_shape_says_so() -> None:
    ranges = {"x": ((2, 3), (2, 3), (4, 3))}
    with pytest.raises(SessionError, match=r"no optimization profile takes x \(5, 3\)"):
        nearest([Profile(ranges)], {"x": (5, 3)})


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)).map(sorted),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 40),
)
def test_the_nearest_profile_is_the_nearest(ranges: list[list[int]], rows: int) -> None:
    profiles = [Profile({"x": ((low, 3), (tuned, 3), (high, 3))}) for low, tuned, high in ranges]
    fitting = [abs(tuned - rows) for low, tuned, high in ranges if low <= rows <= high]
    if not fitting:
        with pytest.raises(SessionError, match="no optimization profile"):
            nearest(profiles, {"x": (rows, 3)})
        return
    chosen = ranges[nearest(profiles, {"x": (rows, 3)})]
    assert chosen[0] <= rows <= chosen[2]
    assert abs(chosen[1] - rows) == min(fitting)


# Outputs whose shape depends on values


def split(inputs: Arrays) -> Arrays:
    x = inputs["x"]
    return {"doubled": 2 * x, "positive": x[x > 0]}


@pytest.mark.parametrize("on_device", [False, True])
def test_outputs_of_unknown_size(opened: Opened, on_device: bool) -> None:
    held = plan(outputs={"doubled": ["batch", 3], "positive": [-1]})
    with opened(held, library=Library(split), outputs=(POSITIVE, DOUBLED)) as session:
        kept = []
        for seed in range(3):
            x = some(2 + seed, seed)
            if on_device:
                found = session._runner.run_device({"x": torch.from_numpy(x)})
                positive, doubled = (found[name].numpy() for name in ("positive", "doubled"))
            else:
                positive, doubled = session(x)
            kept.append((x, positive))
            np.testing.assert_array_equal(doubled, 2 * x)
        for x, positive in kept:  # later calls did not touch them
            np.testing.assert_array_equal(positive, x[x > 0])


def test_outputs_of_unknown_size_are_not_held(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context never lets go of an allocator, so a new one for each call would keep its memory."""
    held = plan(
        profiles=[profile(1, 1, 1), profile(2, 4, 8)],
        outputs={"doubled": ["batch", 3], "positive": [-1]},
    )
    given: list[weakref.ref[torch.Tensor]] = []
    real = HostDevice.empty

    def empty(self: HostDevice, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        memory = real(self, shape, dtype)
        given.append(weakref.ref(memory))
        return memory

    with opened(held, library=Library(split), outputs=(POSITIVE, DOUBLED)) as session:
        monkeypatch.setattr(HostDevice, "empty", empty)
        for rows in (4, 1, 4, 1, 4):
            del given[:]
            session._runner.run_device({"x": torch.from_numpy(some(rows))})
            left = [memory() for memory in given if memory() is not None]
            assert all(memory is session._runner._scratch for memory in left)
        assert [len(context.kept) for context in library_of(session).contexts] == [1, 1]


def test_an_output_may_be_empty(opened: Opened) -> None:
    held = plan(outputs={"positive": [-1]})
    library = Library(lambda inputs: {"positive": inputs["x"][inputs["x"] > 1e9]})
    with opened(held, library=library, outputs=(POSITIVE,)) as session:
        assert session(some(2)).shape == (0,)


def test_no_memory_for_an_output_is_said(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    held = plan(outputs={"positive": [-1]})
    library = Library(lambda inputs: {"positive": inputs["x"].ravel()})
    with opened(held, library=library, outputs=(POSITIVE,)) as session:
        real = HostDevice.empty

        def empty(self: HostDevice, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            if shape == (24,):  # 6 numbers of the output
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, shape, dtype)

        monkeypatch.setattr(HostDevice, "empty", empty)
        with pytest.raises(SessionError, match=r"positive needs 24 bytes \(CUDA out of memory"):
            session(some(2))
        monkeypatch.setattr(HostDevice, "empty", real)
        assert session(some(2)).shape == (6,)


# Every status is looked at


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("set_input_shape", "refused shape of 'x'"),
        ("set_tensor_address", "refused input 'x'"),
        ("infer_shapes", "failed while running: infer_shapes; .*shapes clash"),
        ("set_device_memory", "failed while running: set_device_memory was told to fail"),
        ("execute_async_v3", "refused the launch: .*was told to fail"),
    ],
)
def test_a_call_that_fails_is_an_error(opened: Opened, method: str, message: str) -> None:
    with opened(plan(refuse=[method])) as session:
        with pytest.raises(SessionError, match=message):
            session(some(2))


@pytest.mark.parametrize("on_device", [False, True])
def test_no_memory_to_run_is_said(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    def full(self: HostDevice, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with opened(plan()) as session:
        runner = session._runner
        run = runner.run_device if on_device else runner.run
        monkeypatch.setattr(HostDevice, "empty", full)
        with pytest.raises(SessionError, match=r"not enough device memory .*lower the batch"):
            run({"x": torch.from_numpy(some(2)) if on_device else some(2)})


def test_an_allocator_that_is_refused_is_an_error(opened: Opened) -> None:
    held = plan(outputs={"positive": [-1]}, refuse=["set_output_allocator"])
    with opened(held, outputs=(POSITIVE,)) as session:
        with pytest.raises(SessionError, match="refused output 'positive'"):
            session(some(2))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("create_execution_context", "cannot be prepared: not enough memory"),
        ("set_optimization_profile_async", "refused profile 0"),
    ],
)
def test_an_engine_that_cannot_be_prepared_fails_when_opened(
    opened: Opened, method: str, message: str
) -> None:
    with pytest.raises(SessionError, match=message):
        opened(plan(refuse=[method]))


def test_a_file_that_is_no_engine(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "to_bytes", lambda self: b"something else")
    with pytest.raises(SessionError, match=r"model\.engine cannot be loaded: .*bad magic number"):
        opened(plan())


@pytest.mark.skipif(not _deps.available("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
@pytest.mark.skipif(device_target() is not None, reason="checks what is said without a card")
def test_the_real_library_says_that_there_is_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path / "cache"))
    options = BuildOptions(backend="tensorrt_rtx", target="sm_89", precision="fp16")
    model = tiny_models.linear(tmp_path / "m.onnx")
    engine = build(model, options, store=Store(tmp_path / "store"))
    trt = _deps.require("tensorrt_rtx", purpose="test")
    with pytest.raises(SessionError, match=r"cannot be loaded: no CUDA device .*cudaError 35"):
        LoadedEngine(trt, engine, HostDevice(0), RuntimeOptions())  # type: ignore[arg-type]


def test_other_tensors_than_the_manifest_declares(opened: Opened) -> None:
    with pytest.raises(SessionError, match=r"holds tensors \['doubled', 'x'\], its manifest"):
        opened(plan(), outputs=(POSITIVE,))


# Memory


def test_scratch_is_the_runners_own_and_shared_by_its_contexts(opened: Opened) -> None:
    held = plan(profiles=[profile(1, 1, 1), profile(1, 16, 32)], scratch=[64, 4096])
    with opened(held) as session:
        assert session.device_memory == DeviceMemory(
            engine=len(held.to_bytes()), scratch=0, scratch_limit=4096, buffers=0
        )
        session(some(1))
        first = session.device_memory
        assert first is not None
        assert (first.scratch, first.buffers) == (64, 2 * 12)
        session(some(8))
        session(some(1))
        contexts = library_of(session).contexts
        assert session.device_memory == replace(first, scratch=4096, buffers=2 * 8 * 12)
        assert contexts[0]._memory == contexts[1]._memory
        strategies = {c._config.get_execution_context_allocation_strategy() for c in contexts}
        assert strategies == {Library.ExecutionContextAllocationStrategy.USER_MANAGED}


def test_twins_share_the_engine_but_not_scratch(opened: Opened) -> None:
    session = opened(plan())
    library = library_of(session)
    twin = session.clone()
    x = some(3)
    np.testing.assert_array_equal(session(x), twin(x))
    assert len(library.engines) == 1
    first, second = library.contexts
    assert first._memory[0] != second._memory[0]
    session.close()
    np.testing.assert_array_equal(twin(x), 2 * x)
    twin.close()
    for closed in (session, twin):
        with pytest.raises(SessionError, match="closed"):
            closed(x)
        with pytest.raises(SessionError, match="closed"):
            _ = closed.device_memory


def test_a_pool_of_them(opened: Opened) -> None:
    first = opened(plan())
    barrier = threading.Barrier(2)

    def meet(inputs: Arrays) -> Arrays:
        barrier.wait(10)
        return double(inputs)

    library_of(first).compute = meet
    with SessionPool(first.engine, size=2) as pool:
        results: dict[int, Any] = {}
        threads = [
            threading.Thread(target=lambda s=seed: results.update({s: pool(some(2, s))}))  # type: ignore[misc]
            for seed in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        for seed in range(2):
            np.testing.assert_array_equal(results[seed], 2 * some(2, seed))
    first.close()


# Bindings, which a CUDA graph captures


def on_device(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(some(rows, seed))


def test_a_binding_launches_on_the_same_addresses(opened: Opened) -> None:
    held = plan(profiles=[profile(1, 1, 1), profile(1, 8, 16)], scratch=[64, 512])
    with opened(held) as session:
        x = on_device(6)
        launch = session.bind({"x": x})
        out = launch.outputs["doubled"]
        torch.testing.assert_close(out, 2 * x)  # it has been run once
        contexts = library_of(session).contexts
        bound = contexts[-1]
        assert bound.active_optimization_profile == 1
        assert bound.launches == 1
        before = dict(bound._addresses)
        x.fill_(3.0)
        launch()
        torch.testing.assert_close(out, torch.full((6, 3), 6.0))
        assert bound._addresses == before == {"x": x.data_ptr(), "doubled": out.data_ptr()}
        assert bound.streams[1:] == [session._runner._device.callers_stream]
        # Neither another binding nor a call of the session touches it.
        other = session.bind({"x": on_device(1, 1)})
        np.testing.assert_array_equal(session(some(4)), 2 * some(4))
        torch.testing.assert_close(out, torch.full((6, 3), 6.0))
        assert bound._addresses == before
        assert bound._memory[1] == 512  # what the most demanding profile needs
        assert other.outputs["doubled"].data_ptr() != out.data_ptr()


def test_bindings_of_a_session_share_scratch_and_clones_do_not(opened: Opened) -> None:
    with opened(plan()) as session, session.clone() as twin:
        contexts = library_of(session).contexts
        found = []
        for owner in (session, session, twin):
            owner.bind({"x": on_device(2)})
            found.append(contexts[-1]._memory[0])
        assert found[0] == found[1] != found[2]
        memory = session.device_memory
        assert memory is not None
        assert memory.scratch == 64


@pytest.mark.parametrize(
    ("held", "options"),
    [
        (plan(refuse=["is_stream_capturable"]), RuntimeOptions()),
        (plan(), RuntimeOptions(cuda_graph=True)),
    ],
)
def test_rtx_engines_that_cannot_be_captured_say_how(
    opened: Opened, held: Plan, options: RuntimeOptions
) -> None:
    with opened(held, options=options) as session:
        with pytest.raises(SessionError, match=r"cannot be captured .*user_allocation=True"):
            session.bind({"x": on_device(2)})


def test_tensorrt_engines_are_not_asked_what_only_rtx_knows(opened: Opened) -> None:
    with opened(plan(refuse=["is_stream_capturable"]), backend="tensorrt") as session:
        session.bind({"x": on_device(2)})()


def test_outputs_of_unknown_size_cannot_be_bound(opened: Opened) -> None:
    held = plan(outputs={"positive": [-1]})
    with opened(held, outputs=(POSITIVE,)) as session:
        with pytest.raises(SessionError, match="depends on values"):
            session.bind({"x": on_device(2)})


def test_what_is_bound_is_checked(opened: Opened) -> None:
    with opened(plan()) as session:
        for given, message in (
            ({"x": on_device(2).double()}, "has dtype float64"),
            ({"x": on_device(9)}, "has batch 9"),
            ({"x": on_device(6)[::2]}, "not contiguous"),
            ({"x": torch.zeros(2, 3, device="meta")}, "is on meta"),
            ({}, "'x' is missing"),
        ):
            with pytest.raises(InputError, match=message):
                session.bind(given)
        launch = session.bind({"x": on_device(2)})
        library_of(session).contexts[-1]._plan.refuse.append("execute_async_v3")
        with pytest.raises(SessionError, match="refused the launch"):
            launch()


# Runtime options


def test_kernels_compiled_are_kept_for_the_next_time(opened: Opened, tmp_path: Path) -> None:
    opened(plan()).close()
    files = list((tmp_path / "cache" / "runtime").glob("*.runtime"))
    assert len(files) == 1
    assert files[0].read_bytes() == b"kernels+1"
    opened(plan()).close()
    assert files[0].read_bytes() == b"kernels+1+1"
    files[0].write_bytes(b"damaged")
    with opened(plan()) as session:
        np.testing.assert_array_equal(session(some(2)), 2 * some(2))
    assert files[0].read_bytes() == b"kernels+1"


def test_kernels_that_cannot_be_kept_do_not_fail_the_close(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_tensorrt.IRuntimeCache, "_broken", True)
    with opened(plan()) as session:
        session(some(1))
    with pytest.raises(SessionError, match="closed"):
        session(some(1))


@pytest.mark.parametrize(
    ("backend", "options"),
    [("tensorrt_rtx", RuntimeOptions(runtime_cache=False)), ("tensorrt", RuntimeOptions())],
)
def test_no_kernels_are_kept(
    opened: Opened, tmp_path: Path, backend: str, options: RuntimeOptions
) -> None:
    opened(plan(), backend=backend, options=options).close()
    assert not (tmp_path / "cache" / "runtime").exists()


@pytest.mark.parametrize(
    ("options", "graph", "kernels"),
    [
        (RuntimeOptions(), None, "LAZY"),
        (RuntimeOptions(cuda_graph=True, shape_kernels="eager"), "WHOLE_GRAPH_CAPTURE", "EAGER"),
        (RuntimeOptions(shape_kernels="none"), None, "NONE"),
    ],
)
def test_rtx_is_told_how_to_run(
    opened: Opened, options: RuntimeOptions, graph: str | None, kernels: str
) -> None:
    with opened(plan(), options=options) as session:
        config = library_of(session).contexts[0]._config
        assert getattr(config.cuda_graph_strategy, "name", None) == graph
        assert config.dynamic_shapes_kernel_specialization_strategy.name == kernels


@pytest.mark.parametrize(("asked", "budget"), [(None, 500), (0, 0), (300, 300), (5000, 1000)])
def test_weights_stream_within_a_budget(opened: Opened, asked: int | None, budget: int) -> None:
    options = RuntimeOptions(weight_streaming_bytes=asked)
    with opened(plan(streamable=1000), options=options) as session:
        assert library_of(session).engines[0].weight_streaming_budget_v2 == budget
        np.testing.assert_array_equal(session(some(2)), 2 * some(2))
        memory = session.device_memory
        assert memory is not None
        assert memory.scratch == 0
        with pytest.raises(SessionError, match="streams its weights cannot be captured"):
            session.bind({"x": on_device(2)})


def test_an_engine_that_cannot_stream_says_so(opened: Opened) -> None:
    with pytest.raises(SessionError, match=r"weight_streaming_bytes=300: .*weight_streaming=True"):
        opened(plan(), options=RuntimeOptions(weight_streaming_bytes=300))


def test_a_stripped_engine_asks_for_its_weights(opened: Opened) -> None:
    with pytest.raises(SessionError, match=r"without its weights.*refit"):
        opened(plan(), built=TensorRTOptions(refit="identical", strip_weights=True))


def test_code_in_an_engine_runs_only_where_it_was_asked_for(opened: Opened) -> None:
    with opened(plan()) as session:
        assert not session._runner._loaded._runtime.engine_host_code_allowed
    with opened(plan(), built=TensorRTOptions(version_compatible=True)) as session:
        assert session._runner._loaded._runtime.engine_host_code_allowed


def test_a_lean_runtime_that_does_not_load(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"absent\.so'?: no such file"):
        opened(plan(), options=RuntimeOptions(lean_runtime=str(tmp_path / "absent.so")))
    (tmp_path / "lean.so").write_bytes(b"")
    with pytest.raises(SessionError, match=r"lean\.so' cannot be loaded: .*not a runtime"):
        opened(plan(), options=RuntimeOptions(lean_runtime=str(tmp_path / "lean.so")))


# What the library tells of itself


def test_the_layers_and_their_times_are_the_librarys(opened: Opened) -> None:
    library = Library(double)
    session = opened(plan(), library=library)
    assert layers_of(session.engine) == (Layer("doubled", "Fake"),)
    runs = timed_runs(session.engine, {"x": some(2)}, 3, RuntimeOptions())
    assert [run.layers for run in runs] == [(LayerRun("doubled", "", 500.0),)] * 3
    assert all(run.duration > 0 for run in runs)
    found = profile_layers(session.engine, ProfileOptions(warmup=0, repeats=2))
    # The profiler tells no types; the inspector does.
    assert [(layer.op, layer.ms) for layer in found.layers] == [("Fake", 0.5)]
    session(some(1))
    assert library.contexts[0].profiler is None  # the session's own calls are not timed
