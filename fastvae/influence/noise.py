"""Noise of any module, keyed by sample: what a module draws comes from ``fastvae.noise`` instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae.noise import Stream

__all__ = ["KeyedNoise", "SeesRandomness"]


class SeesRandomness(TorchDispatchMode):
    """Notes whether anything random was drawn."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the operator run."""
        self.seen = self.seen or _is_random(func)
        return func(*args, **(kwargs or {}))


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
        """Let the operator run, and overwrite what it drew."""
        out = func(*args, **(kwargs or {}))
        if not _is_random(func):
            return out
        name, rows = func._schema.name.removeprefix("aten::"), len(self.stream.keys)
        if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] % rows:
            raise NotImplementedError(
                f"TracIn: the model draws noise by {name}, whose result is not one part a sample: expected a "
                f"leading dimension that is a multiple of {rows}, "
                f"got {list(out.shape) if isinstance(out, Tensor) else type(out).__name__}"
            )
        shape = (out.shape[0] // rows, *out.shape[1:])
        if name in ("randn", "randn_like", "normal_", "normal"):
            mean, std = _arguments(func, args, kwargs, mean=0.0, std=1.0)
            return out.copy_(self.stream.normal(shape).reshape(out.shape).to(out) * std + mean)
        if name in ("rand", "rand_like", "uniform_"):
            low, high = _arguments(func, args, kwargs, **{"from": 0.0, "to": 1.0})
            return out.copy_(self.stream.uniform(shape).reshape(out.shape).to(out) * (high - low) + low)
        raise NotImplementedError(f"TracIn: the model draws noise by {name}, which cannot be keyed by sample")


def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _arguments(func: Any, args: Any, kwargs: Any, **defaults: Any) -> list[Any]:
    """The values of the named arguments of an operator call."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
    return [given.get(name, default) for name, default in defaults.items()]
