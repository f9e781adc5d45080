"""fastvae: exact, fused operators for variational auto-encoders in PyTorch.

fastvae.ops             operators (C++ and CUDA), drop-in for your own code
fastvae.VAE, HVAE, ...  models assembled from them
fastvae.Network         what the operators make of a module of yours
fastvae.penalties       further terms of a model's loss
fastvae.fit, data       training and images
fastvae.load            models that model.save wrote
fastvae.architectures   networks for images, and those of the papers
fastvae.influence, ood   influence of training samples; outlier scores
fastvae.noise           noise keyed by sample
fastvae.metrics         measures of trained models
fastvae.reference       every operator again, in plain PyTorch
"""

from fastvae import _extension  # isort: skip  (first: says clearly what is wrong when the build does not fit)
from fastvae import (
    architectures,
    data,
    influence,
    likelihoods,
    lowering,
    metrics,
    models,
    ood,
    ops,
    penalties,
    reference,
    training,
)
from fastvae._version import __version__
from fastvae.likelihoods import Bernoulli, Categorical, Gaussian
from fastvae.models import HVAE, IWAE, VAE, DivergenceError
from fastvae.network import Network
from fastvae.penalties import ConsistencyVAE, JacobianL1VAE
from fastvae.saving import load
from fastvae.training import History, fit

__all__ = [
    "HVAE",
    "IWAE",
    "VAE",
    "Bernoulli",
    "Categorical",
    "ConsistencyVAE",
    "DivergenceError",
    "Gaussian",
    "History",
    "JacobianL1VAE",
    "Network",
    "__version__",
    "architectures",
    "data",
    "fit",
    "influence",
    "likelihoods",
    "load",
    "lowering",
    "metrics",
    "models",
    "ood",
    "ops",
    "penalties",
    "reference",
    "training",
]

del _extension
