"""Whether a forward does nothing but compute its result, so that nobody can tell whether it was called."""

from __future__ import annotations

import dis
import functools
from types import CodeType, FunctionType

from torch import nn

from .reading import stock_base

__all__ = ["has_no_effects"]

_NAMES = frozenset(
    {
        "F", "torch", "nn", "functional", "relu", "leaky_relu", "elu", "silu", "gelu", "softplus", "sigmoid", "tanh",
        "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "chunk", "split", "unbind",
        "cat", "stack", "permute", "transpose", "size", "shape", "ndim", "dim", "float", "len", "tuple", "list",
        "linear", "conv2d", "conv_transpose2d", "range", "forward", "math", "prod",
    }
)  # fmt: skip
_STORES = (
    "STORE_SUBSCR",
    "STORE_ATTR",
    "STORE_GLOBAL",
    "STORE_DEREF",
    "DELETE_SUBSCR",
    "DELETE_ATTR",
    "STORE_SLICE",
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def has_no_effects(module: nn.Module) -> bool:
    """Of a stock module, or of a forward that uses its own modules and well-known functions alone."""
    if type(module) in _CONTAINERS or stock_base(module) is not None:
        return True
    forward = getattr(type(module), "forward", None)
    if not isinstance(forward, FunctionType) or type(module).__call__ is not nn.Module.__call__:
        return False
    names = _names_in(forward.__code__)
    return names is not None and all(name in _NAMES or _is_part(module, name) for name in names)


def _is_part(module: nn.Module, name: str) -> bool:
    """A module or a number of the module's own."""
    return name in module._modules or isinstance(vars(module).get(name), (int, float, tuple))


@functools.lru_cache(maxsize=256)
def _names_in(code: CodeType) -> frozenset[str] | None:
    """All that a forward names; None where it stores anything but local variables."""
    if any(instruction.opname in _STORES for instruction in dis.get_instructions(code)):
        return None
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names_in(constant)
            if inner is None:
                return None
            found |= inner
    return frozenset(found)
