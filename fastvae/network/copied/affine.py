"""Linear layers of which every sample has its own: y_b = x_b W_b^T + b_b; dx = dy W, dW = dy^T x, db = sum dy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.lowering import UnsupportedLayer
from fastvae.network.layers import Gradients, Layer, Point
from fastvae.network.layers.base import Products
from fastvae.network.program import Operation, Slot

from .layers import CopiedGradients, CopiedLayer, CopiedPoint, Kinds, copied_layer_of
from .rows import FIRST, rows_of


class CopiedLinear(CopiedLayer):
    """See above."""

    keeps_output = False

    def __init__(self, operation: Operation, kinds: Kinds, x: int, weight: int, bias: int) -> None:
        super().__init__(operation, kinds)
        self.x, self.weight, self.bias = x, weight, bias

    def _matrix(self, point: CopiedPoint) -> Tensor:
        """x: [B, R, in]."""
        value, axis = point.values[self.x], self.kinds.axes[self.x]
        if axis.dim == value.dim() - 1:
            raise UnsupportedLayer("it multiplies numbers of different samples")
        if value.dim() == 2 and axis == FIRST:
            return value.unsqueeze(1)
        return self._rows(point, self.x).flatten(1, -2)

    def forward(self, point: Point) -> Tensor:
        """y."""
        assert isinstance(point, CopiedPoint)
        x, weight = self._matrix(point), point.values[self.weight]
        if self.bias < 0:
            y = torch.bmm(x, weight.mT)
        else:
            y = torch.baddbmm(point.values[self.bias].unsqueeze(1), x, weight.mT)
        point.kept[self.index] = x
        return self._shaped(y, point.values[self.x], self.index)

    def _shaped(self, rows: Tensor, like: Tensor, index: int) -> Tensor:
        """From [B, R, n] the form of ``like``, with n numbers in the last dimension."""
        axis = self.kinds.axes[index]
        if like.dim() == 2 and axis == FIRST:
            return rows.squeeze(1)
        one = list(like.shape[:-1])
        one[axis.dim] = axis.outer * axis.inner
        return self._whole(rows.unflatten(1, one), index)

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        assert isinstance(point, CopiedPoint) and isinstance(grads, CopiedGradients)
        x = point.kept.pop(self.index)
        if dy.dim() == 2 and self.kinds.axes[self.index] == FIRST:
            rows = dy.unsqueeze(1)
        else:
            rows = rows_of(dy, self.kinds.axes[self.index], point.samples).flatten(1, -2)
        if grads.wants(self.x):
            dx = torch.bmm(rows, point.values[self.weight])
            grads.add(self.x, self._shaped(dx, point.values[self.x], self.x))
        grads.add_factors(self.weight, rows, x)
        if self.bias >= 0:
            grads.add(self.bias, rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(1))


@copied_layer_of("linear")
def linear(operation: Operation, kinds: Kinds) -> Layer | None:
    """aten.linear(x, weight, bias=None): weight and bias of the samples' own, x of data."""
    x, weight, *rest = operation.args
    bias = rest[0] if rest else None
    own = [each for each in (weight, bias) if each is not None]
    if operation.kwargs or not all(isinstance(each, Slot) and kinds.is_copied[each.index] for each in own):
        return None
    axis = kinds.axes[x.index]
    # The last dimension is what is multiplied.
    if axis is None or kinds.axes[operation.index] is None:
        return None
    return CopiedLinear(operation, kinds, x.index, weight.index, -1 if bias is None else bias.index)
