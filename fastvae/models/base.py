"""What all models share: encoder, decoder, likelihood, training loss and importance-sampled evidence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvae._compiling import is_captured, is_compiling
from fastvae.arguments import expect_numbers, given
from fastvae.decoding import check_decoder, natural_parameters, transformed
from fastvae.likelihoods import Likelihood, resolve
from fastvae.likelihoods.weights import check_takes_weight, expanded, filled
from fastvae.lowering import LoweredNetwork
from fastvae.models.evidence import importance_sampled
from fastvae.models.inputs import (
    check_condition,
    check_is_tensor,
    check_observed,
    explained,
    half_dtype_of,
    split_posterior,
    takes_condition,
)
from fastvae.models.observation import Observation
from fastvae.models.steps import Penalty, TrainingStep
from fastvae.models.terms import note_penalty
from fastvae.models.views import steps_for
from fastvae.private import twin_of

__all__ = [
    "BaseVAE",
    "Noise",
    "NoiseSource",
    "Penalty",
    "TrainingStep",
    "encoded_already",
    "reparameterize",
]

Noise = Tensor | Callable[[Tensor], Tensor]
"""Standard normal [noise_draws, B, d], or a function of mu [B, d] that gives it."""

NoiseSource = Callable[[int, int, Tensor], Tensor]
"""(first, count, mu [B, d]) -> standard normal [weight_draws, count, B, d], the same for the same first + i."""

_Model = TypeVar("_Model", bound="BaseVAE")

# Decoder outputs held at once while importance sampling: 16 MiB of float32.
_LOG_LIKELIHOOD_OUTPUTS = 2**22


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mu + sigma eps, sigma = exp(logvar / 2), all [B, d]."""
    return mu + torch.exp(logvar / 2) * eps


class BaseVAE(nn.Module, ABC):
    """A latent variable model p(z) p(x | z), z ~ N(0, I), with an amortised Gaussian q(z_0 | x).

    Args:
        encoder: module; takes x (floats in [0, 1]; uint8 images are divided by 255; any reshaping is its own)
            and returns [B, 2d], mean before log variance, or the pair (mu [B, d], logvar [B, d]), sigma =
            exp(logvar / 2).
        decoder: module [B, d] -> natural parameters of the likelihood. Encoder and decoder that take a second argument
            are given the ``condition`` [B, ...] (labels, covariates, an image) of a call: q(z | x, c), p(x | z, c).
        likelihood: "bernoulli", "gaussian", "categorical" or a ``fastvae.likelihoods.Likelihood``.
        beta: weight of the KL part of the *training loss* (Higgins et al., beta-VAE, ICLR 2017); ``elbo`` and
            ``log_likelihood`` are of the model itself, beta = 1.
        latent_dim: d; inferred from the decoder's first layer, else from the encoder's first output.
        penalties: modules ``penalty(step: TrainingStep) -> [B]``, added to the training loss; see
        ``Penalty``.
        check_finite: check x for NaN, infinities and values outside the likelihood's range at every call. On
            a GPU that waits for x; it is skipped under ``torch.compile``, ``torch.func`` and CUDA graph capture.

    Raises:
        ValueError: beta or latent_dim out of range; a decoder whose last layer contradicts the likelihood;
            later, an x or an encoder output that does not fit.
        TypeError: an encoder, decoder or penalty that is not a module; a beta or latent_dim that is not a number;
            later, an x that is not a tensor.
    """

    noise_draws: int = 1
    """Independent standard normal [B, d] that one evaluation of the objective uses."""
    linear_in_beta: bool = True
    """Whether the loss is beta R - log p(x | z), so that beta can be annealed from outside."""
    has_closed_kl: bool = False
    """Whether R is KL(q(z | x) || N(0, I)) in closed form."""

    @property
    def weight_draws(self) -> int:
        """Independent standard normal [B, d] that one importance weight uses."""
        return self.noise_draws

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str | Likelihood = "bernoulli",
        *,
        beta: float = 1.0,
        latent_dim: int | None = None,
        penalties: Iterable[nn.Module] = (),
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        expect_numbers(name, beta=beta, latent_dim=latent_dim)
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"{name}: beta: expected a finite number of at least 0, got {beta}")
        if latent_dim is not None and latent_dim < 1:
            raise ValueError(f"{name}: latent_dim: expected at least 1, got {latent_dim}")
        penalties = list(penalties)
        for penalty in penalties:
            if not isinstance(penalty, nn.Module):
                raise TypeError(f"{name}: penalties: expected torch modules, got {type(penalty).__name__}")
        density = resolve(likelihood)
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
        self.beta = float(beta)
        self.latent_dim = int(latent_dim) if latent_dim is not None else _latent_dim_of(network)
        self.penalties = nn.ModuleList(penalties)
        self.check_finite = check_finite

    def __setattr__(self, name: str, value: Any) -> None:
        # A likelihood is a module or not, and may be exchanged for one that is not or is.
        if name == "likelihood" and not isinstance(value, nn.Module):
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    @abstractmethod
    def objective(
        self,
        x: Tensor,
        *,
        beta: float | None = None,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> TrainingStep:
        """One evaluation of the objective, without penalties; beta is the model's unless given.

        ``noise`` [noise_draws, B, d], or a function that gives it for mu [B, d], takes the place of a draw from
        ``generator``.
        """

    @abstractmethod
    def log_weight(
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        noise: Tensor,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """log of one importance weight of p(x): [N], for x [N, ...], mu and logvar [N, d], noise [draws, N,
        d].

        The mean of its exponential over the noise is p(x).
        """

    def log_weights(
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        noise: Tensor,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """``log_weight`` of several draws for each x: [S, B], for x [B, ...], mu and logvar [B, d], noise
        [weight_draws, S, B, d]. Not for training: it may come without a gradient.
        """
        draws, batch = noise.shape[1:3]
        seen = Observation(x, condition, weight).repeated(draws)
        codes = mu.repeat(draws, 1), logvar.repeat(draws, 1), noise.flatten(1, 2)
        weights = self.log_weight(seen.x, *codes, **seen.given)
        return weights.reshape(draws, batch)

    @abstractmethod
    def sample_posterior(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """One code [B, d] for each x from the approximate posterior, as the decoder would be given it."""

    def forward(
        self,
        x: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The training loss of each sample, in nats: minus the ELBO with beta, plus the penalties.

        Args:
            x: [B, ...] uint8, bool or floating.
            noise: [noise_draws, B, d] in place of a draw; views that penalties ask for then share it.
            generator: source of all randomness, on any device.
            condition: [B, ...] what the networks are given besides.
            weight: [B, ...] of x's elements, by which their parts of log p(x | z) are weighted: of the shape of x, or
                with sizes of 1 in its place; bool or any real dtype, at least 0. What has weight 0 is left out, as
                missing values are: it may be NaN, and nothing depends on it but what the encoder makes of it, which
                is given 0 for NaN there and x as it is elsewhere.

        Returns:
            [B]
        """
        seen = Observation(x, condition, weight)
        step, steps = steps_for(self.penalties, self, seen, noise, generator)
        loss = step.loss
        for penalty, its_step in zip(self.penalties, steps, strict=True):
            term = penalty(its_step)
            if term.shape != loss.shape:
                raise ValueError(
                    f"{type(penalty).__name__}: expected one value a sample, {list(loss.shape)}, "
                    f"got {list(term.shape)}"
                )
            note_penalty(penalty, term)
            loss = loss + term
        return loss

    def loss(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The mean training loss of a batch: []."""
        return self(x, generator=generator, **Observation(x, condition, weight).given).mean()

    def elbo(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """One-sample estimate of the evidence lower bound in nats, beta = 1, without penalties: [B]."""
        seen = Observation(x, condition, weight)
        return -self.objective(x, beta=1.0, generator=generator, **seen.given).loss

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
            output = self.encoder(self.likelihood.as_float(x, dtype), *second)
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
        return mu.to(wide), logvar.to(wide)

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
        # A module is called as one, so that hooks on it see it.
        params = self.decode(z, **given(condition=condition))
        return (like if isinstance(like, nn.Module) else like.log_prob)(params, x, **given(weight=weight))

    def draw_noise(
        self, mu: Tensor, generator: torch.Generator | None = None, draws: int | None = None
    ) -> Tensor:
        """Standard normal [draws, B, d] like mu, by default ``noise_draws`` of them; drawn on the generator's device
        and moved.
        """
        device = mu.device if generator is None else generator.device
        drawn = [
            torch.randn(mu.shape, generator=generator, device=device, dtype=mu.dtype)
            for _ in range(self.noise_draws if draws is None else draws)
        ]
        return torch.stack(drawn).to(mu.device)

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        num_samples: int = 1000,
        *,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        noise: NoiseSource | None = None,
        posterior: tuple[Tensor, Tensor] | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """log p(x) in nats by importance sampling: log of the mean of ``num_samples`` weights.

        The encoder runs once, and the weights are streamed, so that memory does not grow with ``num_samples``.
        Biased low, by about Var[w] / (2 num_samples E[w]^2) for weights w.

        Args:
            x: [B, ...].
            num_samples: importance samples for each x.
            chunk_size: codes (sample x draw) whose weights are computed at once; by default as many as give
                2**22 outputs or, where the decoder runs in tiles of its own, 2**20 latent variables. It does
                not change which noise is drawn.
            generator: source of the noise.
            noise: source of the noise instead: ``noise(first, count, mu)`` gives importance samples first ..
                first + count - 1 of all of x as [weight_draws, count, B, d]; ``fastvae.noise.SampleNoise``
                keys them by the sample.
            posterior: (mu, logvar), [B, d] each, of the proposal in place of ``encode(x)``.
            condition: [B, ...] what the networks are given besides: log p(x | condition).
            weight: [B, ...] of x's elements, see ``forward``: with zeros and ones log p of those that are observed.

        Returns:
            [B], detached. A RuntimeWarning says so if any of them is NaN.

        Raises:
            ValueError: num_samples or chunk_size below 1, or a posterior of another shape.
            TypeError: num_samples or chunk_size that is not a number; an x that is not a tensor.
        """
        return importance_sampled(
            self, Observation(x, condition, weight), num_samples, chunk_size, generator, noise, posterior
        )

    @torch.no_grad()
    def sample(
        self, num_samples: int, *, generator: torch.Generator | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Means of p(x | z) for ``num_samples`` draws of z from the prior, in the decoder's layout, detached.

        ``model.likelihood.sample(model.decode(z))`` draws x itself. ``condition`` [num_samples, ...]: what the decoder
        is given besides.
        """
        expect_numbers("sample", num_samples=num_samples)
        if self.latent_dim is None:
            raise ValueError(
                f"{type(self).__name__}: sample: latent_dim is not known yet; "
                "pass latent_dim= or encode data first"
            )
        like = next(self.parameters(), torch.empty(0))
        device = like.device if generator is None else generator.device
        z = torch.randn(num_samples, self.latent_dim, generator=generator, device=device, dtype=like.dtype)
        return self.likelihood.mean(self.decode(z.to(like.device), **given(condition=condition)))

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean of p(x | z) for one code of the approximate posterior of each x, of x's shape, detached."""
        seen = Observation(x, condition, weight)
        z = self.sample_posterior(x, generator=generator, **seen.given)
        return self.likelihood.mean(self.decode(z, **given(condition=condition))).reshape(x.shape)

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"likelihood={self.likelihood}, beta={self.beta}, latent_dim={self.latent_dim}"

    def _codes_at_once(self, x: Tensor, mu: Tensor) -> int:
        """Rows of ``log_weights`` at once, by the decoder outputs that they stand for."""
        outputs = math.prod(x.shape[1:]) * self.likelihood.values_per_element
        return max(1, _LOG_LIKELIHOOD_OUTPUTS // max(1, outputs))

    def _noise(self, mu: Tensor, noise: Noise | None, generator: torch.Generator | None) -> Tensor:
        if noise is None:
            return self.draw_noise(mu, generator)
        if not isinstance(noise, Tensor):
            return noise(mu)
        if noise.shape != (self.noise_draws, *mu.shape):
            raise ValueError(
                f"{type(self).__name__}: noise: expected {[self.noise_draws, *mu.shape]}, "
                f"got {list(noise.shape)}"
            )
        return noise.to(mu)

    def _split(self, output: object, x: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output as (mu, logvar)."""
        return split_posterior(self, output, x.shape[0])

    def _kl_weight(self, beta: float | None) -> float:
        """The beta that ``objective`` is given, or the model's own."""
        if not is_compiling():
            expect_numbers(type(self).__name__, beta=beta)
        return self.beta if beta is None else beta


def encoded_already(model: _Model, x: Tensor, encoded: tuple[Tensor, Tensor]) -> _Model:
    """A twin of the model whose ``encode`` of this very x is known; of anything else it is the model's own."""

    def encode(other: Tensor, **besides: Any) -> tuple[Tensor, Tensor]:
        return encoded if other is x else model.encode(other, **besides)

    return twin_of(model, encode=encode)


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
