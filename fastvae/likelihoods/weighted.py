"""A likelihood with the weights of one batch: what operators of a decoder, x and a likelihood take in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.likelihoods.base import Likelihood
from fastvae.likelihoods.weights import check_takes_weight, expanded

__all__ = ["WeightedLikelihood", "weighted"]


class WeightedLikelihood(Likelihood):
    """log p of a batch's elements, each times its weight.

    Args:
        likelihood: whose ``log_prob`` takes weights, without parameters of its own.
        weight: of the shape of the x that it is asked for.
    """

    def __init__(self, likelihood: Likelihood, weight: Tensor) -> None:
        self.likelihood, self.weight = likelihood, weight
        self.probs = likelihood.probs
        self.of_logits = likelihood.of_logits  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"{self.likelihood}"

    @property
    def values_per_element(self) -> int:
        """Its likelihood's."""
        return self.likelihood.values_per_element

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[B], of its own weight."""
        assert weight is None
        return self.likelihood.log_prob(params, x, self.weight)

    def as_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Its likelihood's."""
        return self.likelihood.as_float(x, dtype)

    def params_of_output(self, output: Tensor) -> Tensor:
        """Its likelihood's."""
        return self.likelihood.params_of_output(output)


def weighted(owner: str, likelihood: Likelihood, weight: object, x: Tensor) -> Likelihood:
    """A likelihood with the weights of x, where there are any; errors as of ``expanded`` and ``check_takes_weight``."""
    if weight is None:
        return likelihood
    check_takes_weight(likelihood)
    found = expanded(owner, weight, x)
    if found.is_inference():
        # Such a tensor cannot take part in a backward pass, and a force is one.
        with torch.inference_mode(False):
            found = found.clone()
    return WeightedLikelihood(likelihood, found)
