"""A read network as a chain of layers, in the words of the kernels: the operators', or those that train copies of it.

Two heads on one trunk are one layer of twice the width, whose outputs come one below the other; what follows them may
move numbers about, as long as they end where they were.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.lowering import LoweredNetwork, UnsupportedLayer
from fastvae.lowering.activations import ACTIVATIONS, words_of_operator
from fastvae.lowering.errors import join
from fastvae.network.cache import ReadNetwork
from fastvae.network.program import Operation, Program, Slot
from fastvae.network.sweeps import Sweeps

__all__ = ["Chain", "chain_of", "lowered_chain"]

_ACTIVATIONS = frozenset(activation.operator for activation in ACTIVATIONS)

_MOVES = frozenset(
    {
        "alias", "cat", "chunk", "clone", "contiguous", "dropout", "flatten", "getitem", "movedim", "permute",
        "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "stack", "transpose", "unbind",
        "unflatten", "unsqueeze", "view", "_unsafe_view",
    }
)  # fmt: skip
"""Operations that make no numbers: what they do with places is looked at."""


_NUMBERS: dict[str, list[tuple[int, int]]] = {
    "conv2d": [(3, 1), (4, 0), (5, 1), (6, 1)],
    "conv_transpose2d": [(3, 1), (4, 0), (5, 0), (7, 1), (6, 1)],
}
"""Where a convolution's stride, padding, (output padding,) dilation and groups are, and what they are by default."""


class Chain(NamedTuple):
    """Layers, and the sources of each of their tensors."""

    spec: str
    sources: list[tuple[int, ...]]
    """By tensor of the spec the numbers of its values in the program, one head's below the other's."""


def chain_of(network: ReadNetwork, x: Tensor, *, for_copies: bool = False) -> Chain:
    """The chain that a read network is for data like x [B, ...].

    Args:
        for_copies: for the kernels that train a copy for each sample, which take no transposed convolutions and no
            groups, and tensors that are parameters of one layer alone; and two heads, as one layer.

    Raises:
        UnsupportedLayer: it is none, or one of other layers than linear, conv2d, conv_transpose2d, batch_norm and
            activations.
    """
    return _Reader(network, x, for_copies).chain()


def lowered_chain(network: ReadNetwork, z: Tensor) -> LoweredNetwork | None:
    """A read decoder as the operators' kernels take it, with its current tensors; None where it is no chain.

    Args:
        network: of a module that :func:`fastvae.lowering.lower` does not take, because of its Python: its assertions,
            sizes, branches, or tensors that it computes.
        z: codes [B, d], like those that it was read for.
    """
    sweeps = network.sweeps
    if sweeps not in _kept:
        found: _Kept | None = None
        if z.dim() == 2 and z.dtype in (torch.float32, torch.float64):
            with contextlib.suppress(UnsupportedLayer), torch.no_grad():
                found = _Kept.of(chain_of(network, z.new_zeros(2, z.shape[1])), sweeps.program)
        _kept[sweeps] = found
    kept = _kept[sweeps]
    if kept is None:
        return None
    values: Sequence[Any] = (
        sweeps.program.start(z, network.tensors) if kept.computes else [None, *network.tensors]
    )
    return LoweredNetwork(kept.spec, [values[place] for place in kept.places], kept.names)


class _Kept(NamedTuple):
    """A chain as it is asked for at every call."""

    spec: str
    places: list[int]
    names: tuple[str, ...]
    computes: bool
    """Whether some of its tensors are computed from others."""

    @classmethod
    def of(cls, chain: Chain, program: Program) -> _Kept:
        places = [place for (place,) in chain.sources]
        sources = [program.sources[at - 1] if at <= len(program.sources) else None for at in places]
        names = tuple("(computed)" if each is None else join(each.path, each.name) for each in sources)
        return cls(chain.spec, places, names, None in sources)


_kept: weakref.WeakKeyDictionary[Sweeps, _Kept | None] = weakref.WeakKeyDictionary()
"""What was read, as chains; None: it is none."""


class _Reader:
    def __init__(self, network: ReadNetwork, x: Tensor, for_copies: bool) -> None:
        self.program, self.for_copies = network.sweeps.program, for_copies
        self.values = self.program.start(x, network.tensors)
        self.values[0] = x
        with torch.no_grad():
            for operation in self.program.active:
                self.values[operation.index] = operation.call(self.values)
        self.texts: list[str] = [] if x.dim() == 2 else [_reshaped(x)]
        self.sources: list[tuple[int, ...]] = []
        self.numbers: dict[tuple[int, ...], int] = {}
        """By sources the number of a tensor that is made of them."""

    def chain(self) -> Chain:
        at, rest = 0, list(self.program.active)
        heads: tuple[int, ...] = ()
        while at != self.program.output and not heads:
            users = [operation for operation in rest if at in operation.slots]
            if len(users) == 2 and all(user.kind in _MOVES for user in users):
                users = self._once(users, rest, at)
            if len(users) == 1 and self._follow(users[0], at):
                at = users[0].index
            elif len(users) == 2 and self.for_copies and self._layer(users):
                heads = users[0].index, users[1].index
            else:
                break
            rest = [operation for operation in rest if operation not in users]
        heads = heads or (at,)
        self._check_order(heads, rest)
        if self.values[heads[0]].dim() > 2:
            self.texts.append("reshape -1")
        return Chain(";".join(self.texts), self.sources)

    def _once(self, moves: list[Operation], rest: list[Operation], at: int) -> list[Operation]:
        """The first of two moves, in place of both where they are the same."""
        first, second = moves
        a, b = (self._coded([at], [move], move.index)[1] for move in moves)
        if (
            first.kind != second.kind
            or not (isinstance(a, Tensor) and isinstance(b, Tensor))
            or a.shape != b.shape
            or not torch.equal(a, b)
        ):
            return moves
        for place, operation in enumerate(rest):
            if second.index in operation.slots:
                args = [Slot(first.index) if arg == Slot(second.index) else arg for arg in operation.args]
                rest[place] = Operation(
                    operation.index,
                    operation.name,
                    operation.target,
                    args,
                    operation.kwargs,
                    operation.is_number,
                )
        rest.remove(second)
        return [first]

    def _follow(self, operation: Operation, at: int) -> bool:
        """Whether an operation is a layer of the chain."""
        kind = operation.kind
        if kind in _ACTIVATIONS:
            self.texts.append(_activation(operation))
            return True
        if kind == "batch_norm":
            return self._norm(operation)
        if kind in _MOVES:
            return self._move(operation, at)
        return self._layer([operation])

    def _layer(self, heads: Sequence[Operation]) -> bool:
        """One linear layer or convolution, or two of the same form side by side."""
        first = heads[0]
        forms = [self._form(operation) for operation in heads]
        if forms[0] is None or any(form != forms[0] for form in forms):
            return False
        weights = self._tensor([operation.args[1] for operation in heads])
        bias = self._tensor([_argument(operation, 2, None) for operation in heads])
        self.texts.append(" ".join([first.kind, weights, bias, *forms[0]]))
        return True

    def _form(self, operation: Operation) -> list[str] | None:
        """The numbers of a layer after its tensors; None where it is no layer of the kernels."""
        source = operation.args[0]
        if operation.kwargs or not isinstance(source, Slot) or not self.program.is_active[source.index]:
            return None
        x = self.values[source.index]
        if operation.kind == "linear":
            return [] if x.dim() == 2 else None
        places = _NUMBERS.get(operation.kind)
        if places is None or x.dim() != 4:
            return None
        *pairs, (place, default) = places
        groups = _argument(operation, place, default)
        if self.for_copies and (groups != 1 or operation.kind != "conv2d"):
            return None
        numbers: list[str] = []
        for place, default in pairs:
            value = _argument(operation, place, default)
            pair = list(value) if isinstance(value, (list, tuple)) else [value]
            if not all(isinstance(number, int) for number in pair):
                return None
            numbers += map(str, pair * 2 if len(pair) == 1 else pair)
        return [*numbers, str(groups)]

    def _norm(self, operation: Operation) -> bool:
        _, weight, bias, mean, var, training, _, eps, *_ = operation.args
        if training or mean is None or var is None:
            return False
        tensors = [self._tensor([tensor]) for tensor in (weight, bias, mean, var)]
        self.texts.append(" ".join(["batch_norm", *tensors, repr(eps)]))
        return True

    def _move(self, operation: Operation, at: int) -> bool:
        """A reshape: the numbers of a sample stay in order."""
        coded, result = self._coded([at], [operation], operation.index)
        if not isinstance(result, Tensor) or result.dim() < 2 or not _same_rows(coded, result):
            return False
        if result.dim() == 2 or result.shape[1:] != coded[0].shape[1:]:
            self.texts.append(_reshaped(result))
        return True

    def _tensor(self, slots: Sequence[Any]) -> str:
        """The number of a tensor that is made of these sources."""
        if all(slot is None for slot in slots):
            return "-1"
        if not all(
            isinstance(slot, Slot) and slot.index and not self.program.is_active[slot.index] for slot in slots
        ):
            raise UnsupportedLayer(
                "lower: a tensor of a layer depends on the input, or one of two heads has no bias"
            )
        found = tuple(slot.index for slot in slots)
        if self.for_copies and max(found) > len(self.program.sources):
            raise UnsupportedLayer("lower: a tensor of a layer is computed of others")
        if self.for_copies and any(set(found) & set(other) for other in self.numbers):
            raise UnsupportedLayer("lower: a parameter is shared by two layers")
        if found not in self.numbers:
            self.numbers[found] = len(self.sources)
            self.sources.append(found)
        return str(self.numbers[found])

    def _check_order(self, heads: Sequence[int], rest: Sequence[Operation]) -> None:
        """What comes after the chain leaves its outputs, one head's after the other's, where they are."""
        for operation in rest:
            if operation.kind not in _MOVES:
                name = operation.name or operation.kind
                raise UnsupportedLayer(f"lower: {name}: no layer of a chain that kernels take")
        coded, result = self._coded(heads, rest, self.program.output)
        if not isinstance(result, Tensor) or not _same_rows(coded, result):
            raise UnsupportedLayer("lower: outputs come in another order than the two heads give them")

    def _coded(
        self, places: Sequence[int], operations: Sequence[Operation], output: int
    ) -> tuple[list[Tensor], Any]:
        """Values with a number of its own in every place, and what operations make of them."""
        values, coded, first = list(self.values), [], 0
        for place in places:
            like = self.values[place]
            numbers = torch.arange(first, first + like.numel(), dtype=torch.float64, device=like.device)
            values[place] = numbers.reshape(like.shape)
            coded.append(values[place])
            first += like.numel()
        for operation in operations:
            values[operation.index] = operation.call(values)
        return coded, values[output]


def _same_rows(coded: Sequence[Tensor], result: Tensor) -> bool:
    expected = torch.cat([value.flatten(1) for value in coded], 1)
    return len(result) == len(expected) and torch.equal(result.flatten(1), expected)


def _reshaped(value: Tensor) -> str:
    sizes = [-1] if value.dim() == 2 else list(value.shape[1:])
    if len(sizes) > 3:
        # Kernels know no volumes: what they do to one is the same for any order of its dimensions behind the channels.
        sizes = [*sizes[:2], math.prod(sizes[2:])]
    return " ".join(map(str, ["reshape", *sizes]))


def _argument(operation: Operation, place: int, default: Any) -> Any:
    return operation.args[place] if len(operation.args) > place else default


def _activation(operation: Operation) -> str:
    words = words_of_operator(operation.kind, operation.args[1:], operation.kwargs)
    if words is None:
        raise UnsupportedLayer(f"lower: {operation.kind}: no layer of a chain that kernels take")
    kind, numbers = words
    return " ".join([kind, *(repr(float(value)) for value in numbers)])
