"""Attributes that each forward changes, but that its result does not depend on: a count of calls, the last shape.

That is found out by reading the forward once more with stand-ins in their place, which may be counted on, put away and
added to, and otherwise do not exist. If the same was read, they are idle: whatever their values, only what they are
(a number, a list) is compared from then on.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.held import called_functions, global_names, is_ours, outside_of
from fastvae.lowering.errors import UnsupportedLayer
from fastvae.network.pristine import Pristine
from fastvae.network.program import Program
from fastvae.network.reading import read_program

__all__ = ["idle_attributes"]

_Place = tuple[str, str]
"""The path of a module, and the name of an attribute."""

_NUMBERS = (int, float, complex)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_KINDS = (*_NUMBERS, *_MAPPINGS, str, tuple, list, set, deque, Tensor)
_ADDING: dict[type, set[str]] = {
    list: {"append", "extend", "insert", "clear"},
    deque: {"append", "appendleft", "extend", "extendleft", "clear"},
    set: {"add", "update", "discard", "clear"},
    **{kind: {"update", "clear"} for kind in _MAPPINGS},
}
"""Methods that return nothing and do not fail."""
_QUESTIONS = frozenset({"type", "id"})
"""By which a forward may learn of a value what no stand-in sees."""


class _Used(Exception):  # noqa: N818
    """A result may depend on a stand-in."""


class _StandIn:
    """What may stand for any value of a kind. What is computed with it is one as well."""

    def __init__(self, use: Callable[[], None], original: Any = None) -> None:
        self._use, self._original = use, original

    def _used(self, *_: Any) -> Any:
        self._use()
        raise _Used

    def _mixed(self, *_: Any) -> _StandIn:
        return _StandIn(self._use)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Which isinstance asks for: PyTorch does so of whatever a module holds."""
        return _StandIn if is_ours(sys._getframe(1).f_globals.get("__name__", "?")) else self._used()

    def __getattr__(self, name: str) -> Any:
        if name in _ADDING.get(type(self._original), ()):
            return lambda *_: None
        if name == "get" and type(self._original) in _MAPPINGS:
            return lambda key, _=None: self[key]
        return self._used()

    def __getitem__(self, place: Any) -> _StandIn:
        held = self._original
        if type(held) in (list, tuple) and isinstance(place, slice):
            return _StandIn(self._use, held)
        # A key that is there stays: only what is there is asked for its kind.
        if type(held) in _MAPPINGS and place in held and type(held[place]) in _KINDS:
            return _StandIn(self._use, held[place])
        return self._used()

    def __setitem__(self, place: Any, value: Any) -> None:
        if type(self._original) not in _MAPPINGS:
            self._used()


for _name in (
    "bool", "int", "float", "complex", "index", "len", "iter", "contains", "eq", "ne", "lt", "le", "gt", "ge", "hash",
    "str", "repr", "format", "call", "delitem", "enter", "exit", "next", "reversed", "array", "copy", "deepcopy",
    "reduce_ex", "round", "trunc", "floor", "ceil", "delattr",
):  # fmt: skip
    setattr(_StandIn, f"__{_name}__", _StandIn._used)
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor"):
    setattr(_StandIn, f"__{_name}__", _StandIn._mixed)
    setattr(_StandIn, f"__r{_name}__", _StandIn._mixed)
for _name in ("neg", "pos", "abs"):
    setattr(_StandIn, f"__{_name}__", _StandIn._mixed)


class _WithStandIns:
    """Copies in which some attributes are stand-ins; ``used`` are those on which something may depend."""

    def __init__(self, pristine: Pristine, places: set[_Place]) -> None:
        self.examples, self.writes, self.used = pristine.examples, pristine.writes, set[_Place]()
        self._pristine, self._places = pristine, places

    def fresh(self) -> nn.Module:
        module = self._pristine.fresh()
        parts = dict(module.named_modules(remove_duplicate=False))
        for place in self._places:
            path, name = place
            state: dict[str, Any] = vars(parts[path])  # type: ignore[assignment]
            state[name] = _StandIn(functools.partial(self.used.add, place), state[name])
        return module

    def run(self) -> None:
        """Once, to see what is used."""
        with contextlib.suppress(Exception), torch.no_grad():
            self.fresh()(*(example.clone() for example in self.examples))


def idle_attributes(pristine: Pristine, program: Program) -> Mapping[str, frozenset[str]]:
    """Those of ``pristine.changing`` on which what was read does not depend, as far as can be told.

    Args:
        pristine: of the module.
        program: what was read of it.
    """
    module = pristine.fresh()
    parts = dict(module.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for path, part in parts.items():
        first.setdefault(id(part), path)
    places = {
        (path, name)
        for path, names in pristine.changing.items()
        for name in names
        if first[id(parts[path])] == path and type(vars(parts[path]).get(name)) in _KINDS
    }
    if _asks(module):
        places = set()
    idle: set[_Place] = set()
    # Of other batches than the one that was run such a program alone tells nothing.
    while places and program.turns == () and not program.is_aligned:
        tried = _WithStandIns(pristine, places)
        tried.run()
        other = None
        if not tried.used:
            with contextlib.suppress(UnsupportedLayer):
                other = read_program(tried)
        if not tried.used:
            idle = places if other is not None and other.is_same(program) else set()
            break
        places -= tried.used
    return {
        path: frozenset(name for name in names if (first[id(parts[path])], name) in idle)
        for path, names in pristine.changing.items()
    }


def _asks(module: nn.Module) -> bool:
    """Whether a forward, or a function that it calls, may ask for more of an attribute than its value."""
    waiting = [function for part in module.modules() for _, function in called_functions(type(part))]
    seen = set(waiting)
    while waiting:
        function = waiting.pop()
        if _QUESTIONS & set(global_names(function.__code__)):
            return True
        for _, value in outside_of(function):
            if isinstance(value, FunctionType) and value not in seen:
                seen.add(value)
                waiting.append(value)
    return False
