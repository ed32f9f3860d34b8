"""One self-contained HTML page from headings, text, tables and pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sn72kernels.atomic import write_text

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6678; --line: #d9dee7; --bg: #ffffff;
        --card: #f5f7fa; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa5b5; --line: #333c49; --bg: #12161c; --card: #1a2029;
          --good: #5fcf96; --bad: #ff8a80; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--bg);
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.25rem; }
p.lead { color: var(--soft); margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.card { background: var(--card); border-radius: 8px; overflow: hidden; }
.card img { width: 100%; height: 9rem; object-fit: cover; border-radius: 0; display: block; }
.card div { padding: .6rem .8rem; font-size: .9rem; } .card b { font-size: 1rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .soft { color: var(--soft); }
"""


@dataclass(slots=True)
class Report:
    """Collects sections and writes one HTML file with every picture inside it."""

    title: str
    lead: str
    _body: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Start a section."""
        self._body.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add a paragraph of plain text."""
        self._body.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; every cell is shown as text."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        self._body.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, path: Path, alt: str) -> None:
        """Add a PNG; ``alt`` says in words what it shows."""
        self._body.append(f'<p><img src="{data_uri(path)}" alt="{html.escape(alt)}"></p>')

    def cards(self, cards: Sequence[Card]) -> None:
        """Add a grid of pictures with captions."""
        self._body.append('<div class="cards">' + "".join(c.html() for c in cards) + "</div>")

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body>"
            f'<h1>{html.escape(self.title)}</h1><p class="lead">{html.escape(self.lead)}</p>'
            + "".join(self._body)
            + "</body></html>\n"
        )
        write_text(path, page)


@dataclass(frozen=True, slots=True)
class Card:
    """A picture with a headline, lines below it, and whether it is good news."""

    picture: Path
    headline: str
    lines: tuple[str, ...]
    good: bool | None = None

    def html(self) -> str:
        """This card as HTML."""
        tone = {True: "good", False: "bad", None: ""}[self.good]
        lines = "".join(f'<br><span class="soft">{html.escape(line)}</span>' for line in self.lines)
        return (
            f'<div class="card"><img src="{data_uri(self.picture)}" '
            f'alt="{html.escape(self.headline)}">'
            f'<div><b class="{tone}">{html.escape(self.headline)}</b>{lines}</div></div>'
        )


def data_uri(path: Path) -> str:
    """A PNG or JPEG file as a data URI."""
    kind = "jpeg" if path.suffix in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
