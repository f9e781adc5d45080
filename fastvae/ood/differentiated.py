"""Encoders of their own for every image by autograd: side by side under torch.vmap, or one after the other."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from fastvae._second_order import batchable
from fastvae.arguments import given
from fastvae.models.base import BaseVAE
from fastvae.network.vjp_tape import RepeatedVjp
from fastvae.ood.copies import Adam, Copies, FusedAdam
from fastvae.private import private_copy, twin_of

__all__ = [
    "DifferentiatedCopies",
    "LoopedCopies",
    "VmappedCopies",
    "differentiated_copies",
    "same_gradients",
]


class DifferentiatedCopies(Copies):
    """Copies whose outputs autograd differentiates.

    Args:
        model: in eval mode.
        x: [B, ...], on the model's device.
        adam: its settings.
        condition: [B, ...], of an encoder that takes one.
    """

    def __init__(self, model: BaseVAE, x: Tensor, adam: Adam, condition: Tensor | None = None) -> None:
        self._model, self._x = model, x
        self._given = (x,) if condition is None else (x, condition)
        self._trained = self._copied()
        self._optimizer = FusedAdam(self._trained, adam)
        others = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
        self._encoding_of_all = RepeatedVjp(self._encode, self._trained, [*self._given, *others])

    @abstractmethod
    def _copied(self) -> list[Tensor]:
        """What is trained: leaves, in an order that stays."""

    @abstractmethod
    def _encode(self) -> Tensor:
        """The outputs [B, 2 d], with their graph."""

    @abstractmethod
    def of_first(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """The part of the first image in tensors like those that are trained."""

    def forward(self) -> Tensor:
        """See ``Copies``."""
        return self._encoding_of_all.forward()

    def update(self, grad: Tensor) -> None:
        """See ``Copies``."""
        self._optimizer.step(self.gradients(grad))

    @property
    def can_be_captured(self) -> bool:  # type: ignore[override]
        """See ``Copies``."""
        return self._encoding_of_all.is_straight_on(self._x.device)

    def gradients(self, grad: Tensor, *, retain_graph: bool = False) -> list[Tensor | None]:
        """Of the last outputs to what is trained, given theirs [B, 2 d]; None for what they do not depend on."""
        return self._encoding_of_all.backward(grad, retain_graph=retain_graph)


class VmappedCopies(DifferentiatedCopies):
    """Any encoder that ``torch.vmap`` can run; see ``DifferentiatedCopies``."""

    def _copied(self) -> list[Tensor]:
        encoder = self._model.encoder
        self._parameters = {
            name: parameter.detach().expand(len(self._x), *parameter.shape).clone().requires_grad_()
            for name, parameter in encoder.named_parameters()
        }
        # Each module once, however often it is used: functional_call, left to tie weights by itself, does not put
        # back those of a module that is registered twice.
        first = {id(parameter): name for name, parameter in encoder.named_parameters()}
        self._aliases = {
            f"model.encoder.{path}.{name}" if path else f"model.encoder.{name}": first[id(parameter)]
            for path, module in encoder.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self._encoding = _Encoding(self._model)
        return list(self._parameters.values())

    def _encode(self) -> Tensor:
        with batchable():
            encoded: Tensor = torch.vmap(self._encode_one)(self._parameters, *self._given)
        return encoded

    def _encode_one(self, parameters: dict[str, Tensor], *given: Tensor) -> Tensor:
        own = {name: parameters[first] for name, first in self._aliases.items()}
        encoded: Tensor = torch.func.functional_call(
            self._encoding, own, tuple(each[None] for each in given), tie_weights=False
        )
        return encoded[0]

    def of_first(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """See ``DifferentiatedCopies``."""
        return [None if tensor is None else tensor[0] for tensor in tensors]

    def parameters(self) -> dict[str, Tensor]:
        """See ``Copies``."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}


class LoopedCopies(DifferentiatedCopies):
    """Any encoder at all: a module of its own for each image, one after the other; see ``DifferentiatedCopies``."""

    def _copied(self) -> list[Tensor]:
        self._encoders = [private_copy(self._model.encoder) for _ in range(len(self._x))]
        for encoder in self._encoders:
            for parameter in encoder.parameters():  # Of TorchScript's modules none is asked for as a whole.
                parameter.requires_grad_()
        # Twins of the model share all but their children.
        children = self._model._modules
        self._models = [
            _Encoding(twin_of(self._model, _modules={**children, "encoder": encoder}))
            for encoder in self._encoders
        ]
        return [parameter for encoder in self._encoders for parameter in encoder.parameters()]

    def _encode(self) -> Tensor:
        rows = zip(*(each.split(1) for each in self._given), strict=True)
        return torch.cat([model(*row) for model, row in zip(self._models, rows, strict=True)])

    def of_first(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """See ``DifferentiatedCopies``."""
        return tensors[: len(tensors) // len(self._x)]

    def parameters(self) -> dict[str, Tensor]:
        """See ``Copies``."""
        of_all = [dict(encoder.named_parameters()) for encoder in self._encoders]
        return {name: torch.stack([own[name].detach() for own in of_all]) for name in of_all[0]}


class _Encoding(nn.Module):
    """The model's own way from x to its posterior, mean before log variance, [B, 2 d]; x was checked before."""

    def __init__(self, model: BaseVAE) -> None:
        super().__init__()
        self.model = twin_of(model, check_finite=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.cat(self.model.encode(x, **given(condition=condition)), 1)


def differentiated_copies(
    model: BaseVAE, x: Tensor, adam: Adam, condition: Tensor | None = None
) -> tuple[DifferentiatedCopies, str]:
    """The copies that autograd can train, side by side if it can be, and how they are trained, in words.

    Raises:
        ValueError: an encoder that cannot be differentiated.
    """
    looped = LoopedCopies(model, x[:1], adam, None if condition is None else condition[:1])
    try:
        output = looped.forward()
        expected = looped.of_first(looped.gradients(torch.ones_like(output)))
    except RuntimeError as error:
        raise ValueError(
            "LikelihoodRegret: encoder: expected one whose output autograd can differentiate to its parameters, got "
            f"{type(model.encoder).__name__} ({type(error).__name__}: {_first_line(error)})"
        ) from error
    reason = "torch.vmap computes other gradients of it"
    try:
        vmapped = VmappedCopies(model, x, adam, condition)
        output = vmapped.forward()
        grads = vmapped.of_first(vmapped.gradients(torch.ones_like(output), retain_graph=True))
        # A module that keeps its weights in a second place does not see those that torch.vmap is given.
        if all(same_gradients(a, b) for a, b in zip(grads, expected, strict=True)):
            return vmapped, "by torch.vmap and autograd"
    except Exception as error:
        reason = f"torch.vmap cannot run it ({type(error).__name__}: {_first_line(error)})"
    return LoopedCopies(
        model, x, adam, condition
    ), f"by autograd, one image after the other, because {reason}"


def same_gradients(a: Tensor | None, b: Tensor | None) -> bool:
    """To half the digits: by another order of sums, not by another formula."""
    if a is None or b is None:
        return a is b
    error, size = float((a - b).norm()), float(b.norm())
    eps = torch.finfo(b.dtype).eps
    # Sums that cancel to zero are off by the round-off of their terms.
    return error <= math.sqrt(eps) * size + 1e3 * eps or not math.isfinite(size)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
