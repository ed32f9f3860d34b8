"""Calibration data: sources, order, choice, hash, refusals, and memory that does not grow."""

from __future__ import annotations

import gc
import math
import resource
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sn72engine import image_files, samples
from sn72engine.calibration import CalibrationData, batches, labelled
from sn72engine.errors import CalibrationError
from sn72engine.preprocessing import preprocess
from sn72engine.spec import CalibrationOptions, Preprocess

SPEC = Preprocess(8, 8)
FEW = CalibrationOptions(batch_size=4, minimum=1)


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def save(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path)
    return path


def floats(count: int, shape: tuple[int, ...] = (3, 8, 8)) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)


def joined(data: CalibrationData) -> np.ndarray:
    return np.concatenate(list(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images, of which three lie deeper, among files that are none."""
    root = tmp_path / "images"
    names = ["2.png", "10.png", "1.PNG", "b/x9.png", "b/x10.png", "a.bmp", "B/c.png", "img03.png",
             "img2.png", "img12.png"]  # fmt: skip
    for seed, name in enumerate(names):
        save(root / name, seed)
    (root / "notes.txt").write_text("no image")
    (root / "._2.png").write_bytes(b"resource fork")
    (root / ".cache").mkdir()
    (root / ".cache" / "old.png").write_bytes(b"hidden")
    return root


# --- sources -------------------------------------------------------------------------------------


def test_folder_in_natural_order(folder: Path) -> None:
    paths = image_files.images_in_folder(folder)
    assert [path.relative_to(folder).as_posix() for path in paths] == [
        "1.PNG", "2.png", "10.png", "a.bmp", "B/c.png", "b/x9.png", "b/x10.png", "img2.png",
        "img03.png", "img12.png",
    ]  # fmt: skip
    data = batches(folder, SPEC, FEW)
    assert data.samples == 10
    assert data.batch_size == 4
    assert len(data) == 3
    assert [batch.shape for batch in data] == [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]
    assert all(batch.flags.c_contiguous and batch.dtype == np.float32 for batch in data)
    np.testing.assert_array_equal(joined(data), preprocess(paths, SPEC))
    np.testing.assert_array_equal(joined(batches(str(folder), SPEC, FEW)), joined(data))


@given(
    st.lists(st.text("aB1029_.", min_size=1, max_size=8), unique=True, max_size=12), st.randoms()
)
@settings(max_examples=60, deadline=None)
def test_natural_order_does_not_depend_on_the_listing(names: list[str], random: Any) -> None:
    ordered = sorted(names, key=image_files._natural)
    shuffled = list(names)
    random.shuffle(shuffled)
    assert sorted(shuffled, key=image_files._natural) == ordered
    numbers = sorted((name for name in names if name.isdecimal()), key=image_files._natural)
    assert [int(name) for name in numbers] == sorted(int(name) for name in numbers)


def test_csv(tmp_path: Path) -> None:
    for seed in range(4):
        save(tmp_path / "data" / "images" / f"{seed}.png", seed)
    table = tmp_path / "data" / "labels.csv"
    # A byte order mark and CRLF, as a spreadsheet writes them; an order that is not sorted.
    table.write_bytes(
        b"\xef\xbb\xbffile,label,split\r\nimages/3.png,1,train\r\nimages/0.png,0,test\r\n"
        b"images/2.png,1,train\r\n\r\nimages/1.png,0,train\r\n"
    )
    images = tmp_path / "data" / "images"
    everything = [images / f"{i}.png" for i in (3, 0, 2, 1)]
    train = [images / f"{i}.png" for i in (3, 2, 1)]
    np.testing.assert_array_equal(joined(batches(table, SPEC, FEW)), preprocess(everything, SPEC))
    np.testing.assert_array_equal(
        joined(batches(table, SPEC, FEW, split="train")), preprocess(train, SPEC)
    )
    paths, labels = labelled(table)
    assert paths == everything
    assert labels.dtype == np.int64
    assert labels.tolist() == [1, 0, 1, 0]
    paths, labels = labelled(table, "train")
    assert paths == train
    assert labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("limit", [None, 3])
def test_npz(tmp_path: Path, compressed: bool, limit: int | None) -> None:
    path = tmp_path / "data.npz"
    values = floats(7)
    (np.savez_compressed if compressed else np.savez)(path, values)
    options = CalibrationOptions(batch_size=4, minimum=1, limit=limit)
    expected = values if limit is None else values[[1, 3, 5]]
    np.testing.assert_array_equal(joined(batches(path, SPEC, options)), expected)
    np.testing.assert_array_equal(joined(batches(path, None, options)), expected)


def test_npz_of_images_beside_labels(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    images = np.stack([picture(seed) for seed in range(5)])
    np.savez(path, images=images, labels=np.arange(5))
    data = batches(path, SPEC, FEW, array="images")
    np.testing.assert_array_equal(joined(data), preprocess(images, SPEC))
    with pytest.raises(CalibrationError, match=r"several arrays; choose by array=.*images, labels"):
        batches(path, SPEC, FEW)
    with pytest.raises(CalibrationError, match="no array 'x'"):
        batches(path, SPEC, FEW, array="x")
    with pytest.raises(CalibrationError, match=r"array 'labels': array of int64\[5\]"):
        batches(path, SPEC, FEW, array="labels")


def test_iterables_of_images(folder: Path) -> None:
    arrays: list[Any] = [picture(seed, (9 + seed, 20)) for seed in range(6)]
    mixed = [arrays[0], Image.fromarray(arrays[1]), folder / "2.png", str(folder / "10.png"),
             (folder / "1.PNG").read_bytes()]  # fmt: skip
    for items in (arrays, mixed):
        expected = preprocess(items, SPEC)
        np.testing.assert_array_equal(joined(batches(items, SPEC, FEW)), expected)
        np.testing.assert_array_equal(joined(batches(tuple(items), SPEC, FEW)), expected)
        np.testing.assert_array_equal(joined(batches(iter(items), SPEC, FEW)), expected)
    stack = np.stack([picture(seed) for seed in range(6)])
    np.testing.assert_array_equal(joined(batches(stack, SPEC, FEW)), preprocess(stack, SPEC))


@pytest.mark.parametrize("as_source", [list, iter, np.stack])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_ready_arrays(as_source: Callable[[Any], Any], dtype: str) -> None:
    values = floats(5).astype(dtype)
    found = joined(batches(as_source(list(values)), SPEC, FEW))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.astype(np.float32))
    bare = joined(batches(as_source(list(values)), None, FEW))
    assert bare.dtype == (np.float16 if dtype == "float16" else np.float32)
    half = joined(batches(as_source(list(values)), Preprocess(8, 8, dtype="float16"), FEW))
    np.testing.assert_array_equal(half, values.astype(np.float16))


def test_ready_arrays_of_any_shape_without_a_preprocess() -> None:
    values = floats(5, (7,))
    np.testing.assert_array_equal(joined(batches(list(values), None, FEW)), values)


# --- iterating -----------------------------------------------------------------------------------


@pytest.mark.parametrize("one_shot", [False, True])
def test_can_be_read_again_and_in_parallel(one_shot: bool) -> None:
    images = [picture(seed) for seed in range(9)]
    data = batches(iter(images) if one_shot else images, SPEC, FEW)
    expected = preprocess(images, SPEC)
    for _ in range(3):
        np.testing.assert_array_equal(joined(data), expected)
    first, second = iter(data), iter(data)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        a[:] = np.nan  # a batch belongs to whoever got it
    np.testing.assert_array_equal(joined(data), expected)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_batches_cover_every_sample_once(count: int, batch_size: int, limit: int) -> None:
    values = np.arange(count, dtype=np.float32)[:, None]
    options = CalibrationOptions(batch_size=batch_size, limit=limit, minimum=1)
    data = batches(values, None, options)
    sizes = [len(batch) for batch in data]
    assert len(sizes) == len(data)
    assert all(size == batch_size for size in sizes[:-1])
    assert sum(sizes) == data.samples == min(count, limit)
    chosen = joined(data)[:, 0]
    assert (np.diff(chosen) > 0).all()


@given(st.integers(1, 400), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_limit_spreads_evenly(count: int, limit: int) -> None:
    chosen = np.array(samples.spread(count, limit))
    assert len(chosen) == min(count, limit)
    if limit < count:
        step = count / limit
        assert np.abs(chosen + 0.5 - step * (np.arange(limit) + 0.5)).max() <= 1


@given(st.integers(1, 400), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_limit_spreads_a_stream_evenly(count: int, limit: int) -> None:
    stream = (np.full(1, index, np.float32) for index in range(count))
    chosen = joined(batches(stream, None, CalibrationOptions(limit=limit, minimum=1)))[:, 0]
    assert len(chosen) == min(count, limit)
    assert (np.diff(chosen) > 0).all()
    # The stride is a power of two of at most count / limit; a place is off by at most one stride
    # from the even spread of what was kept, and what was kept ends a stride before the end.
    step = count / limit
    if step > 1:
        assert np.abs(chosen + 0.5 - step * (np.arange(limit) + 0.5)).max() <= 2 * step


def test_a_long_stream_prepares_few_and_stores_few(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    longest = 0

    def counted(item: Any, spec: Any, index: int) -> Any:
        prepared.append(index)
        return original(item, spec, index)

    class Watched(samples.Spool):
        def append(self, sample: Any) -> None:
            nonlocal longest
            super().append(sample)
            longest = max(longest, len(self))

    original = samples.sample_of
    monkeypatch.setattr(samples, "sample_of", counted)
    monkeypatch.setattr(samples, "Spool", Watched)
    stream = (np.zeros(2, np.float32) for _ in range(10_000))
    data = batches(stream, None, CalibrationOptions(limit=10, minimum=1))
    assert data.samples == 10
    assert longest == 20
    # 20, then 10 for each doubling of the stride.
    assert len(prepared) <= 20 + 10 * math.ceil(math.log2(10_000 / 20))


def test_limit_of_a_list_decodes_only_what_is_chosen() -> None:
    items: list[Any] = [b"not an image"] * 9
    for place in samples.spread(9, 3):
        items[place] = picture(place)
    data = batches(items, SPEC, CalibrationOptions(limit=3, minimum=1))
    assert joined(data).shape == (3, 3, 8, 8)


# --- hash ----------------------------------------------------------------------------------------


def test_hash_follows_content_and_order(folder: Path) -> None:
    images = [picture(seed) for seed in range(6)]

    def digest(items: Any, spec: Preprocess | None = SPEC, **options: Any) -> str:
        options = {"minimum": 1, **options}
        return batches(items, spec, CalibrationOptions(**options)).data_sha256()

    same = digest(images)
    assert len(same) == 64
    assert digest(images) == same
    assert digest(iter(images)) == same
    assert digest(images, batch_size=1) == same
    assert digest(preprocess(images, SPEC)) == same
    assert digest(images[::-1]) != same
    assert digest(images[:5]) != same
    assert digest([*images[:5], picture(99)]) != same
    assert digest(images, Preprocess(8, 8, std=(1.0, 1.0, 1.0))) != same
    assert digest(preprocess(images, SPEC).reshape(6, 3, 64), None) != same


def test_hash_is_made_in_passing() -> None:
    reads = []

    class Counting(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            reads.append(index)
            return super().__getitem__(index)

    data = batches(Counting([picture(seed) for seed in range(5)]), SPEC, FEW)
    for _ in data:
        pass
    digest = data.data_sha256()
    assert len(reads) == 5
    next(iter(data))  # a pass that is not finished changes nothing
    assert data.data_sha256() == digest


def test_data_that_changes_between_passes_is_refused(folder: Path) -> None:
    data = batches(folder, SPEC, FEW)
    data.data_sha256()
    save(folder / "2.png", 77)
    with pytest.raises(CalibrationError, match="has changed"):
        list(data)


# --- memory --------------------------------------------------------------------------------------


def peak(run: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy held at once during a call, beyond those before it."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def consume(source: Any, spec: Preprocess | None) -> None:
    data = batches(source, spec, CalibrationOptions(batch_size=4, limit=None, minimum=1))
    for _ in data:
        pass
    data.data_sha256()


@pytest.mark.parametrize("kind", ["generator", "folder", "npz", "compressed npz"])
def test_memory_does_not_grow_with_the_data(kind: str, tmp_path: Path) -> None:
    spec = Preprocess(64, 64)
    sample_bytes = 4 * 3 * 64 * 64

    def source(count: int) -> Any:
        if kind == "generator":
            return (picture(seed, (64, 64)) for seed in range(count))
        if kind == "folder":
            root = tmp_path / str(count)
            for seed in range(count):
                save(root / f"{seed}.png", seed)
            return root
        path = tmp_path / f"{count}.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(path, floats(count, spec.shape))
        return path

    few, many = source(8), source(80)
    consume(source(8), spec)  # first-use costs of the libraries
    small = peak(lambda: consume(few, spec))
    large = peak(lambda: consume(many, spec))
    # Ten times the data; holding it would be 72 samples more. Room for its list of paths.
    assert large - small < 4 * sample_bytes
    assert large < 24 * sample_bytes + (1 << 20)


def test_generator_items_are_let_go() -> None:
    given_out: list[weakref.ref[Any]] = []
    most = 0

    def stream() -> Iterator[np.ndarray]:
        nonlocal most
        for seed in range(30):
            image = picture(seed)
            given_out.append(weakref.ref(image))
            most = max(most, sum(reference() is not None for reference in given_out))
            yield image

    assert batches(stream(), SPEC, FEW).samples == 30
    assert most <= 2


def test_temporary_file_is_closed_with_the_data() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    before = descriptors()
    data = batches(iter([picture(0)] * 3), SPEC, FEW)
    assert descriptors() == before + 1
    del data
    gc.collect()
    assert descriptors() == before


def test_full_disk_is_explained() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stream = iter([np.zeros(100_000, np.float32)] * 3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(CalibrationError, match="TMPDIR"):
            batches(stream, None, FEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- refusals ------------------------------------------------------------------------------------


def test_no_data_is_never_made_up(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = tmp_path / "nothing.npz"
    np.savez(nothing, floats(0))
    for source in (empty, [], (), iter([]), np.zeros((0, 8, 8, 3), np.uint8), nothing):
        with pytest.raises(CalibrationError, match="no samples"):
            batches(source, SPEC)


def test_too_few_samples() -> None:
    images = [picture(seed) for seed in range(7)]
    with pytest.raises(CalibrationError, match=r"only 7 samples.*at least 8"):
        batches(images, SPEC)
    with pytest.raises(CalibrationError, match=r"only 3 samples.*at least 4"):
        batches(images, SPEC, CalibrationOptions(limit=3, minimum=4))
    assert batches([*images, images[0]], SPEC).samples == 8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("as_source", [list, iter, np.stack])
def test_not_finite(value: float, as_source: Callable[[Any], Any]) -> None:
    values = floats(6)
    values[4, 1, 2, 3] = value
    with pytest.raises(CalibrationError, match="item 4 holds NaN or infinity"):
        joined(batches(as_source(list(values)), SPEC, FEW))


def test_too_large_for_the_type() -> None:
    values = floats(3) + np.float32(1e5)
    with pytest.raises(CalibrationError, match="infinity as float16"):
        joined(batches(values, Preprocess(8, 8, dtype="float16"), FEW))


@pytest.mark.parametrize("as_source", [list, iter])
def test_inconsistent_shapes(as_source: Callable[[Any], Any]) -> None:
    values = [*floats(3, (5,)), floats(1, (6,))[0]]
    with pytest.raises(CalibrationError, match=r"sample 3 is float32\[6\], but the first is"):
        joined(batches(as_source(values), None, FEW))
    with pytest.raises(CalibrationError, match=r"item 0 has shape \(5,\)"):
        joined(batches(as_source(values), SPEC, FEW))
    with pytest.raises(CalibrationError, match="this is a batch"):
        joined(batches(as_source([floats(4)]), SPEC, FEW))


@pytest.mark.parametrize("as_source", [list, iter])
def test_unreadable_image_stops_and_is_named(folder: Path, as_source: Callable[[Any], Any]) -> None:
    bad = folder / "b" / "x9.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(CalibrationError, match=r"item 5: .*x9\.png"):
        joined(batches(folder, SPEC, FEW))
    with pytest.raises(CalibrationError, match=r"item 1: .*x9\.png"):
        joined(batches(as_source([folder / "2.png", bad]), SPEC, FEW))


def test_unusable_sources(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", 0)
    cases: list[tuple[Any, Preprocess | None, str]] = [
        (tmp_path / "absent", SPEC, "absent: does not exist"),
        (image, SPEC, "not a folder, a .csv or a .npz file"),
        (tmp_path, None, "images need a Preprocess"),
        (b"bytes", SPEC, "bytes"),
        (3, SPEC, "int"),
        (picture(0), SPEC, r"uint8\[12, 10, 3\]"),
        (np.zeros((4, 8, 8, 3), np.int32), SPEC, "int32"),
    ]
    for source, spec, words in cases:
        with pytest.raises(CalibrationError, match=words):
            batches(source, spec, FEW)
    with pytest.raises(CalibrationError, match="item 0 is a uint8 array; without a Preprocess"):
        joined(batches([picture(0)], None, FEW))
    with pytest.raises(CalibrationError, match=r"item 0: cannot decode a builtins\.tuple"):
        joined(batches([(picture(0), 1)], SPEC, FEW))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,label\na.png,1\n", "no 'file' column; the first line names name, label"),
        ("", "no 'file' column; the first line names none"),
        ("file,label\n", "no rows"),
        ("file,label\na.png,1\nmissing.png,1\n", "line 3: no such file: .*missing.png"),
        ("file,label\n,1\n", "line 2: the 'file' column is empty"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, words: str) -> None:
    save(tmp_path / "a.png", 0)
    table = tmp_path / "t.csv"
    table.write_text(text)
    for call in (lambda: batches(table, SPEC, FEW), lambda: labelled(table)):
        with pytest.raises(CalibrationError, match=words):
            call()


def test_csv_that_is_no_text(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CalibrationError, match="cannot be read as CSV"):
        batches(table, SPEC, FEW)
    with pytest.raises(CalibrationError, match="cannot be read as CSV"):
        labelled(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    "text", ["file\na.png\n", "file,label\na.png,cat\n", "file,label\na.png\n"]
)
def test_bad_labels(tmp_path: Path, text: str) -> None:
    save(tmp_path / "a.png", 0)
    table = tmp_path / "t.csv"
    table.write_text(text)
    with pytest.raises(CalibrationError, match=r"line 2: .*label"):
        labelled(table)


def test_bad_split(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    table = tmp_path / "t.csv"
    table.write_text("file,label,split\na.png,1,test\n")
    with pytest.raises(CalibrationError, match=r"no rows of split 'train'; it has \['test'\]"):
        labelled(table, "train")
    table.write_text("file,label\na.png,1\n")
    with pytest.raises(CalibrationError, match="no 'split' column"):
        labelled(table, "train")


def test_bad_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(b"PK nonsense")
    with pytest.raises(CalibrationError, match=r"cannot be read as .npz"):
        batches(path, SPEC, FEW)
    with pytest.raises(CalibrationError, match=r"cannot be read as .npz"):
        batches(tmp_path / "absent.npz", SPEC, FEW)
    np.savez(path, np.array([{"a": 1}], dtype=object))
    with pytest.raises(CalibrationError, match="array of object"):
        batches(path, SPEC, FEW)
    np.savez(path, np.asfortranarray(floats(4)))
    with pytest.raises(CalibrationError, match="Fortran order"):
        batches(path, SPEC, FEW)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_npz(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "data.npz"
    images = np.stack([picture(seed) for seed in range(40)])  # any byte is a valid pixel
    (np.savez_compressed if compressed else np.savez)(path, images)
    data = bytearray(path.read_bytes())
    data[-500] ^= 0xFF  # in the last image, which is not among the chosen
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match=r"cannot be read as .npz"):
        batches(path, SPEC, CalibrationOptions(limit=3, minimum=1))


# --- labelled folders ----------------------------------------------------------------------------


def test_labelled_folder_of_names(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("test", 1)):
        for name in ("class10", "class2", "other"):
            for seed in range(count):
                save(tmp_path / split / name / f"{seed}.png", seed)
    paths, labels = labelled(tmp_path, "train")
    assert [path.relative_to(tmp_path / "train").as_posix() for path in paths] == [
        "class2/0.png", "class2/1.png", "class10/0.png", "class10/1.png", "other/0.png",
        "other/1.png",
    ]  # fmt: skip
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(labelled(tmp_path / "test")[0]) == 3


def test_labelled_folder_of_numbers(tmp_path: Path) -> None:
    for name in ("7", "10"):
        save(tmp_path / name / "a.png", 0)
    paths, labels = labelled(tmp_path)
    assert [path.parent.name for path in paths] == ["7", "10"]
    assert labels.tolist() == [7, 10]


def test_labelled_refusals(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no images in class folders"):
        labelled(tmp_path)
    with pytest.raises(CalibrationError, match="neither a folder"):
        labelled(tmp_path, "train")


# --- real data -----------------------------------------------------------------------------------

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "roadwork_signs").is_dir(), reason="../shared/data is absent")
def test_real_data() -> None:
    table = SHARED / "roadwork_signs" / "labels.csv"
    paths, labels = labelled(table, "train")
    assert set(labels.tolist()) == {0, 1}
    data = batches(table, SPEC, CalibrationOptions(limit=24, batch_size=8), split="train")
    chosen = [paths[place] for place in samples.spread(len(paths), 24)]
    np.testing.assert_array_equal(joined(data), preprocess(chosen, SPEC))
