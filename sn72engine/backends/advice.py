"""Error messages of a library, shortened, with what to do about those that are known."""

from __future__ import annotations

import re
from collections.abc import Iterable


def explain(text: str, advice: Iterable[tuple[str, str]]) -> str:
    """One line of a library's message, ended by the first advice that fits it.

    Args:
        text: what the library said, of any number of lines.
        advice: pairs of a regular expression for such a message and what to do about it.
    """
    line = " ".join(text.split())
    for pattern, hint in advice:
        if re.search(pattern, line):
            return f"{line[:400]}. {hint[0].upper()}{hint[1:]}"
    return line[:600]
