"""Training with exact resume: ``fit``, its ``History`` and callbacks, and checkpoints that TracIn can read."""

from fastvae.training.callbacks import Callback, EarlyStopping, Training
from fastvae.training.checkpoints import load_checkpoint, save_checkpoint, step_penalties
from fastvae.training.fitting import fit
from fastvae.training.history import History

__all__ = [
    "Callback",
    "EarlyStopping",
    "History",
    "Training",
    "fit",
    "load_checkpoint",
    "save_checkpoint",
    "step_penalties",
]
