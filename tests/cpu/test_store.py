"""The store gives out whole engines or none, whatever happens to its files and its processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sn72engine.engine import Engine, EngineFile, Manifest
from sn72engine.engine_folder import MANIFEST_NAME
from sn72engine.errors import (
    EngineCorruptError,
    EngineMismatchError,
    OptionError,
    StoreError,
)
from sn72engine.store import Store, describe, open_engine

sys.path.insert(0, str(Path(__file__).parent))
from store_builder import FILES, fingerprint_of, leftovers, maker

WANTED = fingerprint_of()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", limit_bytes=10**9)


@pytest.fixture
def engine(store: Store) -> Engine:
    return store.get_or_build(WANTED, maker(WANTED))


def never(_: Path) -> Manifest:
    raise AssertionError("built although the engine is stored")


def lock_of(store: Store, key: str) -> filelock.BaseFileLock:
    """The lock that a process holds while it builds, opens or removes an engine."""
    folder = store.root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder / f"{key}.lock")


def set_age(store: Store, seconds: dict[str, float]) -> None:
    """Say how long ago each engine, by model name, was last used."""
    for name, age in seconds.items():
        folder = store.root / "engines" / fingerprint_of(name).key
        now = folder.stat().st_mtime
        os.utime(folder, (now - age, now - age))


# ---- the ordinary way -----------------------------------------------------------------------


def test_builds_once_then_finds(store: Store) -> None:
    assert store.get(WANTED) is None
    built = store.get_or_build(WANTED, maker(WANTED))
    assert store.get(WANTED) == built
    assert store.get_or_build(WANTED, never) == built
    assert Store(store.root).get(WANTED) == built
    assert open_engine(built.folder) == built
    assert built.path.read_bytes() == FILES["model.plan"]
    assert built.folder.name == WANTED.key
    assert leftovers(store.root) == []


def test_manifest_is_plain_json_with_its_own_hash(engine: Engine) -> None:
    values = json.loads((engine.folder / MANIFEST_NAME).read_text())
    assert values.pop("sha256")
    assert Manifest.from_dict(values) == engine.manifest
    assert {path.name for path in engine.folder.iterdir()} == {*FILES, MANIFEST_NAME}


def test_engine_may_be_moved_out_of_the_store(engine: Engine, tmp_path: Path) -> None:
    moved = tmp_path / "anywhere"
    engine.folder.rename(moved)
    assert open_engine(moved).manifest == engine.manifest
    assert open_engine(str(moved)).folder == moved


def test_defaults_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SN72_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SN72_STORE_LIMIT_GB", "1.5")
    assert Store().root == tmp_path
    assert Store().limit_bytes == 1_500_000_000
    for bad in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("SN72_STORE_LIMIT_GB", bad)
        with pytest.raises(OptionError, match=f"SN72_STORE_LIMIT_GB='{bad}'"):
            Store()
    with pytest.raises(OptionError, match="limit_bytes=-1"):
        Store(tmp_path, -1)


def test_folder_keeps_the_users_mode(engine: Engine) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(engine.folder.stat().st_mode) == 0o777 & ~mask


def test_importing_and_using_the_store_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from sn72engine.store import Store; from pathlib import Path; "
        "Store(Path(sys.argv[1])).entries(); "
        "print(sorted({'torch', 'numpy', 'onnx', 'onnxruntime', 'pickle'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


# ---- damage ---------------------------------------------------------------------------------


def test_flip_of_any_bit_of_any_byte_is_refused(engine: Engine) -> None:
    """Exhaustive over bytes, one bit of each, in every file of the folder."""
    for path in sorted(engine.folder.iterdir()):
        whole = path.read_bytes()
        for position in range(len(whole)):
            data = bytearray(whole)
            data[position] ^= 1 << (position % 8)
            path.write_bytes(data)
            with pytest.raises(EngineCorruptError, match=path.name):
                open_engine(engine.folder)
        path.write_bytes(whole)
    assert open_engine(engine.folder) == engine


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data())
def test_any_edit_of_any_file_is_refused(engine: Engine, data: st.DataObject) -> None:
    path = engine.folder / data.draw(st.sampled_from([*FILES, MANIFEST_NAME]))
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 20)))
    edited = whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:]
    try:
        path.write_bytes(edited)
        if edited == whole:
            assert open_engine(engine.folder) == engine
        else:
            with pytest.raises(EngineCorruptError):
                open_engine(engine.folder)
    finally:
        path.write_bytes(whole)


def rewrite(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / MANIFEST_NAME
        text = path.read_text()
        assert change(text) != text
        path.write_text(change(text))

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / MANIFEST_NAME).unlink(), "manifest.json: is missing"),
        (lambda f: (f / "model.plan").unlink(), "'model.plan' is missing"),
        (lambda f: (f / "model.plan").write_bytes(b""), "has 0 bytes where the manifest says 300"),
        (lambda f: (f / "extra").write_bytes(b"x"), "extra: the manifest does not list this file"),
        (lambda f: (f / "folder").mkdir(), "folder: the manifest does not list"),
        (rewrite(lambda t: t + " "), "altered since it was written"),
        (rewrite(lambda t: t.replace("\n", "\r\n")), "altered since it was written"),
        (rewrite(lambda t: t.replace('": ', '":', 1)), "altered since it was written"),
        (rewrite(lambda t: t.replace("\n}", ',\n  "more": 1\n}')), "altered since it was written"),
        (rewrite(lambda t: json.dumps(json.loads(t))), "altered since it was written"),
        (rewrite(lambda t: t[: len(t) // 2]), "not a manifest"),
        (rewrite(lambda t: ""), "not a manifest"),
        (rewrite(lambda t: "[]"), "not a manifest"),
        (rewrite(lambda t: "{}"), "not a manifest"),
        (rewrite(lambda t: "[" * 100_000), "not a manifest"),
    ],
)
def test_damage_is_refused_with_the_reason_then_rebuilt(
    store: Store,
    engine: Engine,
    damage: Callable[[Path], object],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(engine.folder)
    with pytest.raises(EngineCorruptError, match=reason):
        open_engine(engine.folder)
    assert reason in store.check(WANTED.key)
    with caplog.at_level(logging.WARNING, "sn72engine"):
        assert store.get(WANTED) is None
    assert reason in caplog.text
    rebuilt = store.get_or_build(WANTED, maker(WANTED))
    assert open_engine(rebuilt.folder) == engine
    assert leftovers(store.root) == []


def test_symbolic_link_is_refused(engine: Engine, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    engine.path.rename(outside)
    engine.path.symlink_to(outside)
    with pytest.raises(EngineCorruptError, match="symbolic link"):
        open_engine(engine.folder)


def forge(folder: Path, **changes: object) -> None:
    """Write a manifest with false values and a true hash, as a hostile or foreign writer could."""
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text())
    del values["sha256"]
    values.update(changes)
    body = json.dumps(values, indent=2) + "\n"
    digest = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(json.dumps({**values, "sha256": digest}, indent=2) + "\n")


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\0b", ".hidden", 3]
)
def test_file_names_cannot_leave_the_folder(engine: Engine, name: object) -> None:
    (engine.folder.parent / "outside").write_bytes(b"")
    forge(engine.folder, files=[{"name": name, "bytes": 0, "sha256": "0" * 64}])
    with pytest.raises(EngineCorruptError, match="does not have a plain file name"):
        open_engine(engine.folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": []}, "lists no engine file"),
        ({"files": None}, "a field is missing or wrong"),
        ({"batch": {"min": 9, "max": 1}}, "a field is missing or wrong"),
        ({"fingerprint": {}}, "a field is missing or wrong"),
        ({"fingerprint": fingerprint_of("other").to_dict()}, "is not that of its fingerprint"),
        ({"key": "0" * 32}, "is not that of its fingerprint"),
    ],
)
def test_false_manifests_are_refused(
    engine: Engine, changes: dict[str, object], reason: str
) -> None:
    forge(engine.folder, **changes)
    with pytest.raises(EngineCorruptError, match=reason):
        open_engine(engine.folder)


def test_manifest_of_another_layout_is_refused_and_rebuilt(store: Store, engine: Engine) -> None:
    forge(engine.folder, format=0)
    with pytest.raises(EngineMismatchError, match="layout 0, this version reads 1"):
        open_engine(engine.folder)
    assert store.get(WANTED) is None
    assert store.get_or_build(WANTED, maker(WANTED)) == engine


def test_engine_under_another_key_is_refused(store: Store, engine: Engine) -> None:
    other = fingerprint_of("other")
    engine.folder.rename(engine.folder.with_name(other.key))
    assert store.get(other) is None
    assert "renamed or copied by hand" in store.check(other.key)


# ---- builders that fail ---------------------------------------------------------------------


def test_failing_builder_leaves_nothing(store: Store) -> None:
    def fail(folder: Path) -> Manifest:
        (folder / "model.plan").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_build(WANTED, fail)
    assert list((store.root / "engines").iterdir()) == []
    assert store.get_or_build(WANTED, maker(WANTED)).manifest.key == WANTED.key


def test_failing_rebuild_keeps_the_refused_engine_refused(store: Store, engine: Engine) -> None:
    engine.path.write_bytes(b"corrupt")
    with pytest.raises(AssertionError, match="built although"):
        store.get_or_build(WANTED, never)
    assert store.get(WANTED) is None
    assert leftovers(store.root) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: dataclasses.replace(m, key="0" * 32), "not of"),
        (lambda m: dataclasses.replace(m, fingerprint={}), "key and fingerprint"),
        (lambda m: dataclasses.replace(m, files=m.files[:1]), "does not list this file"),
        (lambda m: dataclasses.replace(m, files=()), "lists no engine file"),
        (
            lambda m: dataclasses.replace(m, files=(EngineFile("gone", 1, "0" * 64), *m.files)),
            "'gone' is missing",
        ),
        (
            lambda m: dataclasses.replace(m, files=(EngineFile("../x", 1, "0" * 64), *m.files)),
            "does not have a plain file name",
        ),
        (lambda m: dataclasses.replace(m, quantization={"a": {1, 2}}), "not plain JSON"),
        (lambda m: dataclasses.replace(m, quantization={"a": float("nan")}), "not plain JSON"),
    ],
)
def test_builder_with_a_false_manifest_is_refused(
    store: Store, change: Callable[[Manifest], Manifest], reason: str
) -> None:
    def make(folder: Path) -> Manifest:
        return change(maker(WANTED)(folder))

    with pytest.raises(StoreError, match=reason):
        store.get_or_build(WANTED, make)
    assert list((store.root / "engines").iterdir()) == []


def test_describe_refuses_what_is_not_a_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, reason in {
        "../x": "plain file name",
        "gone": "is missing",
        "folder": "not a regular file",
        MANIFEST_NAME: "plain file name",
    }.items():
        with pytest.raises(StoreError, match=reason):
            describe(tmp_path, [name])


def test_unwritable_store_says_what_to_do(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot be written to .* set SN72_CACHE_DIR"):
        Store(blocked).get_or_build(WANTED, maker(WANTED))


# ---- many processes, sudden death -----------------------------------------------------------


def run_processes(*arguments: str) -> None:
    """Run the crowd of store_builder.py; a fresh interpreter, so that forking is clean."""
    script = Path(__file__).with_name("store_builder.py")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_eight_processes_build_once(tmp_path: Path) -> None:
    run_processes("crowd", str(tmp_path), "8")
    assert (tmp_path / "builds").read_bytes() == b"x"
    assert Store(tmp_path).check(WANTED.key) == ""


def test_eight_threads_build_once(store: Store) -> None:
    builds: list[int] = []
    found: list[Engine] = []
    gate = threading.Barrier(8)

    def ask() -> None:
        gate.wait()
        make = maker(WANTED, on_build=lambda: builds.append(1), pause=0.002)
        found.append(store.get_or_build(WANTED, make))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == [1]
    assert len(found) == 8
    assert len({engine.folder for engine in found}) == 1


def test_fifty_kills_at_random_times(tmp_path: Path) -> None:
    run_processes("sudden", str(tmp_path), "50", "72")


@pytest.mark.parametrize("what", ["every", "every-replace"])
def test_kill_before_every_file_operation(tmp_path: Path, what: str) -> None:
    """``every-replace`` starts each time from a corrupt engine that must be moved away."""
    run_processes(what, str(tmp_path))


def test_waiting_is_announced(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sn72engine.store._FIRST_WORD_SECONDS", 0.01)
    announced = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            announced.set()

    handler = Handler()
    logging.getLogger("sn72engine.store").addHandler(handler)

    def make(folder: Path) -> Manifest:
        second.start()
        assert announced.wait(30)
        return maker(WANTED)(folder)

    second = threading.Thread(target=lambda: store.get_or_build(WANTED, never))
    try:
        store.get_or_build(WANTED, make)
        second.join()
    finally:
        logging.getLogger("sn72engine.store").removeHandler(handler)
    assert f"waiting for another process that builds or opens engine {WANTED.key}" in caplog.text


def test_leftovers_of_the_dead_are_cleaned_but_not_those_of_the_living(store: Store) -> None:
    dead, alive = fingerprint_of("dead"), fingerprint_of("alive")
    folders = []
    for what, key in (("building", dead.key), ("removed", dead.key), ("building", alive.key)):
        folder = store.root / "engines" / f".{what}-{key}-1-0"
        folder.mkdir(parents=True)
        (folder / "model.plan").write_bytes(b"half")
        folders.append(folder)
    with lock_of(store, alive.key):
        store.get_or_build(WANTED, maker(WANTED))
    assert [folder.exists() for folder in folders] == [False, False, True]
    store.get_or_build(alive, maker(alive))
    assert leftovers(store.root) == []


# ---- eviction and removal -------------------------------------------------------------------


def fill(store: Store, *names: str) -> int:
    """Store an engine per name; returns the size of one."""
    for name in names:
        wanted = fingerprint_of(name)
        store.get_or_build(wanted, maker(wanted))
    return store.entries()[0].bytes


def stored(store: Store) -> set[str]:
    names = {fingerprint_of(name).key: name for name in "abcdef"}
    return {names[entry.key] for entry in store.entries()}


def test_least_recently_used_goes_first(store: Store) -> None:
    size = fill(store, "a", "b", "c", "d")
    set_age(store, {"a": 400, "b": 300, "c": 200, "d": 100})
    assert store.get(fingerprint_of("a")) is not None  # now the one used last
    store.limit_bytes = 2 * size
    evicted = store.evict()
    assert evicted == (fingerprint_of("b").key, fingerprint_of("c").key)
    assert stored(store) == {"a", "d"}
    assert store.evict() == ()


def test_using_an_engine_does_not_rewrite_it(store: Store, engine: Engine) -> None:
    path = engine.folder / MANIFEST_NAME
    before = path.stat()
    set_age(store, {"model": 1000})
    used = store.entries()[0].last_used
    store.get(WANTED)
    assert store.entries()[0].last_used > used + 900
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_a_build_evicts_but_keeps_itself(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    fill(store, "a", "b")
    set_age(store, {"a": -1000, "b": -1000})  # used "later" than the new one
    store.limit_bytes = 1
    wanted = fingerprint_of("c")
    with caplog.at_level(logging.WARNING, "sn72engine"):
        built = store.get_or_build(wanted, maker(wanted))
    assert stored(store) == {"c"}
    assert open_engine(built.folder) == built
    assert "over its limit of 1" in caplog.text


def test_engines_in_use_are_not_evicted(store: Store) -> None:
    fill(store, "a", "b")
    set_age(store, {"a": 200, "b": 100})
    store.limit_bytes = 0
    with lock_of(store, fingerprint_of("a").key):
        store.evict()
        assert stored(store) == {"a"}
    store.evict()
    assert stored(store) == set()


def test_eviction_counts_engines_that_cannot_be_read(store: Store) -> None:
    size = fill(store, "a", "b")
    set_age(store, {"a": 200, "b": 100})
    (store.root / "engines" / fingerprint_of("a").key / MANIFEST_NAME).write_bytes(b"?")
    entry = next(e for e in store.entries() if e.key == fingerprint_of("a").key)
    assert entry.manifest is None
    assert "not a manifest" in entry.problem
    assert entry.problem in entry.summary
    store.limit_bytes = size
    store.evict()
    assert stored(store) == {"b"}


def test_entries_describe_themselves(store: Store, engine: Engine) -> None:
    (entry,) = store.entries()
    assert entry.key == WANTED.key
    assert entry.manifest == engine.manifest
    assert entry.bytes == sum(path.stat().st_size for path in engine.folder.iterdir())
    assert entry.summary == ("onnxruntime 1.31.1 cpu fp32, batch 1..4 (tuned for 2), not verified")
    assert json.loads(json.dumps(entry.to_dict()))["bytes"] == entry.bytes


def test_remove(store: Store, engine: Engine) -> None:
    store.remove(WANTED.key)
    assert not engine.folder.exists()
    assert leftovers(store.root) == []
    with pytest.raises(StoreError, match="no engine"):
        store.remove(WANTED.key)
    for key in ("../engines", "", "x" * 32):
        with pytest.raises(StoreError, match="must be 32 lower-case hexadecimal digits"):
            store.remove(key)
    with pytest.raises(StoreError, match="stored: none"):
        store.check(WANTED.key)


def test_read_only_store_still_serves(
    store: Store, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a read-only disk: no lock can be taken there and no time can be set.
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(store, "_file_lock", refuse)
    assert store.get(WANTED) == engine
    assert store.get_or_build(WANTED, never) == engine


# ---- manifests that change ------------------------------------------------------------------


def test_update_manifest(store: Store, engine: Engine) -> None:
    updated = store.update_manifest(engine, verification={"passed": True, "speedup": 1.25})
    assert updated.manifest.verification == {"passed": True, "speedup": 1.25}
    again = store.update_manifest(engine, notes=("checked by hand",))  # from the older object
    assert again.manifest.verification == updated.manifest.verification
    assert again.manifest.notes == ("checked by hand",)
    assert store.get(WANTED) == again
    assert store.entries()[0].summary.endswith(", verified")


@pytest.mark.parametrize("field", ["key", "files", "fingerprint", "precision", "nonsense"])
def test_update_manifest_refuses_what_the_engine_is(
    store: Store, engine: Engine, field: str
) -> None:
    with pytest.raises(OptionError, match=f"'{field}' cannot be changed"):
        store.update_manifest(engine, **{field: None})


def test_update_manifest_refuses_what_is_not_json(store: Store, engine: Engine) -> None:
    with pytest.raises(StoreError, match="not plain JSON"):
        store.update_manifest(engine, verification={"cosine": float("nan")})
    assert store.get(WANTED) == engine


def test_update_manifest_of_an_engine_that_is_gone(store: Store, engine: Engine) -> None:
    store.remove(WANTED.key)
    with pytest.raises(StoreError, match="no engine"):
        store.update_manifest(engine, notes=())


def test_manifest_half_written_by_an_update_does_not_spoil_the_engine(
    store: Store, engine: Engine
) -> None:
    partial = engine.folder / f".{MANIFEST_NAME}.abc.partial"
    partial.write_bytes(b"half")
    assert store.get(WANTED) == engine
    store.update_manifest(engine, notes=("x",))
    assert not partial.exists()


# ---- near misses ----------------------------------------------------------------------------


def test_explain_miss_finds_the_nearest_engine_of_the_model(store: Store) -> None:
    for wanted in (
        fingerprint_of(version="1.31.0"),
        fingerprint_of(version="1.29.0"),
        fingerprint_of("other", version="1.31.1"),
    ):
        store.get_or_build(wanted, maker(wanted))
    nearest = store.explain_miss(WANTED)
    assert nearest is not None
    assert nearest.key == fingerprint_of(version="1.31.0").key
    assert [(m.field, m.kind) for m in nearest.mismatches] == [("backend_version", "soft")]
    assert "was 1.31.0" in str(nearest)
    assert "is 1.31.1 now" in str(nearest)
    assert store.explain_miss(fingerprint_of("unknown")) is None


def test_soft_differences_are_used_only_when_allowed(store: Store) -> None:
    old = fingerprint_of(version="1.31.0")
    built = store.get_or_build(old, maker(old))
    assert store.get(WANTED) is None
    assert store.get(WANTED, allow_soft=True) == built
    assert store.get_or_build(WANTED, never, allow_soft=True) == built
    assert store.get(fingerprint_of(version="1.30.0"), allow_soft=True) is None
    exact = store.get_or_build(WANTED, maker(WANTED))
    assert store.get(WANTED, allow_soft=True) == exact != built


def test_rebuild_logs_why_the_nearest_was_not_used(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    old = fingerprint_of(version="1.29.0")
    store.get_or_build(old, maker(old))
    with caplog.at_level(logging.INFO, "sn72engine"):
        store.get_or_build(WANTED, maker(WANTED))
    assert f"building engine {WANTED.key}: engine {old.key} is nearest" in caplog.text
    assert "was 1.29.0" in caplog.text


def test_describe_keeps_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"1")
    (tmp_path / "a").write_bytes(b"22")
    described = describe(tmp_path, ["b", "a"])
    assert [(f.name, f.bytes) for f in described] == [("b", 1), ("a", 2)]
