"""What a module's computations read besides what is registered in it: closures, bound methods, globals and the like.

Each as a key. Two keys are equal only if the values compute the same up to the numbers of their tensors, and a private
copy's key equals that of its origin. On the way tensors are met, with the steps by which they are found again.
"""

from __future__ import annotations

import dis
import enum
import functools
import operator
import weakref
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "INTERNAL",
    "Held",
    "UnknownValue",
    "called_functions",
    "follow",
    "global_names",
    "is_ours",
    "outside_of",
]

INTERNAL = frozenset(vars(nn.Module())) - {"training"}
"""What every module has."""

Steps = tuple[tuple[str, Any], ...]
"""The way from a module to a value: an attribute, an entry, a function's cell or one of its globals, each by name."""

_CALLED_HOOKS = tuple(
    sorted(name for name in INTERNAL if name.endswith("_hooks") and "state_dict" not in name)
)
_SCALARS = frozenset(
    {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format}
)
_STAYS = (type, ModuleType, enum.Enum, torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch.layout)
_OURS = ("torch", "fastvae", "math", "numpy", "builtins", "typing", "functools", "operator", "abc")
_HEAP_TYPE = 1 << 9
"""Of a class's flags, that it was made by Python's class statement."""
_MOST = 1000
"""Values that are looked at; with more it is not known."""


class UnknownValue(Exception):  # noqa: N818
    """A value of which nobody can say whether it changed."""


def is_ours(module: str | None) -> bool:
    """Whether modules, classes and functions of a package stay what they are."""
    return (module or "builtins").partition(".")[0] in _OURS


@functools.lru_cache(maxsize=1024)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The global names that a function's code reads, and those of functions inside of it."""
    read = (each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    names = dict.fromkeys(read)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(global_names(constant)))
    return tuple(names)


class Held:
    """The keys of what one module, the root, and the modules registered in it hold.

    Registered modules and tensors stand in a key by their place. ``tensors`` are the others that were met: where a
    value is part of another, by the first way.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._left = 0
        self._seen: dict[int, int] = {}
        self.tensors: list[tuple[Steps, Tensor]] = []

    @functools.cached_property
    def _places(self) -> dict[int, int]:
        parts: dict[int, int] = {}
        for module in self._root.modules():
            for part in (module, *module._parameters.values(), *module._buffers.values()):
                if part is not None:
                    parts.setdefault(id(part), len(parts))
        return parts

    def place(self, part: object) -> int:
        """Of a registered module or tensor."""
        return self._places[id(part)]

    def key(self, value: Any, steps: Steps = ()) -> Any:
        """The key of a value at the end of some steps.

        Raises:
            UnknownValue: what it is made of may change unseen.
        """
        self._left, self._seen = _MOST, {}
        try:
            return self._key(value, steps)
        except RecursionError:
            raise UnknownValue from None

    def around(self, module: nn.Module, steps: Steps = ()) -> Any:
        """The key of what the forward of a module's class, and what it calls there, reads in closures and globals."""
        self._left, self._seen = _MOST, {}
        found = []
        for name, function in called_functions(type(module)):
            way = (*steps, ("class", name))
            found += [self._or_unknown(value, (*way, step)) for step, value in outside_of(function)]
        return tuple(found)

    def _or_unknown(self, value: Any, steps: Steps) -> Any:
        """A global or a closure's value that cannot be known is taken for one that stays."""
        met = len(self.tensors)
        try:
            return self._key(value, steps)
        except (UnknownValue, RecursionError):
            del self.tensors[met:]
            return "unknown"

    def _key(self, value: Any, steps: Steps) -> Any:
        kind = type(value)
        if kind in _SCALARS:
            return kind, value
        if isinstance(value, _STAYS) or (isinstance(value, FunctionType) and _stays(value)):
            return "object", value
        place = self._places.get(id(value))
        if place is not None:
            return "part", place
        if id(value) in self._seen:
            return "again", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._left -= 1
        if self._left < 0:
            raise UnknownValue
        if isinstance(value, Tensor):
            if kind not in (Tensor, nn.Parameter) or value.layout != torch.strided:
                raise UnknownValue
            self.tensors.append((steps, value))
            return kind, value.shape, value.stride(), value.dtype, value.device
        return kind, self._inside(value, steps)

    def _inside(self, value: Any, steps: Steps) -> Any:
        kind = type(value)
        if isinstance(value, np.generic):
            return value.item()
        if kind is weakref.ref:
            return self._key(value(), (*steps, ("call", None)))
        if issubclass(kind, (set, frozenset)) and kind.__module__ == "builtins":
            return frozenset(self._key(entry, ()) for entry in value)
        if issubclass(kind, (list, tuple)) and kind.__module__ in ("builtins", "torch"):
            return tuple(self._key(entry, (*steps, ("item", at))) for at, entry in enumerate(value))
        if kind is dict or kind.__name__ == "OrderedDict":
            return tuple(
                (self._key(key, ()), self._key(entry, (*steps, ("item", key))))
                for key, entry in value.items()
            )
        if kind is FunctionType:
            given = self._attributes(value, ("__defaults__", "__kwdefaults__"), steps)
            read = tuple(self._or_unknown(each, (*steps, step)) for step, each in outside_of(value))
            return value.__code__, given, read
        if kind is MethodType:
            return self._attributes(value, ("__func__", "__self__"), steps)
        if kind is functools.partial:
            return self._attributes(value, ("func", "args", "keywords"), steps)
        if kind is BuiltinFunctionType and isinstance(value.__self__, (type, ModuleType, type(None))):
            return value
        if isinstance(value, nn.Module):
            return self._module(value, steps)
        if all(base is object or _is_plain_class(base) for base in kind.__mro__) and hasattr(
            value, "__dict__"
        ):
            return self._attributes(value, vars(value), steps)
        raise UnknownValue

    def _attributes(self, value: Any, names: Any, steps: Steps) -> Any:
        return tuple(
            (name, self._key(getattr(value, name), (*steps, ("attribute", name)))) for name in tuple(names)
        )

    def _module(self, module: nn.Module, steps: Steps) -> Any:
        """One that is not registered."""
        if isinstance(module, torch.jit.ScriptModule) or any(
            getattr(module, hooks, None) for hooks in _CALLED_HOOKS
        ):
            raise UnknownValue
        state = vars(module)
        names = [*module._parameters, *module._buffers, *module._modules]
        return self._attributes(module, [*names, *sorted(key for key in state if key not in INTERNAL)], steps)


def _is_plain_class(kind: type) -> bool:
    return bool(kind.__flags__ & _HEAP_TYPE) and not vars(kind).get("__slots__")


def _stays(function: FunctionType) -> bool:
    """Whether a function reads nothing that may change."""
    return is_ours(function.__module__) or (
        not function.__closure__
        and not function.__defaults__
        and not function.__kwdefaults__
        and not any(True for _ in outside_of(function))
    )


def outside_of(function: FunctionType) -> Iterator[tuple[tuple[str, Any], Any]]:
    """The cells of a closure, and the globals that may be something else than a package's."""
    for at, cell in enumerate(function.__closure__ or ()):
        try:
            yield ("cell", at), cell.cell_contents
        except ValueError:  # not yet assigned
            yield ("cell", at), None
    for name in global_names(function.__code__):
        if name in function.__globals__:
            value = function.__globals__[name]
            if isinstance(value, (Tensor, nn.Module)) or not (
                isinstance(value, ModuleType) or is_ours(getattr(value, "__module__", "?"))
            ):
                yield ("global", name), value


def called_functions(kind: type) -> list[tuple[str, FunctionType]]:
    """The forward of a user's own class, and the functions of the class that it names, and those that they name."""
    found: dict[str, FunctionType] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        value = getattr(kind, name, None)
        value = value.fget if isinstance(value, property) else value
        if name in found or not isinstance(value, FunctionType) or is_ours(value.__module__):
            continue
        found[name] = value
        waiting += value.__code__.co_names
    return list(found.items())


def follow(module: nn.Module, steps: Steps) -> Tensor:
    """The tensor at the end of some steps."""
    value: Any = module
    for kind, name in steps:
        value = _STEP[kind](value, name)
    if not isinstance(value, Tensor):
        raise TypeError
    return value


def _cell(function: Any, at: int) -> Any:
    return function.__closure__[at].cell_contents


def _of_class(module: nn.Module, name: str) -> Any:
    value = getattr(type(module), name)
    return value.fget if isinstance(value, property) else value


_STEP: Mapping[str, Any] = {
    "attribute": getattr,
    "item": operator.getitem,
    "cell": _cell,
    "global": lambda function, name: function.__globals__[name],
    "class": _of_class,
    "call": lambda value, _: value(),
}
