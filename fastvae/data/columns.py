"""Columns of text files: numbers, names, labels and conditions."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastvae.arguments import expect

__all__ = ["SEPARATORS", "Levels", "TextTable", "coded", "read_text_table"]

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""By suffix."""

Levels = Sequence[Any]
"""Of a column that is a condition: the values of text in order, or mean and standard deviation of numbers."""

_Array = np.ndarray[Any, Any]


class TextTable:
    """The cells of a file, numbers as such.

    Args:
        path: of the file, for messages.
        names: of its columns, all different.
        cells: of each row, at least one.
        lines: of the file at which the rows end.
    """

    def __init__(self, path: Path, names: list[str], cells: list[list[str]], lines: list[int]) -> None:
        self.path, self.names, self.lines = path, names, lines
        self._cells = cells
        self._places = {name: place for place, name in enumerate(names)}

    def holds_text(self, name: str) -> bool:
        """Whether the first row has no number there."""
        return not _is_number(self._cells[0][self._places[name]])

    def text(self, name: str) -> list[str]:
        """The cells of a column."""
        place = self._places[name]
        return [line[place] for line in self._cells]

    def numbers(self, names: Sequence[str]) -> _Array:
        """Columns as float64 [N, len(names)]; ValueError for a cell that is no finite number."""
        places = [self._places[name] for name in names]
        found = np.empty((len(self._cells), len(places)))
        for row, line in enumerate(self._cells):
            try:
                found[row] = array("d", map(float, map(line.__getitem__, places)))
            except ValueError:
                found[row] = np.nan
        bad = np.argwhere(~np.isfinite(found))
        if len(bad):
            row = int(bad[0][0])
            # A line that was not read has no numbers at all.
            column = next(
                n for n, p in zip(names, places, strict=True) if not _is_finite(self._cells[row][p])
            )
            cell = self._cells[row][self._places[column]]
            raise ValueError(
                f"{self.path}, line {self.lines[row]}: column {column!r}: expected a finite number, got {cell!r}; a "
                f"column of text can be the label, a condition or ignored: label={column!r}, condition=[{column!r}], "
                f"ignore=[{column!r}]"
            )
        return found


def read_text_table(path: Path) -> TextTable:
    """The cells of a ``.csv`` or ``.tsv`` file. ValueError, with the line, for what is no table."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            start = file.readline()
            file.seek(0)
            separator = SEPARATORS[path.suffix.lower()]
            if separator == "," and start.count(";") > start.count(","):
                separator = ";"
            reader = csv.reader(file, delimiter=separator)
            found = [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path}: expected a table as text in UTF-8, found something else ({error})"
        ) from error
    expect(bool(found), f"{path}: expected a table", "an empty file")
    first = found[0][1]
    has_names = not all(map(_is_number, first))
    names = [cell.strip() for cell in first] if has_names else list(map(str, range(len(first))))
    rows = found[1:] if has_names else found
    expect(bool(rows), f"{path}: expected rows below the names", "none")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    expect(not twice, f"{path}: expected columns of different names", ", ".join(map(repr, twice)) + " twice")
    for number, cells in rows:
        expect(len(cells) == len(names), f"{path}, line {number}: expected {len(names)} cells", len(cells))
    return TextTable(path, names, [cells for _, cells in rows], [number for number, _ in rows])


def coded(
    table: TextTable, columns: Sequence[str], levels: Mapping[str, Levels]
) -> tuple[_Array | None, dict[str, Levels]]:
    """Columns as a condition, float64 [N, C] or None without any, and the levels of each.

    ValueError for a value that is none of the levels.
    """
    parts: list[_Array] = []
    found: dict[str, Levels] = {}
    for name in columns:
        known = list(levels.get(name, ()))
        if not known and table.holds_text(name):
            known = sorted(set(table.text(name)))
        if known and all(isinstance(level, str) for level in known):
            cells = np.array(table.text(name))
            indicators = cells[:, None] == np.array(known)[None]
            strange = cells[~indicators.any(1)]
            wanted = f"{table.path}: column {name!r}: expected one of {', '.join(map(str, known[:20]))}"
            expect(not len(strange), wanted, strange[0] if len(strange) else "")
            parts.append(indicators.astype(np.float64))
        else:
            values = table.numbers([name])
            known = known or [float(values.mean()), float(values.std()) or 1.0]
            parts.append((values - known[0]) / known[1])
        found[name] = known
    return (np.concatenate(parts, 1) if parts else None), found


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_finite(cell: str) -> bool:
    return _is_number(cell) and bool(np.isfinite(float(cell)))
