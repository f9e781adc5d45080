"""What all models share: encoder, decoder, likelihood, training loss and importance-sampled evidence."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvae._compiling import is_compiling
from fastvae._elbo_reference import reparameterize
from fastvae.arguments import expect, expect_at_least, expect_not_negative, expect_numbers, given
from fastvae.likelihoods import Likelihood
from fastvae.models.evidence import codes_by_outputs, importance_sampled
from fastvae.models.imputation import imputed
from fastvae.models.networks import EncoderDecoder
from fastvae.models.observation import Observation
from fastvae.models.steps import Penalty, TrainingStep, loss_alone
from fastvae.models.terms import note_penalty
from fastvae.models.views import steps_for
from fastvae.private import twin_of
from fastvae.randomness import standard_normal

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


class BaseVAE(EncoderDecoder, ABC):
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
        max_logvar: bound m of the log variances of q, which become m - softplus(m - logvar): below m, so that their
            exponential does not overflow, with a gradient that falls off smoothly beyond it. 10 leaves what is below 0
            as it is to 5e-5. None: as the encoder returns them.

    Raises:
        ValueError: beta, latent_dim or max_logvar out of range; a decoder whose last layer contradicts the likelihood;
            later, an x or an encoder output that does not fit.
        TypeError: an encoder, decoder or penalty that is not a module; a setting that is not a number;
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
        max_logvar: float | None = None,
    ) -> None:
        name = type(self).__name__
        expect_numbers(name, max_logvar=max_logvar)
        expect_not_negative(name, beta=beta)
        expect_at_least(name, 1, optional=True, latent_dim=latent_dim)
        expect(
            max_logvar is None or math.isfinite(max_logvar),
            f"{name}: max_logvar: expected a finite number or None",
            max_logvar,
        )
        penalties = list(penalties)
        for penalty in penalties:
            if not isinstance(penalty, nn.Module):
                raise TypeError(f"{name}: penalties: expected torch modules, got {type(penalty).__name__}")
        super().__init__(encoder, decoder, likelihood, latent_dim, check_finite)
        self.beta = float(beta)
        if max_logvar is not None:
            self.max_logvar = float(max_logvar)
        self.penalties = nn.ModuleList(penalties)

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
        observation = Observation(x, condition, weight).repeated(draws)
        codes = mu.repeat(draws, 1), logvar.repeat(draws, 1), noise.flatten(1, 2)
        weights = self.log_weight(observation.x, *codes, **observation.given)
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
        observation = Observation(x, condition, weight)
        with loss_alone(self.penalties):
            step, steps = steps_for(self.penalties, self, observation, noise, generator)
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
        observation = Observation(x, condition, weight)
        return -self.objective(x, beta=1.0, generator=generator, **observation.given).loss

    def draw_noise(
        self, mu: Tensor, generator: torch.Generator | None = None, draws: int | None = None
    ) -> Tensor:
        """Standard normal [draws, B, d] like mu, by default ``noise_draws`` of them; drawn on the generator's device
        and moved.
        """
        count = self.noise_draws if draws is None else draws
        return torch.stack([standard_normal(mu.shape, mu, generator) for _ in range(count)])

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
        z = standard_normal((num_samples, self.latent_dim), like, generator)
        return self.likelihood.mean(self.decode(z, **given(condition=condition)))

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
        observation = Observation(x, condition, weight)
        z = self.sample_posterior(x, generator=generator, **observation.given)
        return self.likelihood.mean(self.decode(z, **given(condition=condition))).reshape(x.shape)

    @torch.no_grad()
    def impute(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        num_samples: int = 1000,
        draw: bool = False,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """x with what is missing filled in: its mean given what was observed, E[x_m | x_o], or a draw.

        By self-normalised importance sampling from the approximate posterior (Mattei and Frellsen, "MIWAE: deep
        generative modelling and imputation of incomplete data sets", ICML 2019): with z_k ~ q(z | x_o) and
        w_k = p(x_o | z_k) p(z_k) / q(z_k | x_o),

            E[x_m | x_o] = sum_k w_k E[x_m | z_k] / sum_k w_k,

        exact as ``num_samples`` grows. Memory does not grow with it. Other weights than 0 and 1 weigh log p(x_o | z).

        Args:
            x: [B, ...]; whatever it is where the weight is 0, NaN say, the encoder sees, as in ``forward``.
            weight: of the shape of x, or with sizes of 1 in its place; 0: to be filled in.
            num_samples: importance samples for each x.
            draw: one x_m of p(x_m | x_o) instead, by resampling one z_k with probability w_k / sum w and drawing from
                p(x_m | z_k): for multiple imputation, call it several times.
            chunk_size: codes (sample x draw) at once; by default as many as give 2**22 outputs.
            generator: source of all randomness; on the model's device, where ``draw`` is asked for.
            condition: [B, ...] what the networks are given besides.

        Returns:
            [B, ...] of x's shape, detached, floating, in the unit in which an encoder sees x (bytes in [0, 1]): x
            where it was observed.

        Raises:
            ValueError: num_samples or chunk_size below 1, or arguments that do not fit x.
            NotImplementedError: a likelihood without ``mean`` (or ``sample``), or a model of your own without
                ``weighted_codes``.
        """
        return imputed(self, Observation(x, condition, weight), num_samples, draw, chunk_size, generator)

    def weighted_codes(
        self, observation: Observation, mu: Tensor, logvar: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes [N, d], as a decoder is given them, and the log of each one's importance weight; see ``log_weight``."""
        raise NotImplementedError(f"{type(self).__name__}: impute: this model has no weighted_codes")

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model to ``folder``, from which ``fastvae.load(folder)`` makes it again.

        Settings go to ``model.json``, weights to a safetensors file that it names; no code does. What was there before
        is replaced at once, when everything is written. Networks, likelihoods and penalties of your own are given to
        ``load`` again. Training goes on from checkpoints of ``fastvae.fit``, not from this.

        Returns:
            The folder.

        Raises:
            OSError: the disk is full, say; names the file. The model from before stays.
            ImportError: safetensors is not installed.
        """
        from fastvae.saving import save

        return save(self, folder)

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"likelihood={self.likelihood}, beta={self.beta}, latent_dim={self.latent_dim}"

    def _codes_at_once(self, x: Tensor, mu: Tensor) -> int:
        """Rows of ``log_weights`` at once, by the decoder outputs that they stand for."""
        return codes_by_outputs(self, x)

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
