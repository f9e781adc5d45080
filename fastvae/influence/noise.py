"""Noise of any module, keyed by sample: what a module draws comes from ``fastvae.noise`` instead.

Nothing is drawn from torch's own generators, which belong to whoever else uses them in this process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae.noise import Stream, is_own_noise

__all__ = ["KeyedNoise", "SeesRandomness", "draws_noise"]


class _Drawn(BaseException):
    """Ends a forward at the first random number: no ``except Exception`` of a user's keeps it."""


class SeesRandomness(TorchDispatchMode):
    """Stops where anything random would be drawn."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the operator run if it is not random."""
        if _is_random(func, args, kwargs) and not is_own_noise():
            raise _Drawn
        return func(*args, **(kwargs or {}))


def draws_noise(call: Any, *args: Any) -> bool:
    """Whether a call draws random numbers; it is given up before the first one."""
    try:
        with torch.no_grad(), SeesRandomness():
            call(*args)
    except _Drawn:
        return True
    return False


class KeyedNoise(TorchDispatchMode):
    """Draws the noise of any module from the stream of its rows instead of torch's generators.

    Covers normal and uniform numbers with the rows as leading dimension, which is what reparameterisation,
    dequantisation and random augmentation ask for.

    Raises:
        NotImplementedError: another random operator, or a shape whose first dimension is not the rows'.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the operator run, or do what it would with the stream's numbers."""
        if is_own_noise() or not _is_random(func, args, kwargs):
            return func(*args, **(kwargs or {}))
        name, rows = func._schema.name.removeprefix("aten::"), len(self.stream.keys)
        if name not in _NORMAL and name not in _UNIFORM:
            raise NotImplementedError(
                f"TracIn: the model draws noise by {name}, which cannot be keyed by sample"
            )
        out = _room(name, func, args, kwargs)
        if out.dim() == 0 or out.shape[0] % rows:
            raise NotImplementedError(
                f"TracIn: the model draws noise by {name}, whose result is not one part a sample: expected a "
                f"leading dimension that is a multiple of {rows}, got {list(out.shape)}"
            )
        shape = (out.shape[0] // rows, *out.shape[1:])
        if name in _NORMAL:
            mean, std = _arguments(func, args, kwargs, mean=0.0, std=1.0)
            return out.copy_(self.stream.normal(shape).reshape(out.shape).to(out) * std + mean)
        low, high = _arguments(func, args, kwargs, **{"from": 0.0, "to": 1.0})
        return out.copy_(self.stream.uniform(shape).reshape(out.shape).to(out) * (high - low) + low)


_NORMAL = frozenset({"randn", "randn_like", "normal_", "normal"})
_UNIFORM = frozenset({"rand", "rand_like", "uniform_"})


def _room(name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
    """What a random operator would fill: its own tensor, or a new one of the shape and type of its result."""
    given = kwargs or {}
    found: Tensor | None = args[0] if name.endswith("_") else given.get("out")
    if found is not None:
        return found
    of_result = ("dtype", "layout", "device", "pin_memory", "memory_format")
    options = {key: value for key, value in given.items() if key in of_result}
    like = [value for value in (*args, *given.values()) if isinstance(value, Tensor)]
    if like:
        return torch.empty_like(torch.broadcast_tensors(*like)[0], **options)
    (size,) = _arguments(func, args, kwargs, size=())
    return torch.empty(size, **options)


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call draws: attention and recurrent layers are marked as random for a dropout that may be 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    of_call = _arguments(func, args, kwargs, train=True, training=True, dropout=1.0, dropout_p=1.0)
    return all(bool(value) for value in of_call)


def _arguments(func: Any, args: Any, kwargs: Any, **defaults: Any) -> list[Any]:
    """The values of the named arguments of an operator call; what the operator does not have is as in ``defaults``."""
    schema = func._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= dict(zip([argument.name for argument in schema], args, strict=False))
    given |= kwargs or {}
    return [given.get(name, default) for name, default in defaults.items()]
