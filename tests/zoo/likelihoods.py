"""Likelihoods that users write, in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.likelihoods import Likelihood


@dataclass(frozen=True)
class PoissonRates(Likelihood):
    """Counts around rates that the decoder returns, as decoders of single cells do."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        rate, x = self._match(params, x)
        x = x.to(rate.dtype)
        return (x * torch.log(rate) - rate - torch.lgamma(x + 1)).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return params

    def as_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)


@dataclass(frozen=True)
class MeanAndLogScale(Likelihood):
    """Normal elements, means in the first half of the channels and log scales in the second."""

    @property
    def values_per_element(self) -> int:
        return 2

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = params.flatten(1).chunk(2, 1)
        residual = (x.flatten(1) - mean) * torch.exp(-log_scale)
        return (-0.5 * residual.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return params.chunk(2, 1)[0]
