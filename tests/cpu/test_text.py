"""Text stays within its width and keeps what tells one line from another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sn72engine.text import WIDTH, Column, cut, table, wrapped

WORDS = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=40)


@given(WORDS, st.integers(1, 50))
def test_cut_keeps_both_ends(text: str, width: int) -> None:
    short = cut(text, width)
    if len(text) <= width:
        assert short == text
        return
    first, last = short.split("…")
    assert len(short) == width
    assert text.startswith(first)
    assert text.endswith(last)
    assert 0 <= len(first) - len(last) <= 1


def test_wrapped_hangs_below_its_text() -> None:
    lines = wrapped("note", "word " * 60).splitlines()
    assert lines[0].startswith("note       word")
    assert all(line.startswith(" " * 11 + "word") for line in lines[1:])
    assert max(map(len, lines)) <= WIDTH
    assert wrapped("note", "") == f"{'note':11}-"
    assert wrapped("engine", "/a" * 90) == f"{'engine':11}{'/a' * 90}"  # a path stays whole


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_tables_are_aligned(rows: list[tuple[str, str]]) -> None:
    lines = table(
        [Column("name", 12), Column("", 9), Column("ms", 6, right=True)],
        [(name, "", number) for name, number in rows],
    )
    assert len(lines) == 1 + len(rows)
    assert all(len(line) <= 12 + 2 + 6 for line in lines)
    if any(number for _, number in rows):
        ends = {len(line) for line, (_, number) in zip(lines[1:], rows, strict=True) if number}
        assert ends == {len(lines[0])}
