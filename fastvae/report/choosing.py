"""Which samples a page looks at: of images and of tables, with conditions and foreign sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.arguments import expect
from fastvae.data import ImageDataset, TableDataset

__all__ = [
    "Condition",
    "Data",
    "Foreign",
    "TableFacts",
    "chosen_of",
    "conditions_of",
    "facts_of",
    "foreign_of",
    "named_sets",
    "resized",
]

Data = ImageDataset | TableDataset
Foreign = Mapping[str, Data] | Sequence[Data] | Data | None
Condition = Literal["labels"] | tuple[Tensor, Tensor] | None

_MOST = {"train": 2000, "test": 500, "foreign": 200}
"""Images or rows that a page looks at."""


@dataclass(frozen=True)
class TableFacts:
    """What stands in a table besides its numbers."""

    columns: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    rows: Mapping[str, tuple[str, ...] | None]
    """Names of all rows of "train" and "test"."""

    def original(self, x: Tensor) -> Tensor:
        """Rows as the model takes them [N, F], in the table's own units."""
        return x * self.scale + self.mean


class Part(NamedTuple):
    """What was chosen of a data set: N samples, what they are, and which."""

    x: Tensor
    labels: Tensor | None
    condition: Tensor | None
    indices: Tensor


def conditions_of(condition: Condition, train: Data, test: Data) -> tuple[Tensor | None, Tensor | None]:
    """Of all training and test samples."""
    if isinstance(condition, str):
        expect(
            condition == "labels",
            'write_report: condition: expected "labels" or two tensors',
            repr(condition),
        )
        both = tuple(getattr(part, "labels", None) for part in (train, test))
        expect(
            all(each is not None for each in both),
            'write_report: condition: expected data with labels for "labels"',
            "data without",
        )
        return both[0], both[1]
    if condition is None:
        return getattr(train, "condition", None), getattr(test, "condition", None)
    found = tuple(condition)
    for name, part, each in zip(("training", "test"), (train, test), found, strict=True):
        if not isinstance(each, Tensor):
            raise TypeError(f"write_report: condition: expected tensors, got {type(each).__name__}")
        wanted = f"write_report: condition: expected {len(part)} rows, one a {name} sample"
        expect(each.dim() > 0 and len(each) == len(part), wanted, list(each.shape))
    return found[0], found[1]


def chosen_of(name: str, data: Data, condition: Tensor | None, generator: torch.Generator) -> Part:
    """Random samples of a data set, so many as a page looks at of training, test or foreign ones."""
    if not isinstance(data, (ImageDataset, TableDataset)):
        raise TypeError(
            f"write_report: {name}: expected an ImageDataset or a TableDataset, got {type(data).__name__}; "
            'fastvae.data.load(..., split="all") makes one of tensors, data sets and folders, load_table one of tables'
        )
    x, labels = data.tensors()
    # Files are often sorted by label: the first samples would not do.
    chosen = torch.randperm(len(x), generator=generator, device="cpu")[: _MOST[name]]
    return Part(
        x[chosen].float().cpu(),
        None if labels is None else labels[chosen].cpu(),
        None if condition is None else condition[chosen].cpu(),
        chosen,
    )


def foreign_of(data: Data, condition: Condition, shape: torch.Size, generator: torch.Generator) -> Part:
    """Foreign samples in the shape of the others, images resized, with conditions where the model has some."""
    own: Tensor | None = None
    if isinstance(condition, tuple):
        raise ValueError(
            "write_report: foreign: expected none where the condition is two tensors; foreign tables, and labels, "
            "bring their own"
        )
    if isinstance(data, (ImageDataset, TableDataset)):
        own = conditions_of(condition, data, data)[0]
    part = chosen_of("foreign", data, own, generator)
    if isinstance(data, TableDataset) or len(shape) == 1:
        wanted = f"write_report: foreign: expected rows of {list(shape)} as in train"
        expect(part.x.shape[1:] == shape, wanted, list(part.x.shape[1:]))
        return part
    return part._replace(x=resized(part.x, shape))


def facts_of(train: Data, test: Data) -> TableFacts | None:
    """Of two tables; None of images."""
    if not (isinstance(train, TableDataset) and isinstance(test, TableDataset)):
        return None
    for name in ("mean", "scale"):
        same = torch.equal(getattr(train, name), getattr(test, name))
        wanted = (
            f"write_report: test: expected the {name} of train; test.standardized(train.mean, train.scale)"
        )
        expect(same, wanted, "another one")
    return TableFacts(train.columns, train.mean, train.scale, {"train": train.rows, "test": test.rows})


def named_sets(foreign: Foreign) -> dict[str, Data]:
    """Foreign sets by name: the last part of where they come from, unless they have one."""
    if foreign is None:
        return {}
    if isinstance(foreign, Mapping):
        return dict(foreign)
    sets = (
        [foreign]
        if isinstance(foreign, (ImageDataset, TableDataset)) or not isinstance(foreign, Sequence)
        else foreign
    )
    named: dict[str, Data] = {}
    for each in sets:
        source = str(getattr(each, "name", ""))
        name = Path(source).name or source
        while name in named:
            name += " (another)"
        named[name] = each
    return named


def resized(images: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, C, H, W] in [0, 1] at that shape; another number of channels becomes their mean, repeated."""
    if images.shape[1] != shape[0]:
        images = images.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
    if images.shape[2:] == torch.Size(shape[1:]):
        return images
    return F.interpolate(images, size=tuple(shape[1:]), mode="bilinear", antialias=True).clamp(0, 1)
