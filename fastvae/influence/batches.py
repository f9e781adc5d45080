"""Tiles of a data set: consecutive samples as tuples of tensors, whatever sizes the loader gives them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from fastvae.data import images_of
from fastvae.data.images import tensor_at
from fastvae.influence.evaluation import Batch

__all__ = [
    "Take",
    "check_order",
    "count_of",
    "images_alone",
    "spread_over",
    "tiles_of",
    "whole_batch",
    "with_entries",
]

Take = Callable[[Any], Batch]
"""What of a loader's batch is used."""


def tiles_of(data: Any, tile: int, batch_size: int, take: Take) -> Iterator[Batch]:
    """Consecutive tiles of ``tile`` samples, the last one smaller.

    Args:
        data: a tensor or a tuple of tensors (all samples at once), a ``Dataset`` or an iterable of batches such
            as a ``DataLoader``.
        tile: samples.
        batch_size: at which a ``Dataset`` is collated, at least.
        take: ``images_alone``, ``whole_batch`` or a partial ``with_entries``.
    """
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Tensor) or _is_batch(data):
        batches: Iterable[Any] = [data]
    elif isinstance(data, Dataset):
        batches = DataLoader(data, batch_size=max(batch_size, tile))
    else:
        batches = data
    waiting: list[Batch] = []
    count = 0
    for given in batches:
        batch = take(given)
        while count + len(batch[0]) >= tile:
            need = tile - count
            yield _joined([*waiting, tuple(part[:need] for part in batch)])
            batch, waiting, count = tuple(part[need:] for part in batch), [], 0
        if len(batch[0]):
            waiting.append(batch)
            count += len(batch[0])
    if waiting:
        yield _joined(waiting)


def spread_over(data: Any, count: int) -> Any:
    """So many samples of all parts of the data, where they can be had by index; else the data as they are."""
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Tensor) or _is_batch(data):
        parts = (data,) if isinstance(data, Tensor) else tuple(data)
        total = len(parts[0])
        if total > count and all(len(part) == total for part in parts):
            rows = torch.linspace(0, total - 1, count, device="cpu").long()
            chosen = tuple(part[rows.to(part.device)] for part in parts)
            return chosen[0] if isinstance(data, Tensor) else chosen
        return data
    loader = data if isinstance(data, DataLoader) else None
    found = data if loader is None else loader.dataset
    if not isinstance(found, Dataset) or isinstance(found, IterableDataset) or len(found) <= count:  # type: ignore[arg-type]
        return data
    some = Subset(found, torch.linspace(0, len(found) - 1, count, device="cpu").long().tolist())  # type: ignore[arg-type]
    if loader is None:
        return some
    # Of a loader that does not batch, samples are batches already.
    return data if loader.batch_size is None else DataLoader(some, count, collate_fn=loader.collate_fn)


def check_order(argument: str, data: Any) -> None:
    """ValueError for a loader that gives its samples in another order than the data set's own: indices would lie.

    What an ``IterableDataset`` does inside cannot be seen.
    """
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return
    batches, sampler = data.batch_sampler, data.sampler
    if batches is not None and type(batches) is BatchSampler:
        sampler = batches.sampler
    found = sampler if batches is None or type(batches) is BatchSampler else batches
    if not isinstance(found, SequentialSampler):
        raise ValueError(
            f"TracIn: {argument}: expected a DataLoader in the order of its data set, whose indices the results are "
            f"in, got one with a {type(found).__name__}; pass shuffle=False, or the data set itself "
            "(torch.utils.data.Subset for a part or an order of it)"
        )


def count_of(data: Any) -> int:
    """The number of samples."""
    if isinstance(data, TensorDataset):
        return len(data)
    if _is_batch(data):
        return len(data[0])
    if isinstance(data, DataLoader):
        dropped = data.drop_last and data.batch_size
        return len(data) * data.batch_size if dropped else len(data.dataset)  # type: ignore[arg-type, operator]
    return len(data)


def _is_batch(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and bool(data) and all(isinstance(part, Tensor) for part in data)


def images_alone(given: Any) -> Batch:
    """The images of a batch, by ``fastvae.data.images_of``."""
    return (images_of(given),)


def with_entries(places: Mapping[str, Any], given: Any) -> Batch:
    """The images of a batch and other entries, each by its name and place as of ``fastvae.data.condition_of``."""
    others = (tensor_at(given, place, f"TracIn: {name}") for name, place in places.items())
    return _even((images_of(given), *others))


def whole_batch(given: Any) -> Batch:
    """Every entry of a batch, which are tensors."""
    batch = (given,) if isinstance(given, Tensor) else given
    if isinstance(batch, Mapping) or not _is_batch(batch):
        raise TypeError(
            "TracIn: with a loss_fn a batch is expected to be a tensor or a tuple of tensors, the last one the "
            f"targets; got {type(given).__name__}"
        )
    return _even(tuple(batch))


def _even(batch: Batch) -> Batch:
    if not all(part.dim() for part in batch):
        raise ValueError(
            "TracIn: expected batches of samples [B, ...], got an entry without dimensions; samples by themselves are "
            "given as a Dataset"
        )
    if len({len(part) for part in batch}) > 1:
        raise ValueError(
            f"TracIn: expected as many samples in every entry of a batch, got {[len(part) for part in batch]}"
        )
    return batch


def _joined(parts: list[Batch]) -> Batch:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(entries) for entries in zip(*parts, strict=True))
