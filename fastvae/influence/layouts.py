"""Where a read network's values have the samples of a batch: found by running it for two batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.influence.modules import sample_axis
from fastvae.network.cache import ReadNetwork
from fastvae.network.reading import rows_of
from fastvae.network.sweeps import Inputs

__all__ = ["Layout", "layouts_of"]


class Layout(NamedTuple):
    """What all batches have in common of a value."""

    shape: tuple[int, ...]
    """Of two samples."""
    axis: int | None
    """The dimension of its samples."""
    outer: int = 1
    """How many times all samples lie one after the other in it, as in [T, B] made one dimension."""

    def ordered(self, tensor: Any, samples: int) -> Any:
        """The rows of a sample side by side."""
        if self.outer == 1 or self.axis is None or tensor is None:
            return tensor
        apart = tensor.unflatten(self.axis, (self.outer, samples, -1)).transpose(self.axis, self.axis + 1)
        return apart.flatten(self.axis, self.axis + 2)


def layouts_of(network: ReadNetwork, z: Tensor, condition: Tensor | None) -> tuple[list[Any], set[int]]:
    """Every value, where it is a tensor or several; and the numbers of those whose samples cannot be told apart."""
    program = network.sweeps.program
    first, second = [count for count in range(2, 5 + len(program.turns)) if count not in program.turns][:2]
    runs = []
    moved = z.new_zeros(second, *z.shape[1:])
    moved[0] = 1
    for count, move in ((first, 0), (second, 0), (second, moved)):
        codes = rows_of(z, count) + move
        given = None if condition is None else rows_of(condition, count)
        tensors = [
            given if source.is_condition and tensor is not None else tensor
            for source, tensor in zip(program.sources, network.tensors, strict=True)
        ]
        with torch.no_grad():
            passive = Inputs(network.sweeps, codes, tensors).detached()
            runs.append(network.sweeps.forward(passive, codes, program.is_active, keep=False).values)
    found: list[Any] = []
    unfit: set[int] = set()
    for index, (a, b, other) in enumerate(zip(*runs, strict=True)):
        try:
            found.append(_layout_of(a, b, other, (first, second)))
        except ValueError:
            found.append(Layout((), None))
            unfit.add(index)
    return found, unfit


def _layout_of(a: Any, b: Any, moved: Any, counts: tuple[int, int]) -> Any:
    """From runs of two batches, and of the second one with another first sample."""
    if isinstance(a, (list, tuple)):
        return [_layout_of(*parts, counts) for parts in zip(a, b, moved, strict=True)]
    if not isinstance(a, Tensor):
        if a != b:
            raise ValueError("TracIn: a number that depends on the batch")
        return Layout((), None)
    axis = sample_axis(a, b, *counts)
    return Layout(tuple(a.shape), axis, 1 if axis is None else _outer(b, moved, axis, counts[1]))


def _outer(a: Tensor, b: Tensor, axis: int, samples: int) -> int:
    """How many times the samples lie one after the other, of which the first one is another in two tensors."""
    differs = (a != b).movedim(axis, 0)
    other = differs.reshape(len(differs), -1).any(1)  # of one number a sample, too
    rows = len(other) // samples
    for outer in (outer for outer in range(1, rows + 1) if rows % outer == 0):
        if not other.reshape(outer, samples, -1)[:, 1:].any():
            return outer
    raise ValueError("TracIn: samples are not apart")
