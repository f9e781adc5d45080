"""Weights that hooks of torch.nn.utils compute before each forward: older weight_norm and spectral_norm, pruning."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

__all__ = ["computed_weights", "write_out"]

# By the modules' names: torch.nn.utils has functions under them.
_WeightNorm = importlib.import_module("torch.nn.utils.weight_norm").WeightNorm
_SpectralNorm = importlib.import_module("torch.nn.utils.spectral_norm").SpectralNorm

Compute = Callable[[nn.Module], Tensor]


def computed_weights(module: nn.Module) -> dict[str, Compute]:
    """How the hooks of a module compute its tensors, by name; none where it has any hook of which that is not known.

    The hook leaves its result on the module as an attribute, which is another tensor after each forward.
    """
    hooks = module._forward_pre_hooks.values()
    if not hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return {}
    found: dict[str, Compute] = {}
    hook: Any
    for hook in hooks:
        if type(hook) is _WeightNorm:
            found[hook.name] = hook.compute_weight
        elif type(hook) is _SpectralNorm and not module.training:
            found[hook.name] = lambda own, hook=hook: hook.compute_weight(own, do_power_iteration=False)  # type: ignore[misc]
        elif isinstance(hook, BasePruningMethod) and hook._tensor_name:
            found[hook._tensor_name] = hook.apply_mask
    return found if len(found) == len(hooks) else {}


def write_out(module: nn.Module) -> None:
    """Compute those weights, in a private copy, where they are read, so that a trace of its forward says how."""
    for inner in module.modules():
        computed = computed_weights(inner)
        if computed:
            inner._forward_pre_hooks.clear()
            for name in computed:
                vars(inner).pop(name, None)
            kind = type(inner)
            own = {name: property(compute) for name, compute in computed.items()}
            inner.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **own})
