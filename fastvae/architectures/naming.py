"""Networks that say how they were made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import nn

__all__ = ["BY_NAME", "named"]

_Arguments = ParamSpec("_Arguments")
_Network = TypeVar("_Network", bound=nn.Module)

BY_NAME: dict[str, Callable[..., nn.Module]] = {}
"""Every function of this package that makes one network: what ``model.save`` may name in place of code.

What such a function makes says so in its attribute ``made_by``: the name and the arguments.
"""


def named(build: Callable[_Arguments, _Network]) -> Callable[_Arguments, _Network]:
    """Enter a function in ``BY_NAME``."""

    @functools.wraps(build)
    def make(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Network:
        network = build(*args, **kwargs)
        bound = inspect.signature(build).bind(*args, **kwargs)
        bound.apply_defaults()
        network.made_by = {"name": build.__name__, "arguments": dict(bound.arguments)}  # type: ignore[assignment]
        return network

    BY_NAME[build.__name__] = make
    return make
