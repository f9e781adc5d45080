"""What scoring must leave as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def facts_of(model: nn.Module) -> list[Any]:
    """What scoring must leave as it is, besides values."""
    found: list[Any] = []
    for name, module in model.named_modules():
        plain = {
            key: value if isinstance(value, (bool, int, float, str, type(None))) else id(value)
            for key, value in vars(module).items()
            # What hooks compute, a forward computes anew.
            if not (isinstance(value, Tensor) and value.grad_fn is not None)
        }
        hooks = [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
        found.append((name, id(module), plain, hooks))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.append((name, id(tensor), tensor.requires_grad, tensor._version, tensor.grad is None))
    return found
