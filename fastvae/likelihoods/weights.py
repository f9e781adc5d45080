"""Weights of the elements of x, which their log probabilities are times; 0 leaves one out, as if it were missing."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastvae.likelihoods.base import Likelihood

__all__ = ["check_takes_weight", "check_weights", "count", "expanded", "filled", "of_outputs", "total"]


def expanded(owner: str, weight: object, x: Tensor) -> Tensor:
    """A weight as one of x's shape: it has as many dimensions as x, each of x's size or 1.

    Raises:
        TypeError: no tensor, or a complex one.
        ValueError: another shape or device, or one that requires a gradient, which weights have none of.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{owner}: weight: expected a tensor, got {type(weight).__name__}")
    if weight.is_complex():
        raise TypeError(f"{owner}: weight: expected real numbers or bool, got {weight.dtype}")
    fits = weight.dim() == x.dim() and all(
        own in (1, size) for own, size in zip(weight.shape, x.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{owner}: weight: expected the shape of x, {list(x.shape)}, or sizes of 1 in its place, got "
            f"{list(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"{owner}: weight: expected {x.device} as x, got {weight.device}")
    if weight.requires_grad:
        raise ValueError(
            f"{owner}: weight: expected weight.requires_grad = False, since a weight has no gradient"
        )
    return weight.expand(x.shape)


def check_weights(owner: str, weight: Tensor) -> None:
    """ValueError for weights that are negative, NaN or infinite. Waits for them on a GPU."""
    if weight.dtype in (torch.bool, torch.uint8) or not weight.numel():
        return
    low, high = torch.stack(weight.aminmax()).tolist()
    if not (low >= 0 and math.isfinite(high)):
        bad = weight[~((weight >= 0) & (weight < math.inf))]
        raise ValueError(
            f"{owner}: weight: expected finite numbers of at least 0, got {bad[0].item():.6g} (and "
            f"{bad.numel() - 1} more of {weight.numel()})"
        )


def filled(x: Tensor, weight: Tensor) -> Tensor:
    """x with 0 for what is NaN or infinite where its weight is 0: what an encoder sees of it."""
    if not x.is_floating_point():
        return x
    return x.masked_fill((weight == 0) & ~torch.isfinite(x), 0)


def check_takes_weight(likelihood: Likelihood) -> None:
    """TypeError for a ``log_prob`` of a user's own that knows nothing of weights."""
    parameters = inspect.signature(likelihood.log_prob).parameters
    if "weight" not in parameters and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"{type(likelihood).__name__}: weight: expected log_prob(params, x, weight=None), of which weight [B, ...] "
            "has the shape of x, got one that takes no weight"
        )


def of_outputs(weight: Tensor, y: Tensor, values_per_element: int, interleaved: bool) -> Tensor:
    """A weight of x's elements as one of a decoder's outputs y [B, C * values_per_element, ...].

    Args:
        interleaved: whether the values of a channel lie together (logits of classes), not those of a kind.
    """
    if values_per_element == 1:
        return weight.reshape(y.shape)
    channels, trailing = y.shape[1] // values_per_element, math.prod(y.shape[2:])
    each = weight.reshape(len(y), channels, trailing).unsqueeze(2 if interleaved else 1)
    sizes = [-1, -1, -1, -1]
    sizes[2 if interleaved else 1] = values_per_element
    return each.expand(sizes).reshape(y.shape)


def total(elements: Tensor, weight: Tensor | None) -> Tensor:
    """The sum over a sample, weighted where there are weights: [B], for [B, elements] each."""
    return elements.sum(1) if weight is None else (elements * weight).sum(1)


def count(elements: Tensor, weight: Tensor | None) -> Tensor | int:
    """The number of elements of a sample, weighted where there are weights: what a constant of each is times."""
    return elements.shape[1] if weight is None else weight.sum(1)
