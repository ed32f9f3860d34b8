"""Runs a TensorRT builder: progress, Ctrl-C, and what it learns of kernel timings."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

from sn72engine.cache_file import CacheFile
from sn72engine.cards import device_target
from sn72engine.progress import Progress
from sn72engine.spec import BackendName

#: How often the waiting thread looks up: a signal that another thread received wakes nobody.
_POLL_SECONDS = 0.2


def run_builder(trt: Any, builder: Any, network: Any, config: Any, bar: Progress) -> Any:
    """Serialized engine, or None when the builder failed.

    The builder runs in a second thread: Python delivers Ctrl-C to the main thread, which could
    not take it while inside the library.
    """
    monitor = make_monitor(trt, bar)
    config.progress_monitor = monitor
    # The current CUDA device belongs to a thread; the builder must see the caller's.
    device: Any = nullcontext()
    current = device_target()
    if current is not None:
        import torch

        device = torch.cuda.device(torch.cuda.current_device())

    def work() -> Any:
        with device:
            return builder.build_serialized_network(network, config)

    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            try:
                future = pool.submit(work)
                while not future.done():
                    wait([future], timeout=_POLL_SECONDS)
                return future.result()
            except KeyboardInterrupt:
                monitor.cancelled.set()
                raise
    finally:
        config.progress_monitor = None


def make_monitor(trt: Any, bar: Progress) -> Any:
    """An ``IProgressMonitor`` that moves ``bar`` and stops the builder once ``cancelled``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Shows the outermost phase's steps and the name of the innermost phase."""

        def __init__(self) -> None:
            super().__init__()
            self.cancelled = threading.Event()
            self._lock = threading.Lock()
            self._outermost, self._left = "", 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                if parent is None:
                    self._outermost, self._left = phase, steps
                    bar.resize(steps)
                bar.note(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                if phase == self._outermost and self._left:
                    self._left -= 1
                    bar.step()
            return not self.cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                # A phase may finish without reporting all of its steps.
                if phase == self._outermost and not self.cancelled.is_set():
                    bar.step(self._left)
                    self._left = 0

    return Monitor()


def attach_timing_cache(
    config: Any, backend: BackendName, version: str, target: str
) -> CacheFile | None:
    """Give the builder what earlier builds measured; None where that is of no use."""
    if backend == "tensorrt_rtx":
        return None  # it compiles for the card at run time: its timing cache does nothing
    cache = CacheFile.of("timing", backend, version, target)
    held = config.create_timing_cache(cache.read())
    if held is None or not config.set_timing_cache(held, False):
        # Entries that this library refuses are replaced, not used.
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return cache


def merge(config: Any, stored: bytes) -> bytes:
    """Timing cache entries of this build together with what is on disk now."""
    ours = config.get_timing_cache()
    if ours is None:
        return b""
    theirs = config.create_timing_cache(stored) if stored else None
    if theirs is not None:
        ours.combine(theirs, False)
    serialized = ours.serialize()
    return bytes(memoryview(serialized)) if serialized is not None else b""
