"""A lowered network in PyTorch's own operations: what can be differentiated as often as one likes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS

if TYPE_CHECKING:
    from . import LoweredNetwork

__all__ = ["output_of"]

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    name: function for activation in ACTIVATIONS for name, function in activation.run.items()
}


def output_of(network: LoweredNetwork, rows: Tensor) -> Tensor:
    """What the network makes of rows [B, n], or of z [B, d]."""
    found = rows
    for layer in network.spec.split(";"):
        kind, *words = layer.split()
        if kind in _ACTIVATIONS:
            found = _ACTIVATIONS[kind](found, *map(float, words))
        elif kind == "reshape":
            found = found.reshape(len(found), *map(int, words))
        else:
            found = _LAYERS[kind](found, network.tensors, words)
    return found


def _linear(x: Tensor, tensors: Sequence[Tensor], words: Sequence[str]) -> Tensor:
    weight, bias = _taken(tensors, words[:2])
    assert weight is not None
    return F.linear(x, weight, bias)


def _conv2d(x: Tensor, tensors: Sequence[Tensor], words: Sequence[str]) -> Tensor:
    weight, bias = _taken(tensors, words[:2])
    assert weight is not None
    *pairs, groups = map(int, words[2:])
    stride, padding, dilation = pairs[0:2], pairs[2:4], pairs[4:6]
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _conv_transpose2d(x: Tensor, tensors: Sequence[Tensor], words: Sequence[str]) -> Tensor:
    weight, bias = _taken(tensors, words[:2])
    assert weight is not None
    *pairs, groups = map(int, words[2:])
    stride, padding, output_padding, dilation = pairs[0:2], pairs[2:4], pairs[4:6], pairs[6:8]
    return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)


def _batch_norm(x: Tensor, tensors: Sequence[Tensor], words: Sequence[str]) -> Tensor:
    weight, bias, mean, variance = _taken(tensors, words[:4])
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=float(words[4]))


_LAYERS: dict[str, Callable[[Tensor, Sequence[Tensor], Sequence[str]], Tensor]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "batch_norm": _batch_norm,
}


def _taken(tensors: Sequence[Tensor], words: Sequence[str]) -> list[Tensor | None]:
    return [None if word == "-1" else tensors[int(word)] for word in words]
