"""Replaces a cascade by another one while requests go on.

::

    service = Swappable(Cascade(old))
    service.load(lambda: Cascade(new), warmup=images)  # beside the old one
    print(service.shadow())                            # after some traffic
    service.promote()                                  # or service.drop()

A call runs on the cascade that was current when it began, to its end. A cascade that has been
replaced is closed when its last call has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sn72engine.cascade.cascade import Cascade, Flags, Thresholds
from sn72engine.cascade.executor import Progress
from sn72engine.cascade.report import CascadeReport
from sn72engine.cascade.result import Result, Status
from sn72engine.cascade.spec import CascadeSpec
from sn72engine.closing import Closing
from sn72engine.errors import CascadeError, OptionError, VerificationError
from sn72engine.events import Observe
from sn72engine.shadow import Shadow, ShadowOptions, ShadowReport

if TYPE_CHECKING:
    from sn72engine.decode import Source

log = logging.getLogger("sn72engine.swap")


@dataclass(slots=True, eq=False)
class _Generation:
    """A cascade, and how many calls run on it."""

    cascade: Cascade
    users: int = 0


@dataclass(frozen=True, slots=True)
class _Candidate:
    cascade: Cascade
    shadow: Shadow
    observe: Observe | None


class Swappable(Closing):
    """A cascade that can be replaced without a gap. Thread-safe; use as a context manager.

    It is called as a :class:`~sn72engine.cascade.cascade.Cascade` is, so a batcher can run it. It
    closes the cascades that it is given.

    Args:
        cascade: the first one.
        options: how candidates are compared, and what they must show.
        observe: is told of calls repeated on a candidate, see :mod:`sn72engine.events`.
    """

    def __init__(
        self,
        cascade: Cascade,
        options: ShadowOptions | None = None,
        *,
        observe: Observe | None = None,
    ) -> None:
        self._options = options or ShadowOptions()
        self._observe = observe
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # for close: look at the busy ones again
        self._current = _Generation(cascade)
        self._busy: set[_Generation] = set()  # replaced, with calls that still run
        self._candidate: _Candidate | None = None
        self._loading = False
        self._closed = False
        self._closers: list[threading.Thread] = []

    @property
    def spec(self) -> CascadeSpec:
        """Of the current cascade."""
        return self._current.cascade.spec

    def report(self) -> CascadeReport:
        """Of the current cascade, since it was made."""
        return self._current.cascade.report()

    # ------------------------------------------------------------ calls

    def __call__(
        self,
        images: Sequence[Source],
        *,
        deadline: float | None = None,
        flags: Flags | None = None,
        thresholds: Thresholds | None = None,
        progress: Progress | None = None,
    ) -> list[Result]:
        """As :meth:`Cascade.__call__ <sn72engine.cascade.cascade.Cascade.__call__>`."""
        arguments = {"deadline": deadline, "flags": flags, "thresholds": thresholds}
        with self._lease() as cascade:
            begin = time.perf_counter()
            results = cascade(
                images, deadline=deadline, flags=flags, thresholds=thresholds, progress=progress
            )
            seconds = time.perf_counter() - begin
        self._offer(images, arguments, results, seconds)
        return results

    def submit(
        self,
        images: Sequence[Source],
        *,
        deadline: float | None = None,
        flags: Flags | None = None,
        thresholds: Thresholds | None = None,
    ) -> Future[list[Result]]:
        """As :meth:`Cascade.submit <sn72engine.cascade.cascade.Cascade.submit>`.

        It is not compared with a candidate: its time would include waiting in line.
        """
        generation = self._enter()
        try:
            future = generation.cascade.submit(
                images, deadline=deadline, flags=flags, thresholds=thresholds
            )
        except BaseException:
            self._leave(generation)
            raise
        future.add_done_callback(lambda _: self._leave(generation))
        return future

    async def run_async(
        self,
        images: Sequence[Source],
        *,
        deadline: float | None = None,
        flags: Flags | None = None,
        thresholds: Thresholds | None = None,
    ) -> list[Result]:
        """As :meth:`submit`, for ``await``."""
        return await asyncio.wrap_future(
            self.submit(images, deadline=deadline, flags=flags, thresholds=thresholds)
        )

    # ------------------------------------------------------------ candidates

    def load(self, make: Callable[[], Cascade], *, warmup: Sequence[Source] = ()) -> None:
        """Make a candidate beside the current cascade, warm it up, and begin to compare.

        Runs on the calling thread, for as long as it takes; requests go on meanwhile. The
        candidate's own observer is not told anything before it is promoted: what the candidate
        does until then serves nobody.

        Args:
            make: loads the candidate.
            warmup: images that it must answer before it sees traffic.

        Raises:
            CascadeError: there is a candidate already, it failed on a warm-up image, or this
                object has been closed. The current cascade goes on.
            OptionError: its labels are class indices and the current ones are not, or vice versa.
            Exception: what ``make`` raised.
        """
        with self._lock:
            self._check_open()
            if self._loading or self._candidate is not None:
                raise CascadeError("there is a candidate already; promote or drop it first")
            self._loading = True
        try:
            cascade = make()
            observe, cascade.observe = cascade.observe, None
            try:
                self._warm_up(cascade, warmup)
                with self._lock:
                    self._check_open()
                    shadow = Shadow(cascade, self._options, self._observe)
                    self._candidate = _Candidate(cascade, shadow, observe)
            except BaseException:
                cascade.close()
                raise
        finally:
            self._loading = False

    def shadow(self) -> ShadowReport:
        """How the candidate compares so far.

        Raises:
            CascadeError: there is none.
        """
        return self._get_candidate().shadow.report()

    def promote(self, *, force: bool = False) -> ShadowReport:
        """Make the candidate current. Calls that have begun end on the old cascade.

        Args:
            force: also where it breaks the bounds of the options.

        Returns:
            How it compared.

        Raises:
            VerificationError: it breaks a bound; it remains the candidate.
            CascadeError: there is no candidate.
        """
        with self._lock:
            candidate = self._get_candidate()
            report = candidate.shadow.report()
            broken = report.failures(self._options)
            if broken and not force:
                raise VerificationError(
                    f"the candidate is not promoted: {'; '.join(broken)}; let it see more "
                    "traffic, drop() it, or promote(force=True)"
                )
            candidate.shadow.stop()
            candidate.cascade.observe = candidate.observe
            old, self._current = self._current, _Generation(candidate.cascade)
            self._candidate = None
            self._retire(old)
        return report

    def drop(self) -> ShadowReport:
        """Give the candidate up and close it, off this thread; returns how it compared.

        Raises:
            CascadeError: there is none.
        """
        with self._lock:
            candidate = self._get_candidate()
            self._candidate = None
            candidate.shadow.stop()
            self._close_later(candidate.cascade, candidate.shadow)
        return candidate.shadow.report()

    def close(self, *, patience: float | None = None) -> None:
        """Refuse new calls, wait for those running, close every cascade. May be called twice.

        Args:
            patience: seconds to wait for calls, and for each cascade to close; None for no limit.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                if self._candidate is not None:
                    self._candidate.shadow.stop()
                    self._close_later(self._candidate.cascade, self._candidate.shadow)
                    self._candidate = None
                self._retire(self._current)
            self._idle.wait_for(lambda: not self._busy, patience)
            for generation in self._busy:
                self._close_later(generation.cascade)
            self._busy.clear()
            closers, self._closers = self._closers, []
        for closer in closers:
            closer.join(patience)

    # ------------------------------------------------------------ which cascade is in use

    @contextlib.contextmanager
    def _lease(self) -> Iterator[Cascade]:
        generation = self._enter()
        try:
            yield generation.cascade
        finally:
            self._leave(generation)

    def _enter(self) -> _Generation:
        with self._lock:
            self._check_open()
            self._current.users += 1
            return self._current

    def _leave(self, generation: _Generation) -> None:
        with self._lock:
            generation.users -= 1
            if generation.users == 0 and generation in self._busy:
                self._busy.remove(generation)
                self._close_later(generation.cascade)
                self._idle.notify_all()

    def _retire(self, generation: _Generation) -> None:
        if generation.users:
            self._busy.add(generation)
        else:
            self._close_later(generation.cascade)

    def _close_later(self, cascade: Cascade, shadow: Shadow | None = None) -> None:
        """On a thread of its own: no caller is to wait for it, and a stage may hang."""
        self._closers = [closer for closer in self._closers if closer.is_alive()]
        closer = threading.Thread(
            target=_close, args=(cascade, shadow), name="sn72-close", daemon=True
        )
        closer.start()
        self._closers.append(closer)

    def _offer(
        self, images: Any, arguments: dict[str, Any], results: list[Result], seconds: float
    ) -> None:
        candidate = self._candidate
        if candidate is None:
            return
        try:
            candidate.shadow.offer(images, arguments, results, seconds)
        except Exception:  # the caller has its answer, whatever happens here
            log.exception("a call could not be offered to the candidate")

    def _warm_up(self, cascade: Cascade, images: Sequence[Source]) -> None:
        if cascade.spec.top1 != self.spec.top1:
            raise OptionError(
                "the candidate's labels and the current ones differ in kind: with score='top1' "
                "they are class indices, otherwise 0 and 1"
            )
        if not len(images):
            return
        for number, result in enumerate(cascade(images, deadline=math.inf)):
            if result.status is Status.STAGE_FAILED:
                raise CascadeError(
                    f"the candidate failed on warm-up image {number}: {result.error}; the current "
                    "cascade goes on"
                )

    def _get_candidate(self) -> _Candidate:
        candidate = self._candidate
        if candidate is None:
            raise CascadeError("there is no candidate; load() one first")
        return candidate

    def _check_open(self) -> None:
        if self._closed:
            raise CascadeError("this service has been closed")


def _close(cascade: Cascade, shadow: Shadow | None) -> None:
    try:
        if shadow is not None:
            shadow.join()
        cascade.close()
    except Exception:
        log.exception("a cascade could not be closed")
