"""The door of an executor: calls come in until it is closed, and those inside may end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from sn72engine.errors import CascadeError


class Entrance:
    """Counts the calls that are inside."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def visit(self) -> Iterator[None]:
        """One call, from its beginning to its end.

        Raises:
            CascadeError: the entrance has been closed.
        """
        with self._changed:
            if self._closed:
                raise CascadeError("the cascade has been closed")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self, patience: float) -> None:
        """Let nobody in any more, and wait up to ``patience`` seconds for those inside to leave."""
        until = time.monotonic() + patience
        with self._changed:
            self._closed = True
            while self._inside and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
