"""The training set shared out over processes, with the result of one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastvae.influence.topk import TopK

__all__ = ["Share"]


class Share:
    """Every n-th tile for the n-th process of a group; None is a group of one.

    Tiles are the same however many processes there are, so that every score is computed in the same way.
    """

    def __init__(self, group: Any) -> None:
        # Weakly: a group that somebody holds outlives destroy_process_group, and its threads, which let go of tensors,
        # then end the process with SIGABRT if the interpreter is being closed.
        self._group = None if group is None else weakref.ref(group)
        self._rank, self._size = (
            (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        )

    def is_mine(self, tile: int) -> bool:
        """Whether this process does the tile."""
        return tile % self._size == self._rank

    def assembled(self, parts: Sequence[tuple[int, Tensor]], rows: int, columns: int) -> Tensor:
        """[rows, columns] from every process's parts [rows, n] and the column where they start."""
        parts = [part for of_process in self._gathered(list(parts)) for part in of_process]
        if not parts:
            return torch.zeros(rows, columns, device="cpu")
        if len(parts) == 1 and parts[0][1].shape == (rows, columns):
            return parts[0][1]
        whole = parts[0][1].new_zeros(rows, columns)
        for first, part in parts:
            whole[:, first : first + part.shape[1]] = part
        return whole

    def merged(self, best: TopK) -> TopK:
        """The best of all processes."""
        total = TopK(best.k, best.largest)
        for indices, scores in self._gathered((best.indices, best.scores)):
            if scores is not None:
                total.add(indices, scores)
        return total

    def _gathered(self, part: Any) -> list[Any]:
        if self._group is None:
            return [part]
        group = self._group()
        if group is None:
            raise RuntimeError("TracIn: its process_group has been destroyed; make a TracIn of a living one")
        everyone: list[Any] = [None] * self._size
        dist.all_gather_object(everyone, part, group=group)
        return everyone
