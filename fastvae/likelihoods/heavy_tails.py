"""Densities with heavier tails than a normal one's: of real numbers, and of positive ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.likelihoods.base import Likelihood, at_least_float32, set_positive, unit_interval
from fastvae.likelihoods.stirling import stirling_rest
from fastvae.likelihoods.weights import count, total
from fastvae.randomness import standard_normal, standard_uniform

__all__ = ["Gamma", "Laplace", "StudentT"]


@dataclass(frozen=True)
class Gamma(Likelihood):
    """Independent gamma elements with log means a: positive data, the larger the wider.

    log p = k (log k - a) + (k - 1) log x - k x e^-a - lgamma(k) with concentration k: mean e^a, variance e^2a / k. With
    k = 1, the default, it is exponential: of a power spectrogram then -log p is the Itakura-Saito divergence but for a
    constant (Fevotte, Bertin, Durrieu, "Nonnegative matrix factorization with the Itakura-Saito divergence", Neural
    Computation 2009).

    Args:
        concentration: k > 0; or "decoder": the decoder returns [B, 2 C, ...] for data [B, C, ...], C log means and then
            C log concentrations.
    """

    concentration: float | str = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.concentration, str):
            set_positive(self, "concentration")
        elif self.concentration != "decoder":
            raise ValueError(
                f"Gamma: concentration: expected a number or 'decoder', got {self.concentration!r}"
            )

    @property
    def values_per_element(self) -> int:
        """2 where the concentration is the decoder's, else 1."""
        return 2 if self.concentration == "decoder" else 1

    @property
    def element_spec(self) -> str:
        """See ``Likelihood``."""
        of_decoder = isinstance(self.concentration, str)
        return "gamma_head" if of_decoder else f"gamma {float(self.concentration)!r}"

    def _element_data(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        # Of 0, which check refuses and which stands for what is left out, the least number that has a logarithm.
        return unit_interval(x, dtype).clamp(min=torch.finfo(dtype).tiny).log()

    def check(self, x: Tensor) -> None:
        """As ``Likelihood.check``; also ValueError for what is not above 0."""
        super().check(x)
        if x.numel() and (low := x.min().item()) <= 0:
            raise ValueError(f"Gamma: x: expected values above 0, got {low:.6g}")

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log density of a sample: [B]; see ``Likelihood.log_prob``."""
        params, x, weight = self._match_weighted(params, x, weight)
        log_mean, *_ = params.chunk(self.values_per_element, 1)
        log_x = self._element_data(x, params.dtype)
        log_k = self._log_concentration(params)
        k = log_k.exp()
        ratio = log_x - log_mean
        of_k = 0.5 * (log_k - math.log(2 * math.pi)) - stirling_rest(k)
        return total(of_k - log_x - k * (torch.expm1(ratio) - ratio), weight)

    def mean(self, params: Tensor) -> Tensor:
        """exp of the log means."""
        return at_least_float32(params).chunk(self.values_per_element, 1)[0].exp()

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Positive numbers: what underflows is the least that does not."""
        params = at_least_float32(params)
        mean = self.mean(params)
        k = self._log_concentration(params).exp().expand_as(mean).contiguous()
        drawn = torch._standard_gamma(k, generator=generator) / k * mean
        return drawn.clamp(min=torch.finfo(drawn.dtype).tiny)

    def _log_concentration(self, params: Tensor) -> Tensor:
        if isinstance(self.concentration, str):
            return params.chunk(2, 1)[1]
        return torch.full((), math.log(self.concentration), dtype=params.dtype, device=params.device)


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
        u = standard_uniform(location.shape, location, generator) - 0.5
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
        noise = standard_normal(location.shape, location, generator)
        half = torch.full_like(location, float(self.df) / 2)
        gamma = torch._standard_gamma(half, generator=generator).clamp(min=torch.finfo(location.dtype).tiny)
        return location + self.scale * noise * torch.sqrt(half / gamma)


def _half_step_of_lgamma(y: float) -> float:
    """lgamma(y + 1/2) - lgamma(y), also for large y, where both are."""
    if y < 50:
        return math.lgamma(y + 0.5) - math.lgamma(y)
    square = y**-2
    return 0.5 * math.log(y) - (1 / 8 - square * (1 / 192 - square * (1 / 640 - square * 17 / 14336))) / y
