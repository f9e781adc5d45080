"""What a run asks of a loader besides its batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

__all__ = ["as_loader", "generators_of", "length_of", "samplers_of"]

_BATCH_SIZE = 128


class RandomSampler(torch.utils.data.RandomSampler):
    """PyTorch's, which draws the order with a generator of the CPU, wherever new tensors are by default.

    A run's definition names it: whether the loader is made here or by the user, it is the same run.
    """

    def __iter__(self) -> Iterator[int]:
        with torch.device("cpu"):
            return iter(list(super().__iter__()))


def as_loader(argument: str, loader: Any, batch_size: int | None) -> Any:
    """The loader itself, or one of a data set's batches: shuffled, where the argument is "loader".

    TypeError for samples in a tensor or an array, and for paths, over which one can iterate, too.
    """
    if isinstance(loader, (str, bytes, os.PathLike)):
        raise TypeError(
            f"fit: {argument}: expected a data set or an iterable of batches, got a path; pass "
            f"fastvae.data.load({loader!r})"
        )
    if isinstance(loader, (Tensor, np.ndarray)):
        data = "x" if isinstance(loader, Tensor) else "torch.as_tensor(x)"
        raise TypeError(
            f"fit: {argument}: expected a data set or an iterable of batches, got the samples themselves "
            f"({type(loader).__name__}); pass torch.utils.data.TensorDataset({data}), or fastvae.data.load(x)"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        if not len(loader):  # type: ignore[arg-type]
            raise ValueError(
                f"fit: {argument}: expected at least one sample, got an empty {type(loader).__name__}"
            )
        sampler = RandomSampler(loader) if argument == "loader" else None  # type: ignore[arg-type]
        return DataLoader(loader, batch_size or _BATCH_SIZE, sampler=sampler)
    is_missing = loader is None and argument == "val_loader"
    if not is_missing and not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"fit: {argument}: expected a data set or an iterable of batches, got {type(loader).__name__}"
        )
    return loader


def samplers_of(loader: Any) -> list[Any]:
    """The sampler and the batch sampler of a DataLoader, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def generators_of(*loaders: Any) -> list[torch.Generator]:
    """The generators that belong to the loaders, each once."""
    holders = [holder for loader in loaders for holder in (loader, *samplers_of(loader))]
    found = (getattr(holder, "generator", None) for holder in holders)
    return list(
        {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values()
    )


def length_of(loader: Iterable[Any]) -> int | None:
    """Batches in an epoch, None where the loader does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
