"""Noise keyed by (seed, hash of the sample's bytes, draw): a sample's score does not depend on where it stands.

TracIn's is keyed by the checkpoint, too: ``draws_of(keys_of(x) ^ key_of_weights(model), seed, draws)``.

Numbers come from the counter-based generator of Steele, Lea and Flood ("Fast splittable pseudorandom number
generators", OOPSLA 2014), evaluated for all samples at once, on their device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from fastvae._extension import raw
from fastvae.arguments import expect_numbers

__all__ = ["SampleNoise", "Stream", "draws_of", "is_own_noise", "key_of_weights", "keys_of", "own_noise"]


@functools.lru_cache(maxsize=8)
def _of_seed(seed: int, device: torch.device) -> Tensor:
    return raw.keyed_bits(torch.tensor([seed], device=device), 0, 1)[0]


def keys_of(x: Tensor) -> Tensor:
    """A hash of each sample's bytes: int64 [B]."""
    return raw.sample_keys(x.detach())


@torch.no_grad()
def key_of_weights(model: nn.Module) -> int:
    """A hash of the values of all parameters in order.

    It is the same in float32 and in float64, on every device, and wherever the weights were read from. Buffers do not
    count: a BatchNorm's counter goes on while nothing is learnt.
    """
    found = [torch.zeros(1, dtype=torch.int64, device="cpu")]
    for value in model.parameters():
        rows = value.double() if value.is_floating_point() else value
        found.append(keys_of(keys_of(rows if rows.dim() else rows[None])[None]).cpu())
    return int(keys_of(torch.cat(found)[None]))


def draws_of(keys: Tensor, seed: int, draws: int, first: int = 0) -> Tensor:
    """The key of each draw from ``first`` on of each sample, a sample's side by side: int64 [B * draws]."""
    seeds = raw.keyed_bits(keys ^ _of_seed(seed, keys.device), -1, 1).flatten()
    return raw.keyed_bits(seeds, first, draws).flatten()


class Stream:
    """Random numbers for each of several keys, in float64; every call goes on where the last one ended.

    Args:
        keys: int64 [rows].
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys, self._used = keys, 0

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """[rows, *shape] in (0, 1), the middles of 2^53 equal parts."""
        bits = self._next(raw.keyed_bits, shape)
        return (bits >> 11).bitwise_and_((1 << 53) - 1).double().add_(0.5).mul_(2.0**-53)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """[rows, *shape], standard normal (Box and Muller, from the two halves of 64 bits)."""
        return self._next(raw.keyed_normal, shape)

    def _next(self, numbers: Callable[[Tensor, int, int], Tensor], shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        first, self._used = self._used, self._used + count
        return numbers(self.keys, first, count).reshape(len(self.keys), *shape)


_own_noise: ContextVar[bool] = ContextVar("noise of the package's own", default=False)


@contextmanager
def own_noise() -> Iterator[None]:
    """Random numbers inside are none of a model's: for comparisons, say."""
    token = _own_noise.set(True)
    try:
        yield
    finally:
        _own_noise.reset(token)


def is_own_noise() -> bool:
    """Whether ``own_noise`` is in force in this thread."""
    return _own_noise.get()


class SampleNoise:
    """Standard normal noise of each sample, by its bytes alone: what a model's ``noise=`` takes.

    Args:
        keys: int64 [B], from ``keys_of``.
        seed: another seed gives independent noise.
        draws: independent [B, d] that one evaluation of a model needs (``model.noise_draws``).
        start: number of the first draw; ranges that do not overlap are independent.
    """

    def __init__(self, keys: Tensor, seed: int, draws: int = 1, start: int = 0) -> None:
        expect_numbers("SampleNoise", seed=seed, draws=draws, start=start)
        self.keys, self.seed, self.draws, self.start = keys, int(seed), draws, start

    def __call__(self, first: int, count: int, like: Tensor) -> Tensor:
        """Draws first .. first + count - 1 as [draws, count, B, d], for ``like`` [B, d] in its dtype."""
        keys = draws_of(self.keys, self.seed, count, self.start + first)
        noise = Stream(keys).normal((self.draws, like.shape[1])).to(like)
        return noise.unflatten(0, (len(self.keys), count)).permute(2, 1, 0, 3)

    def __getitem__(self, part: slice) -> SampleNoise:
        """The noise of some of the samples."""
        return SampleNoise(self.keys[part], self.seed, self.draws, self.start)
