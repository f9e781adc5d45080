"""Calls that a recorder wrote (tape.py) as a function: without what nobody uses, and without doing the same twice.

The calls are made by csrc/straight_code.cpp, which costs a fraction of making them from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from fastvae._extension import raw

__all__ = ["Call", "Code", "Held", "Method", "Variable", "inputs_of", "variables_in"]

CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""What an operator may be given besides tensors."""


class Held:
    """What one call leaves for later ones besides tensors, such as a graph of autograd's."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Variable(NamedTuple):
    """In place of a tensor, or of another object that is another one each time."""

    number: int


class Method(NamedTuple):
    """A method of a variable."""

    owner: Variable
    name: str


class Call(NamedTuple):
    """One call, of which tensors are known by their variables."""

    function: Any
    """An operator, a function of Python's or a ``Method``."""
    arguments: tuple[Any, ...]
    """Of an operator as many as its schema has, ``MISSING`` where it has a default."""
    results: tuple[int, ...]
    changes: frozenset[int] = frozenset()
    """Memories that it writes to."""

    @property
    def reads(self) -> frozenset[int]:
        """Variables."""
        owner = [self.function.owner] if isinstance(self.function, Method) else []
        return frozenset(variables_in([*owner, *self.arguments]))


MISSING = object()
"""An argument that was not given."""


def variables_in(values: Any) -> Iterable[int]:
    """The numbers of variables in nested tuples and lists."""
    for value in values:
        if isinstance(value, Variable):
            yield value.number
        elif isinstance(value, (list, tuple)):
            yield from variables_in(value)


class Code:
    """Calls as a function.

    Args:
        calls: in order.
        memory: of each variable the memory that it is a view of, as a number of its own.
        inputs: variables of what a run is given.
        taken: variables that an earlier run kept.
        outputs: variables of results; None stays None.
        kept: variables that a later run takes.
        constants: variables that are the same in every run.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        memory: Mapping[int, int],
        inputs: Sequence[int],
        outputs: Sequence[int | None],
        taken: Sequence[int] = (),
        kept: Sequence[int] = (),
        constants: Mapping[int, Tensor] | None = None,
    ) -> None:
        results = [*(each for each in outputs if each is not None), *kept]
        chosen = _used(_once(calls, memory, results), memory, results)
        last: dict[int, int] = {}
        for at, call in enumerate(chosen):
            last.update(dict.fromkeys((*call.reads, *call.results), at))
        functions: list[Callable[..., Any]] = []
        written = []
        for at, call in enumerate(chosen):
            ended = {each for each in (*call.reads, *call.results) if last[each] == at} - set(results)
            target = [-1 if each in ended and each not in call.reads else each for each in call.results]
            written.append((*_encoded(call, functions), target, sorted(ended)))
        self._functions = tuple(functions)
        fixed = {number: value for number, value in (constants or {}).items() if number in last}
        self.constants = list(fixed.values())
        outer = {memory[each] for each in (*inputs, *fixed, *taken)}
        self._code = raw.StraightCode(
            written,
            1 + max(memory, default=0),
            [*inputs, *fixed],
            list(taken),
            [-1 if each is None else each for each in outputs],
            list(kept),
            Held,
            not any(call.changes & outer for call in chosen),
        )

    def __call__(self, given: Sequence[Any], before: Any = None) -> tuple[tuple[Tensor, ...], Any]:
        """The outputs for these inputs, and what is kept, after a run that kept what this one takes."""
        found: tuple[tuple[Tensor, ...], Any] = self._code(self._functions, [*given, *self.constants], before)
        return found

    def __len__(self) -> int:
        return len(self._code)


def inputs_of(calls: Sequence[Call], memory: Mapping[int, int], outputs: Sequence[int | None]) -> list[int]:
    """The variables that the calls take from elsewhere for these outputs."""
    results = [each for each in outputs if each is not None]
    written: set[int] = set()
    found: dict[int, None] = {}
    for call in _used(_once(calls, memory, results), memory, results):
        found.update(dict.fromkeys(sorted(call.reads - written)))
        written.update(call.results)
    found.update(dict.fromkeys(each for each in results if each not in written))
    return list(found)


def _once(calls: Sequence[Call], memory: Mapping[int, int], results: Sequence[int]) -> list[Call]:
    """The calls without those that were made before of the same variables.

    What is returned stays apart, and so does what is written to: nobody else has that memory. Where something is
    written to, what was computed of it before may be another thing from then on.
    """
    apart = {memory[each] for each in results}
    apart.update(*(call.changes for call in calls))
    names: dict[int, int] = {}
    known: dict[Any, Call] = {}
    keys_of: dict[int, set[Any]] = {}  # by memory that they read
    found: list[Call] = []
    for call in calls:
        call = _renamed(call, names)
        if call.changes:
            for each in call.changes:
                for key in keys_of.pop(each, ()):
                    known.pop(key, None)
        elif not any(memory[each] in apart for each in call.results):
            key = _key(call)
            before = known.get(key)
            if before is not None:
                names.update(zip(call.results, before.results, strict=True))
                continue
            known[key] = call
            for each in call.reads:
                keys_of.setdefault(memory[each], set()).add(key)
        found.append(call)
    return found


def _renamed(call: Call, names: Mapping[int, int]) -> Call:
    if not call.reads & names.keys():
        return call
    return call._replace(arguments=tuple(_replaced(each, names) for each in call.arguments))


def _replaced(value: Any, names: Mapping[int, int]) -> Any:
    if isinstance(value, Variable):
        return Variable(names.get(value.number, value.number))
    if type(value) in (list, tuple):  # a recorder leaves others as they are
        return type(value)(_replaced(each, names) for each in value)
    return value


def _key(value: Any) -> Any:
    """Two calls with the same key are the same."""
    if isinstance(value, Call):
        return _key(value.function), *map(_key, value.arguments)
    if isinstance(value, (Variable, Method)):
        return value
    if isinstance(value, (list, tuple)):
        return type(value), *map(_key, value)
    if isinstance(value, CONSTANTS):
        return type(value), repr(value)  # 1 and True, 0.0 and -0.0 are not the same
    try:
        hash(value)
    except TypeError:
        return "object", id(value)
    return "object", value


def _used(calls: Sequence[Call], memory: Mapping[int, int], results: Sequence[int]) -> list[Call]:
    """The calls that reach the results, by what they give or by what they write to."""
    needed = set(results)
    memories = {memory[each] for each in results}
    written = {each for call in calls for each in call.results}
    # What comes from elsewhere is seen elsewhere.
    memories.update(memory[each] for call in calls for each in call.reads - written)
    found = []
    for call in reversed(calls):
        if needed.intersection(call.results) or call.changes & memories:
            needed |= call.reads
            memories.update(memory[each] for each in call.reads)
            found.append(call)
    return found[::-1]


def _encoded(call: Call, functions: list[Callable[..., Any]]) -> tuple[Any, list[tuple[str, Any]]]:
    """The call's function and arguments as straight_code.cpp reads them."""
    if isinstance(call.function, OpOverload):
        schema = call.function._schema
        name = schema.name, schema.overload_name
        return name, [_encoded_argument(each) for each in call.arguments]
    variables = sorted(call.reads)
    functions.append(_flat(call, variables))
    return len(functions) - 1, [("variable", each) for each in variables]


def _encoded_argument(value: Any) -> tuple[str, Any]:
    if value is MISSING:
        return "default", None
    if isinstance(value, Variable):
        return "variable", value.number
    if isinstance(value, (list, tuple)) and any(isinstance(each, Variable) for each in value):
        return "list", [each.number if isinstance(each, Variable) else -1 for each in value]
    return "constant", value


def _flat(call: Call, variables: Sequence[int]) -> Callable[..., Any]:
    """The call of a function of Python's as one of its variables alone."""
    constants: dict[str, Any] = {}

    def code(value: Any) -> str:
        if isinstance(value, Variable):
            return f"v{value.number}"
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            inside = "".join(f"{code(each)}, " for each in value)
            return f"[{inside}]" if type(value) is list else f"({inside})"
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    function = call.function
    called = f"{code(function.owner)}.{function.name}" if isinstance(function, Method) else code(function)
    given = ", ".join(code(each) for each in call.arguments)
    text = f"lambda {', '.join(f'v{each}' for each in variables)}: {called}({given})"
    made: Callable[..., Any] = eval(text, constants)
    return made
