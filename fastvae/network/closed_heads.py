"""Likelihoods' residuals and curvatures in closed form, for those that heads.py has no class of: no graph.

Each class gives of one element's outputs y_1 .. y_n (parts of the decoder's output along its channels) and datum x the
gradients r_i = d ll / d y_i and the second derivatives S_ij.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvae.likelihoods import (
    ContinuousBernoulli,
    DiscretizedLogistic,
    GaussianHead,
    Laplace,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
    ZeroInflatedNegativeBinomial,
)
from fastvae.likelihoods.bernoulli import langevin, langevin_slope
from fastvae.likelihoods.categorical import Categorical

__all__ = ["ClosedForm", "closed_form_of"]

Second = dict[tuple[int, int], Tensor]
"""S_ij for i <= j; what is zero is left out."""


class ClosedForm:
    """Of one likelihood.

    Args:
        likelihood: whose settings count.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood, self.parts = likelihood, likelihood.values_per_element

    def data(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in the form in which the formulas take it."""
        return self.likelihood.as_float(x, dtype)

    def first(self, y: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """r of each output."""
        raise NotImplementedError

    def second(self, y: Sequence[Tensor], x: Tensor) -> Second:
        """S."""
        raise NotImplementedError


class _Laplace(ClosedForm):
    def __init__(self, likelihood: Laplace) -> None:
        super().__init__(likelihood)
        self.scale = float(likelihood.scale)

    def first(self, y: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        return [torch.sign(x - y[0]) / self.scale]

    def second(self, y: Sequence[Tensor], x: Tensor) -> Second:
        return {}


class _Poisson(ClosedForm):
    def first(self, y: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        return [x - y[0].exp()]

    def second(self, y: Sequence[Tensor], x: Tensor) -> Second:
        return {(0, 0): -y[0].exp()}


class _NegativeBinomial(ClosedForm):
    """Of log means a, with p = sigmoid(a - log r)."""

    def __init__(self, likelihood: NegativeBinomial) -> None:
        super().__init__(likelihood)
        assert not isinstance(likelihood.dispersion, str)
        self.r = float(likelihood.dispersion)

    def first(self, y: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        b = y[0] - math.log(self.r)
        return [x * torch.sigmoid(-b) - self.r * torch.sigmoid(b)]

    def second(self, y: Sequence[Tensor], x: Tensor) -> Second:
        b = y[0] - math.log(self.r)
        return {(0, 0): -(x + self.r) * torch.sigmoid(b) * torch.sigmoid(-b)}


class _StudentT(ClosedForm):
    def __init__(self, likelihood: StudentT) -> None:
        super().__init__(likelihood)
        self.df, self.scale = float(likelihood.df), float(likelihood.scale)

    def first(self, y: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        u = (x - y[0]) / self.scale
        return [(self.df + 1) / self.scale * u / (u * u + self.df)]

    def second(self, y: Sequence[Tensor], x: Tensor) -> Second:
        square = ((x - y[0]) / self.scale).square()
        return {(0, 0): (self.df + 1) / self.scale**2 * (square - self.df) / (square + self.df).square()}


class _ContinuousBernoulli(ClosedForm):
    def first(self, y: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        return [(x - 0.5) - 0.5 * langevin(0.5 * y[0])]

    def second(self, y: Sequence[Tensor], x: Tensor) -> Second:
        return {(0, 0): -0.25 * langevin_slope(0.5 * y[0])}


class _Scaled(ClosedForm):
    """Of a mean and a log scale with a floor, below which there is no gradient to it."""

    def __init__(self, likelihood: GaussianHead | DiscretizedLogistic) -> None:
        super().__init__(likelihood)
        self.floor = math.log(likelihood.min_scale)

    def _inverse(self, y: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """1 / scale, and 1 where the log scale counts."""
        return torch.exp(-y[1].clamp(min=self.floor)), (y[1] >= self.floor).to(y[1].dtype)


class _GaussianHead(_Scaled):
    def first(self, y: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        inverse, counts = self._inverse(y)
        u = (x - y[0]) * inverse
        return [u * inverse, (u * u - 1) * counts]

    def second(self, y: Sequence[Tensor], x: Tensor) -> Second:
        inverse, counts = self._inverse(y)
        u = (x - y[0]) * inverse
        twice = -2 * u * counts
        return {(0, 0): -inverse * inverse, (0, 1): twice * inverse, (1, 1): twice * u}


class _DiscretizedLogistic(_Scaled):
    """ll = log sigmoid(u) + log sigmoid(-l) + log(1 - e^-w), l = u - w; the first or second alone at the ends."""

    def __init__(self, likelihood: DiscretizedLogistic) -> None:
        super().__init__(likelihood)
        self.classes = Categorical(likelihood.num_classes)

    def data(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.classes.classes(x).to(dtype)

    def _ends(self, y: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        """1 / scale, whether the scale counts, u, l, w, and of their terms the slopes 1 - sigmoid(u), sigmoid(l) and
        1 / (e^w - 1), 0 where a class has no such term."""
        inverse, counts = self._inverse(y)
        last = self.classes.num_classes - 1
        upper = ((x + 0.5) / last - y[0]) * inverse
        width = inverse / last
        lower = upper - width
        is_first, is_last = x == 0, x == last
        of_upper = torch.sigmoid(-upper).masked_fill(is_last, 0)
        of_lower = torch.sigmoid(lower).masked_fill(is_first, 0)
        of_width = (1 / torch.expm1(width)).masked_fill(is_first | is_last, 0)
        return inverse, counts, upper, lower, width, of_upper, of_lower, of_width

    def first(self, y: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        inverse, counts, upper, lower, width, a, b, q = self._ends(y, x)
        return [(b - a) * inverse, (b * lower - a * upper - q * width) * counts]

    def second(self, y: Sequence[Tensor], x: Tensor) -> Second:
        inverse, counts, upper, lower, width, a, b, q = self._ends(y, x)
        bent_a, bent_b, bent_q = a * (1 - a), b * (1 - b), q * (1 + q)
        au, bl, qw = bent_a * upper, bent_b * lower, bent_q * width
        return {
            (0, 0): -(bent_a + bent_b) * inverse * inverse,
            (0, 1): (a - b - au - bl) * inverse * counts,
            (1, 1): (a * upper - b * lower + q * width - au * upper - bl * lower - qw * width) * counts,
        }


class _ZeroInflated(ClosedForm):
    """Of a log mean a and a logit g; the negative binomial's log probability of 0 is n = -r softplus(a - log r)."""

    def __init__(self, likelihood: ZeroInflatedNegativeBinomial) -> None:
        super().__init__(likelihood)
        assert not isinstance(likelihood.dispersion, str)
        self.r = float(likelihood.dispersion)

    def _terms(self, y: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        """Whether x is 0, sigmoid(a - log r), sigmoid(g), and the probability that a 0 was counted."""
        b = y[0] - math.log(self.r)
        counted = torch.sigmoid(-self.r * F.softplus(b, threshold=50) - y[1])
        return x == 0, torch.sigmoid(b), torch.sigmoid(y[1]), counted

    def first(self, y: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        is_zero, p, zero, counted = self._terms(y, x)
        of_mean = torch.where(is_zero, -self.r * p * counted, x - (x + self.r) * p)
        return [of_mean, torch.where(is_zero, 1 - counted, 0) - zero]

    def second(self, y: Sequence[Tensor], x: Tensor) -> Second:
        is_zero, p, zero, counted = self._terms(y, x)
        slope, spread = self.r * p, counted * (1 - counted)
        bent = -(x + self.r) * p * (1 - p)
        return {
            (0, 0): torch.where(is_zero, counted * bent + spread * slope * slope, bent),
            (0, 1): torch.where(is_zero, spread * slope, 0),
            (1, 1): torch.where(is_zero, spread, 0) - zero * (1 - zero),
        }


def closed_form_of(likelihood: Likelihood) -> ClosedForm | None:
    """The formulas of one of our likelihoods as it is; None where there are none."""
    kind = type(likelihood)
    if kind is Laplace:
        return _Laplace(likelihood)  # type: ignore[arg-type]
    if kind is Poisson:
        return _Poisson(likelihood)
    if kind is NegativeBinomial and not isinstance(likelihood.dispersion, str):  # type: ignore[attr-defined]
        return _NegativeBinomial(likelihood)  # type: ignore[arg-type]
    if kind is StudentT:
        return _StudentT(likelihood)  # type: ignore[arg-type]
    if kind is ContinuousBernoulli:
        return _ContinuousBernoulli(likelihood)
    if kind is GaussianHead:
        return _GaussianHead(likelihood)  # type: ignore[arg-type]
    if kind is DiscretizedLogistic:
        return _DiscretizedLogistic(likelihood)  # type: ignore[arg-type]
    if kind is ZeroInflatedNegativeBinomial and not isinstance(likelihood.dispersion, str):  # type: ignore[attr-defined]
        return _ZeroInflated(likelihood)  # type: ignore[arg-type]
    return None
