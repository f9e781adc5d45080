"""The Hamiltonian variational autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._compiling import is_captured
from fastvae.arguments import expect, expect_at_least, expect_choice
from fastvae.likelihoods import Likelihood
from fastvae.models.adaptation import HALVINGS, AdaptedStepSize, acceptance, adapted_in_training
from fastvae.models.base import BaseVAE, Noise, TrainingStep, reparameterize
from fastvae.models.inputs import needs_condition
from fastvae.models.observation import Observation
from fastvae.models.stability import encoding_mode, stable_step_size
from fastvae.models.tempering import BoundedStepSize, Tempering
from fastvae.ops.hamiltonian_flow import hamiltonian_flow
from fastvae.ops.trajectory import trajectory

__all__ = ["HVAE", "DivergenceError"]

ON_DIVERGENCE = ("raise", "drop", "ignore")


class DivergenceError(RuntimeError):
    """Leapfrog trajectories left the range of finite numbers."""

    def __init__(
        self,
        message: str,
        step: int | None = None,
        num_samples: int = 0,
        energy_error: float = float("nan"),
        step_size: tuple[float, float] = (float("nan"), float("nan")),
    ) -> None:
        super().__init__(message)
        self.step = step
        """First leapfrog step (1..K) after which a trajectory was not finite; 0: none was taken."""
        self.num_samples = num_samples
        """Samples of the batch whose trajectory diverged."""
        self.energy_error = energy_error
        """H - H_0 of the first of them, in nats, at the last step at which it was finite."""
        self.step_size = step_size
        """Smallest and largest step size in use."""

    def __reduce__(self) -> tuple[type[DivergenceError], tuple[object, ...]]:
        return type(self), (self.args[0], self.step, self.num_samples, self.energy_error, self.step_size)


@dataclass
class _Path:
    """Where a batch of trajectories went, and the two parts of its log importance weight."""

    z_0: Tensor
    z: Tensor
    log_px: Tensor
    log_ratio: Tensor
    """[B] log p(z_K) - |rho_K|^2/2 - log q(z_0 | x) + |gamma_0|^2/2."""

    def weight(self) -> Tensor:
        return self.log_px + self.log_ratio


class HVAE(BaseVAE):
    """Hamiltonian variational autoencoder (Caterini, Doucet, Sejdinovic, NeurIPS 2018, Algorithm 1).

    z_0 ~ q(z_0 | x) and a momentum rho_0 = gamma_0 / sqrt(beta_0), gamma_0 ~ N(0, I), follow ``num_steps``
    tempered leapfrog steps towards p(z | x); with sigma and mu of q,

        ELBO = E[log p(x, z_K) - |rho_K|^2/2 - log q(z_0 | x) + |gamma_0|^2/2].

    The paper writes d/2 for |gamma_0|^2/2: the same mean and gradient with more noise. In the form above a
    sample of the ELBO is the log of an importance weight, and equals a VAE's at step size 0. beta weights
    everything but log p(x | z_K).

    Args:
        encoder, decoder, likelihood, beta, latent_dim, penalties, check_finite, max_logvar: see ``BaseVAE``.
        num_steps: K.
        tempering: "free" (an alpha a step is learnt), "fixed" (quadratic in 1/sqrt(beta)),
            "fixed-temperature" (quadratic in 1/beta, the authors' MNIST code) or "none"; see
            ``models.tempering``.
        beta_0: initial inverse temperature at the start of the trajectory, in (0, 1).
        learn_tempering: whether the alphas or beta_0 are trained.
        step_size: "adapted", which starts at 0.2 and is limited, while the model trains, to what its likelihood and
            decoder allow: see ``adapt_step_size``. Or an initial value, which is never limited: number, [d] per
            dimension, [K] or [K, 1] per step, or [K, d]; ``stable_step_size`` measures one.
        max_step_size: its upper bound; the step size is max_step_size * sigmoid of a parameter.
        learn_step_size: whether it is trained.
        target_acceptance: in (0, 1), of an adapted step size where it is limited. 0.6 to 0.95 are usual; more of it
            are shorter steps.
        on_divergence: what happens where a sample's log weight is NaN or infinite, which is looked at once
            for a batch (one wait on a GPU):

            - "raise": ``DivergenceError`` with step, number of samples, energy error and step size.
            - "drop": the trajectory is given up. That sample's loss and ELBO are those of the VAE with the
              same z_0 (zero steps), with their gradient; the rest of the batch is evaluated again without it;
              ``model.divergences`` counts it. Training goes on, but the ELBO of such a sample mixes two
              bounds and is itself none. In ``log_likelihood`` its weight is 0, which never raises it.
            - "ignore": no check and no wait, for ``torch.compile`` and CUDA graphs (in which "raise" does not look
              either); NaN reaches the caller.

    Raises:
        ValueError: an argument out of range, named; see also ``BaseVAE``.
    """

    noise_draws = 2

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str | Likelihood = "bernoulli",
        *,
        num_steps: int = 10,
        tempering: str = "free",
        beta_0: float = 0.3,
        learn_tempering: bool = True,
        step_size: float | Sequence[float] | Tensor | str = "adapted",
        max_step_size: float = 0.5,
        learn_step_size: bool = True,
        target_acceptance: float = 0.65,
        on_divergence: str = "raise",
        beta: float = 1.0,
        latent_dim: int | None = None,
        penalties: Iterable[nn.Module] = (),
        check_finite: bool = True,
        max_logvar: float | None = None,
    ) -> None:
        super().__init__(
            encoder,
            decoder,
            likelihood,
            beta=beta,
            latent_dim=latent_dim,
            penalties=penalties,
            check_finite=check_finite,
            max_logvar=max_logvar,
        )
        expect_at_least("HVAE", 1, num_steps=num_steps)
        expect_choice("HVAE", ON_DIVERGENCE, on_divergence=on_divergence)
        num_steps = int(num_steps)
        self.num_steps = num_steps
        self.tempering = Tempering(tempering, num_steps, beta_0, learn_tempering)
        self.leapfrog_step: BoundedStepSize
        if isinstance(step_size, str):
            expect(step_size == "adapted", "HVAE: step_size: expected numbers or 'adapted'", step_size)
            self.leapfrog_step = AdaptedStepSize(max_step_size, num_steps, learn_step_size, target_acceptance)
        else:
            self.leapfrog_step = BoundedStepSize(
                step_size, max_step_size, num_steps, self.latent_dim, learn_step_size
            )
        self.on_divergence = on_divergence
        self.divergences = 0
        """Samples whose trajectory was given up so far, in this process (on_divergence="drop")."""

    @property
    def step_size(self) -> Tensor:
        """The step size in use: [], [d], [K, 1] or [K, d]."""
        return self.leapfrog_step()

    @property
    def adapts_next(self) -> bool:
        """Whether the next loss in training mode measures the acceptance first; see ``adapt_step_size``."""
        return isinstance(self.leapfrog_step, AdaptedStepSize) and self.training and self.leapfrog_step.is_due

    @property
    def alpha(self) -> Tensor:
        """The factor on the momentum at each step: [K]."""
        return self.tempering()[0]

    @property
    def beta_0(self) -> Tensor:
        """The inverse temperature at the start: []."""
        return self.tempering()[1]

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
        """Minus the ELBO above, with beta, and its parts; see ``BaseVAE.objective`` (two draws of noise).

        In training mode, with gradients, and where it draws the noise itself, it adapts the step size before.
        """
        observation = Observation(x, condition, weight)
        mu, logvar = self.encode(x, **observation.given)
        draws = not isinstance(noise, Tensor)
        noise = self._noise(mu, noise, generator)
        start = observation, mu, logvar, noise
        step = adapted_in_training(self, mu) if draws else None
        if step is not None:
            step.count(acceptance(self, *start), mu)
        path = self._follow(*start)
        bad = self._diverged(path)
        if step is not None and bad is not None:
            path, bad = self._shortened(step, *start, path, bad)
        if bad is not None:
            if self.on_divergence == "raise":
                raise self._report(*start, bad)
            path = self._give_up(*start, bad)
        loss = -path.log_px - self._kl_weight(beta) * path.log_ratio
        return TrainingStep(
            self,
            x,
            mu,
            logvar,
            path.z_0,
            path.z,
            path.log_px,
            loss,
            generator,
            -path.log_ratio,
            *observation[1:],
        )

    def log_weight(
        self,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        noise: Tensor,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """A sample of the ELBO above, which is the log of an importance weight: [N]."""
        return self.weighted_codes(Observation(x, condition, weight), mu, logvar, noise)[1]

    def weighted_codes(
        self, observation: Observation, mu: Tensor, logvar: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z_K, and its ``log_weight``."""
        start = observation, mu, logvar, noise
        path = self._follow(*start)
        bad = self._diverged(path)
        if bad is None:
            return path.z, path.weight()
        if self.on_divergence == "raise":
            raise self._report(*start, bad)
        self.divergences += int(bad.sum())
        return path.z, path.weight().masked_fill(bad, -float("inf"))

    def stable_step_size(
        self,
        x: Tensor,
        *,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> float:
        """A step size at which leapfrog steps are stable for x: half of the limit 2 / sqrt(lambda).

        lambda is the largest eigenvalue of -d^2 log p(x, z) / dz^2 at a code of q(z | x) for each x, in eval mode
        (Neal, "MCMC using Hamiltonian dynamics", 2011, section 5.4.2: beyond the limit the energy grows without bound).
        Before training, ``HVAE(..., step_size=min(0.2, model.stable_step_size(x)))`` starts where trajectories stay
        finite; curvature grows as the decoder learns, and a step size that is trained follows slowly.

        Args:
            x: [B, ...], a batch of the data.
            condition: [B, ...] of a conditional model.
            weight: [B, ...] of x's elements, which the curvature is a sum over.
            generator: of the codes.

        Raises:
            ValueError: no sample, or outputs that are not finite.
            NotImplementedError: a decoder that cannot be differentiated twice.
        """
        return stable_step_size(self, Observation(x, condition, weight), generator)

    def adapt_step_size(
        self,
        x: Tensor,
        *,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> float:
        """Measure the acceptance at x and adapt the limit of the step size; the acceptance before.

        A model in training mode does so by itself before each of the first 50 losses that are computed with gradients,
        then before every eighth. Call it where a training loop runs no Python of the model: under ``torch.compile``.

        The acceptance is the mean of exp(-|error| / T), error being that of the leapfrog steps in the energy (in nats)
        along trajectories from codes of q(z | x), and T = max(1, |rho|^2/d) their temperature: in equilibrium the
        smaller of the probabilities with which HMC accepts a trajectory and its reverse. The step size stays below a
        limit whose logarithm grows by gain (acceptance - target_acceptance): Robbins and Monro, 1951; Andrieu and
        Thoms, "A tutorial on adaptive MCMC", 2008, section 4.2. The target of 0.65 and the search for a first limit, a
        half, a quarter, ... of 0.2, are those of Hoffman and Gelman, "The No-U-Turn Sampler", JMLR 2014. Below the
        limit the step size is trained as any is. A measurement is K + 1 forces, about a third of a training step.

        The limit is in buffers, saved with the weights. A step size at which a trajectory of a training batch diverges
        is halved until none does, unless ``on_divergence`` is "ignore".

        Args:
            x: [B, ...], a batch of the data.
            condition: [B, ...] of a conditional model.
            weight: [B, ...] of x's elements.
            generator: of the codes and momenta.

        Raises:
            ValueError: a model whose step size was given.
        """
        step = self.leapfrog_step
        if not isinstance(step, AdaptedStepSize):
            raise ValueError(
                "HVAE: adapt_step_size: expected a model of step_size='adapted', got one of a given step size"
            )
        observation = Observation(x, condition, weight)
        with encoding_mode(self), torch.no_grad():
            mu, logvar = self.encode(x, **observation.given)
            noise = self.draw_noise(mu, generator)
        return float(step.adapt(acceptance(self, observation, mu, logvar, noise)))

    def sample_posterior(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """One z_K [B, d] for each x."""
        return self.objective(x, generator=generator, **Observation(x, condition, weight).given).z

    def flow(
        self,
        z: Tensor,
        rho: Tensor,
        x: Tensor,
        step_size: Tensor,
        alpha: Tensor,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z_K, rho_K [B, d] and log p(x | z_K) [B]; see :func:`fastvae.ops.hamiltonian_flow`."""
        self.check_condition_of_flow(condition)
        return hamiltonian_flow(
            *(self.decoder, z, rho, x, step_size, alpha, self.likelihood),
            condition=condition,
            weight=weight,
        )

    def check_condition_of_flow(self, condition: Tensor | None) -> None:
        """TypeError for a condition that no network takes, or none where the decoder takes one."""
        if condition is not None:
            self._check_takes_condition()
        elif needs_condition(self.decoder):
            raise TypeError("HVAE: the decoder takes a condition, and none was given; pass condition=")

    def start(self, mu: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_0, rho_0 and alpha."""
        alpha, beta_0 = self.tempering()
        return (
            reparameterize(mu, logvar, noise[0]),
            noise[1] * beta_0.to(mu.dtype).rsqrt(),
            alpha.to(mu.dtype),
        )

    def _follow(self, observation: Observation, mu: Tensor, logvar: Tensor, noise: Tensor) -> _Path:
        z_0, rho_0, alpha = self.start(mu, logvar, noise)
        eps = self.step_size.to(mu.dtype)
        z, rho, log_px = self.flow(z_0, rho_0, observation.x, eps, alpha, **observation.given)
        # The constants of the four normal densities cancel, and so does the volume: prod alpha^2 = beta_0.
        log_ratio = 0.5 * (logvar + noise.square().sum(0) - z.square() - rho.square()).sum(1)
        return _Path(z_0, z, log_px, log_ratio)

    def _shortened(
        self,
        step: AdaptedStepSize,
        observation: Observation,
        mu: Tensor,
        logvar: Tensor,
        noise: Tensor,
        path: _Path,
        bad: Tensor,
    ) -> tuple[_Path, Tensor | None]:
        """The batch at half the step size, a quarter, ..., until no trajectory diverges."""
        start = observation, mu, logvar, noise
        if not bool(torch.isfinite(self._stay(*start).weight()).all()):
            return path, bad
        found: Tensor | None = bad
        for _ in range(HALVINGS):
            step.halve()
            path = self._follow(*start)
            found = self._diverged(path)
            if found is None:
                break
        return path, found

    def _stay(self, observation: Observation, mu: Tensor, logvar: Tensor, noise: Tensor) -> _Path:
        """The trajectory of no steps and no tempering: the VAE's sample ELBO."""
        z_0 = reparameterize(mu, logvar, noise[0])
        log_px = self.log_px(z_0, observation.x, **observation.given)
        return _Path(z_0, z_0, log_px, 0.5 * (logvar + noise[0].square() - z_0.square()).sum(1))

    def _diverged(self, path: _Path) -> Tensor | None:
        """Mask [B] of samples whose weight is not finite; None if all are, or nobody may look: in a CUDA graph."""
        if self.on_divergence == "ignore":
            return None
        if is_captured(path.log_px):
            if self.on_divergence == "drop":
                raise RuntimeError(
                    "HVAE: on_divergence: expected 'ignore' or 'raise' where a CUDA graph is captured, which runs the "
                    "same kernels whatever a batch does, got 'drop'"
                )
            return None
        bad = ~torch.isfinite(path.weight().detach())
        return bad if bool(bad.any()) else None

    def _give_up(
        self, observation: Observation, mu: Tensor, logvar: Tensor, noise: Tensor, bad: Tensor
    ) -> _Path:
        """The batch again, diverged samples without their trajectory.

        Masking alone would not do: a cotangent of zero times an infinite derivative is NaN in every
        parameter.
        """
        order = torch.cat((torch.nonzero(~bad)[:, 0], torch.nonzero(bad)[:, 0]))
        kept, given_up = order.split([len(order) - int(bad.sum()), int(bad.sum())])

        def those(rows: Tensor) -> tuple[Any, ...]:
            return observation.at(rows), mu[rows], logvar[rows], noise[:, rows]

        still = self._stay(*those(given_up))
        if not bool(torch.isfinite(still.weight()).all()):
            raise self._report(observation, mu, logvar, noise, bad)
        moved = self._follow(*those(kept))
        self.divergences += len(given_up)
        back = torch.argsort(order)
        return _Path(
            *(
                torch.cat((getattr(moved, name), getattr(still, name)))[back]
                for name in ("z_0", "z", "log_px", "log_ratio")
            )
        )

    @torch.no_grad()
    def _report(
        self, observation: Observation, mu: Tensor, logvar: Tensor, noise: Tensor, bad: Tensor
    ) -> DivergenceError:
        """Run the diverged samples again, step by step, to say where it went wrong."""
        z_0, rho_0, alpha = self.start(mu[bad], logvar[bad], noise[:, bad])
        eps, of_bad = self.step_size.to(mu.dtype), observation.at(bad)
        energy = trajectory(
            self.decoder, z_0, rho_0, of_bad.x, eps, alpha, self.likelihood, **of_bad.given
        ).energy()
        # Where every energy is finite, the weight is infinite by their difference: blame the last step.
        finite = torch.isfinite(energy)
        finite[-1] = False
        first = finite.int().argmin(0)
        sample = int(first.argmin())
        step = int(first[sample])
        sizes = (float(eps.min()), float(eps.max()))
        count = f"{int(bad.sum())} of {len(bad)}"
        if step == 0:
            return DivergenceError(
                f"HVAE: {count} samples have no finite log p(x, z_0) before the first leapfrog step: "
                "the encoder or the decoder returned NaN, infinite or huge values; the step size is not "
                "the cause",
                0,
                int(bad.sum()),
                float("nan"),
                sizes,
            )
        dropping = self.on_divergence == "drop"
        otherwise = (
            "; without the flow their ELBO is not finite either"
            if dropping
            else ", or pass on_divergence='drop' to go on with the plain ELBO of such samples"
        )
        error = float(energy[step - 1, sample] - energy[0, sample])
        return DivergenceError(
            f"HVAE: {count} trajectories left the finite range, the first at leapfrog step {step} of "
            f"{self.num_steps} (energy error {error:.4g} nats the step before); step size "
            f"{sizes[0]:.4g} to {sizes[1]:.4g}. Lower step_size or max_step_size (model.stable_step_size(x) "
            f"measures one){otherwise}",
            step,
            int(bad.sum()),
            error,
            sizes,
        )

    def extra_repr(self) -> str:
        """What ``repr`` says of the settings."""
        return f"{super().extra_repr()}, num_steps={self.num_steps}, on_divergence={self.on_divergence!r}"
