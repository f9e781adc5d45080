"""Rows of a table in words: there is no picture of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.report.page import Table
from fastvae.report.subject import Subject

__all__ = ["differing_columns", "explained_by_column", "influential_rows", "named_row", "strange_rows"]

_COLUMNS = 3
"""Of a row, those that are named."""


def named_row(subject: Subject, part: str, index: int) -> str:
    """A row of "train" or "test" by its name or number, with its label."""
    table = subject.table
    assert table is not None
    indices, labels = (
        (subject.train_indices, subject.train_labels)
        if part == "train"
        else (subject.test_indices, subject.test_labels)
    )
    names = table.rows[part]
    name = f"{part} row {int(indices[index])}" if names is None else names[int(indices[index])]
    return name if labels is None else f"{name} ({subject.label(labels[index])})"


def differing_columns(subject: Subject, x: Tensor, expected: Tensor, *, columns: int = _COLUMNS) -> list[str]:
    """For each row of x [N, F] the columns in which it is farthest from what is expected [N, F], with both values.

    Far: in standard deviations of the column over the training rows.
    """
    assert subject.table is not None
    spread = subject.comparable(subject.train).std(0).clamp_min(1e-6)
    far = (
        ((subject.comparable(x) - subject.comparable(expected)) / spread).abs().topk(min(columns, x.shape[1]))
    )
    values, others = subject.table.original(x), subject.table.original(expected)
    return [
        ", ".join(
            f"{subject.table.columns[column]} {_number(values[row, column])} (model: {_number(others[row, column])})"
            for column in chosen
        )
        for row, chosen in enumerate(far.indices.tolist())
    ]


@torch.no_grad()
def strange_rows(subject: Subject, part: str, indices: Tensor, scores: Sequence[str], heading: str) -> Table:
    """Rows of "train" or "test" with a score each, and where they are farthest from their reconstructions."""
    x, condition = (
        (subject.train, subject.train_condition)
        if part == "train"
        else (subject.test, subject.test_condition)
    )
    chosen = x[indices]
    made = subject.reconstructed(chosen, None if condition is None else condition[indices])
    said = differing_columns(subject, chosen, made)
    names = [named_row(subject, part, index) for index in indices.tolist()]
    return Table(
        ["row", heading, "farthest from its reconstruction"],
        [list(cells) for cells in zip(names, scores, said, strict=True)],
        3,
    )


def influential_rows(
    subject: Subject, queries: int, proponents: tuple[Tensor, Tensor], opponents: tuple[Tensor, Tensor]
) -> Table:
    """Test rows, and the training rows of most influence on them, with scores over the largest of each row."""
    rows = []
    for query in range(queries):
        largest = max(float(scores[query].abs().max()) for _, scores in (proponents, opponents)) or 1.0
        cells = [
            ", ".join(
                f"{named_row(subject, 'train', index)} {score / largest:.2f}".replace(" -", " −")
                for index, score in zip(indices[query].tolist(), scores[query].tolist(), strict=True)
            )
            for indices, scores in (proponents, opponents)
        ]
        rows.append([named_row(subject, "test", query), *cells])
    return Table(["test row", "proponents", "opponents"], rows, 3)


def explained_by_column(subject: Subject, x: Tensor, made: Tensor) -> Table:
    """The columns whose variance reconstructions explain best and worst."""
    assert subject.table is not None
    left = (x - made).square().sum(0) / (x - subject.train.mean(0)).square().sum(0).clamp_min(1e-12)
    order = left.argsort()
    few = order if len(order) <= 10 else torch.cat((order[:5], order[-5:]))
    return Table(
        ["column", "variance explained"],
        [[subject.table.columns[index], f"{max(0.0, 1 - float(left[index])):.0%}"] for index in few.tolist()],
    )


def _number(value: Tensor) -> str:
    return f"{float(value):.3g}".replace("-", "−")
