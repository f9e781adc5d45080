"""Weights of elements, and log p with them as a sum over elements that knows nothing of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_problems import seeded
from torch import Tensor

from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gamma,
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
    "gamma": Gamma(2.5),
    "gamma, the decoder's concentration": Gamma("decoder"),
    "Poisson": Poisson(),
    "negative binomial": NegativeBinomial(2.5),
    "negative binomial, the decoder's dispersion": NegativeBinomial("decoder"),
    "zero-inflated": ZeroInflatedNegativeBinomial(0.7),
    "zero-inflated, the decoder's dispersion": ZeroInflatedNegativeBinomial("decoder"),
}
PIXELS = 6


def is_of_counts(likelihood: Likelihood) -> bool:
    return isinstance(likelihood, (Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial))


def scipy_log_prob(likelihood: Likelihood, params: Tensor, x: Tensor) -> Any:
    """Elements by scipy, and what it has no density of by the distribution it has one of."""
    stats = pytest.importorskip("scipy.stats")
    special = pytest.importorskip("scipy.special")
    a, *rest = (part.cpu().numpy() for part in params.chunk(likelihood.values_per_element, 1))
    y = x.cpu().numpy()

    def of_counts(r: Any) -> Any:
        return stats.nbinom.logpmf(y, r, r / (r + special.exp2(a / math.log(2))))

    if isinstance(likelihood, Laplace):
        return stats.laplace.logpdf(y, a, likelihood.scale)
    if isinstance(likelihood, StudentT):
        return stats.t.logpdf(y, likelihood.df, a, likelihood.scale)
    if isinstance(likelihood, GaussianHead):
        return stats.norm.logpdf(y, a, special.exp2(rest[0] / math.log(2)))
    if isinstance(likelihood, Gamma):
        k = special.exp2(rest[0] / math.log(2)) if rest else likelihood.concentration
        return stats.gamma.logpdf(y, k, scale=special.exp2(a / math.log(2)) / k)
    if isinstance(likelihood, Poisson):
        return stats.poisson.logpmf(y, special.exp2(a / math.log(2)))
    if isinstance(likelihood, NegativeBinomial):
        return of_counts(special.exp2(rest[0] / math.log(2)) if rest else likelihood.dispersion)
    if isinstance(likelihood, ZeroInflatedNegativeBinomial):
        r = special.exp2(rest[1] / math.log(2)) if len(rest) > 1 else likelihood.dispersion
        inside = special.log_expit(-rest[0]) + of_counts(r)
        return special.logsumexp([inside, special.log_expit(rest[0]) + special.log1p(-1.0 * (y > 0))], 0)
    if isinstance(likelihood, DiscretizedLogistic):
        last, scale = likelihood.num_classes - 1, special.exp2(rest[0] / math.log(2))
        k = (y * last).round()
        ends = [(k + side) / last for side in (-0.5, 0.5)]
        lower, upper = (stats.logistic.cdf(end, a, scale) for end in ends)
        above, beyond = (stats.logistic.sf(end, a, scale) for end in ends)
        upper[k == last], lower[k == 0], beyond[k == last], above[k == 0] = 1, 0, 0, 1
        inside = upper - lower
        inside[lower > 0.5] = (above - beyond)[lower > 0.5]
        return special.xlogy(1, inside)
    assert isinstance(likelihood, ContinuousBernoulli)
    return (
        torch.distributions.ContinuousBernoulli(logits=torch.as_tensor(a), lims=(0.5, 0.5))
        .log_prob(x)
        .cpu()
        .numpy()
    )


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


def lgamma(y: Tensor) -> Tensor:
    """By recurrence and Stirling's series, whose derivatives by autograd have all digits, too."""
    far = y + 20
    of_series = 1 / (12 * far) - 1 / (360 * far**3) + 1 / (1260 * far**5) - 1 / (1680 * far**7)
    stirling = (far - 0.5) * far.log() - far + 0.5 * math.log(2 * math.pi) + of_series
    return stirling - sum((y + k).log() for k in range(20))


def counts_log_prob(params: Tensor, x: Tensor) -> Tensor:
    """Of one element, [rows, 1], with the decoder's log dispersion as its last output; of three, zero-inflated."""
    log_mean, *logits, log_r = params.chunk(params.shape[1], 1)
    r, of_mean = log_r.exp(), F.logsigmoid(log_mean - log_r)
    found = lgamma(x + r) - lgamma(r) - lgamma(x + 1) + r * F.logsigmoid(log_r - log_mean)
    found = found + x * of_mean
    if logits:
        counted = found - F.softplus(logits[0], threshold=700)
        zero = torch.logaddexp(-F.softplus(-logits[0], threshold=700), counted)
        found = torch.where(x > 0, counted, zero)
    return found.sum(1)


def gamma_log_prob(params: Tensor, x: Tensor) -> Tensor:
    """Of one element, with the decoder's log concentration."""
    log_mean, log_k = params.chunk(2, 1)
    k = log_k.exp()
    found = k * (log_k - log_mean) + (k - 1) * x.log() - k * x * (-log_mean).exp() - lgamma(k)
    return found.sum(1)


EXACT = {"dispersion": counts_log_prob, "concentration": gamma_log_prob}
"""By the parameter that may be the decoder's: densities without PyTorch's trigamma."""


@dataclass(frozen=True)
class SumOfElements(Likelihood):
    """The oracle: one element's log p at a time, those of weight 0 never looked at."""

    inner: Likelihood
    weight: Tensor
    is_exact: bool = False
    """Without PyTorch's trigamma, lgamma's second derivative, which is right to 5e-10 in float64."""

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
        density = self.inner.log_prob
        for name, exact in EXACT.items():
            if self.is_exact and getattr(self.inner, name, 0.0) == "decoder":
                density = exact
        terms = density(each[kept], data[kept][:, None]) * given[kept]
        return terms.new_zeros(len(x)).index_add(0, kept.nonzero()[:, 0], terms)
