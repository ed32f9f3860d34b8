"""Parts of a Markdown page that a program writes: between two comments, replaced as a whole.

    <!-- kernels: begin benchmarks/results/some-gpu/2026-01-01-kernels.json -->
    ...
    <!-- kernels: end -->

What follows ``begin`` says what the part was made from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sn72kernels import atomic


def part(page: str, name: str) -> tuple[str, str]:
    """What the part ``name`` was made from, and its text.

    Raises:
        ValueError: the page has no such part.
    """
    found = _pattern(name).search(page)
    if found is None:
        raise ValueError(f"the page has no part '<!-- {name}: begin ... -->' to '{name}: end'")
    return found["source"].strip(), found["body"]


def replaced(page: str, name: str, body: str, source: str = "") -> str:
    """The page with the part ``name`` replaced.

    Raises:
        ValueError: the page has no such part.
    """
    part(page, name)
    begin = " ".join(filter(None, (f"{name}: begin", source)))
    new = f"<!-- {begin} -->\n\n{body.strip()}\n\n<!-- {name}: end -->"
    return _pattern(name).sub(lambda _: new, page)


def rewrite(path: Path, name: str, body: str, source: str = "") -> None:
    """:func:`replaced` on a file, which is left alone where it would not change."""
    page = path.read_text()
    new = replaced(page, name, body, source)
    if new != page:
        atomic.write_text(path, new)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A table whose first ``text_columns`` are aligned to the left, the rest to the right."""
    rule = ["---"] * text_columns + ["--:"] * (len(head) - text_columns)
    lines = [head, rule, *rows]
    return "\n".join(
        "|" + "|".join(line) + "|" if line is rule else "| " + " | ".join(line) + " |"
        for line in lines
    )


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(
        rf"<!-- {re.escape(name)}: begin(?P<source>[^>]*?)-->\s*(?P<body>.*?)\s*"
        rf"<!-- {re.escape(name)}: end -->",
        re.DOTALL,
    )
