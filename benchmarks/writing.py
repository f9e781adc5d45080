"""Tables, JSON and figures of results, of speed and of the papers' experiments."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

WIDTH = 120


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose columns line up in plain text too."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write(path: Path, text: str) -> None:
    """Replace a file by a whole one or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, record: Mapping[str, Any], *, digits: int = 6, allow_nan: bool = False) -> None:
    """With so many digits of a number, and on a line what fits there; dataclasses are mappings.

    Raises:
        TypeError: neither plain data nor a dataclass.
        ValueError: a number that is not finite, unless ``allow_nan``.
    """
    text = json.dumps(record, allow_nan=allow_nan, default=_plain)
    plain = json.loads(text, parse_float=lambda number: float(f"{float(number):.{digits}g}"))
    write(path, _json(plain) + "\n")


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"write_json: expected plain data or dataclasses, got {type(value).__name__}")


def _json(value: Any, indent: str = "", key: str = "") -> str:
    line = f"{indent}{key}{json.dumps(value, ensure_ascii=False)}"
    if len(line) <= WIDTH or not isinstance(value, (dict, list)):
        return line
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    entries = value.items() if isinstance(value, dict) else ((None, entry) for entry in value)
    lines: list[str] = []
    shared = False
    for name, entry in entries:
        text = _json(entry, indent + " ", "" if name is None else f"{json.dumps(name)}: ")
        # Numbers and texts share lines, and so do the short parts of a mapping; rows of a table do not.
        single = "\n" not in text and (isinstance(value, dict) or not isinstance(entry, (dict, list)))
        if shared and single and len(lines[-1]) + len(text.strip()) + 2 <= WIDTH:
            lines[-1] += f", {text.strip()}"
        else:
            lines.append(text)
        shared = single
    return f"{indent}{key}{opening}\n" + ",\n".join(lines) + f"\n{indent}{closing}"


def plotter() -> Any:
    """matplotlib.pyplot, drawing to files; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
