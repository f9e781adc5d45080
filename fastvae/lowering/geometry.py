"""The numbers of a convolution: those that PyTorch refuses, and the sizes that the others give.

csrc/network/geometry.h holds the same rules, for sizes that are known only when the network runs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

Pair = tuple[int, int]

MOST = 2**20
"""Of each number: no network needs more, and what is computed from them stays far from overflowing."""


def pair(value: Any) -> Pair:
    """One integer for height and width, or one each. TypeError for anything else."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    if len(values) not in (1, 2):
        raise TypeError(f"expected one integer or two, got {value!r}")
    return operator.index(values[0]), operator.index(values[-1])


class Convolution(NamedTuple):
    """What a Conv2d or a ConvTranspose2d does to heights and widths."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    output_padding: Pair = (0, 0)
    transposed: bool = False

    def fault(self) -> str | None:
        """Why PyTorch raises when a layer with these numbers runs, or None."""
        for name, least in (
            ("kernel_size", 1),
            ("stride", 1),
            ("padding", 0),
            ("dilation", 1),
            ("output_padding", 0),
        ):
            numbers: Pair = getattr(self, name)
            if min(numbers) < least:
                return f"{name} must be at least {least}, got {numbers}"
        for extra, stride, dilation in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if extra >= max(stride, dilation):
                return (
                    f"output_padding must be smaller than stride or dilation, got {self.output_padding} with "
                    f"stride {self.stride} and dilation {self.dilation}"
                )
        return None

    def largest(self) -> int:
        """The largest of the numbers."""
        return max(map(max, self[:5]))

    def sizes(self, sizes: Sequence[int | None]) -> tuple[int | None, ...]:
        """Height and width of the output, from those of the input; None where they are not known."""
        return tuple(None if size is None else self._size(size, axis) for axis, size in enumerate(sizes))

    def _size(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        if self.transposed:
            grown = (size - 1) * self.stride[axis] + reach + self.output_padding[axis]
            return grown - 2 * self.padding[axis]
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
