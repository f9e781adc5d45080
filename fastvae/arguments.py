"""What is asked of arguments in the same way everywhere."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, TypeGuard

from torch import Tensor

__all__ = [
    "expect",
    "expect_at_least",
    "expect_choice",
    "expect_integers",
    "expect_not_negative",
    "expect_numbers",
    "expect_positive",
    "given",
    "is_integer",
]


def expect(holds: bool, wanted: str, got: object, error: type[Exception] = ValueError) -> None:
    """Raise an error that says what was expected and what came, unless the condition holds.

    Not for what torch.compile traces: a text of symbolic sizes would fix them.

    Args:
        wanted: owner, argument and what is expected of it, as in "HVAE: num_steps: expected at least 1".
    """
    if not holds:
        raise error(f"{wanted}, got {got}")


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
        expect(
            math.isfinite(value) and value > 0, f"{owner}: {name}: expected a finite number above 0", value
        )


def expect_not_negative(owner: str, **arguments: Any) -> None:
    """TypeError as of ``expect_numbers``, ValueError for a number that is not finite or below 0."""
    expect_numbers(owner, **arguments)
    for name, value in arguments.items():
        wanted = f"{owner}: {name}: expected a finite number of at least 0"
        expect(math.isfinite(value) and value >= 0, wanted, value)


def expect_at_least(owner: str, least: int, *, optional: bool = False, **arguments: Any) -> None:
    """TypeError as of ``expect_numbers``, ValueError for a number below ``least``, or None unless it is optional."""
    expect_numbers(owner, **arguments)
    for name, value in arguments.items():
        holds = optional if value is None else value >= least
        expect(holds, f"{owner}: {name}: expected at least {least}", value)


def expect_integers(owner: str, least: int, *, optional: bool = False, **arguments: Any) -> None:
    """As ``expect_at_least``; ValueError also for what is no integer."""
    expect_numbers(owner, **arguments)
    for name, value in arguments.items():
        holds = optional if value is None else is_integer(value) and value >= least
        expect(holds, f"{owner}: {name}: expected an int of at least {least}", repr(value))


def expect_choice(owner: str, choices: Collection[Any], **arguments: object) -> None:
    """ValueError for what is none of the choices."""
    for name, value in arguments.items():
        expect(value in choices, f"{owner}: {name}: expected one of {choices}", repr(value))
