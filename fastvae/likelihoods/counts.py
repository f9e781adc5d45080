"""Counts: 0, 1, 2, ... in any dtype; of uint8 the count itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae.likelihoods.base import Likelihood, at_least_float32, log_sigmoid, set_positive
from fastvae.likelihoods.learned import LearnedLikelihood
from fastvae.likelihoods.stirling import LARGE, stirling_rest, stirling_series
from fastvae.likelihoods.weights import total

__all__ = ["NegativeBinomial", "Poisson", "ZeroInflatedNegativeBinomial"]


class Counts(Likelihood):
    """What likelihoods of counts share."""

    def base_measure(self, x: Tensor, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor | None:
        """log p(x) where the mean is x: [B]. Kernels compute what is missing to it, and that is small."""
        counts = x.detach().flatten(1).to(dtype)
        if weight is None:
            return self._at_own_mean(counts).sum(1)
        each = weight.flatten(1).to(dtype)
        return total(self._at_own_mean(counts.masked_fill(each == 0, 0)), each)

    def _at_own_mean(self, x: Tensor) -> Tensor:
        """log p of each element where its mean is x."""
        raise NotImplementedError

    def as_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x as an encoder sees it: the counts."""
        return x.to(dtype)

    def check(self, x: Tensor) -> None:
        """As ``Likelihood.check``; also ValueError for what is no count: negative, or no whole number."""
        if x.is_floating_point():
            super().check(x)
        elif x.is_complex():
            raise ValueError(f"{type(self).__name__}: x: expected counts, got {x.dtype}")
        if not x.numel() or x.dtype in (torch.bool, torch.uint8):
            return
        if (low := x.min().item()) < 0:
            raise ValueError(f"{type(self).__name__}: x: expected counts of at least 0, got {low:.6g}")
        if x.is_floating_point() and bool((other := x[x != x.round()]).numel()):
            raise ValueError(
                f"{type(self).__name__}: x: expected whole numbers, got {other[0].item():.6g} (and "
                f"{other.numel() - 1} more of {x.numel()}); counts that were divided or transformed are none"
            )


@dataclass(frozen=True)
class Poisson(Counts):
    """Independent Poisson elements with log rates a: log p = x a - e^a - log(x!)."""

    @property
    def spec(self) -> str:
        """The likelihood as the C++ parser reads it."""
        return "poisson"

    def _at_own_mean(self, x: Tensor) -> Tensor:
        return _poisson_at_own_mean(x, _log_of_count(x))

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log probability of a sample: [B]; see ``Likelihood.log_prob``."""
        log_rate, x, weight = self._match_weighted(params, x, weight)
        x = x.to(log_rate.dtype)
        # By the deviance from its own mean: the terms of the formula above are 1e7 where a count of 1e6 has log p = -8.
        log_x = _log_of_count(x)
        ratio = log_rate - log_x
        excess = torch.where(x < 1, log_rate.exp() - x, x * torch.expm1(ratio))  # the rate's over x
        return total(_poisson_at_own_mean(x, log_x) + (x * ratio - excess), weight)

    def mean(self, params: Tensor) -> Tensor:
        """exp(params)."""
        return at_least_float32(params).exp()

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Counts, as floats."""
        return torch.poisson(self.mean(params), generator=generator)


@dataclass(frozen=True)
class _Dispersed(Counts):
    """Counts with a dispersion: a number, the decoder's, or learned."""

    dispersion: float | str = 1.0

    def __new__(
        cls, dispersion: float | str = 1.0, *, shape: Sequence[int] = (), initial: float = 1.0
    ) -> Any:
        """A module, where the dispersion is learned."""
        if dispersion == "learned":
            return LearnedLikelihood(cls("decoder"), "log_dispersion", shape, initial)
        return super().__new__(cls)

    if TYPE_CHECKING:  # the dataclass's own takes a dispersion alone

        def __init__(
            self, dispersion: float | str = 1.0, *, shape: Sequence[int] = (), initial: float = 1.0
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.dispersion, str):
            set_positive(self, "dispersion")
        elif self.dispersion != "decoder":
            raise ValueError(
                f"{type(self).__name__}: dispersion: expected a number, 'decoder' or 'learned', got "
                f"{self.dispersion!r}"
            )

    def _at_own_mean(self, x: Tensor) -> Tensor:
        """Of the negative binomial, as far as it depends on x alone; of a 0 it is 0, whatever inflates it."""
        of_poisson = _poisson_at_own_mean(x, _log_of_count(x))
        if isinstance(self.dispersion, str):
            return of_poisson
        r, _ = _dispersion(x, self.dispersion, [])
        return of_poisson - 0.5 * torch.log1p(x / r) + stirling_rest(x + r) - stirling_rest(r)


@dataclass(frozen=True)
class NegativeBinomial(_Dispersed):
    """Independent negative binomial elements with log means a: variance m + m^2 / dispersion, m = e^a.

    log p = lgamma(x + r) - lgamma(r) - log(x!) + r log(r / (r + m)) + x log(m / (r + m)), r = dispersion: scVI's
    parameterisation (Lopez et al., Nature Methods 2018), theirs being called theta or inverse dispersion. As it grows
    this becomes a Poisson.

    Args:
        dispersion: r > 0; or "decoder": the decoder returns [B, 2 C, ...] for data [B, C, ...], C log means and then C
            log dispersions; or "learned": trained with the model, a module whose parameter is ``log_dispersion``.
        shape: of a learned dispersion, broadcast to a sample: (genes,) for one a gene, () for one that all share.
        initial: what a learned dispersion starts as.
    """

    @property
    def values_per_element(self) -> int:
        """2 where the dispersion is the decoder's, else 1."""
        return 2 if self.dispersion == "decoder" else 1

    @property
    def spec(self) -> str:
        """The likelihood as the C++ parser reads it; empty where the dispersion is the decoder's."""
        return "" if isinstance(self.dispersion, str) else f"negative_binomial {float(self.dispersion)!r}"

    @property
    def element_spec(self) -> str:
        """See ``Likelihood``."""
        return self.spec or "dispersed_counts"

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log probability of a sample: [B]; see ``Likelihood.log_prob``."""
        params, x, weight = self._match_weighted(params, x, weight)
        log_mean, *rest = params.chunk(self.values_per_element, 1)
        return total(negative_binomial(log_mean, _dispersion(log_mean, self.dispersion, rest), x), weight)

    def mean(self, params: Tensor) -> Tensor:
        """exp of the log means."""
        return at_least_float32(params).chunk(self.values_per_element, 1)[0].exp()

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Counts, as floats: Poisson numbers of a gamma distributed rate."""
        log_mean, *rest = at_least_float32(params).chunk(self.values_per_element, 1)
        return _drawn(log_mean, _dispersion(log_mean, self.dispersion, rest), generator)


@dataclass(frozen=True)
class ZeroInflatedNegativeBinomial(_Dispersed):
    """A negative binomial count, or with some probability 0 whatever it is (dropout of single-cell counts).

    p = pi [x = 0] + (1 - pi) NegativeBinomial(x), pi = sigmoid(g) (Lopez et al., Nature Methods 2018). The decoder
    returns [B, 2 C, ...] for data [B, C, ...]: C log means of the negative binomial, then C logits g; with
    dispersion="decoder" C log dispersions after them.

    Args:
        dispersion, shape, initial: as of :class:`NegativeBinomial`.
    """

    @property
    def values_per_element(self) -> int:
        """3 where the dispersion is the decoder's, else 2."""
        return 3 if self.dispersion == "decoder" else 2

    @property
    def element_spec(self) -> str:
        """See ``Likelihood``."""
        if isinstance(self.dispersion, str):
            return "zero_inflated_dispersed_counts"
        return f"zero_inflated_counts {float(self.dispersion)!r}"

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log probability of a sample: [B]; see ``Likelihood.log_prob``."""
        params, x, weight = self._match_weighted(params, x, weight)
        log_mean, logits, *rest = params.chunk(self.values_per_element, 1)
        x = x.to(log_mean.dtype)
        counted = negative_binomial(log_mean, _dispersion(log_mean, self.dispersion, rest), x)
        # log(pi + (1 - pi) e^counted), exactly near 0 and, elsewhere, whichever of the two is larger.
        small = torch.log1p(torch.sigmoid(-logits) * torch.expm1(counted.clamp(min=-0.5)))
        likely = log_sigmoid(logits) - log_sigmoid(logits - counted)
        rare = counted - log_sigmoid(counted - logits) + log_sigmoid(-logits)
        zero = torch.where(counted > -0.5, small, torch.where(logits > counted, likely, rare))
        return total(torch.where(x > 0, log_sigmoid(-logits) + counted, zero), weight)

    def mean(self, params: Tensor) -> Tensor:
        """(1 - pi) times the negative binomial's mean."""
        log_mean, logits, *_ = at_least_float32(params).chunk(self.values_per_element, 1)
        return torch.sigmoid(-logits) * log_mean.exp()

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Counts, as floats."""
        log_mean, logits, *rest = at_least_float32(params).chunk(self.values_per_element, 1)
        counted = _drawn(log_mean, _dispersion(log_mean, self.dispersion, rest), generator)
        return counted * torch.bernoulli(torch.sigmoid(-logits), generator=generator)


def negative_binomial(log_mean: Tensor, dispersion: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """log p of each element, with no digits lost to sums that cancel where counts or the dispersion are large."""
    x = x.to(log_mean.dtype)
    r, log_r = dispersion
    # log(r / (r + m)) and log(m / (r + m))
    log_rest, log_share = log_sigmoid(log_r - log_mean), log_sigmoid(log_mean - log_r)
    small, large = r.clamp(max=LARGE), r.clamp(min=LARGE)
    few, many = x.clamp(max=LARGE), x.clamp(min=LARGE)
    plain = few * log_share + r * log_rest + (torch.lgamma(few + small) - torch.lgamma(small))
    # Gamma(x + r) / (Gamma(r) r^x) is 1 for infinite r, where its parts are infinite.
    rising = (
        (few + large - 0.5) * torch.log1p(few / large)
        - few
        + stirling_series(few + large)
        - stirling_series(large)
    )
    like_poisson = few * log_mean + (few + r) * log_rest + rising
    of_few = torch.where(r < LARGE, plain, like_poisson) - torch.lgamma(few + 1)
    return torch.where(x < LARGE, of_few, _of_many(many, r, log_r, log_rest, log_share))


def _of_many(x: Tensor, r: Tensor, log_r: Tensor, log_rest: Tensor, log_share: Tensor) -> Tensor:
    """By deviances from the mean (Loader, "Fast and accurate computation of binomial probabilities", 2000), n = x + r:

    log(r / n) + x log(n m / (x (r + m))) + r log(n / (r + m)) + log(n / x) / 2 + the rests of Stirling's formula.
    """
    n = x + r
    off = log_share.exp() - x * torch.exp(log_rest - log_r)  # (m - x) / (r + m)
    of_x = _log1p(r * off / x, log_share + torch.log1p(r / x))
    of_r = _log1p(-off, log_rest + torch.log1p(x / r))
    small, large = r.clamp(max=LARGE), r.clamp(min=LARGE)
    by_lgamma = torch.lgamma(small + 1) - small * (small.log() - 1)
    by_series = 0.5 * torch.log(2 * math.pi * large) + stirling_series(large)
    of_gamma = torch.where(r < LARGE, by_lgamma, by_series)
    rest = stirling_series(n) - stirling_series(x) - of_gamma
    return log_r - torch.log(n) + x * of_x + r * of_r + 0.5 * torch.log1p(r / x) + rest


def _log1p(y: Tensor, otherwise: Tensor) -> Tensor:
    """log(1 + y), which far from y = 0 is given."""
    return torch.where(y.abs() < 0.5, torch.log1p(y.clamp(-0.5, 0.5)), otherwise)


def _log_of_count(x: Tensor) -> Tensor:
    """log x, and some number for 0, which it is times."""
    return x.clamp(min=1e-30).log()


def _poisson_at_own_mean(x: Tensor, log_x: Tensor) -> Tensor:
    """x log x - x - log(x!)"""
    many = -0.5 * (log_x + math.log(2 * math.pi)) - stirling_series(x.clamp(min=LARGE))
    return torch.where(x < LARGE, x * (log_x - 1) - torch.lgamma(x + 1), many)


def _dispersion(like: Tensor, dispersion: float | str, rest: list[Tensor]) -> tuple[Tensor, Tensor]:
    """r and log r."""
    if isinstance(dispersion, str):
        return rest[0].exp(), rest[0]
    r, log_r = (
        torch.full((), value, dtype=like.dtype, device=like.device)
        for value in (dispersion, math.log(dispersion))
    )
    return r, log_r


def _drawn(log_mean: Tensor, dispersion: tuple[Tensor, Tensor], generator: torch.Generator | None) -> Tensor:
    r = dispersion[0].expand_as(log_mean).contiguous()
    gamma = torch._standard_gamma(r, generator=generator)
    return torch.poisson(gamma * log_mean.exp() / r, generator=generator)
