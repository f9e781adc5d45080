"""What is inside torch.compile's and data parallel wrappers."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["unwrap", "wrapped_modules"]


def wrapped_modules(model: nn.Module) -> list[nn.Module]:
    """The model, and what is inside torch.compile's and data parallel wrappers, outermost first."""
    found = [model]
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return found
        found.append(model)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and DDP's wrappers, whose parameters have the plain names."""
    return wrapped_modules(model)[-1]
