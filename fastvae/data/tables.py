"""Tables: rows of numbers in memory, read from CSV, ``.npy`` or ``.npz`` files or from arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvae.arguments import expect, expect_choice, expect_numbers
from fastvae.data.columns import SEPARATORS, Levels, TextTable, coded, read_text_table
from fastvae.data.images import random_parts
from fastvae.data.sources import numbered
from fastvae.data.unpacking import keys_of_npz, read_npy, read_npz, shape_of_npy

__all__ = ["TableDataset", "is_named", "is_table", "load_table"]

_SUFFIXES = (*SEPARATORS, ".npy", ".npz")
_ARRAYS = ("values", "labels", "condition", "columns")
"""Keys of an ``.npz`` file."""


class TableDataset(Dataset[tuple[Any, ...]]):
    """Rows of numbers held in memory.

    Item ``i`` is ``(row, condition, label)``, without those that the table does not have: row float32 [F], condition
    float32 [C], label an int.

    Attributes:
        values: float32 [N, F], finite, as the source has them; anything else, or N or F = 0, is a ValueError.
        labels: int64 [N], or None.
        condition: float32 [N, C], or None: what a conditional model is given with each row.
        name: where the rows come from.
        columns: F names.
        classes: the names of the labels 0, 1, ..., or None.
        rows: N names, or None.
        mean, scale: float32 [F]; a model sees (values - mean) / scale. 0 and 1 unless :meth:`standardized`.
        levels: how columns became the condition; see :func:`load_table`.
    """

    def __init__(
        self,
        values: Tensor,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
        name: str = "table",
        *,
        columns: Sequence[str] | None = None,
        classes: tuple[str, ...] | None = None,
        rows: Sequence[str] | None = None,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
        levels: Mapping[str, Levels] | None = None,
    ) -> None:
        is_matrix = isinstance(values, Tensor) and values.dim() == 2 and values.numel() > 0
        found = (
            f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        )
        expect(is_matrix and not values.is_complex(), f"{name}: expected numbers [N, F], not empty", found)
        self.values = _finite(name, "numbers", values)
        if labels is not None:
            fits = labels.shape == values.shape[:1] and not labels.is_floating_point()
            found = f"{labels.dtype} {list(labels.shape)}"
            expect(fits, f"{name}: expected labels as integers [{len(values)}], one a row", found)
            labels = labels.to(torch.int64)
        if condition is not None:
            fits = condition.dim() == 2 and len(condition) == len(values)
            expect(fits, f"{name}: condition: expected numbers [{len(values)}, C]", list(condition.shape))
            condition = _finite(name, "a condition of numbers", condition)
        self.columns = tuple(map(str, range(values.shape[1]) if columns is None else columns))
        for argument, names, count in (("columns", self.columns, 1), ("rows", rows, 0)):
            size = values.shape[count]
            expect(
                names is None or len(names) == size,
                f"{name}: {argument}: expected {size} names",
                len(names or ()),
            )
        self.labels, self.condition, self.name, self.classes = labels, condition, name, classes
        self.rows = None if rows is None else tuple(rows)
        self.mean = torch.zeros(values.shape[1], device="cpu") if mean is None else mean
        self.scale = torch.ones(values.shape[1], device="cpu") if scale is None else scale
        self.levels = dict(levels or {})

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        found: list[Any] = [(self.values[index] - self.mean) / self.scale]
        if self.condition is not None:
            found.append(self.condition[index])
        if self.labels is not None:
            found.append(int(self.labels[index]))
        return tuple(found)

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else f"{self.labels.unique().numel()} labels"
        count, columns = self.values.shape
        return f"{type(self).__name__}({self.name!r}, {count} rows of {columns} columns, {labels})"

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """All rows as a model sees them, float32 [N, F], and the labels int64 [N] or None."""
        return (self.values - self.mean) / self.scale, self.labels

    def standardized(self, mean: Tensor | None = None, scale: Tensor | None = None) -> TableDataset:
        """The same rows, of which a model sees (values - mean) / scale.

        Args:
            mean, scale: float32 [F]; those of training rows, say. None: mean and standard deviation of these rows, 1
                for a column that is constant.
        """
        with torch.no_grad():
            if mean is None:
                mean = self.values.double().mean(0).float()
            if scale is None:
                spread = self.values.double().std(0, correction=0).float()
                scale = torch.where(
                    spread > 1e-6 * self.values.abs().amax(0), spread, torch.ones_like(spread)
                )
        return self._with(slice(None), mean=mean, scale=scale)

    def subset(self, indices: Tensor | Sequence[int]) -> TableDataset:
        """The rows at ``indices`` (integers [M]), in that order, as a data set of its own."""
        return self._with(torch.as_tensor(indices, dtype=torch.int64, device=self.values.device))

    def split(self, *sizes: int, seed: int = 0) -> tuple[TableDataset, ...]:
        """Disjoint random parts of the given sizes; see :meth:`ImageDataset.split`."""
        return tuple(self.subset(part) for part in random_parts(self, "rows", sizes, seed))

    def _with(self, chosen: Tensor | slice, **changed: Any) -> TableDataset:
        names = self.rows
        if names is not None and isinstance(chosen, Tensor):
            names = tuple(names[index] for index in chosen.tolist())
        kept = {
            "columns": self.columns,
            "classes": self.classes,
            "rows": names,
            "mean": self.mean,
            "scale": self.scale,
            "levels": self.levels,
        }
        labels, condition = (None if part is None else part[chosen] for part in (self.labels, self.condition))
        return TableDataset(self.values[chosen], labels, condition, self.name, **{**kept, **changed})


def load_table(
    source: Any,
    *,
    split: Literal["train", "test", "all"] = "train",
    test_fraction: float = 0.1,
    seed: int = 0,
    columns: Sequence[str] | None = None,
    label: Any = "auto",
    condition: Any = (),
    ignore: Sequence[str] = (),
    levels: Mapping[str, Levels] | None = None,
    max_unpacked: int = 2**32,
) -> TableDataset:
    """Load a table: a CSV file, an ``.npy`` or ``.npz`` file, or an array.

    Args:
        source: one of

            - a ``.csv`` or ``.tsv`` file, with or without a line of names (numbers alone have none), its separator a
              comma, semicolon or tab. A first column without a name, or of text that differs in all rows, names the
              rows; else the numbers of their lines do. All others are numbers, but for ``label``, ``condition`` and
              ``ignore``;
            - an array or tensor [N, F] of numbers, or an ``.npy`` file with one;
            - an ``.npz`` file with ``values`` and, if wanted, ``labels`` [N], ``condition`` [N, C] and ``columns`` [F].
        split: "train" and "test" are random parts, by ``seed`` and the number of rows; "all" is everything.
        test_fraction: share of the rows in the test part.
        seed: of the split.
        columns: of a file with names, the columns to take as numbers, in this order; None: all that are left.
        label: the column of the labels, integers or text; of an array, integers or strings [N]. "auto": the column
            "label", if there is one; None: without.
        condition: names of columns that a conditional model is given with each row; of an array, numbers [N, C]. Text
            becomes an indicator for each of its values, numbers are standardised.
        ignore: names of columns to leave out.
        levels: by name of such a column its values in order, or its mean and standard deviation. None, or where a name
            is missing: as found; ``TableDataset.levels`` has them for other tables.
        max_unpacked: bytes that a compressed array may unpack to.

    Returns:
        :class:`TableDataset`.

    Raises:
        ValueError: what is no table of finite numbers, with the row and the column; arguments.
        FileNotFoundError: no such source.
    """
    expect_choice("load_table", ("train", "test", "all"), split=split)
    expect_numbers("load_table", test_fraction=test_fraction, seed=seed)
    expect(
        0.0 < test_fraction < 1.0,
        "load_table: test_fraction: expected a number between 0 and 1",
        test_fraction,
    )
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"load_table: source: expected a file, got {os.fspath(source)!r}; no such file"
            )
        suffix = path.suffix.lower()
        expect(suffix in _SUFFIXES, f"{path}: expected one of {', '.join(_SUFFIXES)}", suffix or "no suffix")
        if suffix in SEPARATORS:
            whole = _from_text(read_text_table(path), path, columns, label, condition, ignore, levels)
        else:
            absent = {"columns": columns is None, "condition": not len(condition), "ignore": not ignore}
            for argument, holds in absent.items():
                expect(holds, f"{path}: {argument}: expected a file with named columns, .csv or .tsv", suffix)
            arrays = {"values": read_npy(path)} if suffix == ".npy" else read_npz(path, _ARRAYS, max_unpacked)
            labels = None if label is None else arrays.get("labels")
            names = None if "columns" not in arrays else [str(each) for each in arrays["columns"].reshape(-1)]
            whole = _from_arrays(str(path), arrays["values"], labels, arrays.get("condition"), names)
    else:
        labels = None if isinstance(label, str) and label == "auto" else label
        given = condition if isinstance(condition, (Tensor, np.ndarray)) else None
        expect(
            given is not None or not len(condition),
            "load_table: condition: expected numbers [N, C]",
            condition,
        )
        whole = _from_arrays("array", source, labels, given, columns)
    if split == "all":
        return whole
    test_size = min(max(round(test_fraction * len(whole)), 1), len(whole) - 1)
    expect(test_size >= 1, f"{whole.name}: expected at least two rows to split", 1)
    train, test = whole.split(len(whole) - test_size, test_size, seed=seed)
    return train if split == "train" else test


def is_table(source: str | os.PathLike[str]) -> bool:
    """Whether a path holds a table and not images, by its suffix and by what its header says."""
    path = Path(source).expanduser()
    if not path.is_file():
        return False
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return len(shape_of_npy(path) or ()) == 2
    return suffix in SEPARATORS or (suffix == ".npz" and "values" in keys_of_npz(path))


def is_named(source: str | os.PathLike[str]) -> bool:
    """Whether a table's columns may have names by which they are chosen."""
    return Path(source).suffix.lower() in SEPARATORS


def _from_arrays(
    name: str, values: Any, labels: Any, condition: Any, columns: Sequence[str] | None
) -> TableDataset:
    try:
        table, given = (None if each is None else _numbers(each) for each in (values, condition))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: expected an array of numbers [N, F], got {type(values).__name__} ({error})"
        ) from error
    assert table is not None
    numbers, classes = (None, None) if labels is None else numbered(labels, name)
    return TableDataset(table, numbers, given, name, columns=columns, classes=classes)


def _numbers(values: Any) -> Tensor:
    tensor = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    # Unsigned integers beyond bytes have few operations in torch.
    return tensor.to(torch.float64)


def _from_text(
    table: TextTable,
    path: Path,
    columns: Sequence[str] | None,
    label: Any,
    condition: Sequence[str],
    ignore: Sequence[str],
    levels: Mapping[str, Levels] | None,
) -> TableDataset:
    names = table.names
    of_label = ("label" if "label" in names else None) if label == "auto" else label
    told = [*([] if of_label is None else [of_label]), *condition, *ignore, *(columns or ())]
    for name in told:
        expect(name in names, f"{path}: expected a column {name!r}", ", ".join(map(str, names[:20])))
    first = names[0]
    named = None
    if first not in told and (first == "" or table.holds_text(first)):
        named = table.text(first)
        if first and len(set(named)) < len(named):
            named = None
    others = {*condition, *ignore, of_label, *([first] if named is not None else [])}
    chosen = list(columns) if columns is not None else [name for name in names if name not in others]
    expect(bool(chosen), f"{path}: expected columns of numbers besides those of label and condition", "none")
    values = torch.from_numpy(table.numbers(chosen))
    numbers, classes = (None, None) if of_label is None else _labels(table, of_label, path)
    given, found = coded(table, condition, levels or {})
    return TableDataset(
        values,
        numbers,
        None if given is None else torch.from_numpy(given),
        str(path),
        columns=chosen,
        classes=classes,
        rows=[f"line {number}" for number in table.lines] if named is None else named,
        levels=found,
    )


def _labels(table: TextTable, name: str, path: Path) -> tuple[Tensor, tuple[str, ...] | None]:
    if table.holds_text(name):
        return numbered(np.array(table.text(name)), str(path))
    values = table.numbers([name])[:, 0]
    other = values[values != np.rint(values)]
    expect(not len(other), f"{path}: column {name!r}: expected labels as integers or text", f"{other[:1]}")
    return torch.from_numpy(values.astype(np.int64)), None


def _finite(name: str, wanted: str, values: Tensor) -> Tensor:
    values = values.to(torch.float32)
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"{name}: expected {wanted}, all finite, got {float(values[row, column])} in row {row}, column {column} "
            f"(and {len(bad) - 1} more); what is missing takes weights, fit(weight=...)"
        )
    return values
