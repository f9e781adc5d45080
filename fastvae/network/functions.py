"""A user's autograd.Function in a forward that is traced: its gradient is its own, which its operations do not tell.

While a module is traced, each call is put between two marks; what lies between them becomes one operation that calls
the function itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction

BEGINS, ENDS = "fastvae_marks::function_begins", "fastvae_marks::function_ends"


def _copies(tensors: Sequence[Tensor], number: int) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


for _name in (BEGINS, ENDS):
    torch.library.define(_name, "(Tensor[] tensors, int number) -> Tensor[]")
    torch.library.impl(_name, "CompositeExplicitAutograd", _copies)
    torch.library.register_fake(_name, _copies)


class Call:
    """One call of a function: with other tensors in the place of the first ones."""

    def __init__(self, function: type[Function], args: Sequence[Any]) -> None:
        self.function = function
        self.places = [place for place, arg in enumerate(args) if isinstance(arg, Tensor)]
        self.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        self.__name__ = function.__name__

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results as a tuple."""
        args = list(self.others)
        for place, tensor in zip(self.places, tensors, strict=True):
            args[place] = tensor
        result = self.function.apply(*args)
        return (result,) if isinstance(result, Tensor) else tuple(result)


@contextlib.contextmanager
def marked() -> Iterator[list[Call]]:
    """Mark the calls of this thread; they are listed by number. Another thread's functions are called as ever."""
    calls: list[Call] = []
    thread, inside = threading.get_ident(), [False]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        own: Callable[..., Any] = super(_SingleLevelFunction, cls).apply  # type: ignore[misc]
        if threading.get_ident() != thread or inside[0] or kwargs:
            return own(*args, **kwargs)
        call, number = Call(cls, args), len(calls)
        calls.append(call)
        begun = torch.ops.fastvae_marks.function_begins([args[place] for place in call.places], number)
        replaced = list(args)
        for place, tensor in zip(call.places, begun, strict=True):
            replaced[place] = tensor
        inside[0] = True
        try:
            result = own(*replaced)
        finally:
            inside[0] = False
        results = [result] if isinstance(result, Tensor) else list(result)
        if not all(isinstance(each, Tensor) for each in results):
            raise TypeError(f"{cls.__name__} returns something that is no tensor")
        ended = torch.ops.fastvae_marks.function_ends(results, number)
        return ended[0] if isinstance(result, Tensor) else tuple(ended)

    # Where Function.apply itself looks, so that ``step = Step.apply`` of a user's file is marked, too.
    _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]


__all__ = ["BEGINS", "ENDS", "Call", "marked"]
