"""Likelihoods p(x | z): densities of data given the natural parameters that a decoder returns.

``params`` are [B, ...]; ``x`` has as many elements a sample (``Categorical``: ``num_classes`` times fewer) in
any shape, as floats, bool (0 or 1) or uint8 (0..255, read as x / 255; of counts, as the count). Half precision is
summed in float32.

A density of your own is a subclass of :class:`Likelihood` with ``log_prob`` in plain PyTorch: models, scores and
influence work with it by autograd, where the stock ones have fused kernels.
"""

from __future__ import annotations

from fastvae.decoding import check_decoder
from fastvae.likelihoods.base import Likelihood, unit_interval
from fastvae.likelihoods.bernoulli import Bernoulli, ContinuousBernoulli
from fastvae.likelihoods.categorical import Categorical, DiscretizedLogistic
from fastvae.likelihoods.counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from fastvae.likelihoods.gaussian import Gaussian, GaussianHead
from fastvae.likelihoods.heavy_tails import Laplace, StudentT
from fastvae.likelihoods.learned import LearnedLikelihood

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Gaussian",
    "GaussianHead",
    "Laplace",
    "LearnedLikelihood",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "check_decoder",
    "resolve",
    "unit_interval",
]

_BY_NAME: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "categorical": Categorical,
}


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood itself, or the plain one of that name ("bernoulli", "gaussian", "categorical").

    ValueError for another name, TypeError for anything else.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str):
        raise TypeError(
            f"likelihood: expected a name or a fastvae Likelihood, got {type(likelihood).__name__}"
        )
    if likelihood not in _BY_NAME:
        raise ValueError(
            f"likelihood: expected one of {sorted(_BY_NAME)} or a Likelihood, got {likelihood!r}"
        )
    return _BY_NAME[likelihood]()
