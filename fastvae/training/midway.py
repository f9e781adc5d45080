"""What a checkpoint in the middle of an epoch holds, and Ctrl-C, which waits until there can be one."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae.randomness import global_states, set_global_states

__all__ = ["Interrupt", "PartOfEpoch", "interrupts_noted", "plain_states", "set_plain_states"]


@dataclass
class PartOfEpoch:
    """An epoch as far as it has come; all of its sums, so that it goes on as if nothing had been."""

    batches: int = 0
    """Taken from the loader, those of skipped steps included."""
    loss: float = 0.0
    """Sum over samples."""
    samples: float = 0.0
    """Their number, or the sum of their weights."""
    rates: list[float] = field(default_factory=list)
    """Learning rates of the steps that were taken."""
    seconds: float = 0.0
    """Before this start of the run."""
    pending_weight: float = 0.0
    """Of TracIn, before this epoch."""
    random: list[list[Any]] = field(default_factory=list)
    """The global generators of each process, where the next batch is to be loaded."""

    @property
    def mean_rate(self) -> float:
        """Of the steps that were taken."""
        return math.fsum(self.rates) / max(1, len(self.rates))

    def weight(self, length: int | None) -> float:
        """In TracIn: of an epoch of ``length`` batches that ends here, or of a whole one."""
        return self.mean_rate * (self.batches / length if length else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """As plain data and tensors."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Any) -> PartOfEpoch:
        """What ``to_dict`` gave. ValueError for anything else."""
        kinds = {"batches": int, "rates": list, "random": list}
        names = cls.__dataclass_fields__
        if not isinstance(values, dict) or values.keys() != names.keys():
            raise ValueError("an epoch's part with other entries")
        for name, value in values.items():
            if type(value) is not kinds.get(name, float):
                raise ValueError(f"an epoch's part with {name} of {type(value).__name__}")
        if values["batches"] < 0 or not all(type(rate) is float for rate in values["rates"]):
            raise ValueError("an epoch's part with batches or rates that are none")
        for states in values["random"]:
            _check_states(states)
        return cls(**values)


def plain_states() -> list[Any]:
    """Those of the global generators, as tensors, numbers, strings and lists."""
    main, cuda, (version, words, gauss), (kind, keys, *rest) = global_states()
    return [main, cuda, [version, list(words), gauss], [kind, torch.from_numpy(keys.astype(np.int64)), *rest]]


def set_plain_states(states: list[Any]) -> None:
    """Put the global generators to where ``plain_states`` found them; GPUs' where there are as many."""
    main, cuda, (version, words, gauss), (kind, keys, *rest) = states
    known = cuda is not None and len(cuda) == torch.cuda.device_count()
    numpys = (kind, keys.numpy().astype(np.uint32), *rest)
    set_global_states((main, cuda if known else None, (version, tuple(words), gauss), numpys))


def _check_states(states: Any) -> None:
    """ValueError for what generators do not take."""
    before = global_states()
    try:
        set_plain_states(states)
        if not all(isinstance(state, Tensor) for state in states[1] or ()):
            raise ValueError("GPUs' generators that are no tensors")
    except Exception as error:
        raise ValueError(f"states of generators that are none ({error})") from error
    finally:
        set_global_states(before)


class Interrupt:
    """Whether Ctrl-C was pressed."""

    is_set = False


@contextmanager
def interrupts_noted(wanted: bool) -> Iterator[Interrupt]:
    """Within, the first Ctrl-C is noted, to be heeded by what runs; the second is a KeyboardInterrupt at once.

    Where none is wanted, in other threads, and where somebody else handles Ctrl-C, nothing is changed.
    """
    noted = Interrupt()
    is_main = threading.current_thread() is threading.main_thread()
    if not (wanted and is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted.is_set:
            signal.default_int_handler(number, frame)
        noted.is_set = True

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
