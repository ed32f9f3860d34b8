"""The cascade as callers use it: images in, one result per image out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sn72engine.cascade.executor import Bounds, Executor, Progress, Request, Samples, log
from sn72engine.cascade.modes import GraphOptions, Mode, make_executor
from sn72engine.cascade.opening import Given, enter_stages
from sn72engine.cascade.opening import open_stages as open_stages
from sn72engine.cascade.report import CascadeReport, Counters, ExecutorReport
from sn72engine.cascade.result import Result
from sn72engine.cascade.route import as_float32
from sn72engine.cascade.spec import CascadeSpec
from sn72engine.closing import Closing
from sn72engine.decode import decode
from sn72engine.errors import CascadeError, InputError, OptionError
from sn72engine.events import CallEvent, Observe, notify
from sn72engine.spec import RuntimeOptions, check_choice, check_number
from sn72engine.stages.base import Size, Stage

if TYPE_CHECKING:
    from sn72engine.decode import Source

Thresholds = Mapping[str, tuple[ArrayLike, ArrayLike]]
Flags = Mapping[str, ArrayLike]

#: Seconds that close() gives a stage that is still running.
_PATIENCE = 5.0


class Cascade(Closing):
    """Early-exit cascade over images. Thread-safe; use as a context manager, or close it.

    Each image is decoded once per call, at the size that the most demanding stage needs, and the
    decoded image is shared between stages. An image that cannot be decoded gets probability 0.5
    and STAGE_FAILED with the reason; the others are not affected.

    Stages run one call at a time each, so callers on several threads overlap between stages and
    wait for each other within one. With a deadline, stages run on threads of the cascade, one per
    stage. A stage that is still running when time is up is left behind: its late answer is thrown
    away, and the next caller of that stage first waits for it to end, for as long as its own
    deadline allows. So a stage never runs twice at once, and one that hangs for ever costs one
    thread and makes later calls that reach it end with DEADLINE.

    Args:
        spec: the stages and what holds for them.
        stages: stage name to a :class:`~sn72engine.stages.base.Stage` or a plain callable
            (wrapped in a :class:`~sn72engine.stages.function.FunctionStage`), for the stages of
            ``spec`` that name no engine, OCR or VLM. The cascade does not close these.
        runtime: how engines are run.
        observe: is told of every call, see :mod:`sn72engine.events`.
        mode: ``auto``, ``cpu``, ``host`` or ``device``, see :mod:`sn72engine.cascade.modes`;
            :meth:`report` says what was chosen and why.
        graphs: how stages are captured in CUDA graphs.

    Raises:
        OptionError: ``stages`` does not fit ``spec``, or an engine cannot be a stage.
        CudaUnavailableError: ``mode`` is ``host`` or ``device``, and there is no usable GPU.
        Sn72Error: a stage cannot be loaded, warmed up or, with such a mode, captured.
    """

    def __init__(
        self,
        spec: CascadeSpec,
        stages: Given | None = None,
        *,
        runtime: RuntimeOptions | None = None,
        observe: Observe | None = None,
        mode: Mode = "auto",
        graphs: GraphOptions | None = None,
    ) -> None:
        check_choice("mode", mode, Mode)
        self._spec = spec
        #: Is told of every call; may be changed at any time.
        self.observe = observe
        given = dict(stages or {})
        # Closed again if a later stage fails to load.
        with contextlib.ExitStack() as opened:
            by_name = enter_stages(spec, runtime, given, opened)
            opened.pop_all()
        self._stages = tuple(by_name.values())
        self._owned = tuple(name not in given for name in by_name)
        self._needs = largest_need([stage.needs for stage in self._stages])
        self._bounds = [_bounds(stage.thresholds, None, stage.name) for stage in spec.stages]
        self._executor, self._executor_report = self._make_executor(
            mode, graphs or GraphOptions(), runtime
        )
        self._counters = Counters(spec.stages)
        #: Submitted calls that run side by side: more than stages and lanes would only wait.
        self._at_once = max(len(self._stages), self._executor_report().lanes)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def spec(self) -> CascadeSpec:
        """What the cascade is made of."""
        return self._spec

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, in order."""
        return self._stages

    def __call__(
        self,
        images: Sequence[Source],
        *,
        deadline: float | None = None,
        flags: Flags | None = None,
        thresholds: Thresholds | None = None,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Answer a batch of images.

        Args:
            images: sources as :func:`sn72engine.decode.decode` takes them, or a uint8 array
                (N, H, W, 3).
            deadline: seconds from now; 0 or less is already over, ``math.inf`` is no limit. None
                takes the specification's. Samples without a sure answer by then keep what they
                have with status DEADLINE.
            flags: trigger name to which samples it marks: one bool for all, or shape (n,). A
                trigger that is not given marks none.
            thresholds: stage name to ``(low, high)`` instead of the specification's, each a
                scalar or shape (n,). Values that make no sense escalate.
            progress: called between stages with one result per image as known so far, and which
                of them are settled and will not change. It must be quick and must not raise.

        Returns:
            One result per image, in order.

        Raises:
            InputError: ``images`` is no sequence of images, or an array does not fit their number.
            OptionError: ``deadline`` is no number, or a name in ``flags`` or ``thresholds`` is
                unknown.
            CascadeError: the cascade has been closed.
        """
        return self._run(self._request(images, deadline, flags, thresholds, progress))

    def submit(
        self,
        images: Sequence[Source],
        *,
        deadline: float | None = None,
        flags: Flags | None = None,
        thresholds: Thresholds | None = None,
    ) -> Future[list[Result]]:
        """As a call, but on a thread of the cascade; returns at once.

        As many submitted calls run side by side as there are stages, or lanes if those are more;
        others wait in line, and their deadlines run from now. A call that has not begun can be
        cancelled.

        Raises:
            as a call does, for arguments that cannot be used.
        """
        request = self._request(images, deadline, flags, thresholds)
        with self._lock:
            if self._closed:
                raise CascadeError("the cascade has been closed")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="sn72-cascade")
            return self._pool.submit(self._run, request)

    async def run_async(
        self,
        images: Sequence[Source],
        *,
        deadline: float | None = None,
        flags: Flags | None = None,
        thresholds: Thresholds | None = None,
    ) -> list[Result]:
        """As :meth:`submit`, for ``await``; the event loop stays free meanwhile."""
        return await asyncio.wrap_future(
            self.submit(images, deadline=deadline, flags=flags, thresholds=thresholds)
        )

    def report(self) -> CascadeReport:
        """Thresholds, exits, escalations, failures and time of each stage since start."""
        return dataclasses.replace(self._counters.report(), executor=self._executor_report())

    def close(self) -> None:
        """Refuse new calls, cancel those in line, wait for those running, close the stages.

        A stage that still hangs after a few seconds is left open, because closing what it is
        using would be worse. Calling it twice is allowed.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            pool = self._pool
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        idle = self._executor.close(_PATIENCE)
        for spec, stage, owned, free in zip(
            self._spec.stages, self._stages, self._owned, idle, strict=True
        ):
            if not free:
                log.warning("stage %s still runs; it is left open", spec.name)
            elif owned:
                stage.close()

    def _make_executor(
        self, mode: Mode, graphs: GraphOptions, runtime: RuntimeOptions | None
    ) -> tuple[Executor, Callable[[], ExecutorReport]]:
        device = 0 if runtime is None else runtime.device_index
        try:
            return make_executor(self._spec, self._stages, mode, graphs, device=device)
        except BaseException:
            for stage, owned in zip(self._stages, self._owned, strict=True):
                if owned:
                    stage.close()
            raise

    def _request(
        self,
        images: Sequence[Source],
        deadline: float | None,
        flags: Flags | None,
        thresholds: Thresholds | None,
        progress: Progress | None = None,
    ) -> Request:
        begin = time.monotonic()
        if self._closed:
            raise CascadeError("the cascade has been closed")
        _check_images(images)
        samples = Samples(images, self._decode)
        count = len(samples)
        if deadline is None:
            deadline = math.inf if self._spec.deadline is None else self._spec.deadline
        elif deadline != math.inf:
            check_number("deadline", deadline)
        return Request(
            samples,
            begin + deadline,
            self._check_flags(flags or {}, count),
            self._check_thresholds(thresholds or {}, count),
            progress,
        )

    def _run(self, request: Request) -> list[Result]:
        begin = time.perf_counter()
        results, counts = self._executor.run(request)
        seconds = time.perf_counter() - begin
        self._counters.add(len(results), seconds, counts)
        if (observe := self.observe) is not None:
            names = tuple(stage.name for stage in self._spec.stages)
            notify(observe, CallEvent(seconds, results, names, counts))
        return results

    def _decode(self, source: Source) -> NDArray[np.uint8]:
        return decode(source, at_least=self._needs)

    def _check_flags(self, flags: Flags, count: int) -> dict[str, NDArray[np.bool_]]:
        checked = {trigger: np.zeros(count, bool) for trigger in self._spec.triggers}
        for trigger, values in flags.items():
            if trigger not in checked:
                known = ", ".join(checked) or "none"
                raise OptionError(f"flags: no stage waits for {trigger!r}; triggers: {known}")
            array = np.asarray(values)
            good = array.dtype == bool or array.size == 0  # an empty list has no type
            if not good or array.shape not in ((), (count,)):
                raise InputError(
                    f"flags[{trigger!r}] must be a bool or {count} bools, got {array.dtype} of "
                    f"shape {array.shape}"
                )
            checked[trigger][:] = array
        return checked

    def _check_thresholds(self, thresholds: Thresholds, count: int) -> list[Bounds]:
        if not thresholds:
            return self._bounds
        names = [stage.name for stage in self._spec.stages]
        bounds = list(self._bounds)
        for name, pair in thresholds.items():
            if name not in names:
                raise OptionError(
                    f"thresholds: no stage is called {name!r}; stages: {', '.join(names)}"
                )
            number = names.index(name)
            first = next(group[0] for group in self._spec.groups if number in group)
            if number != first:
                raise OptionError(
                    f"thresholds: {name!r} is routed with {names[first]!r}, the first stage of its "
                    "parallel group; set the thresholds of that one"
                )
            bounds[number] = _bounds(pair, count, name)
        return bounds


def largest_need(needs: Sequence[Size | None]) -> Size | None:
    """Smallest size that serves every stage; None, the full image, as soon as one needs that."""
    sizes = [need for need in needs if need is not None]
    if len(sizes) < len(needs):
        return None
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _bounds(pair: tuple[ArrayLike, ArrayLike], count: int | None, name: str) -> Bounds:
    try:
        low, high = pair
    except (TypeError, ValueError):
        raise InputError(f"thresholds[{name!r}] must be a pair (low, high), got {pair!r}") from None
    bounds = as_float32(low, f"{name}.low"), as_float32(high, f"{name}.high")
    for bound in bounds:
        if bound.shape not in ((), (count,)):
            raise InputError(
                f"thresholds[{name!r}] must be scalars or have one value per image, {count}, "
                f"got shape {bound.shape}"
            )
    return bounds


def _check_images(images: object) -> None:
    if isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise InputError(
                f"images has shape {images.shape}; pass a list of images, or one array of shape "
                "(N, H, W, 3)"
            )
    elif isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike)) or not isinstance(
        images, Sequence
    ):
        raise InputError(
            f"images must be a sequence of images, got one {type(images).__name__}; wrap it: "
            "cascade([image])"
        )
