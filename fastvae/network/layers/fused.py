"""A norm and the activation behind it, or either alone, by the kernels of csrc/kernels/cpu/norm_activation.cpp.

Where torch needs ten to twenty passes over memory for a second-order term, these take three. On a CPU only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae._extension import raw
from fastvae.lowering.activations import words_of_operator
from fastvae.network.tape import kernel

from .base import Gradients, Layer, Point, Products, Values
from .norms import BatchNorm, ChannelNorm, LayerNorm, NormLayer
from .pointwise import PointwiseLayer
from .shapes import CHANNELS_LAST


def words_of(layer: PointwiseLayer) -> str | None:
    """The activation as the kernels read it; None: they do not know it."""
    words = words_of_operator(layer.operation.kind, layer.operation.args[1:], layer.operation.kwargs)
    return None if words is None else " ".join([words[0], *(repr(float(number)) for number in words[1])])


def norm_rules(norm: NormLayer | BatchNorm | None, words: str, x: Tensor) -> Any:
    """The kernels for x [rows, channels, ...], with an activation as they read it behind the norm."""
    groups = (norm.num_groups or x.shape[1]) if isinstance(norm, ChannelNorm) else 1
    statistics, eps = "none", 0.0
    if isinstance(norm, BatchNorm):
        statistics = "given"
    elif norm is not None:
        statistics = "groups" if norm.centred else "root_square"
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return raw.NormActivationRules(statistics, groups, eps, words)


class FusedLayer(Layer):
    """y = phi(norm(x)); see the kernels for the rules.

    Args:
        norm: None: the activation alone.
        activation: None: the norm alone.
        words: the activation as the kernels read it.
    """

    keeps_output = False

    def __init__(
        self,
        norm: NormLayer | BatchNorm | None,
        activation: PointwiseLayer | None,
        words: str,
        active: Sequence[bool],
    ) -> None:
        first = norm or activation
        last = activation or norm
        assert first is not None and last is not None
        super().__init__(first.operation, active)
        self.operations = tuple(each.operation for each in (norm, activation) if each is not None)
        self.index, self.norm, self.words = last.index, norm, words
        self.gain = -1 if norm is None else norm.gain
        self.bias = -1 if norm is None else norm.bias
        piecewise = activation is None or activation.function.curve is None
        self.linear = piecewise and (norm is None or (isinstance(norm, BatchNorm) and norm.gain < 0))
        self._rules: dict[tuple[int, torch.dtype], Any] = {}

    def _rules_for(self, x: Tensor) -> Any:
        key = x.shape[1] if isinstance(self.norm, ChannelNorm) else 1, x.dtype
        if key not in self._rules:
            self._rules[key] = norm_rules(self.norm, self.words, x)
        return self._rules[key]

    def _last(self, x: Tensor) -> int:
        """How many dimensions an image has, if x has its channels last under a norm over all of it; or 0.

        Such a norm is the same in any order.
        """
        layout = CHANNELS_LAST.get(x.dim())
        if not isinstance(self.norm, LayerNorm) or len(self.norm.shape) != x.dim() - 1 or layout is None:
            return 0
        return 0 if x.is_contiguous() or not x.is_contiguous(memory_format=layout) else x.dim() - 1

    def _rows(self, tensor: Tensor, rank: int, last: int) -> Tensor:
        """As the kernels take it: [rows, channels, ...]."""
        if isinstance(self.norm, LayerNorm):
            if last:
                tensor = tensor.movedim(-last, -1)
            known = tensor.dim() == 2 and tensor.shape[1] == self.norm.numel
            return tensor if known else tensor.reshape(-1, self.norm.numel)
        if tensor.dim() > rank:
            tensor = tensor.flatten(0, 1)
        return tensor if tensor.dim() > 1 else tensor[:, None]

    def _affine(self, values: Values, last: int) -> tuple[Tensor | None, Tensor | None]:
        gain, bias = (None if index < 0 else values[index] for index in (self.gain, self.bias))
        if isinstance(self.norm, LayerNorm) and len(self.norm.shape) > 1:
            gain, bias = (
                None if each is None else (each.movedim(0, -1) if last else each).flatten()
                for each in (gain, bias)
            )
        return gain, bias

    def _of(self, point: Point) -> tuple[Any, Tensor, tuple[Any, ...], int, int]:
        """The rules, x, gain, bias, mean and s, how many dimensions x has, and ``_last``."""
        x: Tensor = point.values[self.x]
        last = self._last(x)
        rows = self._rows(x, x.dim(), last)
        others = (*self._affine(point.values, last), *point.kept[self.index])
        return self._rules_for(rows), rows, others, x.dim(), last

    def forward(self, point: Point) -> Tensor:
        """y; mean and s are kept."""
        x: Tensor = point.values[self.x]
        last = self._last(x)
        rows = self._rows(x, x.dim(), last)
        statistics: tuple[Tensor | None, Tensor | None] = None, None
        if isinstance(self.norm, BatchNorm):
            s = torch.rsqrt(point.values[self.norm.var] + self.norm.eps)
            statistics = point.values[self.norm.mean], s
        y, *statistics_found = kernel(
            self._rules_for(rows).forward, rows, *self._affine(point.values, last), *statistics
        )
        point.kept[self.index] = statistics if isinstance(self.norm, BatchNorm) else tuple(statistics_found)
        return _shaped(y, x.shape, last)

    def _trains(self, grads: Gradients) -> bool:
        return any(index >= 0 and grads.wants(index) for index in (self.gain, self.bias))

    def _add(
        self, point: Point, grads: Gradients, found: tuple[Any, ...], shape: Sequence[int], last: int
    ) -> None:
        dx, *affine = found
        if grads.wants(self.x):
            grads.add(self.x, _shaped(dx, shape, last))
        for index, gradient in zip((self.gain, self.bias), affine, strict=True):
            if index >= 0 and gradient is not None and grads.wants(index):
                grads.add(index, _shaped(gradient, point.values[index].shape, last))

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See ``Layer``."""
        rules, x, others, rank, last = self._of(point)
        affine = products is not None and self._trains(grads)
        found = kernel(rules.reverse, self._rows(dy, rank, last), x, *others, affine)
        self._add(point, grads, found, dy.shape, last)

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """See ``Layer``."""
        rules, x, others, rank, last = self._of(point)
        dot: Tensor = dots[self.x]
        found: Tensor = kernel(rules.tangent, self._rows(dot, rank, last), x, *others)
        return _shaped(found, dot.shape, last)

    def adjoint(
        self, point: Point, dy_dot: Any, dy: Any, dots: Values, grads: Gradients, products: Products
    ) -> None:
        """Both terms in one pass, where no latents stand in front."""
        dot = dots[self.x]
        if dot is None or dy is None:
            if dy_dot is not None:
                self.reverse(point, dy_dot, grads, products)
            return
        rules, x, others, rank, last = self._of(point)
        dy_rows, dot_rows = self._rows(dy, rank, last), self._rows(dot, rank, last)
        affine = self._trains(grads)
        if dot.dim() == rank:
            rows = None if dy_dot is None else self._rows(dy_dot, rank, last)
            found = kernel(rules.adjoint, rows, dy_rows, dot_rows, x, *others, affine)
            self._add(point, grads, found, dot.shape, last)
            return
        if dy_dot is not None:
            self.reverse(point, dy_dot, grads, products)
        dx, *of_affine = kernel(rules.adjoint, None, dy_rows, dot_rows, x, *others, affine)
        dx = _shaped(dx, dot.shape, last).sum(0)
        self._add(point, grads, (dx, *of_affine), dot.shape[1:], last)


def _shaped(tensor: Tensor, shape: Sequence[int], last: int = 0) -> Tensor:
    """A reshape costs as much as a small kernel, also where there is nothing to do.

    Args:
        tensor: in the order of memory.
        shape: of the result.
        last: how many dimensions an image has whose channels are last in memory; 0: they are not.
    """
    if tensor.shape == shape:
        return tensor
    if not last:
        return tensor.reshape(shape)
    front, channels, places = shape[:-last], shape[-last], shape[1 - last :]
    return tensor.reshape(*front, *places, channels).movedim(-1, -last)


def fuse(layers: Sequence[Layer], output: int, active: Sequence[bool]) -> list[Layer]:
    """Put norms and activations together where the norm's result is used once, and take the kernels for both."""
    uses: dict[int, int] = {output: 1}
    for layer in layers:
        for slot in layer.slots:
            uses[slot] = uses.get(slot, 0) + 1
    norms: dict[int, Layer] = {}
    found: list[Layer | None] = []
    places: dict[int, int] = {}
    for layer in layers:
        fused: Layer | None = None
        if isinstance(layer, (NormLayer, BatchNorm)):
            fused = FusedLayer(layer, None, "identity", active)
            norms[layer.index] = layer
            places[layer.index] = len(found)
        elif isinstance(layer, PointwiseLayer):
            words = words_of(layer)
            norm = norms.get(layer.x)
            if words is not None and norm is not None and uses[layer.x] == 1:
                found[places[layer.x]] = None
                fused = FusedLayer(norm, layer, words, active)  # type: ignore[arg-type]
            elif words is not None and layer.function.curve is not None:
                fused = FusedLayer(None, layer, words, active)
        found.append(fused or layer)
    return [layer for layer in found if layer is not None]
