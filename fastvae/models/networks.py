"""An encoder, a decoder and a likelihood: how models call them, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._compiling import is_captured, is_compiling
from fastvae.arguments import given
from fastvae.decoding import called_on_copies, check_decoder, natural_parameters, transformed
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.fused import fused_log_prob
from fastvae.likelihoods.weights import check_takes_weight, expanded, filled
from fastvae.lowering import LoweredNetwork
from fastvae.models.inputs import (
    bounded,
    check_condition,
    check_is_tensor,
    check_observed,
    explained,
    half_dtype_of,
    split_posterior,
    takes_condition,
)
from fastvae.models.observation import Observation
from fastvae.ops.elbo import FusedObjective, fused

__all__ = ["EncoderDecoder"]


class EncoderDecoder(nn.Module):
    """The networks of a model; arguments and errors are those of ``BaseVAE``."""

    max_logvar: float | None = None
    """What log variances of q stay below; see ``BaseVAE``."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str | Likelihood,
        latent_dim: int | None,
        check_finite: bool,
    ) -> None:
        super().__init__()
        name, density = type(self).__name__, resolve(likelihood)
        for role, module in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: {role}: expected a torch module, got {type(module).__name__}")
        network = check_decoder(decoder, density)
        self.encoder = encoder
        self.decoder = decoder
        # Behind the networks, whose dtype and device a model's first parameter stands for, and in theirs.
        self.likelihood = density
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        if isinstance(density, nn.Module) and like is not None:
            density.to(like.device, torch.promote_types(like.dtype, torch.float32))
        self.latent_dim = int(latent_dim) if latent_dim is not None else _latent_dim_of(network)
        self.check_finite = check_finite

    def __setattr__(self, name: str, value: Any) -> None:
        # A likelihood is a module or not, and may be exchanged for one that is not or is.
        if name == "likelihood" and not isinstance(value, nn.Module):
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    def encode(
        self, x: Tensor, condition: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z_0 | x): (mu [B, d], logvar [B, d]), at least float32.

        The encoder sees x as it is, but 0 where it is NaN or infinite and its weight is 0.
        """
        check_is_tensor(self, x)
        weight = None if weight is None else expanded(type(self).__name__, weight, x)
        self.check_data(x, **given(weight=weight))
        x = x if weight is None else filled(x, weight)
        if condition is not None:
            check_condition(self, condition, x.shape[0])
        second = () if condition is None or not takes_condition(self.encoder) else (condition,)
        parameter = next((p for p in self.parameters() if p.is_floating_point()), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        try:
            output = called_on_copies(self.encoder, self.likelihood.as_float(x, dtype), *second)
        except (RuntimeError, ValueError, TypeError) as error:
            if (better := explained(error, self, "encoder", x)) is None:
                raise
            raise better from error
        mu, logvar = self._split(output, x)
        if self.latent_dim is None:
            self.latent_dim = mu.shape[1]
        if mu.shape[1] != self.latent_dim:
            raise ValueError(
                f"{type(self).__name__}: encoder: expected mean and log variance of latent_dim = "
                f"{self.latent_dim}, got {mu.shape[1]} each"
            )
        wide = torch.promote_types(mu.dtype, torch.float32)
        logvar = logvar.to(wide)
        if self.max_logvar is not None:
            logvar = bounded(logvar, self.max_logvar)
        return mu.to(wide), logvar

    def overrides(self, *methods: str) -> bool:
        """Whether a subclass, or this very model, has one of these methods of its own."""
        kind, own = type(self), vars(self)
        return any(
            name in own or getattr(kind, name) is not getattr(EncoderDecoder, name) for name in methods
        )

    def fused(self, observation: Observation) -> FusedObjective | None:
        """This model's ``encode`` and ``log_px`` as one operator; None where they are a subclass's, or no operator's.

        See :func:`fastvae.ops.elbo`.
        """
        if any(part is not None for part in (observation.condition, observation.weight, self.max_logvar)):
            return None
        if self.latent_dim is None or self.overrides("encode", "decode", "log_px", "_split"):
            return None
        check_is_tensor(self, observation.x)
        found = fused(self.encoder, self.decoder, observation.x, self.likelihood, self.latent_dim)
        if found is not None:
            self.check_data(observation.x)
        return found

    def check_data(self, x: Tensor, weight: Tensor | None = None) -> None:
        """ValueError if x is no data of the likelihood, where its numbers may be looked at (``check_finite``).

        Of the elements of weight 0 nothing is asked; ValueError for weights that are none.
        """
        if self.check_finite and not is_compiling() and not is_captured(x) and not transformed():
            check_observed(self, x, weight)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Natural parameters of p(x | z) for z [B, d], in the decoder's layout."""
        half = half_dtype_of(self.decoder)
        if condition is not None:
            check_condition(self, condition, z.shape[0])
            self._check_takes_condition()
        try:
            return natural_parameters(
                self.decoder, z if half is None else z.to(half), self.likelihood, condition
            )
        except (RuntimeError, ValueError, TypeError) as error:
            if (better := explained(error, self, "decoder", z)) is None:
                raise
            raise better from error

    def _check_takes_condition(self) -> None:
        if not takes_condition(self.decoder):
            raise ValueError(
                f"{type(self).__name__}: condition: expected a decoder that takes one, forward(z, condition), got "
                f"{type(self.decoder).__name__}"
            )

    def log_px(
        self, z: Tensor, x: Tensor, condition: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """log p(x | z) in nats for z [B, d] and x [B, ...]: [B]; the sum of its elements', each times its weight."""
        like = self.likelihood
        if weight is not None:
            check_takes_weight(like)
        params = self.decode(z, **given(condition=condition))
        found = fused_log_prob(like, params, x, weight)
        if found is not None:
            return found
        # A module is called as one, so that hooks on it see it.
        return (like if isinstance(like, nn.Module) else like.log_prob)(params, x, **given(weight=weight))

    def _split(self, output: object, x: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output as (mu, logvar)."""
        return split_posterior(self, output, x.shape[0])


def _latent_dim_of(network: LoweredNetwork | None) -> int | None:
    """The size of the decoder's input where its first layer fixes it."""
    if network is None:
        return None
    kind, *words = network.spec.split(";")[0].split()
    if kind == "linear":
        return network.tensors[int(words[0])].shape[1]
    if kind == "reshape" and "-1" not in words:
        return math.prod(int(word) for word in words)
    return None
