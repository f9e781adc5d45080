"""Variational autoencoders."""

import importlib
import warnings
from typing import Any

from fastvae.models.base import BaseVAE, Penalty, TrainingStep
from fastvae.models.hvae import HVAE, DivergenceError
from fastvae.models.iwae import IWAE
from fastvae.models.observation import Observation
from fastvae.models.outputs import SelectOutputs
from fastvae.models.vae import VAE

__all__ = [
    "HVAE",
    "IWAE",
    "VAE",
    "BaseVAE",
    "DivergenceError",
    "Observation",
    "Penalty",
    "SelectOutputs",
    "TrainingStep",
]


def __getattr__(name: str) -> Any:
    """Names that have moved, for one release."""
    if name not in ("ConsistencyVAE", "JacobianL1VAE"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"fastvae.models.{name} is fastvae.{name} now", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module("fastvae"), name)
