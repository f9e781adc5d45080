"""Other libraries' models and trainers. Each module needs its library; none is imported with fastvae.

pythae.py       a pythae model's networks in a fastvae model
lightning.py    any fastvae model as a LightningModule
pytorch_ood.py  the outlier scores as detectors
"""

__all__ = ["TORCHVISION"]

TORCHVISION = (
    "imports torchvision, whose build does not fit this torch ({error}). To mend it: install both from one index (a "
    "CPU build of torch needs a CPU build of torchvision), or, for Lightning, which does without it: "
    "pip uninstall torchvision"
)
"""What to do where ``import torchvision`` raises RuntimeError."""
