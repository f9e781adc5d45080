"""A run that several processes share: one replica of the model each, under DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastvae.wrappers import wrapped_modules

__all__ = ["Team"]


class Team:
    """The processes that train replicas of a model; a model without DistributedDataParallel is a team of one.

    Each process calls every method at the same point of the run: all but ``rank`` and ``size`` wait for the others.
    """

    def __init__(self, model: nn.Module) -> None:
        wrapper = next((m for m in wrapped_modules(model) if isinstance(m, DistributedDataParallel)), None)
        self._group = None if wrapper is None else wrapper.process_group
        self.rank = 0 if wrapper is None else dist.get_rank(self._group)
        self.size = 1 if wrapper is None else dist.get_world_size(self._group)
        self.replica: nn.Module = model if wrapper is None else wrapper.module
        """The model of this process, whose forward waits for no other."""
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the processes, the same bits in all of them."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=self._group)
        result: list[float] = total.tolist()
        return result

    def gathered(self, part: Any) -> list[Any]:
        """What each process has, in the order of their ranks."""
        if self.size == 1:
            return [part]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, part, group=self._group)
        return everyone

    def by_first(self, action: Callable[[], object]) -> None:
        """Let the first process do something, such as writing a file; its error is raised in all of them."""
        problem: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except Exception as error:
                if self.size == 1:
                    raise
                problem = error
        if first := self.gathered(problem)[0]:
            raise first

    def wait(self) -> None:
        """Return when every process has come here."""
        self.sums(0.0)
