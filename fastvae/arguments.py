"""What is asked of arguments in the same way everywhere."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TypeGuard

from torch import Tensor

__all__ = ["expect_numbers", "is_integer"]


def expect_numbers(owner: str, *, hint: str = "", **arguments: object) -> None:
    """Raise TypeError, by name, for whatever is no number: above all a tensor, whose gradient would be lost.

    Python's and numpy's numbers pass, and None, which stands for a default.

    Args:
        owner: the class or function whose arguments they are.
        hint: what to say to a tensor; by default how to get at its value.
        arguments: by name.
    """
    for argument, value in arguments.items():
        if value is None or isinstance(value, Real):
            continue
        found, remedy = type(value).__name__, ""
        if isinstance(value, Tensor):
            remedy = "; " + (hint or "it would not be trained: pass its value, such as tensor.item()")
        raise TypeError(f"{owner}: {argument}: expected a number, got {found}{remedy}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it counts something: an int or a numpy integer, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
