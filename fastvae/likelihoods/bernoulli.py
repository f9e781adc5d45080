"""Densities on [0, 1] with one logit an element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.likelihoods.base import Likelihood, at_least_float32, unit_interval
from fastvae.likelihoods.weights import total
from fastvae.randomness import standard_uniform

__all__ = ["Bernoulli", "ContinuousBernoulli"]


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent Bernoulli elements with logits a: log p = x a - log(1 + e^a), also for x between 0 and 1.

    Args:
        probs: the decoder ends in a Sigmoid. Fused operators and models work with what goes into that Sigmoid,
            so that nothing is rounded, and every method here but ``params_of_output`` and
            ``log_prob_of_output`` takes *logits*. Where only probabilities can be had (from TorchScript, inside
            ``torch.compile``, of a decoder that does more to them than reshape), logits are as good as these
            numbers: they end at the smallest normal number and at 1 - eps / 2 (float32: logits of -87 and
            16.6), beyond which there is no gradient, and near 1 they are rounded (float32: by 0.01 at a logit
            of 13, by 0.6 at 16.5).
    """

    of_logits: ClassVar[bool] = True
    _in_unit_interval: ClassVar[bool] = True
    probs: bool = False

    @property
    def spec(self) -> str:
        """The likelihood as the C++ parser reads it."""
        return "bernoulli"

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Sum of x a - log(1 + e^a) over a sample: [B]; see ``Likelihood.log_prob``."""
        logits, x, weight = self._match_weighted(params, x, weight)
        x = unit_interval(x, logits.dtype)
        # From the end of [0, 1] that x is nearer to: log p of a one is -e^-a where a is large, which a - log(1 + e^a)
        # rounds to 0. (logsigmoid, since torch's softplus turns linear at 20, which costs 2e-9 in float64.)
        one = (x > 0.5).to(x.dtype)
        return total((x - one) * logits + F.logsigmoid((2 * one - 1) * logits), weight)

    def mean(self, params: Tensor) -> Tensor:
        """sigmoid(params)."""
        return torch.sigmoid(at_least_float32(params))

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Zeros and ones."""
        return torch.bernoulli(self.mean(params), generator=generator)

    def params_of_output(self, output: Tensor) -> Tensor:
        """The logits of the decoder's output."""
        output = super().params_of_output(output)
        if not self.probs:
            return output
        p = at_least_float32(output)
        info = torch.finfo(p.dtype)
        # In double precision, where the second derivative 1 / p^2 of the smallest p is no infinity.
        wide = p.double().clamp(max(info.tiny, 1e-150), 1 - info.eps / 2)
        return (torch.log(wide) - torch.log1p(-wide)).to(p.dtype)


@dataclass(frozen=True)
class ContinuousBernoulli(Likelihood):
    """Independent elements in [0, 1] with density C(p) p^x (1 - p)^(1 - x), p = sigmoid(a) for logits a.

    Loaiza-Ganem and Cunningham ("The continuous Bernoulli", NeurIPS 2019, equation 7): the Bernoulli that pixels
    between 0 and 1 are often given to, with the constant that makes it a density: log p = x a - log((e^a - 1) / a).
    """

    of_logits: ClassVar[bool] = True
    _in_unit_interval: ClassVar[bool] = True

    @property
    def element_spec(self) -> str:
        """See ``Likelihood``."""
        return "continuous_bernoulli"

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log density of a sample: [B]; see ``Likelihood.log_prob``."""
        a, x, weight = self._match_weighted(params, x, weight)
        # log((e^a - 1) / a) = a / 2 + log(sinh(h) / h), h = a / 2.
        return total((unit_interval(x, a.dtype) - 0.5) * a - _log_sinh_ratio(a / 2), weight)

    def mean(self, params: Tensor) -> Tensor:
        """E[x] = 1/2 + (coth(h) - 1 / h) / 2, h = a / 2; not sigmoid(a), which is where the mode tends to."""
        return 0.5 + 0.5 * langevin(at_least_float32(params) / 2)

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """By the inverse of the distribution function, log(1 + u (e^a - 1)) / a."""
        a = at_least_float32(params)
        u = standard_uniform(a.shape, a, generator)
        # Of -|a|, which does not overflow; 1 minus it for the others. Near 0 the distribution is uniform.
        size = a.abs()
        safe = size.clamp(min=1e-6)
        found = torch.where(size < 1e-6, u, -torch.log1p(u * torch.expm1(-safe)) / safe)
        return torch.where(a < 0, found, 1 - found)


_NEAR = 0.5
"""Of h, below which series are used: their terms fall as (h / pi)^2."""
_LOG_SINH_RATIO = (
    1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250, 2 / 127702575, -3617 / 2605132530000,
    43867 / 350813659321125, -174611 / 15313294652906250, 155366 / 147926426347074375,
)  # fmt: skip
"""log(sinh(h) / h) by powers of h^2, from the first on."""
_LANGEVIN = tuple(2 * (n + 1) * c for n, c in enumerate(_LOG_SINH_RATIO))
"""(coth(h) - 1 / h) / h, the derivative over h."""


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def _log_sinh_ratio(h: Tensor) -> Tensor:
    """log(sinh(h) / h), exact and with its derivatives near 0 as well."""
    near = h.clamp(-_NEAR, _NEAR)
    square = near * near
    # At or beyond _NEAR.
    size = h.abs().clamp(min=_NEAR)
    far = size + torch.log1p(-torch.exp(-2 * size)) - torch.log(2 * size)
    return torch.where(h.abs() < _NEAR, square * _polynomial(square, _LOG_SINH_RATIO), far)


def langevin(h: Tensor) -> Tensor:
    """coth(h) - 1 / h, the derivative of log(sinh(h) / h)."""
    size = h.abs().clamp(min=_NEAR)
    far = (1 / torch.tanh(size) - 1 / size) * h.sign()
    near = h.clamp(-_NEAR, _NEAR)
    return torch.where(h.abs() < _NEAR, near * _polynomial(near * near, _LANGEVIN), far)
