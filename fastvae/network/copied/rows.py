"""Where values of a network that was read have their samples, and each sample's own part as one alone would have it.

A forward may fold samples with other things, as in ``x.view(-1, 3)``, or put them second, as attention does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FIRST", "Axis", "axis_of", "rows_of", "whole_of"]


class Axis(NamedTuple):
    """The dimension with the samples, which are ``outer x B x inner`` of its numbers."""

    dim: int
    outer: int
    inner: int


FIRST = Axis(0, 1, 1)
"""As a network is given them."""


def rows_of(whole: Tensor, axis: Axis, samples: int) -> Tensor:
    """[B, *shape of one sample alone], where that is possible without a copy."""
    if axis == FIRST:
        return whole.unsqueeze(1)
    dim, outer, inner = axis
    parts = whole.unflatten(dim, (outer, samples, inner)).movedim(dim + 1, 0)
    return parts.flatten(dim + 1, dim + 2)


def whole_of(rows: Tensor, axis: Axis) -> Tensor:
    """From the samples' own parts the value of their batch."""
    if axis == FIRST:
        return rows.squeeze(1)
    dim, outer, inner = axis
    parts = rows.unflatten(dim + 1, (outer, inner)).movedim(0, dim + 1)
    return parts.flatten(dim, dim + 2)


def axis_of(whole: Any, alone: Sequence[Any]) -> Any:
    """The axis of a value of a batch, given each sample's alone; of several tensors a list; None: there is none."""
    if isinstance(whole, (tuple, list)):
        return [axis_of(each, [value[place] for value in alone]) for place, each in enumerate(whole)]
    if not isinstance(whole, Tensor) or any(one.dim() != whole.dim() for one in alone):
        return None
    first = alone[0]
    differ = [dim for dim in range(whole.dim()) if whole.shape[dim] != first.shape[dim]]
    if len(differ) != 1:
        return None
    (dim,) = differ
    count = first.shape[dim]
    if count == 0 or whole.shape[dim] != count * len(alone):
        return None
    rows = torch.stack(list(alone))
    for outer in range(1, count + 1):
        if count % outer == 0:
            axis = Axis(dim, outer, count // outer)
            if _alike(whole_of(rows, axis), whole):
                return axis
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    if not b.is_floating_point():
        return torch.equal(a, b)
    size = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    near = 1e-3 if b.dtype == torch.float32 else 1e-8
    return torch.allclose(a, b, near, near * size, equal_nan=True)
