"""Normalisation: LayerNorm, GroupNorm, InstanceNorm, RMSNorm over a sample's own elements; BatchNorm in eval mode.

Over a group of n elements xhat = (x - m) s, s = (var + eps)^(-1/2), y = g xhat + b; with
P(w) = w - mean(w) - xhat mean(w xhat):

    reverse   w = g dy:  dx = s P(w), dg = dy xhat, db = dy
    tangent   xhatdot = s P(xdot), ydot = g xhatdot
    bend      with sdot = -s^2 mean(xhat xdot):
              dx = sdot P(w) - s (xhatdot mean(w xhat) + xhat mean(w xhatdot)), dg = dy xhatdot

RMSNorm is the same without the means of w and x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.program import Slot

from .base import Gradients, Layer, Point, Products, Values, folded, layer_of, over_latents


class _Norm:
    """What a norm keeps at a point: mean and s of the groups, and results that are asked for again."""

    def __init__(self, x: Tensor, mean: Tensor | None, s: Tensor) -> None:
        self.x, self.mean, self.s = x, mean, s
        self._xhat: Tensor | None = None
        self.pulled: tuple[Tensor, Tensor] | None = None
        """dy, and s P(g dy)."""
        self.moved: tuple[Tensor, Tensor] | None = None
        """xdot, and s P(xdot)."""


class NormLayer(Layer):
    """See above.

    Args:
        gain, bias: numbers of the passive tensors, -1: none.
        eps: None: the dtype's own.
        centred: whether the mean is taken away.
    """

    keeps_output = False

    def __init__(
        self,
        operation: Any,
        active: Sequence[bool],
        gain: int,
        bias: int,
        eps: float | None,
        centred: bool = True,
    ) -> None:
        super().__init__(operation, active)
        self.gain, self.bias, self.eps, self.centred = gain, bias, eps, centred

    def groups(self, tensor: Tensor, rank: int) -> tuple[Tensor, list[int]]:
        """A view of a value of so many dimensions, or of its dot rows, and the dimensions of a group in it."""
        raise NotImplementedError

    def affine(self, values: Values, index: int, rank: int) -> Tensor:
        """Gain or bias in the shape in which it is broadcast to an input of so many dimensions."""
        raise NotImplementedError

    def normalise(
        self, x: Tensor, gain: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """y, and the groups' mean and s in the shape in which they are broadcast to ``groups``."""
        rows, dims = self.groups(x, x.dim())
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        s = torch.rsqrt(rows.square().mean(dims, keepdim=True) + eps)
        y = (rows * s).reshape(x.shape)
        return y if gain is None else y * gain, None, s

    def pull(
        self, dy: Tensor, at: _Norm, gain: Tensor | None, bias: Tensor | None, mask: list[bool]
    ) -> tuple[Any, ...] | None:
        """s P(g dy), dg and db of rows without latents, where PyTorch has one kernel for it."""
        return None

    def forward(self, point: Point) -> Tensor:
        """y; mean and s are kept."""
        x = point.values[self.x]
        gain = None if self.gain < 0 else point.values[self.gain]
        bias = None if self.bias < 0 else point.values[self.bias]
        y, mean, s = self.normalise(x, gain, bias)
        point.kept[self.index] = _Norm(x, mean, s)
        return y

    def _xhat(self, at: _Norm) -> Tensor:
        """In the view of ``groups``."""
        if at._xhat is None:
            rows, _ = self.groups(at.x, at.x.dim())
            at._xhat = (rows if at.mean is None else rows - at.mean) * at.s
        return at._xhat

    def _times_gain(self, point: Point, rows: Tensor, rank: int) -> Tensor:
        return rows if self.gain < 0 else rows * self.affine(point.values, self.gain, rank)

    def _projected(self, w: Tensor, at: _Norm) -> Tensor:
        """s P(w), in the shape of w."""
        rows, dims = self.groups(w, at.x.dim())
        xhat = self._xhat(at)
        found = rows - xhat * (rows * xhat).mean(dims, keepdim=True)
        if self.centred:
            found = found - rows.mean(dims, keepdim=True)
        return (found * at.s).reshape(w.shape)

    def _pulled(self, point: Point, dy: Tensor, at: _Norm) -> Tensor:
        """s P(g dy)."""
        if at.pulled is None or at.pulled[0] is not dy:
            rank = at.x.dim()
            gain = None if self.gain < 0 else point.values[self.gain]
            found = self.pull(dy, at, gain, None, [True, False, False]) if dy.dim() == rank else None
            dx = self._projected(self._times_gain(point, dy, rank), at) if found is None else found[0]
            at.pulled = dy, dx
        return at.pulled[1]

    def _moved(self, dot: Tensor, at: _Norm) -> Tensor:
        """s P(xdot)."""
        if at.moved is None or at.moved[0] is not dot:
            found = self.pull(dot, at, None, None, [True, False, False]) if dot.dim() == at.x.dim() else None
            at.moved = dot, self._projected(dot, at) if found is None else found[0]
        return at.moved[1]

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        at: _Norm = point.kept[self.index]
        if products is None:
            if grads.wants(self.x):
                grads.add(self.x, self._pulled(point, dy, at))
            return
        wanted = [grads.wants(self.x), self._trains(grads, self.gain), self._trains(grads, self.bias)]
        gain = None if self.gain < 0 else point.values[self.gain]
        bias = None if self.bias < 0 else point.values[self.bias]
        found = self.pull(dy, at, gain, bias, wanted) if gain is not None else None
        if found is not None:
            for index, gradient, wants in zip((self.x, self.gain, self.bias), found, wanted, strict=True):
                if wants:
                    grads.add(index, gradient)
            return
        if wanted[0]:
            grads.add(self.x, self._pulled(point, dy, at))
        if wanted[1]:
            rows, _ = self.groups(dy, at.x.dim())
            self._add_affine(point, grads, self.gain, (rows * self._xhat(at)).reshape(dy.shape), at.x)
        if wanted[2]:
            self._add_affine(point, grads, self.bias, dy, at.x)

    @staticmethod
    def _trains(grads: Gradients, index: int) -> bool:
        return index >= 0 and grads.wants(index)

    def _add_affine(self, point: Point, grads: Gradients, index: int, each: Tensor, x: Tensor) -> None:
        like = self.affine(point.values, index, x.dim())
        summed = over_latents(each, x.dim()).sum_to_size(like.shape)
        grads.add(index, summed.reshape(point.values[index].shape))

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """See above."""
        at: _Norm = point.kept[self.index]
        return self._times_gain(point, self._moved(dots[self.x], at), at.x.dim())

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """See above."""
        if dots[self.x] is None:
            return
        at: _Norm = point.kept[self.index]
        rank = at.x.dim()
        moved = self._moved(dots[self.x], at)
        if grads.wants(self.x):
            xhat = self._xhat(at)
            w, dims = self.groups(self._times_gain(point, dy, rank), rank)
            pulled, _ = self.groups(self._pulled(point, dy, at), rank)
            along, _ = self.groups(dots[self.x], rank)
            xhatdot, _ = self.groups(moved, rank)
            bent = pulled * (xhat * along).mean(dims, keepdim=True)
            bent = bent + xhatdot * (w * xhat).mean(dims, keepdim=True)
            bent = (bent + xhat * (w * xhatdot).mean(dims, keepdim=True)) * -at.s
            grads.add(self.x, over_latents(bent.reshape(dy.shape), rank))
        if self._trains(grads, self.gain):
            self._add_affine(point, grads, self.gain, dy * moved, at.x)


class LayerNorm(NormLayer):
    """Over the last dimensions."""

    def __init__(self, *args: Any, shape: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shape = list(shape)
        self.numel = math.prod(self.shape)

    def groups(self, tensor: Tensor, rank: int) -> tuple[Tensor, list[int]]:
        """As it is."""
        return tensor, list(range(-len(self.shape), 0))

    def affine(self, values: Values, index: int, rank: int) -> Tensor:
        """As it is."""
        return values[index]

    def normalise(
        self, x: Tensor, gain: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See ``NormLayer``."""
        if not self.centred:
            return super().normalise(x, gain, bias)
        return torch.native_layer_norm(x, self.shape, gain, bias, self.eps or 0.0)

    def pull(
        self, dy: Tensor, at: _Norm, gain: Tensor | None, bias: Tensor | None, mask: list[bool]
    ) -> tuple[Any, ...] | None:
        """See ``NormLayer``."""
        if not self.centred:
            return None
        return torch.ops.aten.native_layer_norm_backward(
            dy, at.x, self.shape, at.mean, at.s, gain, bias, mask
        )


class ChannelNorm(NormLayer):
    """GroupNorm, and InstanceNorm with a group for each channel: over some channels of [B, C, ...] and all places."""

    def __init__(self, *args: Any, num_groups: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_groups = num_groups

    def groups(self, tensor: Tensor, rank: int) -> tuple[Tensor, list[int]]:
        """[..., groups, channels of one, places]: a view in any layout."""
        count = self.num_groups or tensor.shape[1 - rank]
        return tensor.unflatten(1 - rank, (count, -1)), list(range(1 - rank, 0))

    def affine(self, values: Values, index: int, rank: int) -> Tensor:
        """[C, 1, ...]."""
        return values[index].reshape(-1, *[1] * (rank - 2))

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        return len(x), x.shape[1], x.shape[2:].numel(), self.num_groups or x.shape[1]

    def normalise(
        self, x: Tensor, gain: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See ``NormLayer``."""
        y, mean, s = torch.native_group_norm(_dense(x), gain, bias, *self._sizes(x), self.eps or 0.0)
        shape = (*mean.shape, *[1] * (x.dim() - 1))
        return y, mean.reshape(shape), s.reshape(shape)

    def pull(
        self, dy: Tensor, at: _Norm, gain: Tensor | None, bias: Tensor | None, mask: list[bool]
    ) -> tuple[Any, ...] | None:
        """See ``NormLayer``."""
        assert at.mean is not None
        x, (*sizes, count) = _dense(at.x), self._sizes(at.x)
        statistics = at.mean.reshape(len(x), count), at.s.reshape(len(x), count)
        return torch.ops.aten.native_group_norm_backward(
            _like(dy, x), x, *statistics, gain, *sizes, count, mask
        )


def _dense(x: Tensor) -> Tensor:
    """As PyTorch's kernel reads it: contiguous, or with the channels last."""
    return x if x.is_contiguous() or _is_last(x) else x.contiguous()


def _is_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _like(dy: Tensor, x: Tensor) -> Tensor:
    return dy.contiguous(memory_format=torch.channels_last if _is_last(x) else torch.contiguous_format)


def _number(arg: Any) -> int:
    return arg.index if isinstance(arg, Slot) else -1


def _suits(operation: Any, active: Sequence[bool]) -> bool:
    return [slot for slot in operation.slots if active[slot]] == [operation.args[0].index]


@layer_of("layer_norm", "rms_norm")
def layer_norm(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.layer_norm(x, shape, weight=None, bias=None, eps=1e-5, ...), aten.rms_norm(x, shape, weight, eps)."""
    if not _suits(operation, active):
        return None
    _, shape, *others = operation.args
    rest: list[Any] = list(others)
    if operation.kind == "rms_norm":
        weight, eps = [*rest, None, None][:2]
        return LayerNorm(operation, active, _number(weight), -1, eps, False, shape=shape)
    weight, bias, eps = [*rest, *[None, None, 1e-5][len(rest) :]][:3]
    return LayerNorm(operation, active, _number(weight), _number(bias), eps, shape=shape)


@layer_of("group_norm")
def group_norm(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.group_norm(x, groups, weight=None, bias=None, eps=1e-5, ...)."""
    if not _suits(operation, active):
        return None
    _, groups, *others = operation.args
    rest: list[Any] = list(others)
    weight, bias, eps = [*rest, *[None, None, 1e-5][len(rest) :]][:3]
    return ChannelNorm(operation, active, _number(weight), _number(bias), eps, num_groups=groups)


@layer_of("instance_norm")
def instance_norm(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.instance_norm(x, weight, bias, mean, var, use_input_stats, momentum, eps, ...)."""
    _, weight, bias, mean, var, of_input, _, eps, *_ = operation.args
    if not _suits(operation, active):
        return None
    if not of_input:
        numbers = _number(weight), _number(bias), _number(mean), _number(var)
        return None if mean is None or var is None else BatchNorm(operation, active, *numbers, eps)
    return ChannelNorm(operation, active, _number(weight), _number(bias), eps, num_groups=0)


class BatchNorm(Layer):
    """y = (x - m) (v + eps)^(-1/2) g + b with m and v of the training: linear in x.

    dg = dy xhat, db = dy; the second-order term is dg = dy xhatdot. m and v get no gradient.
    """

    keeps_output = False

    def __init__(
        self, operation: Any, active: Sequence[bool], gain: int, bias: int, mean: int, var: int, eps: float
    ) -> None:
        super().__init__(operation, active)
        self.gain, self.bias, self.mean, self.var, self.eps = gain, bias, mean, var, eps

    def forward(self, point: Point) -> Tensor:
        """y; the factors of channels are kept, in the shape in which they are broadcast."""
        x = point.values[self.x]
        shape = (-1, *[1] * (x.dim() - 2))
        s = torch.rsqrt(point.values[self.var] + self.eps).reshape(shape)
        scale = s if self.gain < 0 else s * point.values[self.gain].reshape(shape)
        shift = -point.values[self.mean].reshape(shape) * scale
        if self.bias >= 0:
            shift = shift + point.values[self.bias].reshape(shape)
        point.kept[self.index] = s, scale, shape
        y = torch.addcmul(shift, x, scale)
        return y

    def reverse(self, point: Point, dy: Tensor, grads: Gradients, products: Products | None) -> None:
        """See above."""
        s, scale, shape = point.kept[self.index]
        if grads.wants(self.x):
            grads.add(self.x, dy * scale)
        if products is not None:
            if self.gain >= 0 and grads.wants(self.gain):
                xhat = (point.values[self.x] - point.values[self.mean].reshape(shape)) * s
                grads.add(self.gain, self._summed(dy * xhat, xhat.dim()))
            if self.bias >= 0 and grads.wants(self.bias):
                grads.add(self.bias, self._summed(dy, len(shape) + 1))

    @staticmethod
    def _summed(rows: Tensor, rank: int) -> Tensor:
        rows = folded(rows, rank)
        return rows.sum([dim for dim in range(rows.dim()) if dim != 1])

    def tangent(self, point: Point, dots: Values) -> Tensor:
        """See above."""
        return dots[self.x] * point.kept[self.index][1]

    def bend(self, point: Point, dy: Tensor, dots: Values, grads: Gradients, products: Products) -> None:
        """See above."""
        if self.gain >= 0 and grads.wants(self.gain) and dots[self.x] is not None:
            s = point.kept[self.index][0]
            grads.add(self.gain, self._summed(dy * (dots[self.x] * s), point.values[self.x].dim()))


@layer_of("batch_norm")
def batch_norm(operation: Any, active: Sequence[bool]) -> Layer | None:
    """aten.batch_norm(x, weight, bias, mean, var, training, momentum, eps, ...) without training."""
    if not _suits(operation, active):
        return None
    _, weight, bias, mean, var, training, _, eps, *_ = operation.args
    if training or mean is None or var is None:
        return None
    numbers = _number(weight), _number(bias), _number(mean), _number(var)
    return BatchNorm(operation, active, *numbers, eps)
