"""Norms of which every sample has its own weight and bias, and the activation behind them, by the kernels for both.

On a CPU; elsewhere by PyTorch's batched operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.lowering import UnsupportedLayer
from fastvae.network.layers import Gradients, Layer, Point
from fastvae.network.layers.base import Products
from fastvae.network.layers.fused import norm_rules, words_of
from fastvae.network.layers.norms import BatchNorm, LayerNorm, NormLayer
from fastvae.network.layers.pointwise import PointwiseLayer
from fastvae.network.program import Operation
from fastvae.network.tape import kernel

from .layers import CopiedLayer, CopiedPoint, Kinds, copied_layer_of, plain_layer_of
from .rows import rows_of, whole_of

__all__ = ["CopiedNorm", "with_activations"]


class CopiedNorm(CopiedLayer):
    """y = phi(g xhat + b).

    Args:
        norm: the same without copies and activation.
    """

    keeps_output = False
    words = "identity"
    """The activation behind it, as the kernels read it."""

    def __init__(self, operation: Operation, kinds: Kinds, norm: NormLayer | BatchNorm) -> None:
        super().__init__(operation, kinds)
        self.x, self.norm = norm.x, norm
        self.axis = kinds.axes[norm.x]
        self._rules: dict[Any, Any] = {}

    def _rules_for(self, x: Tensor) -> Any:
        key = x.shape[1], x.dtype
        if key not in self._rules:
            self._rules[key] = norm_rules(self.norm, self.words, x)
        return self._rules[key]

    def _in_rows(self, value: Tensor, samples: int) -> Tensor:
        """As the kernels take it, [rows, channels, ...], each sample's rows one after the other."""
        if self.axis.dim != 0 or self.axis.outer != 1:
            value = rows_of(value, self.axis, samples).flatten(0, 1)
        return value.reshape(-1, self.norm.numel) if isinstance(self.norm, LayerNorm) else value

    def _value(self, rows: Tensor, like: Sequence[int], samples: int) -> Tensor:
        """Back to the order of the value, of this shape."""
        if self.axis.dim == 0 and self.axis.outer == 1:
            return rows if rows.shape == like else rows.reshape(like)
        one = list(like)
        one[self.axis.dim] //= samples
        return whole_of(rows.reshape(samples, *one), self.axis)

    def _affine(self, point: CopiedPoint) -> list[Tensor | None]:
        given = [None if index < 0 else point.values[index] for index in (self.norm.gain, self.norm.bias)]
        return [each if each is None or each.dim() == 2 else each.flatten(1) for each in given]

    def forward(self, point: Point) -> Tensor:
        """y; mean and s are kept."""
        assert isinstance(point, CopiedPoint)
        x: Tensor = point.values[self.x]
        if isinstance(self.norm, LayerNorm):
            if self.axis.dim >= x.dim() - len(self.norm.shape):
                raise UnsupportedLayer("it is a norm over samples")
        elif self.axis.dim != 0:
            raise UnsupportedLayer("it is a norm over samples")
        rows = self._in_rows(x, point.samples)
        rules, affine = self._rules_for(rows), self._affine(point)
        statistics: list[Tensor | None] = [None, None]
        if isinstance(self.norm, BatchNorm):
            mean, var = point.values[self.norm.mean], point.values[self.norm.var]
            statistics = [mean, torch.rsqrt(var + self.norm.eps)]
        y, *found = kernel(rules.forward, rows, *affine, *statistics)
        point.kept[self.index] = rows, affine, statistics if isinstance(self.norm, BatchNorm) else found
        return self._value(y, x.shape, point.samples)

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See the kernels."""
        assert isinstance(point, CopiedPoint)
        rows, affine, statistics = point.kept.pop(self.index)
        of_y = self._in_rows(dy, point.samples)
        rules = self._rules_for(rows)
        dx, *of_affine = kernel(rules.reverse, of_y, rows, *affine, *statistics, True)
        if grads.wants(self.x):
            grads.add(self.x, self._value(dx, dy.shape, point.samples))
        for index, gradient in zip((self.norm.gain, self.norm.bias), of_affine, strict=True):
            if index >= 0:
                grads.add(index, gradient.reshape(point.values[index].shape))


@copied_layer_of("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
def norm(operation: Operation, kinds: Kinds) -> Layer | None:
    """With weight or bias of the samples' own."""
    plain = plain_layer_of(operation, kinds)
    if kinds.device != "cpu" or not isinstance(plain, (NormLayer, BatchNorm)):
        return None
    own = [each for each in (plain.gain, plain.bias) if each >= 0]
    fixed = [plain.mean, plain.var] if isinstance(plain, BatchNorm) else []
    if kinds.axes[plain.x] is None or not all(kinds.is_copied[each] for each in own):
        return None
    return None if any(kinds.is_trained[each] for each in fixed) else CopiedNorm(operation, kinds, plain)


def with_activations(layers: Sequence[Layer], uses: Sequence[int]) -> list[Layer]:
    """Norms together with the activations behind them, where the norm's result is used once."""
    norms = {layer.index: layer for layer in layers if isinstance(layer, CopiedNorm)}
    found: list[Layer] = []
    for layer in layers:
        before = norms.get(layer.x) if isinstance(layer, PointwiseLayer) and uses[layer.x] == 1 else None
        words = None if before is None else words_of(layer)  # type: ignore[arg-type]
        if before is None or words is None:
            found.append(layer)
            continue
        found.remove(before)
        before.index, before.words = layer.index, words
        found.append(before)
    return found
