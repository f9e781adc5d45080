"""A network as a list of operations in order, read once from a module; see :mod:`fastvae.network.reading`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """A value of the program by its number, where an argument of an operation stands."""

    index: int


class Source(NamedTuple):
    """Where a tensor of the network comes from: one of four.

    path, name: a parameter or buffer of the submodule at ``path``.
    steps: attributes and items that lead to it from the module, where it is registered nowhere.
    constant: what the forward made of numbers.
    is_condition: the module's second argument, a row for each sample.
    """

    path: str
    name: str
    steps: tuple[tuple[str, Any], ...] = ()
    constant: Tensor | None = None
    is_condition: bool = False

    def is_same(self, other: Source) -> bool:
        """Whether both are one, or constants of the same numbers."""
        a, b = self.constant, other.constant
        same = a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        return same and self._replace(constant=None) == other._replace(constant=None)


Function = Callable[..., Any]


class Operation:
    """One operation: ``values[index] = target(*args, **kwargs)``.

    Args:
        index: the number of its result.
        name: as torch.export calls it; for messages and tables.
        target: an ATen operator, or a function of numbers (sizes).
        args, kwargs: constants, and :class:`Slot` where a value goes, also inside lists.
        is_number: whether the result is no tensor but a number.
        is_complex: whether the result, or what it is made of, is complex, of which no rule knows.
        line: of the forward, where that is known.
    """

    def __init__(
        self,
        index: int,
        name: str,
        target: Function,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        is_number: bool = False,
        is_complex: bool = False,
        line: str = "",
    ) -> None:
        self.index, self.name, self.target, self.is_number = index, name, target, is_number
        self.is_complex, self.line = is_complex, line
        self.args, self.kwargs = tuple(args), kwargs
        # An overload's own call adds a layer of Python to it.
        self._run: Function = getattr(target, "_op", target)
        self.slots = tuple(dict.fromkeys(_slots((self.args, tuple(kwargs.values())))))
        self.numbers: frozenset[int] = frozenset()
        """Slots that hold no tensor but a number, such as a size; set by the program."""
        self._flat = not kwargs and not any(
            isinstance(arg, (list, tuple)) for arg in self.args if not isinstance(arg, Slot)
        )

    def arguments(self, values: Sequence[Any]) -> list[Any]:
        """The positional arguments with their values."""
        if self._flat:
            return [values[arg.index] if type(arg) is Slot else arg for arg in self.args]
        return [_filled(arg, values) for arg in self.args]

    def call(self, values: Sequence[Any]) -> Any:
        """The result."""
        if not self.kwargs:
            return self._run(*self.arguments(values))
        kwargs = {key: _filled(value, values) for key, value in self.kwargs.items()}
        return self._run(*self.arguments(values), **kwargs)

    def replaced(self, target: Function, args: Sequence[Any]) -> Operation:
        """Another operation in its place."""
        return Operation(self.index, self.name, target, args, {}, self.is_number, self.is_complex, self.line)

    def widened(self) -> Operation:
        """With float64 where it names float32."""
        return Operation(
            self.index,
            self.name,
            self.target,
            [_wide(arg) for arg in self.args],
            {key: _wide(value) for key, value in self.kwargs.items()},
            self.is_number,
            self.is_complex,
            self.line,
        )

    def is_same(self, other: Operation) -> bool:
        """Whether both do the same to the same values."""
        mine = self.index, self.target, self.args, self.kwargs
        return mine == (other.index, other.target, other.args, other.kwargs)

    @property
    def kind(self) -> str:
        """The operator's name without its namespace and overload."""
        packet = getattr(self.target, "overloadpacket", None)
        return getattr(packet or self.target, "__name__", str(self.target))


_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def _wide(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _slots(tree: Any) -> list[int]:
    if isinstance(tree, Slot):
        return [tree.index]
    if isinstance(tree, (list, tuple)):
        return [index for entry in tree for index in _slots(entry)]
    return []


def _filled(tree: Any, values: Sequence[Any]) -> Any:
    if type(tree) is Slot:
        return values[tree.index]
    if isinstance(tree, (list, tuple)):
        return [_filled(entry, values) for entry in tree]
    return tree


class Program:
    """Operations in topological order, and which of them depend on the code z.

    A value is *active* if it depends on z's numbers; the others (made of parameters, constants, sizes) are *passive*:
    they are evaluated once a call by PyTorch, with their gradients. ``values`` of a sweep is a list by number:
    z first, then the sources, then the operations' results.

    Attributes:
        sources: the network's tensors, values 1 to len(sources).
        passive, active: operations, each in order.
        output: the number of the result.
        turns: numbers of samples at which the module's forward may take another way, known from its reading.
        is_aligned: whether it is made of the runs of two batches.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        operations: Sequence[Operation],
        output: int,
        *,
        turns: Sequence[int] = (),
        is_aligned: bool = False,
    ) -> None:
        self.sources, self.operations, self.output = tuple(sources), tuple(operations), output
        self.turns, self.is_aligned = tuple(turns), is_aligned
        self.size = 1 + len(sources) + len(operations)
        needed = {output}
        for operation in reversed(operations):
            if operation.index in needed:
                needed.update(operation.slots)
        live = [operation for operation in operations if operation.index in needed]
        numbers = frozenset(operation.index for operation in operations if operation.is_number)
        for operation in live:
            operation.numbers = numbers & frozenset(operation.slots)
        depends = {0}
        self.active: list[Operation] = []
        self.passive: list[Operation] = []
        for operation in live:
            if not is_size(operation.target) and depends & set(operation.slots):
                depends.add(operation.index)
                self.active.append(operation)
            else:
                self.passive.append(operation)
        self.used = tuple(index for index in range(1, 1 + len(sources)) if index in needed)
        self.is_active = [index in depends for index in range(self.size)]

    def last(self) -> Operation | None:
        """The operation whose result is returned, reshaped or not; None if there is none."""
        by_index = {operation.index: operation for operation in self.active}
        last = by_index.get(self.output)
        while last is not None and last.kind in _MOVES:
            last = by_index.get(last.args[0].index)
        return last

    def is_same(self, other: Program) -> bool:
        """Whether both compute the same in the same way, for batches of all sizes."""
        return (
            (self.output, self.turns, self.is_aligned) == (other.output, other.turns, other.is_aligned)
            and len(self.sources) == len(other.sources)
            and len(self.operations) == len(other.operations)
            and all(a.is_same(b) for a, b in zip(self.sources, other.sources, strict=True))
            and all(a.is_same(b) for a, b in zip(self.operations, other.operations, strict=True))
        )

    @property
    def ends_in_sigmoid(self) -> bool:
        """Whether the result is a sigmoid's, reshaped or not."""
        last = self.last()
        return last is not None and last.kind == "sigmoid"

    def without(self, operation: Operation) -> Program:
        """The program in which one operation of one tensor hands that tensor on."""
        passed = operation.replaced(torch.ops.aten.alias.default, operation.args[:1])
        operations = [passed if each is operation else each for each in self.operations]
        return self._with(operations, self.output)

    def followed_by(self, target: Function) -> Program:
        """The program with one function more at its end."""
        index = 1 + len(self.sources) + len(self.operations)
        added = Operation(index, target.__name__, target, [Slot(self.output)], {})
        return self._with([*self.operations, added], index)

    def widened(self) -> Program:
        """The program in float64: what was made in the dtype of float32 codes is made in that of float64 ones."""
        return self._with([operation.widened() for operation in self.operations], self.output)

    def _with(self, operations: Sequence[Operation], output: int) -> Program:
        return Program(self.sources, operations, output, turns=self.turns, is_aligned=self.is_aligned)

    def start(self, z: Tensor, tensors: Sequence[Tensor | None]) -> list[Any]:
        """The passive values, with their graph, for the batch of z; active ones are None."""
        values: list[Any] = [z, *tensors]
        values += [None] * (self.size - len(values))
        for operation in self.passive:
            values[operation.index] = operation.call(values)
        values[0] = None
        return values


_MOVES = frozenset(
    {
        "alias", "clone", "contiguous", "flatten", "mT", "movedim", "numpy_T", "permute", "reshape", "reshape_as",
        "squeeze", "swapaxes", "t", "transpose", "unflatten", "unsqueeze", "_unsafe_view", "view", "view_as",
    }
)  # fmt: skip


_SIZES = {
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.truediv,
    operator.pow, operator.getitem, max, min, int,
}  # fmt: skip


def is_size(target: Function) -> bool:
    """Whether an operation reads or computes a size: a number that depends on the batch alone."""
    if target is operator.getitem:
        return False
    packet = getattr(target, "overloadpacket", None)
    known = (torch.ops.aten.sym_size, torch.ops.aten.sym_numel, torch.ops.aten.sym_stride)
    return packet in known or target in _SIZES or getattr(target, "__module__", "").startswith("torch.sym")
