"""The table of registers per kernel and architecture, as the documents hold it. Needs no GPU.

    python -m benchmarks.kernels.registers                          # prints it
    python -m benchmarks.kernels.registers --page docs/kernels.md   # rewrites the page's part

What the compiler makes of a kernel depends on its version, which stands beside the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks import markdown
from sn72kernels import OPS, testing

PART = "registers"


def body(table: Sequence[testing.Compiled]) -> str:
    """Markdown: a row per case and kernel; of all but registers the worst architecture's."""
    architectures = sorted({row.arch for row in table})
    lines: dict[tuple[str, str], list[testing.Compiled]] = {}
    for row in table:
        lines.setdefault((row.case, row.kernel), []).append(row)
    rows = [
        [
            case,
            kernel,
            str(found[0].warps),
            *(_registers(found, arch) for arch in architectures),
            str(max(row.shared_bytes for row in found)),
            str(max(row.local_bytes for row in found)),
            str(min(row.load_bits for row in found)),
            str(min(row.store_bits for row in found)),
        ]
        for (case, kernel), found in lines.items()
    ]
    head = ["case", "kernel", "warps", *(f"sm_{arch}" for arch in architectures)]
    head += ["shared bytes", "local bytes", "load bits", "store bits"]
    return markdown.table(head, rows, text_columns=2)


def compiler() -> str:
    """What the table was made with."""
    return f"triton {version('triton')}"


def _registers(found: Sequence[testing.Compiled], arch: int) -> str:
    """Of one architecture; of several launches of one kernel in a case, the most."""
    counts = [row.registers for row in found if row.arch == arch]
    return str(max(counts)) if counts else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile every kernel for every architecture and print the table or write it to a page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.registers", description=main.__doc__
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown page to rewrite")
    options = parser.parse_args(arguments)
    table = testing.compile_table(sorted(set(OPS.values())))
    if options.page is None:
        print(body(table))
    else:
        markdown.rewrite(options.page, PART, body(table), compiler())
    return 0


if __name__ == "__main__":
    sys.exit(main())
