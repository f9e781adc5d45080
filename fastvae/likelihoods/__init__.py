"""Likelihoods p(x | z): densities of data given the natural parameters that a decoder returns.

``params`` are [B, ...]; ``x`` has as many elements a sample (``Categorical``: ``num_classes`` times fewer) in
any shape, as floats, bool (0 or 1) or uint8 (0..255, read as x / 255; of counts, as the count). Half precision is
summed in float32.

A density of your own is a subclass of :class:`Likelihood` with ``log_prob`` in plain PyTorch: models, scores and
influence work with it by autograd, where the stock ones have fused kernels.
"""

from __future__ import annotations

from fastvae.decoding import check_decoder
from fastvae.likelihoods import bernoulli, categorical, counts, gaussian, heavy_tails
from fastvae.likelihoods.base import Likelihood, unit_interval
from fastvae.likelihoods.bernoulli import *  # noqa: F403
from fastvae.likelihoods.bernoulli import Bernoulli
from fastvae.likelihoods.categorical import *  # noqa: F403
from fastvae.likelihoods.categorical import Categorical
from fastvae.likelihoods.counts import *  # noqa: F403
from fastvae.likelihoods.gaussian import *  # noqa: F403
from fastvae.likelihoods.gaussian import Gaussian
from fastvae.likelihoods.heavy_tails import *  # noqa: F403
from fastvae.likelihoods.learned import LearnedLikelihood

__all__ = ["LearnedLikelihood", "Likelihood", "check_decoder", "resolve", "unit_interval"]
# Each of these files says what it has.
__all__ += bernoulli.__all__ + categorical.__all__ + counts.__all__ + gaussian.__all__ + heavy_tails.__all__

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
