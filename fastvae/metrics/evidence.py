"""Evidence by annealed importance sampling, with bounds from both sides on simulated data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.arguments import expect, expect_at_least, expect_numbers
from fastvae.likelihoods.weights import expanded
from fastvae.metrics.annealing import Bridge, adapted_steps, annealed, temperatures
from fastvae.metrics.posteriors import Estimate, Images, estimate_of, observations, private_model
from fastvae.models import BaseVAE
from fastvae.models.evidence import warn_of_nan
from fastvae.models.inputs import check_condition, check_observed, half_dtype_of, needs_condition
from fastvae.models.observation import Observation
from fastvae.noise import Stream, draws_of
from fastvae.progress import with_bar
from fastvae.training.batches import Place

__all__ = ["AISBounds", "AISEstimate", "ais", "bidirectional_ais"]

_SCHEDULES = ("sigmoid", "linear")
_INITIAL = ("prior", "posterior")

# The preliminary run that finds step sizes: chains an image, and temperatures at least and at most.
_PILOTS = 4
_PILOT_TEMPERATURES = 100, 300
# Numbers of the first draw of noise of the chains forth and back, behind those of the preliminary run.
FIRST_DRAW, _FIRST_BACK = _PILOTS, 2**32
_BATCH = 500
"""Images in the encoder at once."""
# Decoder outputs at once: on a CPU 512 KiB of float32, below the size from which fresh memory costs a page fault each.
_OUTPUTS = {"cpu": 2**17}
_OUTPUTS_ELSEWHERE = 2**22


class AISEstimate(NamedTuple):
    """What annealed chains say of log p(x) of each image, in nats; float64, on the CPU."""

    log_px: Tensor
    """[B]: log of the mean weight; in expectation a lower bound, an upper one of chains back."""
    standard_error: Tensor
    """[B]: of ``log_px``, by the spread of the weights (back: of chains that share their start); NaN for one chain."""
    log_weights: Tensor
    """[B, chains]: logarithms of unbiased estimates of p(x), of 1 / p(x) of chains that started at the posterior."""
    acceptance: Tensor
    """[B]: share of the transitions that were accepted."""
    step_size: Tensor
    """[num_temperatures - 2, B]: of the transitions, which ``step_size=`` takes for another run."""

    def negative_log_likelihood(self) -> Estimate:
        """The mean of -log p(x) over the images, as ``fastvae.metrics.negative_log_likelihood`` gives it."""
        return estimate_of("AISEstimate.negative_log_likelihood", -self.log_px)


class AISBounds(NamedTuple):
    """Bounds of log p(x) from both sides for data that the model itself drew."""

    x: Tensor
    """[B, ...]: the data, in the decoder's layout."""
    lower: AISEstimate
    upper: AISEstimate

    def gap(self) -> Estimate:
        """Mean of upper - lower over the images, in nats: in expectation at least the error of each of them."""
        return estimate_of("AISBounds.gap", self.upper.log_px - self.lower.log_px)


@torch.no_grad()
def ais(
    model: BaseVAE,
    x: Images,
    num_temperatures: int = 1000,
    num_chains: int = 16,
    *,
    num_leapfrog_steps: int = 10,
    schedule: str = "sigmoid",
    initial: str = "prior",
    step_size: float | Tensor | None = None,
    target_acceptance: float = 0.65,
    condition: Tensor | Place | None = None,
    weight: Tensor | Place | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> AISEstimate:
    """log p(x) of images by annealed importance sampling, in nats.

    Neal, "Annealed importance sampling", Statistics and Computing 2001; for decoders Wu, Burda, Salakhutdinov, Grosse,
    "On the quantitative analysis of decoder-based generative models", ICLR 2017. Chains start at draws from the prior
    and pass densities proportional to p(z) p(x | z)^b, b from 0 to 1, by Hamiltonian transitions that leave each as it
    is, with forces of :func:`fastvae.ops.log_px_and_force`. It needs no encoder that is any good, where
    ``model.log_likelihood`` needs one. Each weight is an unbiased estimate of p(x), so the log of their mean is a lower
    bound in expectation; how tight it is :func:`bidirectional_ais` says.

    That holds for transitions that do not depend on the chain's own past. Wu et al. adapt the step sizes to the
    acceptance as a chain runs, after which its weight is no longer unbiased. Here a preliminary run of 4 other chains
    an image, with noise of their own, adapts a step size for each image and temperature; the chains that count take
    these as they are.

    Costs (num_temperatures - 2) num_leapfrog_steps + 1 forces a chain, and 400 to 1200 transitions an image before.

    Args:
        model: a copy of it is measured, in eval mode; in half precision, that copy computes in float32.
        x: [B, ...], or an iterable of batches such as ``fit`` takes.
        num_temperatures: values of b, 0 and 1 among them; 2: importance sampling from the initial density.
        num_chains: an image.
        num_leapfrog_steps: of a transition.
        schedule: "sigmoid", as in Wu et al., at equidistant numbers from -4 to 4, or "linear".
        initial: "prior", or "posterior": from the encoder's q(z | x) to p(x, z), in its coordinates. Near the posterior
            a chain has less far to go: less variance for the same work, unless q lacks a part of the posterior.
        step_size: of the leapfrog steps in place of the preliminary run, in units of the initial density's scale, for
            all or as [num_temperatures - 2, B]. Each transition takes 0.8 to 1.2 of it.
        target_acceptance: what the preliminary run adapts to, as far as no trajectory becomes longer than a quarter of
            the initial density's period.
        condition: [B, ...] of a conditional model: log p(x | condition). Where x is an iterable, its place in a batch,
            as for ``fit``.
        weight: [B, ...] of x's elements (or its place), 0 for what is missing: log p of what was observed; see
            ``BaseVAE.forward``.
        chunk_size: rows (image x chain) in the decoder at once, but for the 4 of an image's preliminary run, which stay
            together; by default as many as give 2**17 outputs (2**22 on a GPU).
        seed: of the noise, which is keyed by (seed, the image): an estimate does not depend on the batch, as far as
            the decoder's rounding does not (in float32, a decision on the border may fall otherwise).
        show_progress: a bar over the transitions (needs tqdm).

    Raises:
        ValueError: no images, an argument out of range, x that is no data of the likelihood.
        TypeError: not a fastvae model, or arguments that are not numbers.
    """
    options = _Options(
        "ais",
        *(num_temperatures, num_chains, num_leapfrog_steps, schedule, initial, step_size, target_acceptance),
        *(chunk_size, seed, show_progress),
    )
    private = _private("ais", model)
    chains = _Chains(options, private, _observed(x, condition, weight))
    ticks = chains.ticks(runs=1)
    found = chains.estimate(ticks=ticks)
    next(ticks, None)
    return found


@torch.no_grad()
def bidirectional_ais(
    model: BaseVAE,
    num_images: int = 100,
    num_temperatures: int = 1000,
    num_chains: int = 16,
    *,
    num_leapfrog_steps: int = 10,
    schedule: str = "sigmoid",
    initial: str = "prior",
    step_size: float | Tensor | None = None,
    target_acceptance: float = 0.65,
    condition: Tensor | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> AISBounds:
    """Bounds of log p(x) from both sides, for data that the model draws: how far off :func:`ais` can be.

    Bidirectional Monte Carlo (Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood using bidirectional Monte
    Carlo", 2015). The code that x was drawn with is an exact sample of its posterior. Chains that start there and run
    the same transitions backwards, to the initial density, have weights that are unbiased estimates of 1 / p(x): minus
    the log of their mean is an upper bound in expectation. Both hold with probability 1 - exp(-t) to within t nats
    (Markov's inequality). The gap is one of drawn data; it says as much of real data as these are like what the model
    draws.

    Args:
        model: see :func:`ais`; its likelihood has a ``sample``.
        num_images: how many are drawn.
        num_temperatures, num_chains, num_leapfrog_steps, schedule, initial, step_size, target_acceptance: see
            :func:`ais`. The chains back of an image all start at its one code.
        condition: [num_images, ...] of a conditional model.
        chunk_size, seed, show_progress: see :func:`ais`.

    Raises:
        ValueError, TypeError: see :func:`ais`; a model that does not know its latent_dim yet.
        NotImplementedError: a likelihood that cannot be sampled.
    """
    name = "bidirectional_ais"
    expect_at_least(name, 1, num_images=num_images)
    options = _Options(
        name,
        *(num_temperatures, num_chains, num_leapfrog_steps, schedule, initial, step_size, target_acceptance),
        *(chunk_size, seed, show_progress),
    )
    private = _private(name, model)
    if private.latent_dim is None:
        raise ValueError(f"{name}: latent_dim is not known yet; pass latent_dim= or encode data first")
    device, dtype = _place(private)
    generator = torch.Generator(device).manual_seed(int(seed))
    z = torch.randn(int(num_images), private.latent_dim, generator=generator, device=device, dtype=dtype)
    drawn = []
    for rows in torch.arange(len(z), device=device).split(_BATCH):
        named = {} if condition is None else {"condition": condition[rows].to(device)}
        drawn.append(private.likelihood.sample(private.decode(z[rows], **named), generator=generator))
    x = torch.cat(drawn)
    chains = _Chains(options, private, Observation(x, condition))
    ticks = chains.ticks(runs=2)
    bounds = AISBounds(x.cpu(), chains.estimate(ticks=ticks), chains.estimate(z, ticks=ticks))
    next(ticks, None)
    return bounds


@dataclass(frozen=True)
class _Options:
    name: str
    num_temperatures: int
    num_chains: int
    num_leapfrog_steps: int
    schedule: str
    initial: str
    step_size: float | Tensor | None
    target_acceptance: float
    chunk_size: int | None
    seed: int
    show_progress: bool

    def __post_init__(self) -> None:
        minima = {"num_temperatures": 2, "num_chains": 1, "num_leapfrog_steps": 1, "chunk_size": 1}
        numbers = {key: getattr(self, key) for key in (*minima, "target_acceptance", "seed")}
        expect_numbers(self.name, **numbers)
        for key, least in minima.items():
            if numbers[key] is not None and numbers[key] < least:
                raise ValueError(f"{self.name}: {key}: expected at least {least}, got {numbers[key]}")
        for key, known in (("schedule", _SCHEDULES), ("initial", _INITIAL)):
            expect(
                getattr(self, key) in known,
                f"{self.name}: {key}: expected one of {known}",
                repr(getattr(self, key)),
            )
        expect(
            0 < self.target_acceptance < 1,
            f"{self.name}: target_acceptance: expected a number in (0, 1)",
            self.target_acceptance,
        )

    def steps_for(self, images: int, device: torch.device) -> Tensor | None:
        """The step sizes that were given, [num_temperatures - 2, images]."""
        shape = int(self.num_temperatures) - 2, images
        if self.step_size is None:
            return None if shape[0] else torch.empty(shape, dtype=torch.float64, device=device)
        given_size = torch.as_tensor(self.step_size, dtype=torch.float64, device=device)
        expect(
            not given_size.dim() or given_size.shape == shape,
            f"{self.name}: step_size: expected a number or {list(shape)}",
            list(given_size.shape),
        )
        if not bool((given_size.isfinite() & (given_size > 0)).all()):
            raise ValueError(f"{self.name}: step_size: expected finite numbers above 0")
        return given_size.expand(shape)


class _Chains:
    """The chains of all images, in tiles of rows (image x chain)."""

    def __init__(self, options: _Options, model: BaseVAE, observation: Observation) -> None:
        self.options, self.model = options, model
        images = len(observation.x)
        expect(images > 0, f"{options.name}: x: expected some images", "none")
        self.device, self.dtype = _place(model)
        if observation.condition is not None:
            check_condition(model, observation.condition, images)
            model._check_takes_condition()
        elif needs_condition(model.decoder):
            raise TypeError(
                f"{options.name}: the decoder takes a condition, and none was given; pass condition="
            )
        if observation.weight is not None:
            observation = observation._replace(
                weight=expanded(options.name, observation.weight, observation.x)
            )
        self.observation = observation.each(lambda tensor: tensor.to(self.device))
        check_observed(model, self.observation.x, self.observation.weight)
        self.initial: tuple[Tensor, Tensor] | None = None
        if options.initial == "posterior":
            self.initial = self._posterior(images)
        self.dim = model.latent_dim if model.latent_dim is not None else self._posterior(1)[0].shape[1]
        self.keys = self.observation.keys
        self.ladder = temperatures(int(options.num_temperatures), options.schedule).to(self.device)
        outputs = math.prod(observation.x.shape[1:]) * model.likelihood.values_per_element
        at_once = _OUTPUTS.get(self.device.type, _OUTPUTS_ELSEWHERE)
        rows = images * int(options.num_chains)
        most = int(options.chunk_size or max(1, at_once // max(1, outputs)))
        # As few tiles, of about one size.
        self.rows = -(-rows // -(-rows // most))
        self.steps = options.steps_for(images, self.device)

    def _posterior(self, images: int) -> tuple[Tensor, Tensor]:
        """Mean and scale of the encoder's posterior of the first images."""
        parts = []
        for rows in torch.arange(images, device=self.device).split(_BATCH):
            own = self.observation.at(rows)
            parts.append(self.model.encode(own.x, **own.given))
        means, logvars = zip(*parts, strict=True)
        return torch.cat(means), torch.exp(torch.cat(logvars) / 2)

    def ticks(self, runs: int) -> Iterator[object]:
        """One for each transition of all tiles."""
        if not self.options.show_progress:
            return itertools.repeat(None)
        chains = len(self.observation.x) * int(self.options.num_chains)
        total = runs * (len(self.ladder) - 2) * -(-chains // self.rows)
        if self.steps is None:
            tiles = -(-len(self.observation.x) * _PILOTS // self._pilot_rows())
            total += (self._pilot_temperatures() - 2) * tiles
        return iter(with_bar(self.options.name, range(total), "transition"))

    def estimate(self, z: Tensor | None = None, *, ticks: Iterator[object]) -> AISEstimate:
        """Of chains from the initial density, or back to it from posterior samples z [B, d]."""
        if self.steps is None:
            self.steps = self._adapted(ticks)
        ladder, steps, start = self.ladder, self.steps, None
        if z is not None:
            ladder, steps = ladder.flip(0), steps.flip(0)
            start = z if self.initial is None else (z - self.initial[0]) / self.initial[1]
        count = int(self.options.num_chains)
        keys = draws_of(self.keys, int(self.options.seed), count, FIRST_DRAW if z is None else _FIRST_BACK)
        weights, rates = [], []
        for rows in torch.arange(len(keys), device=self.device).split(self.rows):
            images, stream = rows // count, Stream(keys[rows])
            log_weight, rate = annealed(
                self._bridge(images, self._drawn(stream) if start is None else start[images]),
                *(ladder, steps[:, images], stream, int(self.options.num_leapfrog_steps), ticks),
            )
            weights.append(log_weight)
            rates.append(rate)
        log_weights = torch.cat(weights).view(-1, count)
        mean = log_weights.logsumexp(1) - math.log(count)
        # Of weights in units of their mean, which is 1; with one chain 0 / 0.
        off = (log_weights - mean[:, None]).exp() - 1
        spread = (off.square().sum(1) / (off.new_tensor(count - 1.0) * count)).sqrt()
        acceptance = torch.cat(rates).view(-1, count).mean(1)
        warn_of_nan(self.options.name, self.model, mean)
        found = (mean if z is None else -mean, spread, log_weights, acceptance, self.steps)
        return AISEstimate(*(tensor.cpu() for tensor in found))

    def _adapted(self, ticks: Iterator[object]) -> Tensor:
        """Step sizes of all images by a preliminary run on a ladder of its own: [num_temperatures - 2, B]."""
        ladder = temperatures(self._pilot_temperatures(), self.options.schedule).to(self.device)
        keys = draws_of(self.keys, int(self.options.seed), _PILOTS)
        parts = []
        for rows in torch.arange(len(keys), device=self.device).split(self._pilot_rows()):
            stream = Stream(keys[rows])
            options = int(self.options.num_leapfrog_steps), self.options.target_acceptance, _PILOTS
            bridge = self._bridge(rows // _PILOTS, self._drawn(stream))
            parts.append(adapted_steps(bridge, ladder, stream, *options, ticks))
        # At the same part of the way; both ladders are of one schedule.
        found, wanted = torch.cat(parts, 1).log(), len(self.ladder)
        way = torch.arange(1, wanted - 1, device=self.device, dtype=torch.float64) / (wanted - 1)
        place = (way * (len(ladder) - 1) - 1).clamp(0, len(found) - 1)
        low = place.long()
        return torch.lerp(
            found[low], found[(low + 1).clamp(max=len(found) - 1)], (place - low)[:, None]
        ).exp()

    def _pilot_temperatures(self) -> int:
        least, most = _PILOT_TEMPERATURES
        return min(max(len(self.ladder), least), most)

    def _pilot_rows(self) -> int:
        """At once: those of whole images."""
        return max(1, self.rows // _PILOTS) * _PILOTS

    def _drawn(self, stream: Stream) -> Tensor:
        return stream.normal((self.dim,)).to(self.dtype)

    def _bridge(self, images: Tensor, start: Tensor) -> Bridge:
        initial = None if self.initial is None else (self.initial[0][images], self.initial[1][images])
        return Bridge(self.model, start, self.observation.at(images), initial)


def _observed(x: Images, condition: Tensor | Place | None, weight: Tensor | Place | None) -> Observation:
    """All images as one batch."""
    if isinstance(x, Tensor):
        return Observation(x, condition, weight)  # type: ignore[arg-type]
    parts = list(observations(x, {"condition": condition, "weight": weight}))  # type: ignore[dict-item]
    if not parts:
        return Observation(torch.empty(0, device="cpu"))
    columns = ([t for t in column if t is not None] for column in zip(*parts, strict=True))
    return Observation(*(torch.cat(column) if column else None for column in columns))  # type: ignore[arg-type]


def _private(name: str, model: BaseVAE) -> BaseVAE:
    private = private_model(name, model)
    return private if half_dtype_of(private) is None else private.float()


def _place(model: BaseVAE) -> tuple[torch.device, torch.dtype]:
    """Of the codes."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return like.device, like.dtype
