"""A report: sections as one HTML file without scripts or other files, and as text."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Picture", "Section", "Table", "as_html", "as_text"]

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f8fafc; color: #1e293b; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
section { background: #fff; border: 1px solid #e2e8f0; border-radius: 8px; padding: 1.25rem 1.5rem;
  margin-bottom: 1.25rem; }
p { margin: 0 0 .8rem; max-width: 44rem; }
figure { margin: 1rem 0 0; }
img { max-width: 100%; height: auto; display: block; }
figcaption { color: #64748b; font-size: .85rem; margin-top: .4rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .4rem 0; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e2e8f0; }
th { color: #64748b; font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; }
"""


@dataclass
class Table:
    """Rows of text under headings; ``numbers`` says from which column on cells are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 1


@dataclass
class Picture:
    """A PNG, and what it shows in a sentence."""

    png: bytes
    caption: str


@dataclass
class Section:
    """One part of the report."""

    title: str
    text: Sequence[str] = ()
    """Paragraphs; line breaks and indentation do not count."""
    table: Table | None = None
    pictures: Sequence[Picture] = field(default_factory=list)
    printed: bool = False
    """Whether its text and table go to the terminal too."""


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The whole report as one page."""
    body = "\n".join(_section_html(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section_html(section: Section) -> str:
    parts = [
        f"<h2>{escape(section.title)}</h2>",
        *(f"<p>{escape(' '.join(text.split()))}</p>" for text in section.text),
    ]
    if section.table is not None:
        head = _row_html("th", section.table.columns, section.table.numbers)
        rows = [_row_html("td", row, section.table.numbers) for row in section.table.rows]
        parts.append(
            f'<div class="table"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
        )
    for picture in section.pictures:
        data, caption = base64.b64encode(picture.png).decode(), escape(picture.caption)
        parts.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _row_html(tag: str, cells: Sequence[str], numbers: int) -> str:
    classes = ["" if index < numbers else ' class="number"' for index in range(len(cells))]
    return (
        "<tr>"
        + "".join(f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True))
        + "</tr>"
    )


def as_text(section: Section) -> str:
    """Title, table and paragraphs for a terminal of at least 100 columns."""
    lines = [section.title, "-" * len(section.title)]
    if section.table is not None:
        rows = [section.table.columns, *section.table.rows]
        widths = [max(len(row[index]) for row in rows) for index in range(len(section.table.columns))]
        for row in rows:
            cells = [
                cell.ljust(width) if index < section.table.numbers else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *(textwrap.fill(" ".join(text.split()), 100) for text in section.text)])
