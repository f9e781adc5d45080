"""Noise keyed by (seed, hash of the sample's bytes, draw): a sample's score does not depend on where it stands.

Numbers come from the counter-based generator of Steele, Lea and Flood ("Fast splittable pseudorandom number
generators", OOPSLA 2014), evaluated for all samples at once, on their device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["KeyedNoise", "SeesRandomness", "Stream", "draws_of", "keys_of"]

# As signed integers: int64 arithmetic wraps around like that of uint64.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shifted(bits: Tensor, places: int) -> Tensor:
    """A right shift that fills with zeros."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    """The output function of SplitMix64: a bijection of 64 bits that leaves no pattern."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


@functools.lru_cache(maxsize=8)
def _multipliers(count: int, device: torch.device) -> Tensor:
    return _mixed(torch.arange(1, count + 1, device=device) * _GAMMA) | 1


def keys_of(x: Tensor) -> Tensor:
    """A hash of each sample's bytes: int64 [B]."""
    rows = x.detach().reshape(len(x), math.prod(x.shape[1:])).contiguous()
    rows = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    octets = rows.view(torch.uint8)
    if octets.shape[1] % 8:
        octets = torch.nn.functional.pad(octets, (0, 8 - octets.shape[1] % 8))
    words = octets.view(torch.int64)
    # A sum of products with odd numbers, in which every bit of every word counts.
    folded = words ^ _shifted(words, 32)
    return _mixed((folded * _multipliers(words.shape[1], x.device)).sum(1) + octets.shape[1])


def draws_of(keys: Tensor, seed: int, draws: int) -> Tensor:
    """The key of each draw of each sample, the draws of a sample side by side: int64 [B * draws]."""
    of_seed = _mixed(torch.tensor(seed, device=keys.device) + _GAMMA)
    counts = torch.arange(1, draws + 1, device=keys.device) * _GAMMA
    return _mixed(_mixed(keys ^ of_seed)[:, None] + counts).flatten()


class Stream:
    """Random numbers for each of several keys, in float64; every call goes on where the last one ended.

    Args:
        keys: int64 [rows].
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys, self._used = keys, 0

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """[rows, *shape] in (0, 1)."""
        count = math.prod(shape)
        counters = torch.arange(self._used + 1, self._used + count + 1, device=self.keys.device) * _GAMMA
        self._used += count
        bits = _mixed(self.keys[:, None] + counters)
        return (_shifted(bits, 11).double() + 0.5).mul_(2.0**-53).reshape(len(self.keys), *shape)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """[rows, *shape], standard normal."""
        return self.uniform(shape).mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))


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
