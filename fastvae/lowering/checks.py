"""What must hold before a module is read: calling it runs its forward alone, and its tensors are plain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module_internals
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import CoupledSamples, UnsupportedLayer, describe, join
from .hooked import computed_weights

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    _module_internals._global_forward_hooks,
    _module_internals._global_forward_pre_hooks,
    _module_internals._global_backward_hooks,
    _module_internals._global_backward_pre_hooks,
)
# As they are at import, so that a later replacement shows.
_METHODS = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__", "__getattribute__")}
PLAIN = frozenset({Tensor, nn.Parameter})
QUANTISED = ("torch.ao.", "torchao.")
_WRAPPERS = {
    "DataParallel": "it scatters the batch in its own forward",
    "DistributedDataParallel": "its own forward prepares the gradient reduction",
    "FullyShardedDataParallel": "its own forward gathers the sharded parameters",
    "FSDPModule": "its own forward gathers the sharded parameters",
}


def method(cls: type[nn.Module], name: str) -> Any:
    """What a class runs as ``name``; None if it has no such method.

    torch.export replaces methods of nn.Module itself for as long as it traces, to note which module is called: that is
    not taken for a change.
    """
    found = getattr(cls, name, None)
    if torch.compiler.is_exporting() and found is getattr(nn.Module, name, None):
        return _METHODS.get(name, found)
    return found


def check_is_module(name: str, value: object) -> None:
    """Raise TypeError for what is not an nn.Module, with what to pass instead."""
    if isinstance(value, nn.Module):
        return
    owner = getattr(value, "__self__", None)
    hint = ""
    if isinstance(value, type) and issubclass(value, nn.Module):
        hint = f"; pass an instance, {value.__name__}(...)"
    elif isinstance(owner, nn.Module):
        called = getattr(value, "__name__", "it")
        hint = f" ({called} of a {type(owner).__name__})" + (
            "; pass the module itself"
            if called in ("forward", "__call__")
            else f"; pass a module whose forward does what {called} does: parameters are found through a module "
            "(docs/bring-your-model.md)"
        )
    elif callable(value):
        hint = "; pass a module whose forward does what it does: parameters are found through a module"
    raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}{hint}")


def check_global_hooks() -> None:
    """Hooks on every module (``register_module_forward_hook``; the FLOP counter sets some) would not fire
    inside an op."""
    for hooks in _GLOBAL_HOOKS:
        if hooks:
            raise UnsupportedLayer(
                "lower: global module hooks are registered (torch.nn.modules.module.register_module_*), "
                "which would not fire "
                "inside a lowered network; remove them"
            )


def check_tensor(path: str, tensor: Tensor) -> None:
    """Refuse what C++ cannot read as a plain strided tensor; costs one set lookup for a plain one."""
    if type(tensor) in PLAIN:
        return
    kind = type(tensor).__name__
    if not isinstance(tensor, Tensor):
        raise UnsupportedLayer(f"lower: tensor '{path}' is a {kind}, expected a torch.Tensor")
    if kind == "DTensor":
        raise UnsupportedLayer(
            f"lower: parameter '{path}' is a DTensor (tensor parallel or FSDP2); the sweeps need whole "
            "local tensors: replicate "
            "the decoder's parameters and keep them out of the sharding plan"
        )
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise UnsupportedLayer(f"lower: tensor '{path}' is lazy and has no shape yet; run the module once")
    if is_traceable_wrapper_subclass(tensor):
        raise UnsupportedLayer(
            f"lower: tensor '{path}' is a tensor subclass ({kind}); only plain tensors are lowered"
        )


def _check_layout(path: str, tensor: Tensor) -> None:
    check_tensor(path, tensor)
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UnsupportedLayer(
            f"lower: tensor '{path}' is sparse or quantised; only dense tensors are lowered"
        )


def named(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule by every path, except inside parametrisations, which run when their tensor is read."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != "parametrizations":
            yield from named(child, join(path, name))


def check_readable(module: nn.Module) -> None:
    """Refuse what a snapshot does not describe: TorchScript and the types of tensors."""
    for path, inner in named(module):
        if isinstance(inner, torch.jit.ScriptModule):
            reason = "TorchScript modules are not read; pass the module it was made from"
            raise UnsupportedLayer(describe(path, type(inner).__name__, reason))
        for store in (inner._parameters, inner._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    _check_layout(join(path, name), tensor)


def check_module(path: str, module: nn.Module, *, hooked: bool = False) -> None:
    """Refuse one module, by name and reason, if calling it does more than its type's forward.

    With ``hooked`` it may have hooks that compute its weights (see ``hooked.computed_weights``).
    """
    cls = type(module)
    kind = cls.__name__

    def refuse(reason: str) -> UnsupportedLayer:
        return UnsupportedLayer(describe(path, kind, reason))

    for wrapper, reason in _WRAPPERS.items():
        if any(parent.__name__ == wrapper for parent in cls.__mro__):
            raise refuse(
                f"{reason}, which a lowered network would bypass; wrap the whole model, not the decoder"
            )
    if cls.__module__.startswith(QUANTISED):
        raise refuse("quantised modules are not lowered; pass the float module")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise refuse("it is lazy and has no shapes yet; run the module once on a batch")
    for hooks in () if hooked and computed_weights(module) else HOOKS:
        for hook in getattr(module, hooks).values():
            if getattr(type(hook), "__module__", "").startswith("torch.nn.utils."):
                raise refuse(
                    f"its tensor is computed by a hook ({type(hook).__name__}); use "
                    "torch.nn.utils.parametrizations (weight_norm, spectral_norm), or make it permanent "
                    "with torch.nn.utils.remove_*/prune.remove"
                )
            raise refuse(
                f"it has a hook ({hooks.strip('_')[:-1]}), which would not fire inside a lowered network; "
                "remove it"
            )
    if kind != "OptimizedModule":
        if "forward" in vars(module):
            raise refuse("its forward was replaced on the instance; put the change into the class")
        own_call = method(cls, "__call__")
        # Lists of parameters raise when they are called.
        stock = (torch.fx.GraphModule, nn.ParameterList, nn.ParameterDict)
        if own_call is not _METHODS["__call__"] and not isinstance(module, stock):
            raise refuse("its type replaces __call__, which a lowered network would bypass")


def check_uncoupled(module: nn.Module) -> None:
    """Refuse what couples samples or draws at random in a module that is not lowered: by type, whoever calls it."""
    for path, inner in named(module):
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            coupled = inner.training or inner.running_mean is None or inner.running_var is None
            remedy = "switch the module to eval(), with track_running_stats=True"
        else:
            p = getattr(inner, "p", 0.0) if isinstance(inner, nn.modules.dropout._DropoutNd) else 0.0
            if isinstance(inner, (nn.MultiheadAttention, nn.RNNBase)):
                p = inner.dropout
            coupled, remedy = inner.training and p > 0, "switch the module to eval(), or set its dropout to 0"
        if coupled:
            raise CoupledSamples(
                describe(
                    path,
                    type(inner).__name__,
                    "in training mode a sample's output depends on the other samples or on noise; " + remedy,
                )
            )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches a module, or one inside it, or all modules there are."""
    return any(_GLOBAL_HOOKS) or any(getattr(part, hooks) for part in module.modules() for hooks in HOOKS)
