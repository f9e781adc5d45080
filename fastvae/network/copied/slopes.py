"""Activations with slopes of the samples' own: PReLU, y = x where x > 0, else a_b x; da = the sum of x dy there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.network.layers import Gradients, Layer, Point
from fastvae.network.layers.base import Products
from fastvae.network.program import Operation

from .layers import CopiedLayer, CopiedPoint, Kinds, copied_layer_of
from .rows import rows_of


class CopiedPReLU(CopiedLayer):
    """See above; one slope, or one a channel.

    Args:
        slope: the number of its slopes' value, [B, 1] or [B, channels].
    """

    keeps_output = False

    def __init__(self, operation: Operation, kinds: Kinds, x: int, slope: int) -> None:
        super().__init__(operation, kinds)
        self.x, self.slope = x, slope

    def forward(self, point: Point) -> Tensor:
        """y; x and the slopes as they meet it are kept."""
        assert isinstance(point, CopiedPoint)
        rows, slope = self._rows(point, self.x), point.values[self.slope]
        # [B, samples' own first dimension, channels, ...]
        channels = [slope.shape[1], *[1] * (rows.dim() - 3)] if rows.dim() > 2 else []
        slope = slope.reshape(len(slope), 1, *channels)
        point.kept[self.index] = rows, slope
        return self._whole(torch.where(rows > 0, rows, slope * rows), self.index)

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        assert isinstance(point, CopiedPoint)
        rows, slope = point.kept.pop(self.index)
        of_y = rows_of(dy, self.kinds.axes[self.index], point.samples)
        if grads.wants(self.x):
            grads.add(self.x, self._whole(torch.where(rows > 0, of_y, slope * of_y), self.x))
        if grads.wants(self.slope):
            found = (rows.clamp(max=0) * of_y).sum_to_size(slope.shape)
            grads.add(self.slope, found.reshape(point.values[self.slope].shape))


@copied_layer_of("prelu")
def prelu(operation: Operation, kinds: Kinds) -> Layer | None:
    """aten.prelu(x, slope), of the samples' own slopes."""
    x, slope = (slot.index for slot in operation.args)
    from_data = kinds.axes[x] is not None and kinds.axes[operation.index] is not None
    return CopiedPReLU(operation, kinds, x, slope) if from_data and kinds.is_copied[slope] else None
