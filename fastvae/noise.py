"""Noise keyed by (seed, hash of the sample's bytes, draw): a sample's score does not depend on where it stands.

Numbers come from the counter-based generator of Steele, Lea and Flood ("Fast splittable pseudorandom number
generators", OOPSLA 2014), evaluated for all samples at once, on their device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SampleNoise", "Stream", "draws_of", "keys_of"]

# As signed integers: int64 arithmetic wraps around like that of uint64.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shifted(bits: Tensor, places: int) -> Tensor:
    """A right shift that fills with zeros."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    """The output function of SplitMix64: a bijection of 64 bits that leaves no pattern."""
    bits = _shifted(bits, 30).bitwise_xor_(bits).mul_(_FIRST)
    bits = _shifted(bits, 27).bitwise_xor_(bits).mul_(_SECOND)
    return _shifted(bits, 31).bitwise_xor_(bits)


@functools.lru_cache(maxsize=32)
def _counters(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first + 1, first + count + 1, device=device) * _GAMMA


@functools.lru_cache(maxsize=8)
def _multipliers(count: int, device: torch.device) -> Tensor:
    return _mixed(_counters(0, count, device)) | 1


@functools.lru_cache(maxsize=8)
def _of_seed(seed: int, device: torch.device) -> Tensor:
    return _mixed(torch.tensor(seed, device=device) + _GAMMA)


def keys_of(x: Tensor) -> Tensor:
    """A hash of each sample's bytes: int64 [B]."""
    rows = x.detach().reshape(len(x), math.prod(x.shape[1:])).contiguous()
    rows = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    octets = rows.view(torch.uint8)
    if octets.shape[1] % 8:
        octets = torch.nn.functional.pad(octets, (0, 8 - octets.shape[1] % 8))
    words = octets.view(torch.int64)
    # A sum of products with odd numbers, in which every bit of every word counts.
    folded = _shifted(words, 32).bitwise_xor_(words)
    return _mixed(folded.mul_(_multipliers(words.shape[1], x.device)).sum(1) + octets.shape[1])


def draws_of(keys: Tensor, seed: int, draws: int, first: int = 0) -> Tensor:
    """The key of each draw from ``first`` on of each sample, a sample's side by side: int64 [B * draws]."""
    mine = _mixed(keys ^ _of_seed(seed, keys.device))
    return _mixed(mine[:, None] + _counters(first, draws, keys.device)).flatten()


class Stream:
    """Random numbers for each of several keys, in float64; every call goes on where the last one ended.

    Args:
        keys: int64 [rows].
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys, self._used = keys, 0

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """[rows, *shape] in (0, 1)."""
        return _unit(_shifted(self._bits(shape), 11), 53)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """[rows, *shape], standard normal (Box and Muller, from the two halves of 64 bits)."""
        bits = self._bits(shape)
        radius = _unit(_shifted(bits, 32), 32).log_().mul_(-2).sqrt_()
        angle = _unit(bits.bitwise_and_((1 << 32) - 1), 32).mul_(2 * math.pi)
        return angle.cos_().mul_(radius)

    def _bits(self, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        counters = _counters(self._used, count, self.keys.device)
        self._used += count
        return _mixed(self.keys[:, None] + counters).reshape(len(self.keys), *shape)


def _unit(bits: Tensor, count: int) -> Tensor:
    """Numbers of so many bits as the middles of equal parts of (0, 1), in float64."""
    return bits.double().add_(0.5).mul_(2.0**-count)


class SampleNoise:
    """Standard normal noise of each sample, by its bytes alone: what a model's ``noise=`` takes.

    Args:
        keys: int64 [B], from ``keys_of``.
        seed: another seed gives independent noise.
        draws: independent [B, d] that one evaluation of a model needs (``model.noise_draws``).
        start: number of the first draw; ranges that do not overlap are independent.
    """

    def __init__(self, keys: Tensor, seed: int, draws: int = 1, start: int = 0) -> None:
        self.keys, self.seed, self.draws, self.start = keys, seed, draws, start

    def __call__(self, first: int, count: int, like: Tensor) -> Tensor:
        """Draws first .. first + count - 1 as [draws, count, B, d], for ``like`` [B, d] in its dtype."""
        keys = draws_of(self.keys, self.seed, count, self.start + first)
        noise = Stream(keys).normal((self.draws, like.shape[1])).to(like)
        return noise.unflatten(0, (len(self.keys), count)).permute(2, 1, 0, 3)

    def __getitem__(self, part: slice) -> SampleNoise:
        """The noise of some of the samples."""
        return SampleNoise(self.keys[part], self.seed, self.draws, self.start)
