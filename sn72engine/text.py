"""Text that is readable in a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Columns of the terminal that text is laid out for.
WIDTH = 100


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its head, the most characters it takes, and on which side it stands."""

    head: str
    limit: int
    right: bool = False


def cut(text: str, width: int) -> str:
    """A long text without its middle: layers are told apart by both ends of their names."""
    if len(text) <= width:
        return text
    kept = max(width - 1, 0)
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def wrapped(label: str, text: str, indent: int = 11) -> str:
    """A label and its text, which goes on below itself where it is too long for a line."""
    return textwrap.fill(
        text or "-",
        WIDTH,
        initial_indent=f"{label:{indent}}",
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned lines, the heads first.

    A column is as wide as its widest text, up to its limit; one without any text is left out.
    """
    rows = list(rows)
    shown = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    widths = {
        place: min(
            max(len(columns[place].head), *(len(row[place]) for row in rows)),
            columns[place].limit,
        )
        for place in shown
    }

    def line(texts: Sequence[str]) -> str:
        return "  ".join(
            f"{cut(texts[place], width):{'>' if columns[place].right else '<'}{width}}"
            for place, width in widths.items()
        ).rstrip()

    return [line([column.head for column in columns]), *map(line, rows)]
