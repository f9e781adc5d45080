"""Gradients in closed form, of which there is no gradient again: asked for one, they say so instead of leaving it out.

``torch.autograd.function.once_differentiable`` does so only where the cotangents themselves require a gradient; without
that a second derivative would lose its terms in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """The identity on a gradient, with an edge to whatever it depends on."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"fastvae::{ctx.name}: differentiable once; its second derivative is not implemented. For "
            f"create_graph=True use fastvae.reference.{ctx.name}, which PyTorch can differentiate twice"
        )


@contextmanager
def backward_pass(like: Tensor) -> Iterator[None]:
    """No graph, and full precision: of what autocast is when a backward pass runs nothing was said forward."""
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield


def differentiable_once(
    name: str, gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """What a backward pass returns: the gradients, to refuse to be differentiated where create_graph=True.

    Args:
        name: of the operator.
        gradients: computed without a graph.
        sources: the differentiable inputs of the forward pass, and the cotangents.
    """
    given = [source for source in sources if source is not None]
    if not torch.is_grad_enabled() or not any(source.requires_grad for source in given):
        return list(gradients)
    return [None if gradient is None else _Refusal.apply(name, gradient, *given) for gradient in gradients]
