"""A program of any batch from two runs at fixed ones: sizes that differ between them are linear in the batch.

For forwards that ask for the batch size as a number, which torch.export then takes for a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastvae.lowering.errors import UnsupportedLayer
from fastvae.network.program import Operation, Slot


def linear_size(batch: int, slope: int, offset: int) -> int:
    """slope batch + offset."""
    return slope * batch + offset


def aligned(
    first: Sequence[Operation], second: Sequence[Operation], batches: tuple[int, int], start: int
) -> tuple[list[Operation], dict[int, int]]:
    """The operations of both, and the new numbers of their results.

    Args:
        first, second: of the two runs, with the same numbers for the same operations.
        batches: samples of the two runs.
        start: the first number.

    Raises:
        UnsupportedLayer: the runs differ in more than sizes.
    """
    if [each.target for each in first] != [each.target for each in second]:
        raise UnsupportedLayer("its forward does something else for batches of another size")
    found = [Operation(start, "batch", torch.ops.aten.sym_size.int, [Slot(0), 0], {}, True)]
    numbers: dict[int, int] = {}
    sizes: dict[tuple[int, int], int] = {}

    def size(a: int, b: int) -> Slot:
        slope, rest = divmod(b - a, batches[1] - batches[0])
        offset = a - slope * batches[0]
        # An offset: a size such as 2 batch - 1, which is a rare thing and no mistake.
        if rest:
            raise UnsupportedLayer("its forward has a size that is not linear in the number of samples")
        if (slope, offset) not in sizes:
            index = start + len(found)
            found.append(Operation(index, "size", linear_size, [Slot(start), slope, offset], {}, True))
            sizes[slope, offset] = index
        return Slot(sizes[slope, offset])

    def merged(a: Any, b: Any) -> Any:
        if isinstance(a, Slot) and a == b:
            return Slot(numbers.get(a.index, a.index))
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            return [merged(*pair) for pair in zip(a, b, strict=True)]
        if type(a) is int and type(b) is int and a != b:
            return size(a, b)
        if type(a) is type(b) and (a == b or (isinstance(a, float) and a != a and b != b)):
            return a
        raise UnsupportedLayer("its forward computes with the number of samples")

    for one, other in zip(first, second, strict=True):
        args = merged(one.args, other.args)
        if set(one.kwargs) != set(other.kwargs):
            raise UnsupportedLayer("its forward does something else for batches of another size")
        kwargs = {key: merged(value, other.kwargs[key]) for key, value in one.kwargs.items()}
        numbers[one.index] = start + len(found)
        found.append(
            Operation(start + len(found), one.name, one.target, args, kwargs, one.is_number, one.is_complex)
        )
    return found, numbers
