"""What a penalty sees of a model's loss, and what a penalty is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvae._compiling import is_compiling, is_in_compiled_graph

if TYPE_CHECKING:
    from fastvae.models.base import BaseVAE

__all__ = ["Penalty", "TrainingStep"]


@dataclass
class TrainingStep:
    """One evaluation of a model's objective: what a penalty may read, with its graph."""

    model: BaseVAE
    x: Tensor
    """[B, ...] the data as they were given."""
    mu: Tensor
    """[B, d] mean of q(z_0 | x)."""
    logvar: Tensor
    """[B, d] log variance of q(z_0 | x)."""
    z_0: Tensor
    """[B, d] the sample of q(z_0 | x)."""
    z: Tensor
    """[B, d] the code that was decoded: z_0, or where a flow took it."""
    log_px: Tensor
    """[B] log p(x | z)."""
    loss: Tensor
    """[B] minus the ELBO with the model's beta, in nats, without penalties."""
    generator: torch.Generator | None
    """Where a penalty draws its own noise from."""
    kl: Tensor | None = None
    """[B] what the loss has besides log p(x | z), before beta weighs it; None where the loss is no such sum."""
    condition: Tensor | None = None
    """[B, ...] what the networks were given besides."""
    weight: Tensor | None = None
    """[B, ...] of x's elements."""
    view: TrainingStep | None = None
    """The same for the view of x that the penalty asked for."""

    def parts(self, of: Sequence[Tensor]) -> list[TrainingStep]:
        """The steps of several views ``of``, evaluated as one batch [B * views] with those of a sample side by side."""
        samples, count = of[0].shape[0], len(of)

        def split(tensor: Tensor) -> tuple[Tensor, ...]:
            return tensor.reshape(samples, count, *tensor.shape[1:]).unbind(1)

        names = ["mu", "logvar", "z_0", "z", "log_px", "loss"] + (["kl"] if self.kl is not None else [])
        names += ["condition"] if self.condition is not None else []
        names += ["weight"] if self.weight is not None else []
        split_up = zip(*(split(getattr(self, name)) for name in names), strict=True)
        return [
            replace(self, x=x, **dict(zip(names, tensors, strict=True)))
            for x, tensors in zip(of, split_up, strict=True)
        ]


_loss_alone: ContextVar[bool] = ContextVar("nobody but us sees the step", default=False)
_loss_alone_in_trace: list[bool] = []
"""The same, innermost last, for code that Dynamo traces: it knows no context variables."""


@contextmanager
def loss_alone(penalties: Iterable[nn.Module]) -> Iterator[None]:
    """Say that a step's loss is all that is wanted, where the penalties are the package's own."""
    own = all(type(penalty).__module__.startswith("fastvae.penalties.") for penalty in penalties)
    if is_in_compiled_graph():
        _loss_alone_in_trace.append(own)
        try:
            yield
        finally:
            _loss_alone_in_trace.pop()
        return
    if is_compiling():
        yield
        return
    token = _loss_alone.set(own)
    try:
        yield
    finally:
        _loss_alone.reset(token)


def is_loss_alone() -> bool:
    """Whether no user's code looks into the step that is being made."""
    if is_in_compiled_graph():
        return bool(_loss_alone_in_trace) and _loss_alone_in_trace[-1]
    return not is_compiling() and _loss_alone.get()


class Penalty(nn.Module, ABC):
    """A term of the training loss; its weight is its own business.

    Penalties are modules of the model, so that their state is saved and moved with it. ``fit`` calls ``step``
    once after each optimisation step, for annealing.

    A penalty may ask for a further view of the data (``view``). The model evaluates its objective on x and all views
    as one batch, and hands each penalty the step of x alone, with the step of its own view as ``step.view``.
    """

    on_views: bool = False
    """Whether this term is part of the ELBO, and so is also added to the loss of views that other penalties ask for."""
    common_noise: bool = False
    """Whether the view is evaluated with the noise of x instead of its own."""
    couples_samples: bool = False
    """Whether a sample's term depends on the others of its batch."""
    differentiates_decoder: bool = False
    """Whether this term is made of derivatives of the decoder, so that its gradient is no sum over decodes."""

    def view(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """A view of x [B, ...] of the same shape, dtype and device, or None."""
        return None

    def weighted_view(
        self, x: Tensor, weight: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """As ``view``, of an x whose elements have weights [B, ...]: the view and the weights of its own elements.

        Unless overridden these are x's, where all elements of a sample have one weight.

        Raises:
            ValueError: other weights.
        """
        found = self.view(x, generator)
        if found is None:
            return None
        if not bool((weight == weight.flatten(1)[:, :1].reshape(-1, *[1] * (weight.dim() - 1))).all()):
            raise ValueError(
                f"{type(self).__name__}: weight: expected one weight for all elements of a sample, since those of a "
                "view's elements are not known, got several; an augmentation that takes weight= and returns the pair "
                "(view, its weights), as fastvae.data.RandomFlip does, makes them known"
            )
        return found, weight

    @abstractmethod
    def forward(self, step: TrainingStep) -> Tensor:
        """The weighted penalty of each sample: [B]. ``step.model.objective(other_x)`` gives other views of
        it.
        """

    def step(self) -> None:
        """Called after each optimisation step; does nothing unless overridden."""
