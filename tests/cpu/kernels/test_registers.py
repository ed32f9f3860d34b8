"""The table of registers in the documents is what the compiler makes of the kernels now."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import markdown
from benchmarks.kernels import registers
from sn72kernels import testing
from sn72kernels.testing import Compiled

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "kernels.md"


def test_worst_of_a_row() -> None:
    rows = [
        Compiled("case", "kernel", 90, 4, 40, 0, 1024, 128, 128),
        Compiled("case", "kernel", 80, 4, 32, 8, 2048, 64, 128),
        Compiled("other", "kernel", 90, 4, 30, 0, 0, 128, 32),
    ]
    lines = registers.body(rows).splitlines()
    assert lines[0].startswith("| case | kernel | warps | sm_80 | sm_90 | shared bytes |")
    assert lines[2] == "| case | kernel | 4 | 32 | 40 | 2048 | 8 | 64 | 128 |"
    assert lines[3] == "| other | kernel | 4 | - | 30 | 0 | 0 | 128 | 32 |"


def test_the_command_rewrites_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Compiled("case", "kernel", 90, 4, 40, 0, 1024, 128, 128)]
    monkeypatch.setattr(testing, "compile_table", lambda _: rows)
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- registers: begin -->\n<!-- registers: end -->\n\nAfter.\n")
    assert registers.main(["--page", str(page)]) == 0
    assert markdown.part(page.read_text(), registers.PART) == (
        registers.compiler(), registers.body(rows),
    )  # fmt: skip
    assert registers.main([]) == 0
    assert capsys.readouterr().out.strip() == registers.body(rows)


@pytest.mark.slow
def test_the_page_is_up_to_date(
    compiled: list[Compiled], capsys: pytest.CaptureFixture[str]
) -> None:
    made_with, committed = markdown.part(PAGE.read_text(), registers.PART)
    if made_with != registers.compiler():
        pytest.skip(f"the table was made with {made_with}; here is {registers.compiler()}")
    now = registers.body(compiled)
    with capsys.disabled():
        print(f"\n{made_with}\n{now}")
    again = "python -m benchmarks.kernels.registers --page docs/kernels.md"
    assert committed == now, f"kernels have changed; run: {again}"
