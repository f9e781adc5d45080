"""A training step of every model, beside pythae's and beside the same loss in plain PyTorch, eager and compiled.

    python -m benchmarks.speed models             about five minutes on 2 cores
    python -m benchmarks.speed models --quick     tiny sizes, no torch.compile: does everything run?

A step draws its noise, evaluates the mean loss of a batch and its gradient to all parameters, float32; all contestants
share one pair of networks. "eager" is what a careful user writes: the likelihood on logits, and K + 1 forces for the
Hamiltonian flow. "pythae" is the published library's model around the same networks. Before they are timed, all
gradients are compared with those of the eager loss in float64 at the same noise, but for pythae's HVAE, which computes
another objective (see the note in the results).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastvae
from fastvae import reference
from fastvae.architectures import hvae_decoder, hvae_encoder
from fastvae.models import BaseVAE

from .. import networks
from ..rivals.flow import functional_flow
from ..rivals.models import Loss, hvae_loss, iwae_loss, objective, pythae_model, vae_loss
from . import harness, timing

Pair = tuple[nn.Module, nn.Module]

OURS, EAGER, PYTHAE = "ours", "eager", "pythae"
TOLERANCE = 2e-4
"""of gradients in float32, relative to those in float64; that of the steps of a trajectory add up"""

HVAE_NOTE = (
    "pythae's HVAE evaluates 2 K forces and decodes twice, and takes the forces for constants, so that its gradient is "
    "not that of its loss. Ours and the other two differentiate the whole trajectory."
)


@dataclass(frozen=True)
class Step:
    """A training step: ours, what it is beside, and its batch."""

    networks: Callable[[], Pair]
    loss: Loss
    model: Callable[..., BaseVAE]
    options: dict[str, Any] = field(default_factory=dict)
    compiled_loss: Loss | None = None
    """for a loss that torch.compile cannot read"""
    pythae: str = "VAE"
    """the name of pythae's model"""
    pythae_options: dict[str, Any] = field(default_factory=dict)
    batch: int = 100
    size: int = 28
    """of the images, in pixels either way"""
    channels: int = 1


def cases(quick: bool) -> list[harness.Case]:
    size, hidden, latents, batch = (4, 8, 4, 3) if quick else (28, 512, 32, 100)
    draws, steps, width = (2, 2, 2) if quick else (5, 10, 16)
    colours = 2 if quick else 32
    shape = f"{size**2}-{hidden}-{hidden}-{2 * latents}, {latents}-{hidden}-{hidden}-{size**2}, B = {batch}"

    def mlp() -> Pair:
        return networks.dense(size, hidden, latents)

    def convolutional() -> Pair:
        return hvae_encoder(width), hvae_decoder(width)

    def colour() -> Pair:
        return networks.colour(colours, latents)

    def hvae(pair: Callable[[], Pair], num_steps: int, pixels: int) -> Step:
        theirs = {"n_lf": num_steps, "eps_lf": 0.01, "learn_eps_lf": True, "learn_beta_zero": True}
        ours = {"num_steps": num_steps, "step_size": 0.01, "on_divergence": "ignore"}
        of_eager, of_compiled = (hvae_loss(f) for f in (reference.hamiltonian_flow, functional_flow))
        return Step(pair, of_eager, fastvae.HVAE, ours, of_compiled, "HVAE", theirs, batch, pixels)

    few, vae = min(3, steps), functools.partial(Step, loss=vae_loss, model=fastvae.VAE, batch=batch)
    ours, theirs = {"num_samples": draws}, {"number_samples": draws}
    iwae = Step(mlp, iwae_loss, fastvae.IWAE, ours, None, "IWAE", theirs, batch, size)
    paper, in_colour = "the paper's convolutional", f"3x32x32, {colours} to {4 * colours} channels, B = 64"
    found: dict[str, tuple[str, Step]] = {
        "vae-mlp": (f"VAE, {shape}", vae(mlp, size=size)),
        "vae-conv": (f"VAE, {paper}, B = {batch}", vae(convolutional)),
        "vae-colour": (f"VAE, {in_colour}", vae(colour, batch=3 if quick else 64, size=32, channels=3)),
        "iwae-mlp": (f"IWAE, K = {draws}, {shape}", iwae),
        "hvae-mlp": (f"HVAE, K = {steps}, {shape}", hvae(mlp, steps, size)),
        "hvae-conv": (f"HVAE, K = {few}, {paper}, B = {batch}", hvae(convolutional, few, 28)),
    }
    return [
        harness.Case(key, title, build, (step,), 0.1 if quick else 15) for key, (title, step) in found.items()
    ]


def build(options: harness.Options, step: Step) -> harness.Trial:
    torch.manual_seed(0)
    pair = step.networks()
    model = step.model(*pair, **step.options).to(options.device)
    # pythae's HVAE takes no pixels between 0 and 1.
    shape = step.batch, step.channels, step.size, step.size
    x = torch.rand(*shape, device=options.device).round()
    shared = [parameter for network in pair for parameter in network.parameters()]

    def draw() -> Tensor:
        """Standard normal [draws, B, d]; from one seed the numbers that our models and pythae's draw."""
        return model.draw_noise(x.new_empty(step.batch, model.latent_dim or 0))

    def gradients(loss: Callable[[], Tensor], of: nn.Module = model) -> timing.Contestant:
        own = [p for p in of.parameters() if not any(p is q for q in shared)]
        return lambda: torch.autograd.grad(loss(), [*shared, *own], allow_unused=True)

    def plain(loss: Loss) -> timing.Contestant:
        return gradients(lambda: loss(model, x, draw()))

    def pythae() -> timing.Contestant:
        shape = step.channels, step.size, step.size
        theirs = pythae_model(step.pythae, step.pythae_options, shape, *pair).to(options.device)
        # The learnt numbers of its trajectory are its own.
        return gradients(lambda: theirs({"data": x}).loss, theirs)

    contestants: dict[str, Callable[[], timing.Contestant]] = {
        OURS: lambda: gradients(lambda: model.loss(x)),
        EAGER: lambda: plain(step.loss),
    }
    if options.compile:
        for_compiler = step.compiled_loss or step.loss
        contestants[OURS + harness.COMPILED] = lambda: plain(torch.compile(objective))
        contestants[EAGER + harness.COMPILED] = lambda: plain(torch.compile(for_compiler))
    contestants[PYTHAE] = pythae
    torch.manual_seed(1)  # as before each contestant
    noise = draw().double()
    exact = copy.deepcopy(model).double()
    parameters = [*exact.encoder.parameters(), *exact.decoder.parameters()]
    expected = torch.autograd.grad(step.loss(exact, x.double(), noise), parameters)
    with FlopCounterMode(display=False) as counter:
        plain(step.loss)()
    hvae = step.pythae == "HVAE"
    return harness.Trial(
        contestants,
        expected,
        TOLERANCE,
        [PYTHAE] if hvae else [],
        operations=counter.get_total_flops(),
        notes={PYTHAE: HVAE_NOTE} if hvae else {},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    of_cases = cases(options.quick)
    harness.Benchmark("models", "A training step", of_cases, packages=["pythae"]).run(options)
