"""Variational autoencoders."""

from fastvae.models.base import BaseVAE, Penalty, TrainingStep
from fastvae.models.hvae import HVAE, DivergenceError
from fastvae.models.jacobian_l1_vae import JacobianL1VAE
from fastvae.models.vae import VAE

__all__ = ["HVAE", "VAE", "BaseVAE", "DivergenceError", "JacobianL1VAE", "Penalty", "TrainingStep"]
