"""Several sessions of one engine for several threads, with the weights held once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sn72engine.closing import Closing
from sn72engine.engine import Engine
from sn72engine.errors import OptionError, SessionError
from sn72engine.session import Session
from sn72engine.spec import RuntimeOptions, check_int, check_number


class SessionPool(Closing):
    """A fixed number of sessions, lent to one thread at a time each.

    A :class:`Session` runs one call after another. A pool runs as many side by side as it has
    sessions; further callers wait. On a GPU each session has a stream, contexts and scratch memory
    of its own, and all share the weights. On a CPU they share the weights and the ``threads``.

    Args:
        engine: an engine, or the folder of one.
        options: how to run it.
        size: number of sessions.
        timeout: seconds to wait for one to come free before giving up.

    Raises:
        OptionError: ``size`` or ``timeout`` cannot be used.
        SessionError, StoreError, MissingDependencyError: as for :class:`Session`.
    """

    def __init__(
        self,
        engine: Engine | str | Path,
        options: RuntimeOptions | None = None,
        *,
        size: int = 2,
        timeout: float = 30.0,
    ) -> None:
        check_int("size", size, 1)
        check_number("timeout", timeout, 0.0)
        self.size, self.timeout = size, timeout
        self._changed = threading.Condition()
        self._closed = False
        first = Session(engine, options)
        self._idle = [first]
        self._lent: list[Session] = []
        try:
            self._idle += [first.clone() for _ in range(size - 1)]
        except BaseException:
            self.close()
            raise

    def acquire(self, timeout: float | None = None) -> Session:
        """Take a session; give it back with :meth:`release`, or use :meth:`lease`.

        Args:
            timeout: seconds to wait instead of the pool's own.

        Raises:
            SessionError: none came free in time, or the pool was closed.
        """
        patience = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + patience
        with self._changed:
            while not self._idle and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise SessionError(
                        f"no session came free in {patience:g} s: all {self.size} are in use; "
                        "raise size or timeout, or send less at once"
                    )
                self._changed.wait(left)
            if self._closed:
                raise SessionError("this pool was closed; make a new one")
            session = self._idle.pop()
            self._lent.append(session)
            return session

    def release(self, session: Session) -> None:
        """Give a session back; it is closed when the pool was closed meanwhile.

        Raises:
            OptionError: it was not taken from this pool, or was given back already.
        """
        with self._changed:
            if not any(session is lent for lent in self._lent):
                raise OptionError("this session is not on loan from this pool")
            self._lent = [lent for lent in self._lent if lent is not session]
            if self._closed:
                session.close()
            else:
                self._idle.append(session)
            self._changed.notify_all()

    @contextmanager
    def lease(self, timeout: float | None = None) -> Iterator[Session]:
        """A session for the length of a ``with`` block; arguments and errors as :meth:`acquire`."""
        session = self.acquire(timeout)
        try:
            yield session
        finally:
            self.release(session)

    def __call__(self, *arrays: Any) -> Any:
        """Run one call on whichever session is free: see :meth:`Session.__call__`.

        Raises:
            SessionError: none came free in time, the pool was closed, or the call failed.
        """
        with self.lease() as session:
            return session(*arrays)

    def close(self) -> None:
        """Close the idle sessions now and the others when they come back; wait for those."""
        with self._changed:
            self._closed = True
            for session in self._idle:
                session.close()
            self._idle = []
            self._changed.notify_all()
            while self._lent:
                self._changed.wait()
