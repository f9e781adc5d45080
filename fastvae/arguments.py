"""What is asked of arguments in the same way everywhere."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard

from torch import Tensor

__all__ = ["expect_numbers", "expect_positive", "given", "is_integer"]


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


def given(**tensors: Tensor | None) -> dict[str, Any]:
    """The optional tensors that are there, as arguments: methods of a user's subclass need not know of all of them."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it counts something: an int or a numpy integer, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def expect_positive(owner: str, *, hint: str = "", **arguments: Any) -> None:
    """TypeError as of ``expect_numbers``, ValueError for a number that is not finite or not above 0."""
    expect_numbers(owner, hint=hint, **arguments)
    for name, value in arguments.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{owner}: {name}: expected a finite number above 0, got {value}")
