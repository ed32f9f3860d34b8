"""What everything has in common that must be closed."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """Base of classes with a ``close`` method: makes them context managers that call it."""

    def close(self) -> None:
        """Release what is held; calling it twice is allowed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
