"""What is known of the samples of a batch: their data, and what goes with these row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastvae.arguments import given
from fastvae.likelihoods.weights import expanded
from fastvae.noise import keys_of

__all__ = ["Observation"]


class Observation(NamedTuple):
    """Of B samples."""

    x: Tensor
    """[B, ...] the data."""
    condition: Tensor | None = None
    """[B, ...] what the networks are given besides."""
    weight: Tensor | None = None
    """[B, ...] of x's elements in log p(x | z); 0: missing."""

    @property
    def given(self) -> dict[str, Any]:
        """What is there besides x, as arguments of a model's methods."""
        return given(condition=self.condition, weight=self.weight)

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [self.x, *self.given.values()]

    @property
    def keys(self) -> Tensor:
        """A hash of the bytes of what was observed of each sample, not of what stands for the rest: int64 [B]."""
        x, _, weight = self
        return keys_of(x if weight is None else x.masked_fill(expanded("fastvae", weight, x) == 0, 0))

    def each(self, function: Callable[[Tensor], Tensor]) -> Observation:
        """With a function of every tensor in its place; the weight has the shape of x."""
        x, condition, weight = self
        return Observation(
            function(x),
            None if condition is None else function(condition),
            None if weight is None else function(expanded("fastvae", weight, x)),
        )

    def at(self, rows: Tensor | slice) -> Observation:
        """Some of the samples."""
        return self.each(lambda tensor: tensor[rows])

    def repeated(self, times: int) -> Observation:
        """All samples so many times, one batch after the other."""
        return (
            self if times == 1 else self.each(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))
        )

    def interleaved(self, times: int) -> Observation:
        """Each sample so many times, side by side."""
        return self if times == 1 else self.each(lambda tensor: tensor.repeat_interleave(times, 0))
