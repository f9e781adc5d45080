"""The global generators, which a run of a model of ours borrows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "global_generators_kept",
    "global_states",
    "seed_globals",
    "set_global_states",
    "standard_normal",
    "standard_uniform",
]


def standard_normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal numbers in the dtype of ``like``, drawn on the generator's device and moved to that of ``like``."""
    return _drawn(torch.randn, shape, like, generator)


def standard_uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same, uniform in [0, 1)."""
    return _drawn(torch.rand, shape, like, generator)


def _drawn(
    draw: Callable[..., Tensor], shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    if generator is None:
        # Given None as one, PyTorch would take no symbolic sizes: those of batches of any size under torch.compile.
        return draw(shape, device=like.device, dtype=like.dtype)
    return draw(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def seed_globals(seed: int, purpose: str, epoch: int, rank: int = 0) -> None:
    """Seed torch's, numpy's and Python's global generators; each process of a run draws noise of its own."""
    # Hashed, so that runs with neighbouring seeds share no epoch's noise.
    digest = hashlib.sha256(f"{seed} {purpose} {epoch}{f' {rank}' if rank else ''}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    torch.manual_seed(key)
    random.seed(key)
    np.random.seed(key % 2**32)


def global_states() -> tuple[Any, ...]:
    """The states of the global generators, for ``set_global_states``."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def set_global_states(states: tuple[Any, ...]) -> None:
    """Put the global generators back to where ``global_states`` found them."""
    torch_state, cuda, python_state, numpy_state = states
    torch.set_rng_state(torch_state)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python_state)
    np.random.set_state(numpy_state)


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Leave the global generators as they were found."""
    states = global_states()
    try:
        yield
    finally:
        set_global_states(states)
