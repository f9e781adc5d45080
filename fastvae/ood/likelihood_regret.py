"""Likelihood regret: how much an image gains from an encoder of its own."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvae.arguments import expect, expect_at_least, expect_choice, expect_not_negative, expect_numbers
from fastvae.cuda_graphs import run_steps
from fastvae.influence.noise import draws_noise
from fastvae.likelihoods.weights import expanded, filled
from fastvae.lowering import CoupledSamples, UnsupportedLayer
from fastvae.models.base import BaseVAE
from fastvae.models.inputs import check_condition, check_observed, takes_condition
from fastvae.models.observation import Observation
from fastvae.noise import SampleNoise
from fastvae.ood.base import Detector
from fastvae.ood.copies import (
    Adam,
    Copies,
    LoweredCopies,
    PosteriorCopies,
    lower_encoder,
    numel_of,
)
from fastvae.ood.differentiated import differentiated_copies
from fastvae.ood.objective import PosteriorObjective
from fastvae.ood.read_copies import ReadCopies
from fastvae.private import PrivateCopies
from fastvae.progress import with_bar
from fastvae.wrappers import unwrap

__all__ = ["LikelihoodRegret", "Refit"]

TARGETS = ("encoder", "posterior")

# Learning rates: the paper's for weights; a mean has to move by about its standard deviation in 100 steps.
_LEARNING_RATES = {"encoder": 2e-4, "posterior": 5e-2}

# Importance samples are draws of the same stream as the noise of the steps, far behind them.
_FIRST_SAMPLE = 2**32

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Refit(NamedTuple):
    """What optimisation for each image alone came to, detached."""

    mu: Tensor
    """[B, d] mean of the image's own posterior."""
    logvar: Tensor
    """[B, d] its log variance."""
    losses: Tensor
    """[B, num_steps] minus the one-sample ELBO before each step, in nats."""
    parameters: dict[str, Tensor]
    """Of each image's encoder, [B, *shape] by name; empty unless asked for, and with target="posterior"."""


class LikelihoodRegret(Detector):
    """log p(x) with a posterior optimised for x alone, minus log p(x) with the encoder's (in nats).

    Xiao, Yan, Amit, Likelihood Regret: An Out-of-Distribution Detection Score for Variational Auto-encoders,
    NeurIPS 2020, equation (7). A model gains little on images like those that it was trained on, and much on
    others, whatever their likelihood. Each image has its own copy of the encoder, its own Adam state and its
    own noise; the images of a batch share only the work, so that a score does not depend on its batch. The
    decoder is fixed, and so are the leapfrog steps of an HVAE: any model's regret is that of its own
    objective (with beta = 1, without penalties) and its own importance-sampled likelihood.

    An encoder that is a chain of Linear, Conv2d, BatchNorm and activations, with one last layer or a head each for mean
    and log variance, is trained by fused kernels. Any other is read as a graph of operations, each of which runs for
    all copies at once: dense layers by batched products; convolutions, norms and Adam by kernels (on a GPU by PyTorch's
    batched operators); everything else with parameters by batched operators; what has none as one batch of images.
    What cannot be read is trained by ``torch.vmap`` and autograd, or one image after the other, with the same result,
    after one warning that names the way. One also names operations on parameters that have no rule, such as those of
    ``weight_norm``, which go through ``torch.vmap`` and autograd by themselves.

    A private copy of the model is worked on, in eval mode (BatchNorm's statistics stay, its weight and bias are
    trained): the model itself is not touched. All parameters of the encoder are trained, frozen ones too.

    Args:
        model: a fastvae model in float32 or float64.
        num_steps: of Adam; each uses one draw of noise.
        lr: learning rate; None: 2e-4 (the paper's), or 5e-2 with target="posterior".
        num_samples: importance samples of the likelihood before and after, with the same noise.
        target: what is optimised. "encoder": all of an image's encoder, as in the paper. "posterior": the mean
            and log variance of its posterior alone; a faster variant with scores of its own.
        seed: of all noise, which is keyed by (seed, the image).
        betas, weight_decay: of Adam; the authors' by default. Weight decay is part of the gradient, as in
            ``torch.optim.Adam``, and covers every parameter of the encoder, biases and BatchNorm's weight and bias
            too, as in the authors' code. With target="posterior" there is none to decay.
        memory_budget: bytes, about; images are taken in groups whose copies fit. None: 256 MiB, which keep a CPU busy
            (15 images of the paper's DCGAN), or 4 GiB on a GPU.
        cuda_graph: on a GPU, replay the steps of a group from a CUDA graph after the first ones, where kernels take the
            decoder, and they or straight code the encoders. The same scores.

    Raises:
        ValueError: an argument out of range.
        TypeError: not a fastvae model.
    """

    model: BaseVAE

    def __init__(
        self,
        model: BaseVAE,
        *,
        num_steps: int = 100,
        lr: float | None = None,
        num_samples: int = 1000,
        target: str = "encoder",
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 5e-5,
        memory_budget: int | None = None,
        cuda_graph: bool = True,
    ) -> None:
        inner = unwrap(model)
        if not isinstance(inner, BaseVAE):
            raise TypeError(f"LikelihoodRegret: model: expected a fastvae model, got {type(inner).__name__}")
        owner = "LikelihoodRegret"
        expect_choice(owner, TARGETS, target=target)
        expect_numbers(owner, seed=seed)
        for beta in betas:
            expect_numbers(owner, betas=beta)
        expect_at_least(owner, 1, num_steps=num_steps, num_samples=num_samples)
        expect_at_least(owner, 1, optional=True, memory_budget=memory_budget)
        lr = _LEARNING_RATES[target] if lr is None else lr
        expect_not_negative(owner, lr=lr, weight_decay=weight_decay)
        expect(
            len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
            "LikelihoodRegret: betas: expected two numbers in [0, 1)",
            betas,
        )
        super().__init__(inner)
        self.num_steps, self.num_samples, self.target, self.seed = num_steps, num_samples, target, seed
        self.adam = Adam(lr, (float(betas[0]), float(betas[1])), weight_decay)
        self.memory_budget = memory_budget
        self.cuda_graph = cuda_graph
        self._copies = PrivateCopies()

    def predict(
        self,
        x: Tensor,
        *,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """The regret of each image in nats, higher = more foreign: [B], detached, on the model's device.

        Args:
            x: [B, ...] as the model takes it, on any device.
            condition: [B, ...] of a conditional model.
            weight: [B, ...] of x's elements, 0 for what is missing; see ``BaseVAE.forward``. What stands for it matters
                as far as the encoder makes something of it.
            show_progress: a bar over the groups of images (needs tqdm).

        Raises:
            ValueError: x that is not finite, out of the likelihood's range, or of a shape that the model does
                not take; an encoder without parameters, whose samples depend on each other, that draws random
                numbers in eval mode, or that autograd cannot differentiate.
        """
        with self._borrowed() as model:
            scores = []
            checked = self._checked(model, Observation(x, condition, weight))
            for part in self._groups(model, checked, show_progress):
                refit = self._refit(model, part, parameters=False)
                noise = SampleNoise(part.keys, self.seed, model.weight_draws, start=_FIRST_SAMPLE)
                before, after = (
                    model.log_likelihood(
                        part.x, self.num_samples, noise=noise, posterior=posterior, **part.given
                    )
                    for posterior in (model.encode(part.x, **part.given), (refit.mu, refit.logvar))
                )
                scores.append(after - before)
        found = torch.cat(scores) if scores else next(self.model.parameters()).new_zeros(0)
        if not bool(torch.isfinite(found).all()):
            bad = torch.nonzero(~torch.isfinite(found))[:, 0].tolist()
            warnings.warn(
                f"LikelihoodRegret: the scores of {len(bad)} image(s) are not finite, the first is number "
                f"{bad[0]}: optimisation diverged; lower lr = {self.adam.lr}",
                RuntimeWarning,
                stacklevel=2,
            )
        return found

    def refit(
        self,
        x: Tensor,
        *,
        condition: Tensor | None = None,
        weight: Tensor | None = None,
        parameters: bool = False,
    ) -> Refit:
        """The optimisation alone: each image's own posterior, and its encoder's parameters if asked for.

        Args:
            x, condition, weight: as for ``predict``.
            parameters: also return them: as many numbers as the encoder has, times B.
        """
        with self._borrowed() as model:
            groups = self._groups(model, self._checked(model, Observation(x, condition, weight)), False)
            parts = [self._refit(model, part, parameters) for part in groups]
        if not parts:
            return self._empty(parameters)
        mu, logvar, losses, copies = zip(*parts, strict=True)
        return Refit(
            torch.cat(mu),
            torch.cat(logvar),
            torch.cat(losses),
            {name: torch.cat([part[name] for part in copies]) for name in copies[0]},
        )

    def _refit(self, model: BaseVAE, observation: Observation, parameters: bool) -> Refit:
        """Of one group."""
        mu, logvar = model.encode(observation.x, **observation.given)
        copies = self._encoders(model, observation, mu, logvar)
        objective = PosteriorObjective(model, observation, mu)
        noise = SampleNoise(observation.keys, self.seed, model.noise_draws)(0, self.num_steps, mu)

        def take(noise_of_step: Tensor) -> Tensor:
            loss, grad = objective(copies.forward().to(mu), noise_of_step)
            copies.update(grad)
            return loss

        losses = run_steps(
            take,
            noise.transpose(0, 1),
            lambda: self.cuda_graph and objective.can_be_captured and copies.can_be_captured,
        )
        mu, logvar = copies.forward().to(mu).chunk(2, 1)
        return Refit(mu, logvar, losses.T, copies.parameters() if parameters else {})

    def _encoders(self, model: BaseVAE, observation: Observation, mu: Tensor, logvar: Tensor) -> Copies:
        if self.target == "posterior":
            return PosteriorCopies(mu, logvar, self.adam)
        expect(
            next(model.encoder.parameters(), None) is not None,
            "LikelihoodRegret: encoder: expected parameters to optimise for each image",
            "none; target='posterior' optimises its mean and log variance alone",
        )
        x, condition, weight = observation
        x = x if weight is None else filled(x, weight)
        of_encoder = condition if condition is not None and takes_condition(model.encoder) else None
        try:
            if of_encoder is not None or model.max_logvar is not None:
                raise UnsupportedLayer("lower: a condition, or a bound of its outputs")
            return LoweredCopies(model, x, self.adam, self.num_steps)
        except UnsupportedLayer:
            pass
        try:
            read = ReadCopies(model, x, self.adam, of_encoder)
            if read.by_autograd:
                operations = ", ".join(dict.fromkeys(read.by_autograd))
                self._warn(f"in part by torch.vmap and autograd ({operations})")
            return read
        except UnsupportedLayer as error:
            copies, way = differentiated_copies(model, x, self.adam, of_encoder)
            self._warn(f"{way}, which is slower: {error}")
            return copies

    def _warn(self, way: str) -> None:
        """Once of an encoder."""
        if self.model.encoder not in _warned:
            _warned.add(self.model.encoder)
            warnings.warn(f"LikelihoodRegret: the encoder's copies are trained {way}", stacklevel=5)

    def _empty(self, parameters: bool) -> Refit:
        like = next(self.model.parameters())
        encoder = self.model.encoder.named_parameters() if parameters and self.target == "encoder" else ()
        return Refit(
            like.new_zeros(0, self.model.latent_dim or 0),
            like.new_zeros(0, self.model.latent_dim or 0),
            like.new_zeros(0, self.num_steps),
            {name: parameter.detach().new_zeros(0, *parameter.shape) for name, parameter in encoder},
        )

    # ---- what is borrowed and what is given ----

    @contextmanager
    def _borrowed(self) -> Iterator[BaseVAE]:
        """A private copy of the model in eval mode, frozen and outside of autocast."""
        device = next(self.model.parameters()).device.type
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device, enabled=False),
            self._copies.borrowed(self.model) as model,
        ):
            yield model.requires_grad_(False)

    def _checked(self, model: BaseVAE, observation: Observation) -> Observation:
        """The samples on the model's device, of a shape and with values that the model takes."""
        x = observation.x
        if not isinstance(x, Tensor) or x.dim() < 2:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"LikelihoodRegret: x: expected a batch of images [B, ...], got {got}")
        like = next(model.parameters())
        expect(
            like.dtype in (torch.float32, torch.float64),
            "LikelihoodRegret: model: expected parameters in float32 or float64",
            like.dtype,
        )
        _check_independence(model.encoder, tuple(x.shape[1:]))
        if observation.condition is not None:
            check_condition(self, observation.condition, len(x))
        if observation.weight is not None:
            observation = observation._replace(weight=expanded("LikelihoodRegret", observation.weight, x))
        # A tensor made under inference_mode cannot take part in a backward pass; and a network that was read takes its
        # data in the order of memory in which it was read.
        observation = observation.each(
            lambda t: (t.clone() if t.is_inference() else t.detach()).to(like.device).contiguous()
        )
        check_observed(model, observation.x, observation.weight)
        first = observation.at(slice(1))
        if len(x):
            try:
                if self.target == "encoder" and draws_noise(partial(model.encode, **first.given), first.x):
                    raise ValueError(
                        "LikelihoodRegret: encoder: expected the same output for the same image, so that each can "
                        "be optimised for its own; it draws random numbers in eval mode"
                    )
                mu, _ = model.encode(first.x, **first.given)
                model.log_px(mu, first.x, **first.given)
            except RuntimeError as error:
                raise ValueError(
                    f"LikelihoodRegret: x: the model does not take images of shape {list(x.shape[1:])}: {error}"
                ) from error
        return observation

    def _groups(self, model: BaseVAE, observation: Observation, show_progress: bool) -> Iterator[Observation]:
        """The images and what goes with them, so many at a time as their copies fit into the budget."""
        size = self._group_size(model, observation.x)
        starts: Iterable[int] = range(0, len(observation.x), size)
        if show_progress:
            starts = with_bar("LikelihoodRegret", starts, "group")
        for start in starts:
            yield observation.at(slice(start, start + size))

    def _group_size(self, model: BaseVAE, x: Tensor) -> int:
        outputs = math.prod(x.shape[1:]) * model.likelihood.values_per_element
        # Weights, two moments and a gradient; what the decoder keeps of a pass is a few times its output.
        numbers = (4 * numel_of(model.encoder) if self.target == "encoder" else 0) + 8 * outputs
        like = next(model.parameters())
        budget = self.memory_budget or (2**28 if like.device.type == "cpu" else 2**32)
        return max(1, budget // (numbers * like.element_size()))


def _check_independence(encoder: nn.Module, shape: tuple[int, ...]) -> None:
    """CoupledSamples of an encoder that is known to mix the samples of a batch in eval mode, too."""
    try:
        lower_encoder(encoder, shape)
    except CoupledSamples:
        raise
    except UnsupportedLayer:
        return
