"""What a training step makes of a loader's batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.arguments import expect
from fastvae.data import binarize as draw_binary
from fastvae.data import images_of
from fastvae.data.images import tensor_at
from fastvae.likelihoods.weights import expanded, filled
from fastvae.models.observation import Observation

__all__ = ["Batch", "Place", "batch_of"]

Place = int | str | Callable[[Any], Tensor]
"""Of a tensor in a batch: its index, its key, or a function of the batch."""


class Batch(NamedTuple):
    """Samples, and what their losses count."""

    observation: Observation
    sample_weight: Tensor | None
    """[B], or None where all count the same."""
    amount: float
    """Their sum: the number of samples, where they have no weights."""

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return self.observation.tensors + ([] if self.sample_weight is None else [self.sample_weight])

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """With a function of every tensor in its place."""
        own = None if self.sample_weight is None else function(self.sample_weight)
        return Batch(self.observation.each(function), own, self.amount)

    def total(self, losses: Tensor) -> Tensor:
        """The weighted sum of losses [B], in float64: []."""
        each = losses if self.sample_weight is None else losses * self.sample_weight
        return each.sum(dtype=torch.float64)

    def mean(self, losses: Tensor) -> Tensor:
        """The weighted mean of losses [B]: []."""
        if self.sample_weight is None:
            return losses.mean()
        weight = self.sample_weight.to(losses.dtype)
        return (losses * weight).sum() / weight.sum()


def batch_of(loaded: Any, places: Mapping[str, Place | None], binarize: bool) -> Batch:
    """A loader's batch, where it is.

    Args:
        loaded: as of ``fastvae.data.images_of``.
        places: of the "condition", the "weight" and the "sample_weight".
        binarize: draw binary images.
    """
    x = images_of(loaded)
    found = {
        name: tensor_at(loaded, place, f"fit: {name}") for name, place in places.items() if place is not None
    }
    sample_weight = found.pop("sample_weight", None)
    if "weight" in found:
        found["weight"] = expanded("fit", found["weight"], x)
        x = filled(x, found["weight"]) if binarize else x
    amount = float(len(x)) if sample_weight is None else _amount_of(sample_weight, len(x))
    return Batch(Observation(draw_binary(x) if binarize else x, **found), sample_weight, amount)


def _amount_of(sample_weight: Tensor, samples: int) -> float:
    expect(
        sample_weight.shape == (samples,),
        f"fit: sample_weight: expected one number a sample, [{samples}]",
        list(sample_weight.shape),
    )
    total = float(sample_weight.sum(dtype=torch.float64))
    if not (math.isfinite(total) and total > 0 and bool((sample_weight >= 0).all())):
        raise ValueError(
            "fit: sample_weight: expected finite numbers of at least 0, and in each batch one above 0, got values from "
            f"{float(sample_weight.min()):.6g} to {float(sample_weight.max()):.6g}"
        )
    return total
