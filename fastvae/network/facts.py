"""What a likelihood's functions read besides their arguments, as a key: another one where any of it has changed.

Numbers, strings and functions can be told apart. Whoever reads anything else, such as a table or a tensor of the file
around it, has no key: what it does may change unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from fastvae.held import global_names, is_ours
from fastvae.likelihoods import Likelihood

__all__ = ["key_of"]

_ASKED = ("__call__", "__getattr__", "__getattribute__")
"""Of the methods that Python itself calls, those that a density may come to."""


class _Unknown(Exception):  # noqa: N818
    """Something that may change unseen."""


def key_of(likelihood: Likelihood) -> Any:
    """What tells a likelihood's density from another's; None: it cannot be told."""
    kind = type(likelihood)
    if is_ours(kind.__module__):
        try:
            return kind, tuple((name, _plain(value)) for name, value in vars(likelihood).items())
        except _Unknown:
            return None
    found: list[Any] = [kind]
    visited: set[Any] = {kind}
    try:
        found += [(name, _plain(value)) for name, value in vars(likelihood).items()]
        for each in kind.__mro__:
            if not is_ours(each.__module__):
                visited.add(each)
                found += _of_class(each, visited)
    except (_Unknown, TypeError, ValueError):  # what has no hash, and a variable without a value
        return None
    return tuple(found)


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return type(value), value
    raise _Unknown


def _of_class(kind: type, visited: set[Any]) -> Iterator[Any]:
    for name, value in vars(kind).items():
        if name.startswith("__") and name not in _ASKED:
            continue
        if isinstance(value, (staticmethod, classmethod)):
            yield from _of_function(value.__func__, visited)
        elif isinstance(value, property):
            yield from _of_function(value.fget, visited)
        elif isinstance(value, FunctionType):
            yield from _of_function(value, visited)
        elif name != "_abc_impl":
            yield name, _plain(value)


def _of_function(function: Any, visited: set[Any]) -> Iterator[Any]:
    if not isinstance(function, FunctionType):
        raise _Unknown
    if function in visited:
        return
    visited.add(function)
    yield function
    for name in global_names(function.__code__):
        if name in function.__globals__:
            yield from _of_value(name, function.__globals__[name], visited)
    for cell in function.__closure__ or ():
        yield from _of_value("", cell.cell_contents, visited)
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield _plain(value)


def _of_value(name: str, value: Any, visited: set[Any]) -> Iterator[Any]:
    if isinstance(value, (BuiltinFunctionType, FunctionType, ModuleType, type)):
        module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "?")
        if is_ours(module):
            yield value
        elif value not in visited:
            yield from _of_function(value, visited)
    else:
        yield name, _plain(value)
