"""Normal densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae.arguments import expect
from fastvae.likelihoods.base import Likelihood, at_least_float32, set_positive, unit_interval
from fastvae.likelihoods.learned import LearnedLikelihood
from fastvae.likelihoods.weights import count, total
from fastvae.randomness import standard_normal

__all__ = ["Gaussian", "GaussianHead"]


@dataclass(frozen=True)
class GaussianHead(Likelihood):
    """Independent normal elements of which the decoder gives mean and log scale.

    The decoder returns [B, 2 C, ...] for data [B, C, ...]: C means, then C log scales, in the unit of x.

    Args:
        min_scale: the scale is at least this, > 0: a decoder that reconstructs some element exactly would else send its
            density to infinity. Where it is smaller there is no gradient to its logarithm.
    """

    min_scale: float = 1e-6

    def __post_init__(self) -> None:
        set_positive(self, "min_scale")

    @property
    def values_per_element(self) -> int:
        """2."""
        return 2

    @property
    def element_spec(self) -> str:
        """See ``Likelihood``."""
        return f"gaussian_head {float(self.min_scale)!r}"

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log density of a sample: [B]; see ``Likelihood.log_prob``."""
        params, x, weight = self._match_weighted(params, x, weight)
        mean, log_scale = params.chunk(2, 1)
        log_scale = log_scale.clamp(min=math.log(self.min_scale))
        residual = (unit_interval(x, mean.dtype) - mean) * torch.exp(-log_scale)
        of_scale = 0.5 * math.log(2 * math.pi) * count(mean, weight)
        return total(-0.5 * residual.square() - log_scale, weight) - of_scale

    def mean(self, params: Tensor) -> Tensor:
        """The means."""
        return at_least_float32(params).chunk(2, 1)[0]

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Means + scales * standard normal noise."""
        mean, log_scale = at_least_float32(params).chunk(2, 1)
        noise = standard_normal(mean.shape, mean, generator)
        return mean + log_scale.clamp(min=math.log(self.min_scale)).exp() * noise


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Independent normal elements N(a, scale^2) around the decoder's output a.

    Args:
        scale: > 0, in the unit of x: a number; "learned": trained with the model (the sigma-VAE of Rybkin, Daniilidis,
            Levine, "Simple and effective VAE training with calibrated decoders", ICML 2021), a module whose parameter
            is ``log_scale``; or a tensor without a gradient, which stays as it is.
        shape: of a learned scale, broadcast to a sample of the decoder's output: () for one that all elements share,
            (C, 1, 1) for one a channel, the sample's own for one an element.
        initial: what a learned scale starts as.
        min_scale: a learned scale is at least this; where it is smaller there is no gradient to its logarithm.

    Raises:
        TypeError: a scale that is a Parameter or requires a gradient: pass "learned" and ``initial``.
        ValueError: a scale that is not finite or not above 0.
    """

    scale: float = 1.0

    def __new__(
        cls,
        scale: float | str | Tensor = 1.0,
        *,
        shape: Sequence[int] = (),
        initial: float = 1.0,
        min_scale: float = 1e-6,
    ) -> Any:
        """A module, where the scale is no number."""
        if isinstance(scale, str):
            expect(
                scale == "learned", "Gaussian: scale: expected a number, a tensor or 'learned'", repr(scale)
            )
            return LearnedLikelihood(GaussianHead(min_scale), "log_scale", shape, initial, owner="Gaussian")
        if isinstance(scale, Tensor) and not scale.requires_grad:
            head = GaussianHead(min_scale)
            return LearnedLikelihood(head, "log_scale", scale.shape, scale, False, "Gaussian")
        return super().__new__(cls)

    if TYPE_CHECKING:  # the dataclass's own takes a number alone

        def __init__(
            self,
            scale: float | str | Tensor = 1.0,
            *,
            shape: Sequence[int] = (),
            initial: float = 1.0,
            min_scale: float = 1e-6,
        ) -> None: ...

    def __post_init__(self) -> None:
        set_positive(self, "scale", hint="for a learned scale pass scale='learned', initial=...")

    @property
    def spec(self) -> str:
        """The likelihood as the C++ parser reads it."""
        return f"gaussian {float(self.scale)!r}"

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log density of a sample: [B]; see ``Likelihood.log_prob``."""
        mean, x, weight = self._match_weighted(params, x, weight)
        constant = math.log(self.scale) + 0.5 * math.log(2 * math.pi)
        residual = (unit_interval(x, mean.dtype) - mean) / self.scale
        return -0.5 * total(residual.square(), weight) - constant * count(mean, weight)

    def mean(self, params: Tensor) -> Tensor:
        """params."""
        return at_least_float32(params)

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """params + scale * standard normal noise."""
        mean = self.mean(params)
        noise = standard_normal(mean.shape, mean, generator)
        return mean + self.scale * noise
