"""The one progress bar, so that every long step looks and behaves alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """A progress bar of ``total`` steps on standard error; silent when not a terminal.

    Use as a context manager. ``total=None`` shows a count without an end. ``shown=None`` shows
    the bar only on a terminal, so that logs and pipes stay clean.
    """

    def __init__(
        self, label: str, total: int | None = None, *, unit: str = "it", shown: bool | None = None
    ) -> None:
        from tqdm import tqdm

        visible = sys.stderr.isatty() if shown is None else shown
        self._bar = tqdm(desc=label, total=total, unit=unit, disable=not visible, leave=True)

    def step(self, count: int = 1) -> None:
        """Advance by ``count`` steps."""
        self._bar.update(count)

    def resize(self, total: int) -> None:
        """Set the number of steps once it is known."""
        self._bar.total = total
        self._bar.refresh()

    def note(self, text: str) -> None:
        """Show what is being done, beside the bar."""
        self._bar.set_postfix_str(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def track(
    items: Iterable[T],
    label: str,
    *,
    total: int | None = None,
    unit: str = "it",
    shown: bool | None = None,
) -> Iterator[T]:
    """Yield from ``items`` with a progress bar."""
    with Progress(label, total, unit=unit, shown=shown) as bar:
        for item in items:
            yield item
            bar.step()
