"""What the store's tests build: a small engine, its fingerprint, and processes that build it.

Run as a script it is a crowd of real processes for the tests of concurrency and of sudden death.
It imports nothing heavy, so that a process is up in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sn72engine.engine import Manifest
from sn72engine.fingerprint import Fingerprint
from sn72engine.model import TensorSpec
from sn72engine.spec import ShapeRange
from sn72engine.store import Store, describe

FILES = {"model.plan": b"plan" * 75, "weights.bin": bytes(range(256))}


def fingerprint_of(name: str = "model", version: str = "1.31.1") -> Fingerprint:
    model = hashlib.sha256(name.encode()).hexdigest()
    return Fingerprint(model, "0" * 64, '{"batch":1}', "onnxruntime", version, "cpu-linux-x86_64")


def manifest_of(wanted: Fingerprint, folder: Path, names: list[str]) -> Manifest:
    return Manifest(
        key=wanted.key,
        backend="onnxruntime",
        backend_version=wanted.backend_version,
        target="cpu",
        precision="fp32",
        batch=ShapeRange(1, 2, 4),
        inputs=(TensorSpec("x", "float32", ("batch", 3)),),
        outputs=(TensorSpec("y", "float32", ("batch", 2)),),
        files=describe(folder, names),
        fingerprint=wanted.to_dict(),
    )


def maker(
    wanted: Fingerprint,
    files: dict[str, bytes] = FILES,
    *,
    on_build: Callable[[], None] = lambda: None,
    pause: float = 0.0,
) -> Callable[[Path], Manifest]:
    """A builder that writes in chunks, so that there is a half-written state to be killed in."""

    def make(folder: Path) -> Manifest:
        on_build()
        for name, data in files.items():
            with (folder / name).open("wb", buffering=0) as stream:
                for start in range(0, len(data), 32):
                    stream.write(data[start : start + 32])
                    time.sleep(pause)
        return manifest_of(wanted, folder, list(files))

    return make


def spawn(body: Callable[[], None]) -> int:
    """Run ``body`` in a child process that ends without cleaning up anything."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        body()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def crowd(root: Path, processes: int) -> None:
    """Processes that ask for one engine at once; each real build appends a byte to a file."""
    wanted = fingerprint_of()

    def count() -> None:
        with (root / "builds").open("ab") as stream:
            stream.write(b"x")

    start = time.monotonic() + 0.2

    def ask() -> None:
        time.sleep(max(0.0, start - time.monotonic()))
        Store(root).get_or_build(wanted, maker(wanted, on_build=count, pause=0.01))

    pids = [spawn(ask) for _ in range(processes)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert codes == [0] * processes, codes


def sudden_death(root: Path, kills: int, seed: int) -> None:
    """Kill builders at random times; nothing half-written may ever be there to be loaded."""
    generator = random.Random(seed)
    wanted = fingerprint_of()
    store = Store(root)
    started = time.monotonic()
    os.waitpid(spawn(lambda: build(root, pause=0.0005)), 0)
    usual = time.monotonic() - started
    died = halfway = 0
    while died < kills:
        if store.get(wanted) is not None:
            store.remove(wanted.key)
        pid = spawn(lambda: build(root, pause=0.0005))
        time.sleep(generator.uniform(0.0, 1.2 * usual))
        os.kill(pid, signal.SIGKILL)
        died += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        halfway += bool(leftovers(root))
        check_whole(store)
    assert halfway > 0, "no builder was killed at its work"
    build(root)
    check_whole(store)
    assert store.get(wanted) is not None
    assert leftovers(root) == []


def every_death(root: Path, replace_corrupt: bool) -> None:
    """Kill a builder before each of its file operations in turn, until one survives them all."""
    store = Store(root)
    wanted = fingerprint_of()
    survived = False
    operation = 0
    while not survived:
        if store.get(wanted) is not None:
            store.remove(wanted.key)
        if replace_corrupt:
            build(root)
            (root / "engines" / wanted.key / "model.plan").write_bytes(b"corrupt")
        pid = spawn(partial(die_before, operation, lambda: build(root)))
        _, status = os.waitpid(pid, 0)
        survived = not os.WIFSIGNALED(status)
        assert not survived or os.WEXITSTATUS(status) == 0
        check_whole(store)
        operation += 1
    assert operation > 20, operation
    assert leftovers(root) == []
    print(operation)


def build(root: Path, pause: float = 0.0) -> None:
    wanted = fingerprint_of()
    Store(root).get_or_build(wanted, maker(wanted, pause=pause))


def die_before(operation: int, body: Callable[[], None]) -> None:
    """Run ``body``, killing this process just before its file operation of that number."""
    seen = 0
    watched = ("open", "os.", "shutil.", "fcntl.")

    def audit(event: str, _: object) -> None:
        nonlocal seen
        if event.startswith(watched) and event != "os.kill":
            seen += 1
            if seen == operation + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    body()


def check_whole(store: Store) -> None:
    """Whatever has a final name and can be loaded is complete."""
    for entry in store.entries():
        if store.check(entry.key) == "":
            for name, data in FILES.items():
                assert (entry.folder / name).read_bytes() == data
        else:
            assert (entry.folder / "model.plan").read_bytes() == b"corrupt"


def leftovers(root: Path) -> list[str]:
    return [path.name for path in (root / "engines").iterdir() if path.name.startswith(".")]


if __name__ == "__main__":
    what, folder, *numbers = sys.argv[1:]
    if what == "crowd":
        crowd(Path(folder), int(numbers[0]))
    elif what == "sudden":
        sudden_death(Path(folder), int(numbers[0]), int(numbers[1]))
    else:
        every_death(Path(folder), what == "every-replace")
