"""Images that are made from known factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.arguments import expect
from fastvae.data.images import ImageDataset

__all__ = ["FactorDataset", "FactorSpace"]

# Pixels drawn at once: 16 MiB of float32 in each temporary.
_PIXELS_AT_ONCE = 2**22


@dataclass(frozen=True)
class FactorSpace:
    """All images that ``len(sizes)`` factors make, of which factor j takes the values 0 .. sizes[j] - 1.

    Args:
        name: of the images.
        names: of the factors.
        sizes: number of values of each factor.
        shape: (C, H, W) of an image.
        draw: factors int64 [N, F] -> uint8 [N, C, H, W] on their device, a function of nothing else; called
            with few images at a time.
    """

    name: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, int, int]
    draw: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.names) != len(self.sizes) or min(self.sizes) < 1:
            raise ValueError(
                f"FactorSpace: expected a name and a size of at least 1 for each factor, "
                f"got names {self.names} and sizes {self.sizes}"
            )

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent uniform factors: int64 [count, F], drawn on the generator's device."""
        device = None if generator is None else generator.device
        columns = [torch.randint(n, (count,), generator=generator, device=device) for n in self.sizes]
        return torch.stack(columns, 1)

    def render(self, factors: Tensor) -> Tensor:
        """The images of ``factors`` (integers [N, F]): uint8 [N, C, H, W] on their device.

        ValueError for another shape or dtype, or a value outside its factor's range.
        """
        expect(
            factors.dim() == 2 and factors.shape[1] == len(self.sizes) and factors.dtype == torch.int64,
            f"{self.name}: factors: expected int64 [N, {len(self.sizes)}]",
            f"{factors.dtype} {list(factors.shape)}",
        )
        sizes = torch.tensor(self.sizes, device=factors.device)
        outside = (factors < 0) | (factors >= sizes)
        if bool(outside.any()):
            row, column = (int(index) for index in outside.nonzero()[0])
            raise ValueError(
                f"{self.name}: factors: expected {self.names[column]} in 0..{self.sizes[column] - 1}, "
                f"got {int(factors[row, column])} in row {row}"
            )
        if not len(factors):
            return torch.empty((0, *self.shape), dtype=torch.uint8, device=factors.device)
        rows = max(1, _PIXELS_AT_ONCE // math.prod(self.shape))
        return torch.cat([self.draw(part) for part in factors.split(rows)])


class FactorDataset(ImageDataset):
    """Images held in memory with the factors they were made from.

    Attributes:
        images, labels, name: as in :class:`ImageDataset`; there are no labels.
        factors: int64 [N, F], values 0 .. ``space.sizes[j]`` - 1.
        space: draws further images of the same kind.
    """

    def __init__(self, space: FactorSpace, factors: Tensor) -> None:
        super().__init__(space.render(factors), name=space.name)
        self.space = space
        self.factors = factors

    def subset(self, indices: Tensor | Sequence[int]) -> FactorDataset:
        """The images at ``indices`` (integers [M]), in that order, as a data set of its own."""
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        part = FactorDataset.__new__(FactorDataset)
        ImageDataset.__init__(part, self.images[chosen], name=self.name)
        part.space, part.factors = self.space, self.factors[chosen]
        return part
