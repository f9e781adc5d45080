"""Weights of elements, and log p with them as a sum over elements that knows nothing of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from model_problems import seeded
from torch import Tensor

from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    GaussianHead,
    Laplace,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
    ZeroInflatedNegativeBinomial,
)

LIKELIHOODS: dict[str, Likelihood] = {
    "Bernoulli": Bernoulli(),
    "Gaussian": Gaussian(0.7),
    "categorical": Categorical(4),
    "continuous Bernoulli": ContinuousBernoulli(),
    "discretized logistic": DiscretizedLogistic(16),
    "Gaussian head": GaussianHead(),
    "Laplace": Laplace(0.3),
    "Student t": StudentT(3.0, 0.4),
    "Poisson": Poisson(),
    "negative binomial": NegativeBinomial(2.5),
    "negative binomial, the decoder's dispersion": NegativeBinomial("decoder"),
    "zero-inflated": ZeroInflatedNegativeBinomial(0.7),
    "zero-inflated, the decoder's dispersion": ZeroInflatedNegativeBinomial("decoder"),
}
PIXELS = 6


def is_of_counts(likelihood: Likelihood) -> bool:
    return isinstance(likelihood, (Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial))


def data(likelihood: Likelihood, rows: int, seed: int = 1) -> Tensor:
    x = torch.rand(rows, PIXELS, generator=seeded(seed), dtype=torch.float64)
    return torch.poisson(3 * x, generator=seeded(seed + 1)) if is_of_counts(likelihood) else x


def weights(rows: int, seed: int = 3) -> Tensor:
    """Zeros, ones and others."""
    drawn = torch.randint(3, (rows, PIXELS), generator=seeded(seed)).double()
    return drawn.where(drawn < 2, 0.3 + torch.rand(rows, PIXELS, generator=seeded(seed), dtype=torch.float64))


def holed(x: Tensor, weight: Tensor) -> Tensor:
    """x, NaN where it is left out."""
    return x.masked_fill(weight == 0, float("nan"))


@dataclass(frozen=True)
class SumOfElements(Likelihood):
    """The oracle: one element's log p at a time, those of weight 0 never looked at."""

    inner: Likelihood
    weight: Tensor

    @property
    def values_per_element(self) -> int:
        return self.inner.values_per_element

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        values = self.values_per_element
        if isinstance(self.inner, Categorical):
            each = params.reshape(len(params), -1, values)
        else:
            each = params.reshape(len(params), values, -1).transpose(1, 2)
        # Of an IWAE the codes of a sample come side by side.
        own = self.weight.repeat_interleave(len(x) // len(self.weight), 0)
        given, data = own.expand(x.shape).reshape(len(x), -1), x.reshape(len(x), -1)
        kept = given != 0
        terms = self.inner.log_prob(each[kept], data[kept][:, None]) * given[kept]
        return terms.new_zeros(len(x)).index_add(0, kept.nonzero()[:, 0], terms)
