"""A session computes what the model does for what fits, and names what does not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sn72engine.backends.base import Bindable, OnDevice, Shareable
from sn72engine.builder import build
from sn72engine.engine import Engine
from sn72engine.errors import EngineCorruptError, EngineMismatchError, InputError, SessionError
from sn72engine.preprocessing import preprocess
from sn72engine.session import DeviceRunner, Session, load
from sn72engine.spec import BuildOptions, RuntimeOptions, ShapeRange
from sn72engine.store import Store
from tests import tiny_models

ONE_THREAD = RuntimeOptions(threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    """Linear, 2 to 6 samples."""
    model = tiny_models.linear(folder / "linear.onnx")
    return build(model, BuildOptions(batch=ShapeRange(2, 3, 6)), store=Store(folder / "store"))


@pytest.fixture(scope="module")
def session(engine: Engine) -> Iterator[Session]:
    with load(engine, ONE_THREAD) as opened:
        yield opened


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Session]:
    """Two inputs, two outputs."""
    model = tiny_models.two_by_two(folder / "two.onnx")
    with load(build(model, store=Store(folder / "store")), ONE_THREAD) as opened:
        yield opened


@pytest.fixture(scope="module")
def images(folder: Path) -> Iterator[Session]:
    """Images of 16 x 16 to 5 classes, 2 to 4 samples."""
    model = tiny_models.convolution(folder / "images.onnx")
    options = BuildOptions(batch=ShapeRange(2, 2, 4))
    with load(build(model, options, store=Store(folder / "store")), ONE_THREAD) as opened:
        yield opened


def expected(folder: Path, x: np.ndarray) -> np.ndarray:
    w, b = tiny_models.linear_weights(tiny_models.OnnxModel.open(folder / "linear.onnx"))
    result: np.ndarray = x @ w + b
    return result


def some(batch: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 4)).astype(np.float32)


# What comes back


@given(batch=st.integers(2, 6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_batch_of_the_range(session: Session, folder: Path, batch: int, seed: int) -> None:
    x = some(batch, seed)
    np.testing.assert_allclose(session(x), expected(folder, x), rtol=1e-4, atol=1e-5)


def test_mapping_in_dict_out_positional_in_array_out(session: Session) -> None:
    x = some()
    by_name = session({"x": x})
    assert list(by_name) == ["y"]
    np.testing.assert_array_equal(session(x), by_name["y"])


def test_several_outputs_come_as_a_tuple_in_order(two: Session) -> None:
    a, b = some(3, 1), some(3, 2)
    total, difference = two(a, b)
    np.testing.assert_allclose(total, a + b)
    np.testing.assert_allclose(difference, a - b)
    by_name = two({"b": b, "a": a})
    np.testing.assert_array_equal(by_name["difference"], difference)


def test_tensors_in_tensors_out(session: Session) -> None:
    x = some()
    result = session(torch.from_numpy(x))
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), session(x))
    assert isinstance(session({"x": torch.from_numpy(x)})["y"], torch.Tensor)


def test_a_tensor_that_needs_gradients_is_taken(session: Session) -> None:
    result = session(torch.from_numpy(some()).requires_grad_())
    assert not result.requires_grad


def test_mixed_inputs_give_arrays(two: Session) -> None:
    total, _ = two(some(), torch.from_numpy(some()))
    assert isinstance(total, np.ndarray)


def test_tensors_are_not_copied_on_the_way_in(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    runner = session._runner
    real = runner.run

    def spy(inputs: Any) -> Any:
        seen.append(inputs["x"].ctypes.data)
        return real(inputs)

    monkeypatch.setattr(runner, "run", spy)
    array, tensor = some(), torch.from_numpy(some())
    session(array)
    session(tensor)
    assert seen == [array.ctypes.data, tensor.data_ptr()]


class Foreign:
    """An array of some other library, known by its DLPack methods alone."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def test_any_dlpack_object_is_taken(session: Session) -> None:
    x = some()
    result = session(Foreign(x))
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(result, session(x))


@given(
    step=st.sampled_from([1, 2, -1]),
    transpose=st.booleans(),
    tensor=st.booleans(),
    read_only=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_memory_order_gives_the_same_answer(
    session: Session, step: int, transpose: bool, tensor: bool, read_only: bool
) -> None:
    base = np.random.default_rng(4).standard_normal((8, 8)).astype(np.float32)
    view = (base.T if transpose else base)[::step][:4, 2:6]
    given_to_it: Any = view
    if tensor:
        if step < 0:
            return  # PyTorch has no negative strides
        given_to_it = torch.from_numpy(view)
    elif read_only:
        view.flags.writeable = False
    got = session(given_to_it)
    np.testing.assert_array_equal(np.asarray(got), session(view.copy()))


def test_results_belong_to_the_caller(session: Session) -> None:
    first = session(some(3, 0))
    kept = first.copy()
    for seed in range(1, 6):
        session(some(3, seed))
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # writeable, and nobody else's
    np.testing.assert_array_equal(session(some(3, 0)), kept)


def test_inputs_are_left_alone(session: Session) -> None:
    x = some()
    kept = x.copy()
    session(x)
    np.testing.assert_array_equal(x, kept)


# What is refused


@given(batch=st.integers(0, 50).filter(lambda n: not 2 <= n <= 6))
@settings(max_examples=20, deadline=None)
def test_a_batch_outside_the_range(session: Session, batch: int) -> None:
    with pytest.raises(InputError) as caught:
        session(np.zeros((batch, 4), np.float32))
    message = str(caught.value)
    assert f"input 'x' has batch {batch}" in message
    assert "2..6" in message
    way_out = "leave out" if batch == 0 else "split it" if batch > 6 else "pad it to 2"
    assert way_out in message


@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool", ">f4"]),
    tensor=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_anything_either_fits_or_is_refused_by_name(
    session: Session, shape: tuple[int, ...], dtype: str, tensor: bool
) -> None:
    array: Any = np.zeros(shape, dtype)
    if tensor and array.dtype.isnative:
        array = torch.from_numpy(array)
    fits = dtype == "float32" and len(shape) == 2 and 2 <= shape[0] <= 6 and shape[1] == 4
    if fits:
        assert tuple(session(array).shape) == (shape[0], 3)
    else:
        with pytest.raises(InputError, match="input 'x'"):
            session(array)


@pytest.mark.parametrize(
    ("given_to_it", "message"),
    [
        (np.zeros((3, 4)), r"dtype float64, but the engine takes float32.*\.astype\('float32'\)"),
        (np.zeros((3, 4), ">f4"), "swapped bytes"),
        (np.zeros((3, 5), np.float32), r"shape \(3, 5\), but axis 1 must be 4"),
        (np.zeros(4, np.float32), "add the batch axis"),
        (np.zeros((3, 4, 1), np.float32), r"takes x: float32\[N, 4\]"),
        ([[0.0] * 4] * 3, "is a list; give a NumPy array, a PyTorch tensor"),
        (None, "is a NoneType"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "bfloat16.*convert it first"),
        (torch.zeros(3, 4).to_sparse(), "sparse"),
        (torch.zeros(3, 4, device="meta"), "is on meta"),
    ],
)
def test_messages(session: Session, given_to_it: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"input 'x'.*{message}"):
        session(given_to_it)


def test_names_are_checked(two: Session) -> None:
    with pytest.raises(InputError, match=r"unknown input 'c'; the engine takes a: float32\[N, 4\]"):
        two({"a": some(), "b": some(), "c": some()})
    with pytest.raises(InputError, match="input 'b' is missing"):
        two({"a": some()})
    with pytest.raises(InputError, match="got 1 positional arrays, but the engine takes 2"):
        two(some())
    with pytest.raises(InputError, match="got 0 positional arrays"):
        two()


def test_inputs_must_agree_on_shared_axes(two: Session) -> None:
    with pytest.raises(InputError, match="'a' and 'b' share axis 'N', but have 3 and 2 there"):
        two(some(3), some(2))


# Images


def photo(value: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_images_in_chunks_equal_images_at_once(images: Session, count: int) -> None:
    sources = [
        np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), dtype=np.uint8)
        for seed in range(count)
    ]
    got = images.infer_images(sources)
    assert got.shape == (count, 5)
    for index, source in enumerate(sources):
        pair = preprocess([source, source], tiny_models.IMAGES)
        np.testing.assert_allclose(got[index], images(pair)[0], rtol=1e-4, atol=1e-5)


def test_every_kind_of_image(images: Session, tmp_path: Path) -> None:
    want = images.infer_images([photo(90)])
    Image.fromarray(photo(90)).save(tmp_path / "p.png")
    for source in (
        photo(90),
        photo(90)[None],
        Image.fromarray(photo(90)),
        tmp_path / "p.png",
        str(tmp_path / "p.png"),
        (tmp_path / "p.png").read_bytes(),
    ):
        np.testing.assert_allclose(images.infer_images(source), want, rtol=1e-5)


def test_images_are_preprocessed_as_recorded(images: Session) -> None:
    assert images.preprocess == tiny_models.IMAGES


def test_no_images_no_answer(images: Session) -> None:
    with pytest.raises(InputError, match="images is empty"):
        images.infer_images([])


def test_engines_without_images_say_so(session: Session, two: Session) -> None:
    with pytest.raises(InputError, match=r"does not take images.*not recorded"):
        session.infer_images([photo(1)])
    with pytest.raises(InputError, match="does not take images"):
        two.infer_images([photo(1)])


# Opening and closing


def test_load_takes_an_engine_or_its_folder(engine: Engine, folder: Path) -> None:
    x = some()
    for given_to_it in (engine, engine.folder, str(engine.folder)):
        with load(given_to_it, ONE_THREAD) as opened:
            np.testing.assert_allclose(opened(x), expected(folder, x), rtol=1e-4, atol=1e-5)
            assert opened.manifest.key == engine.manifest.key
            assert opened.inputs == engine.manifest.inputs
            assert opened.outputs == engine.manifest.outputs


def test_a_folder_is_hash_checked(tmp_path: Path) -> None:
    made = build(tiny_models.linear(tmp_path / "m.onnx"), store=Store(tmp_path / "store"))
    made.path.write_bytes(made.path.read_bytes() + b"x")
    with pytest.raises(EngineCorruptError):
        load(made.folder)


def made_elsewhere(engine: Engine, **changes: str) -> Engine:
    """The engine as if it had been built with another library, or on another platform."""
    stored = {**engine.manifest.fingerprint, **changes}
    return replace(engine, manifest=replace(engine.manifest, fingerprint=stored))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend_version": "1.2.0"}, r"backend_version was 1\.2\.0 .* build again with"),
        ({"target": "cpu-windows-arm64"}, r"target was cpu-windows-arm64 .* and is cpu-"),
    ],
)
def test_an_engine_that_was_made_for_something_else_is_refused(
    engine: Engine, changes: dict[str, str], reason: str
) -> None:
    with pytest.raises(EngineMismatchError, match=reason):
        load(made_elsewhere(engine, **changes))


def test_a_soft_difference_is_logged(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    version = f"{engine.manifest.backend_version}.post9"
    caplog.set_level("INFO", logger="sn72engine.session")
    with load(made_elsewhere(engine, backend_version=version)) as session:
        assert session(np.zeros((2, 4), np.float32)).shape == (2, 3)
    assert version in caplog.text
    assert "may be used" in caplog.text
    caplog.clear()
    load(engine).close()
    assert not caplog.records


def test_opening_a_folder_of_a_store_counts_as_use(folder: Path) -> None:
    store = Store(folder / "used")
    model = tiny_models.linear(folder / "used.onnx")
    first, second = (
        build(model, BuildOptions(batch=ShapeRange(size, size, size)), store=store)
        for size in (1, 2)
    )
    for age, made in ((200, first), (100, second)):
        then = time.time() - age
        os.utime(made.folder, (then, then))
    assert [entry.key for entry in store.entries()] == [first.manifest.key, second.manifest.key]
    load(first.folder).close()
    assert [entry.key for entry in store.entries()] == [second.manifest.key, first.manifest.key]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineCorruptError, match="absent: no such engine folder"):
        load(tmp_path / "absent")


@given(count=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_any_number_of_rows(session: Session, count: int) -> None:
    rows = np.random.default_rng(count).standard_normal((count, 4)).astype(np.float32)
    wanted = [session(np.stack([row, row]))[0] for row in rows]
    np.testing.assert_allclose(session.infer_rows(rows), wanted, rtol=1e-5, atol=1e-6)


def test_rows_are_for_engines_with_one_input(session: Session, two: Session) -> None:
    with pytest.raises(InputError, match="one input"):
        two.infer_rows(np.zeros((3, 4), np.float32))
    with pytest.raises(InputError, match="at least one"):
        session.infer_rows(np.zeros((0, 4), np.float32))


def test_closed_sessions_say_so(engine: Engine) -> None:
    opened = load(engine, ONE_THREAD)
    assert "onnxruntime fp32, cpu: x: float32[N, 4] -> y" in repr(opened)
    opened.close()
    opened.close()
    assert "closed" in repr(opened)
    with pytest.raises(SessionError, match="closed"):
        opened(some())


def test_a_clone_lives_on_its_own(engine: Engine) -> None:
    with load(engine, ONE_THREAD) as opened:
        twin = opened.clone()
        assert twin.options == opened.options
        want = opened(some())
    np.testing.assert_array_equal(twin(some()), want)
    twin.close()


def test_threads_share_a_session(engine: Engine, folder: Path) -> None:
    inside, most = [0], [0]
    wrong: list[int] = []
    with load(engine, ONE_THREAD) as opened:
        real = opened._runner.run

        def counted(inputs: Any) -> Any:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            try:
                return real(inputs)
            finally:
                inside[0] -= 1

        opened._runner.run = counted

        def work(seed: int) -> None:
            for turn in range(50):
                x = some(2 + (seed + turn) % 5, seed * 100 + turn)
                if not np.allclose(opened(x), expected_by(x), rtol=1e-4, atol=1e-5):
                    wrong.append(seed)

        w, b = tiny_models.linear_weights(tiny_models.OnnxModel.open(folder / "linear.onnx"))

        def expected_by(x: np.ndarray) -> np.ndarray:
            result: np.ndarray = x @ w + b
            return result

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert most[0] == 1


def test_closing_waits_for_the_call_under_way(engine: Engine) -> None:
    opened = load(engine, ONE_THREAD)
    real, entered, go_on = opened._runner.run, threading.Event(), threading.Event()

    def slow(inputs: Any) -> Any:
        entered.set()
        assert go_on.wait(20)
        return real(inputs)

    opened._runner.run = slow
    results: list[Any] = []
    caller = threading.Thread(target=lambda: results.append(opened(some())))
    caller.start()
    assert entered.wait(20)
    closer = threading.Thread(target=opened.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    go_on.set()
    caller.join(20)
    closer.join(20)
    assert results[0].shape == (3, 3)


def test_the_runners_are_what_they_claim(session: Session) -> None:
    from sn72engine.backends.tensorrt_runner import TensorRTRunner

    assert not isinstance(session._runner, DeviceRunner)
    # The protocol's one data member belongs to the device, which is absent here.
    made = TensorRTRunner.__new__(TensorRTRunner)
    made._device = SimpleNamespace(torch_device=torch.device("cuda", 0))  # type: ignore[assignment]
    assert isinstance(made, DeviceRunner)
    assert isinstance(made, Shareable)
    assert isinstance(made, OnDevice)
    assert isinstance(made, Bindable)
    assert isinstance(session._runner, Shareable)
    assert session.device_memory is None
    assert not session.bindable
    with pytest.raises(SessionError, match=r"engines of onnxruntime cannot be captured.*inductor"):
        session.bind({"x": torch.zeros(2, 4)})
