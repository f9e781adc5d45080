"""What a run asks of a loader besides its batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

__all__ = ["check_loader", "generators_of", "length_of", "samplers_of"]


def check_loader(argument: str, loader: object) -> None:
    """TypeError for samples where batches are meant: a data set or a tensor, which one can iterate over, too."""
    remedy = ""
    if isinstance(loader, (Tensor, np.ndarray)):
        data = "x" if isinstance(loader, Tensor) else "torch.as_tensor(x)"
        remedy = f"TensorDataset({data})"
    elif isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        remedy = "dataset"
    elif loader is not None and not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(f"fit: {argument}: expected an iterable of batches, got {type(loader).__name__}")
    if remedy:
        raise TypeError(
            f"fit: {argument}: expected an iterable of batches, got the samples themselves ({type(loader).__name__}); "
            f"pass torch.utils.data.DataLoader({remedy}, batch_size=128, shuffle={argument == 'loader'})"
        )


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
