"""Densities of real numbers with heavier tails than a normal one's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.likelihoods.base import Likelihood, at_least_float32, set_positive, unit_interval
from fastvae.likelihoods.weights import count, total

__all__ = ["Laplace", "StudentT"]


@dataclass(frozen=True)
class Laplace(Likelihood):
    """Independent Laplace elements around the decoder's output a: log p = -|x - a| / scale - log(2 scale).

    Args:
        scale: > 0, in the unit of x; the standard deviation is sqrt(2) times it.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        set_positive(self, "scale")

    @property
    def spec(self) -> str:
        """The likelihood as the C++ parser reads it."""
        return f"laplace {float(self.scale)!r}"

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log density of a sample: [B]; see ``Likelihood.log_prob``. At x = a its derivative is taken as 0."""
        location, x, weight = self._match_weighted(params, x, weight)
        distance = total((unit_interval(x, location.dtype) - location).abs(), weight)
        return -distance / self.scale - math.log(2 * self.scale) * count(location, weight)

    def mean(self, params: Tensor) -> Tensor:
        """params."""
        return at_least_float32(params)

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """By the inverse of the distribution function."""
        location = self.mean(params)
        u = (
            torch.rand(location.shape, generator=generator, device=location.device, dtype=location.dtype)
            - 0.5
        )
        # rand may give 0, of which the logarithm below would be minus infinity.
        tail = (1 - 2 * u.abs()).clamp(min=torch.finfo(u.dtype).tiny)
        return location - self.scale * u.sign() * torch.log(tail)


@dataclass(frozen=True)
class StudentT(Likelihood):
    """Independent elements of Student's t distribution around the decoder's output a.

    log p = lgamma((df + 1) / 2) - lgamma(df / 2) - log(pi df) / 2 - log scale - (df + 1) / 2 log(1 + u^2 / df),
    u = (x - a) / scale.

    Args:
        df: degrees of freedom, > 0; the mean is defined above 1, the variance above 2.
        scale: > 0, in the unit of x.
    """

    df: float = 4.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        set_positive(self, "df", "scale")

    @property
    def element_spec(self) -> str:
        """See ``Likelihood``."""
        return f"student_t {float(self.df)!r} {float(self.scale)!r}"

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log density of a sample: [B]; see ``Likelihood.log_prob``."""
        location, x, weight = self._match_weighted(params, x, weight)
        df = float(self.df)
        u = (unit_interval(x, location.dtype) - location) / self.scale
        constant = _half_step_of_lgamma(df / 2) - 0.5 * math.log(math.pi * df) - math.log(self.scale)
        return -0.5 * (df + 1) * total(torch.log1p(u.square() / df), weight) + constant * count(
            location, weight
        )

    def mean(self, params: Tensor) -> Tensor:
        """params, which is the median where df is at most 1."""
        return at_least_float32(params)

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A normal number over the root of a chi-squared one over df."""
        location = self.mean(params)
        noise = torch.randn(location.shape, generator=generator, device=location.device, dtype=location.dtype)
        half = torch.full_like(location, float(self.df) / 2)
        gamma = torch._standard_gamma(half, generator=generator).clamp(min=torch.finfo(location.dtype).tiny)
        return location + self.scale * noise * torch.sqrt(half / gamma)


def _half_step_of_lgamma(y: float) -> float:
    """lgamma(y + 1/2) - lgamma(y), also for large y, where both are."""
    if y < 1e4:
        return math.lgamma(y + 0.5) - math.lgamma(y)
    return 0.5 * math.log(y) - 1 / (8 * y) + 1 / (192 * y**3)
