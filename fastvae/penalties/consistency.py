"""Consistency between the codes of an image and of a random view of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvae.arguments import expect, expect_choice, expect_not_negative
from fastvae.data.augmentation import accepts
from fastvae.likelihoods.weights import expanded
from fastvae.models.base import Penalty, TrainingStep
from fastvae.ops.gaussian_kl import gaussian_kl

__all__ = ["Consistency"]

NOISE = ("independent", "common")


class Consistency(Penalty):
    """Asks that a random view x~ of each x is coded like x.

    Sinha and Dieng, "Consistency Regularization for Variational Auto-Encoders", NeurIPS 2021, equation (6): the model
    maximises

        ELBO(x) + ELBO(x~) - weight KL(q(z | x~) || q(z | x)),    x~ = augment(x)

    so this term of the loss is weight KL minus ELBO(x~) (with the model's beta), and has a gradient to both sides of
    the KL. The view reconstructs itself. For an HVAE q is that of z_0, for an IWAE both ELBOs are its bounds. x and x~
    go through encoder and decoder as one batch of 2 B, views of a sample side by side; in training mode BatchNorm
    therefore normalises over both. Of the model's other penalties, those of the ELBO itself (``BetaAnnealing``) also
    apply to x~; all others, such as ``JacobianL1``, see x alone.

    Args:
        augment: callable x -> x~ of the same shape, dtype and device, such as ``fastvae.data.RandomAffine()``. One with
            a parameter ``generator`` is given the model's. A module is registered: its parameters are trained. Where
            x's elements have weights, one with a parameter ``weight`` is given them and returns (x~, its weights);
            with any other the elements of a sample must all have one weight.
        weight: lambda, in nats per nat of KL.
        noise: of the codes of x and x~: "independent", or "common" to both, for less noise in their difference.

    Raises:
        ValueError: weight negative or not finite, an unknown noise; in training, a view of another shape or dtype.
        TypeError: an augment that cannot be called.
    """

    def __init__(
        self, augment: Callable[..., Tensor], weight: float = 1e-3, *, noise: str = "independent"
    ) -> None:
        super().__init__()
        expect(
            callable(augment), "Consistency: augment: expected a callable", type(augment).__name__, TypeError
        )
        expect_not_negative("Consistency", weight=weight)
        expect_choice("Consistency", NOISE, noise=noise)
        self.augment = augment
        self.weight = float(weight)
        self.common_noise = noise == "common"
        called = augment.forward if isinstance(augment, torch.nn.Module) else augment
        self._takes_generator = accepts(called, "generator")
        self._takes_weight = accepts(called, "weight")

    def view(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """augment(x), checked: [B, ...]."""
        return self._checked(self._augmented(x, generator), x)

    def weighted_view(
        self, x: Tensor, weight: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """augment(x, weight=weight), checked, of an augment that takes weights; see ``Penalty.weighted_view``."""
        if not self._takes_weight:
            return super().weighted_view(x, weight, generator)
        pair = self._augmented(x, generator, weight=weight)
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise ValueError("Consistency: augment: expected (view, its weights) where weights are given")
        return self._checked(pair[0], x), expanded("Consistency", pair[1], x)

    def _augmented(self, x: Tensor, generator: torch.Generator | None, **besides: Tensor) -> Any:
        if self._takes_generator:
            return self.augment(x, generator=generator, **besides)
        return self.augment(x, **besides)

    def _checked(self, found: Any, x: Tensor) -> Tensor:
        if not isinstance(found, Tensor):
            raise ValueError(f"Consistency: augment: expected a tensor, got {type(found).__name__}")
        if (found.shape, found.dtype, found.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"Consistency: augment: expected {list(x.shape)} {x.dtype} on {x.device} as x, "
                f"got {list(found.shape)} {found.dtype} on {found.device}"
            )
        return found

    def forward(self, step: TrainingStep) -> Tensor:
        """Loss of the view plus weight KL(q(z | x~) || q(z | x)): [B]."""
        view = step.view
        assert view is not None, "BaseVAE.forward evaluates the view that this penalty asks for"
        divergence = gaussian_kl(view.mu, view.logvar, step.mu, step.logvar)
        return view.loss + self.weight * divergence

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        noise = NOISE[self.common_noise]
        augment = "" if isinstance(self.augment, torch.nn.Module) else f"augment={self.augment!r}, "
        return f"{augment}weight={self.weight}, noise={noise!r}"
