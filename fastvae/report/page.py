"""Sections as one HTML file, without scripts or other files, and as text."""

from __future__ import annotations

import base64
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastvae._distribution import to_mend
from fastvae.atomic import write_atomically

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ImportError as error:
    raise ImportError(f"fastvae.report: needs Jinja2; {to_mend('Jinja2', 'demo')}") from error

__all__ = ["Picture", "Section", "Table", "as_text", "write_page"]


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

    @property
    def source(self) -> str:
        """The picture itself, as the address of an image."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass
class Section:
    """One part of the page."""

    title: str
    verdict: str
    """A sentence that the numbers of the section decide."""
    worked: bool | None = None
    """Whether what it is about worked, False where it gained nothing; None where that is no question."""
    text: Sequence[str] = ()
    """Paragraphs; line breaks and indentation do not count."""
    table: Table | None = None
    pictures: Sequence[Picture] = field(default_factory=list)
    listings: Sequence[Table] = ()
    """Below the pictures: rows of data, say, of which there is none."""
    details: Sequence[tuple[str, str]] = ()
    """What is folded away: a heading and text as it stands."""
    is_appendix: bool = False
    """Whether it comes after all others."""
    seconds: float = 0.0
    """Wall-clock time that it took."""

    @property
    def anchor(self) -> str:
        """Where it is on the page."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page: contents with every verdict, then the sections, what worked first.

    Args:
        path: of the file; its folder exists.
        title: of the page.
        lead: what it is about, in a sentence or two.
        sections: their order counts among those that worked, those that are no question, those that gained nothing.
    """
    environment = Environment(
        loader=PackageLoader("fastvae.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = lambda text: " ".join(text.split())
    rank = {True: 0, None: 1, False: 2}
    ordered = sorted(sections, key=lambda section: (section.is_appendix, rank[section.worked]))
    text = environment.get_template("page.html").render(title=title, lead=lead, sections=ordered)
    # Names of files may hold what no text does.
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "replace")))


def as_text(section: Section) -> str:
    """Title, verdict and table for a terminal of at least 100 columns."""
    lines = [section.title, "-" * len(section.title), textwrap.fill(" ".join(section.verdict.split()), 100)]
    if section.table is not None:
        rows = [section.table.columns, *section.table.rows]
        widths = [max(len(row[index]) for row in rows) for index in range(len(section.table.columns))]
        for row in rows:
            cells = [
                cell.ljust(width) if index < section.table.numbers else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
