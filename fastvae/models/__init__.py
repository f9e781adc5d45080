"""Variational autoencoders."""

from fastvae.models.base import BaseVAE, Penalty, TrainingStep
from fastvae.models.hvae import HVAE, DivergenceError
from fastvae.models.vae import VAE

__all__ = ["HVAE", "VAE", "BaseVAE", "DivergenceError", "Penalty", "TrainingStep"]
