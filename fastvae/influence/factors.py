"""Dot products of samples' gradients from their factors, by the cheaper exact route."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvae.influence.rules import Terms
from fastvae.ops.grad_dot import grad_dot

__all__ = ["Factors", "cheaper_route", "concatenate", "dot", "self_dot"]

GRAM, TILES = "gram", "tiles"

_WRITE = 32
"""Multiply-adds that a core does in the time of writing a number of a gradient to memory and reading it back."""


@dataclass
class Factors:
    """The gradients of B samples over all parameters: sums of outer products, layer by layer, and numbers."""

    inputs: list[Tensor] = field(default_factory=list)
    """Of each layer that goes by Gram matrices: h [B, T, in]."""
    output_grads: list[Tensor] = field(default_factory=list)
    """delta [B, T, out]"""
    bias: list[bool] = field(default_factory=list)
    """Whether sum_t delta_t is part of the gradient."""
    dense: list[Tensor] = field(default_factory=list)
    """[B, numel] the gradients of all other parameters; their order is the same for all samples."""

    def to(self, device: torch.device) -> Factors:
        """The same on a device."""
        return Factors(
            [tensor.to(device) for tensor in self.inputs],
            [tensor.to(device) for tensor in self.output_grads],
            self.bias,
            [tensor.to(device) for tensor in self.dense],
        )

    def in_one_dtype(self) -> Factors:
        """The same in the widest dtype among them: a model may have layers in float32 and in float64."""
        dtypes = {tensor.dtype for tensor in (*self.inputs, *self.output_grads, *self.dense)}
        if len(dtypes) < 2:
            return self
        widest = functools.reduce(torch.promote_types, dtypes)
        parts = (self.inputs, self.output_grads, self.dense)
        inputs, output_grads, dense = ([tensor.to(widest) for tensor in part] for part in parts)
        return Factors(inputs, output_grads, self.bias, dense)

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a cache stores them."""
        named = {f"inputs.{i}": tensor for i, tensor in enumerate(self.inputs)}
        named |= {f"output_grads.{i}": tensor for i, tensor in enumerate(self.output_grads)}
        return named | {f"dense.{i}": tensor for i, tensor in enumerate(self.dense)}


def cheaper_route(terms: Terms, other_terms: int, rows: int, columns: int) -> str:
    """The route with fewer operations for a layer between ``rows`` samples and ``columns`` others.

    Gram matrices: T U (in + out + 2) multiply-adds a pair. Tiles of gradients: in * out a pair, and once a
    sample T outer products, which are written and read back.
    """
    return min((GRAM, TILES), key=lambda route: pair_cost(route, terms, other_terms, rows, columns))


def pair_cost(route: str, terms: Terms, other_terms: int, rows: int, columns: int) -> float:
    """Multiply-adds a pair, what is done once a sample shared out over its pairs."""
    if route == GRAM:
        return terms.count * other_terms * (terms.inputs + terms.outputs + 2)
    once = (terms.count + _WRITE) / max(1, columns) + (other_terms + _WRITE) / max(1, rows)
    return terms.numel * (1 + once)


def self_route(terms: Terms) -> str:
    """The route with fewer operations for a sample's gradient with itself."""
    gram = terms.count**2 * (terms.inputs + terms.outputs + 2)
    return GRAM if gram <= terms.numel * (terms.count + _WRITE) else TILES


def dot(a: Factors, b: Factors) -> Tensor:
    """[N, M] dot products of the gradients of N samples with those of M others."""
    if a.inputs:
        total = grad_dot(a.inputs, a.output_grads, b.inputs, b.output_grads, a.bias)
    else:
        total = a.dense[0].new_zeros(len(a.dense[0]), len(b.dense[0]))
    for of_a, of_b in zip(a.dense, b.dense, strict=True):
        total.addmm_(of_a, of_b.T)
    return total


def self_dot(a: Factors) -> Tensor:
    """[B] squared norms of the gradients."""
    parts = [tensor.square().sum(1) for tensor in a.dense]
    for h, delta, bias in zip(a.inputs, a.output_grads, a.bias, strict=True):
        if h.shape[1] == 1:
            parts.append((h.square().sum((1, 2)) + bias) * delta.square().sum((1, 2)))
        else:
            parts.append(((h @ h.mT + bias) * (delta @ delta.mT)).sum((1, 2)))
    return torch.stack(parts).sum(0)


def concatenate(parts: Sequence[Factors]) -> Factors:
    """The samples of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Factors(
        [torch.cat(tensors) for tensors in zip(*(part.inputs for part in parts), strict=True)],
        [torch.cat(tensors) for tensors in zip(*(part.output_grads for part in parts), strict=True)],
        first.bias,
        [torch.cat(tensors) for tensors in zip(*(part.dense for part in parts), strict=True)],
    )
