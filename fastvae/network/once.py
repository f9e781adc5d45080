"""Gradients in closed form that know no second derivative, and say so where one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """The identity on ``count`` gradients, which depend on ``tensors`` in a way that has no derivative."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(gradient.clone() for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"fastvae::{ctx.name}: differentiable once; its second derivative is not implemented. For "
            f"create_graph=True use fastvae.reference.{ctx.name}, which PyTorch can differentiate twice"
        )


def differentiable_once(
    name: str,
) -> Callable[[Callable[..., tuple[Any, ...]]], Callable[..., tuple[Any, ...]]]:
    """A Function's ``backward`` whose results raise NotImplementedError when they are differentiated.

    It depends on what the Function saved, in the graph or not, and on the gradients that it is given;
    ``torch.autograd.function.once_differentiable`` looks at those alone, and leaves the others' terms out in silence.
    """

    def decorate(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            with torch.no_grad():
                found = backward(ctx, *gradients)
            if not torch.is_grad_enabled():
                return found
            of = [t for t in (*ctx.saved_tensors, *gradients) if isinstance(t, Tensor) and t.requires_grad]
            present = [part for part in found if part is not None]
            if not of or not present:
                return found
            refusing = iter(_Refusal.apply(name, len(present), *present, *of))
            return tuple(None if part is None else next(refusing) for part in found)

        return wrapped

    return decorate
