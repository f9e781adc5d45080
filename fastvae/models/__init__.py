"""Variational autoencoders."""

from fastvae.models.base import BaseVAE, Penalty, TrainingStep
from fastvae.models.consistency_vae import ConsistencyVAE
from fastvae.models.hvae import HVAE, DivergenceError
from fastvae.models.iwae import IWAE
from fastvae.models.jacobian_l1_vae import JacobianL1VAE
from fastvae.models.observation import Observation
from fastvae.models.outputs import SelectOutputs
from fastvae.models.vae import VAE

__all__ = [
    "HVAE",
    "IWAE",
    "VAE",
    "BaseVAE",
    "ConsistencyVAE",
    "DivergenceError",
    "JacobianL1VAE",
    "Observation",
    "Penalty",
    "SelectOutputs",
    "TrainingStep",
]
