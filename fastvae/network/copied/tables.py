"""Look-ups in tables of the samples' own: y = table_b[numbers], dtable = the rows of dy added up by number."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.network.layers import Gradients, Layer, Point
from fastvae.network.layers.base import Products
from fastvae.network.program import Operation

from .layers import CopiedLayer, CopiedPoint, Kinds, copied_layer_of
from .rows import rows_of


class CopiedLookup(CopiedLayer):
    """See above.

    Args:
        padding: the number whose row gets no gradient; None: there is none.
    """

    keeps_output = False

    def __init__(
        self, operation: Operation, kinds: Kinds, table: int, numbers: int, padding: int | None
    ) -> None:
        super().__init__(operation, kinds)
        self.table, self.numbers, self.padding = table, numbers, padding

    def forward(self, point: Point) -> Tensor:
        """y; the places of the numbers in all tables are kept."""
        assert isinstance(point, CopiedPoint)
        table, numbers = point.values[self.table], self._rows(point, self.numbers)
        first = torch.arange(point.samples, device=numbers.device) * table.shape[1]
        places = numbers + first.reshape(-1, *[1] * (numbers.dim() - 1))
        point.kept[self.index] = numbers, places.flatten()
        y = table.flatten(0, 1)[places.flatten()]
        return self._whole(y.unflatten(0, numbers.shape), self.index)

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        assert isinstance(point, CopiedPoint)
        numbers, places = point.kept.pop(self.index)
        rows = rows_of(dy, self.kinds.axes[self.index], point.samples)
        if self.padding is not None:
            rows = rows.masked_fill((numbers == self.padding).unsqueeze(-1), 0.0)
        table: Tensor = point.values[self.table]
        found = torch.zeros_like(table).flatten(0, 1)
        found.index_add_(0, places, rows.reshape(len(places), -1))
        grads.add(self.table, found.unflatten(0, table.shape[:2]))


@copied_layer_of("embedding")
def embedding(operation: Operation, kinds: Kinds) -> Layer | None:
    """aten.embedding(table, numbers, padding_idx=-1, ...), of the samples' own tables."""
    table, numbers, *rest = operation.args
    if operation.kwargs or any(rest[1:]) or not kinds.is_copied[table.index]:
        return None
    if kinds.axes[numbers.index] is None or kinds.axes[operation.index] is None:
        return None
    padding = rest[0] if rest and rest[0] >= 0 else None
    return CopiedLookup(operation, kinds, table.index, numbers.index, padding)
