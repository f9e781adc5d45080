"""Annealed importance sampling of log p(x), against eager PyTorch with forces by autograd.

    python -m benchmarks.speed ais             about two minutes on 2 cores
    python -m benchmarks.speed ais --quick     tiny sizes: does everything run?

Every contestant runs the same chains in float32: same images, schedule, step sizes (found beforehand) and noise, which
the rivals are given and ours draws, keyed by image. The rivals: "eager, textbook", whose transition of K leapfrog steps
evaluates K + 1 forces, two energies and two densities of the weight, each for itself; "eager, careful", which has
log p(x | z) and its gradient from one evaluation, keeps both of the current code for the next temperature and so
evaluates K; and the same with decoder and density through torch.compile. Errors are against the careful one in float64.

Floor: "FLOP floor", forward and reverse sweeps of the careful one's forces at the rate of a large square product.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fastvae
from fastvae.architectures import hvae_decoder
from fastvae.metrics.annealing import temperatures
from fastvae.metrics.evidence import FIRST_DRAW, AISEstimate
from fastvae.noise import Stream, draws_of, keys_of

from ..networks import softplus_mlp
from ..rivals.annealing import LEAPFROG_STEPS, careful, log_px_of, textbook
from . import floors, harness, timing

OURS, TEXTBOOK, CAREFUL = "ours", "eager, textbook", "eager, careful"


def cases(quick: bool) -> list[harness.Case]:
    if quick:
        return [harness.Case("small", "2-8-16, 2 x 2 chains", build, (mlp(2, 8, 16), 2, 2, 5), 0.1)]
    small, dense = mlp(2, 64, 64, 64), mlp(20, 200, 200, 784)
    return [
        harness.Case("small", "2-64-64-64, 8 x 8 chains", build, (small, 8, 8, 100), 10),
        harness.Case("dense", "20-200-200-784, 16 x 16 chains", build, (dense, 16, 16, 30), 20),
        harness.Case("conv", "HVAE's convolutional, 8 x 16 chains", build, (hvae_decoder, 8, 16, 5), 20),
    ]


def mlp(*widths: int) -> Callable[[], nn.Sequential]:
    return functools.partial(softplus_mlp, *widths)


def build(
    options: harness.Options,
    make: Callable[[], nn.Sequential],
    images: int,
    chains: int,
    num_temperatures: int,
) -> harness.Trial:
    device = options.device
    torch.manual_seed(0)
    decoder = make()
    latent_dim = next(decoder.parameters()).shape[1]
    model = fastvae.VAE(nn.Flatten(), decoder, latent_dim=latent_dim)
    model = model.to(device).eval().requires_grad_(False)
    x = torch.bernoulli(model.sample(images))

    def ours(step_size: Tensor | None = None) -> AISEstimate:
        return fastvae.metrics.ais(
            *(model, x),
            num_temperatures=num_temperatures,
            num_chains=chains,
            num_leapfrog_steps=LEAPFROG_STEPS,
            step_size=step_size,
        )

    step_size = ours().step_size
    stream = Stream(draws_of(keys_of(x), 0, chains, FIRST_DRAW))
    start = stream.normal((latent_dim,))
    noise = [(stream.normal((latent_dim,)), stream.uniform((2,))) for _ in step_size]
    single = [(rho.float(), uniform) for rho, uniform in noise]
    ladder = temperatures(num_temperatures, "sigmoid").to(device)
    steps = step_size.repeat_interleave(chains, 1).to(device)
    rows = x.repeat_interleave(chains, 0)

    def log_mean(log_weights: Tensor) -> Tensor:
        return log_weights.view(images, -1).exp().mean(1).log()

    def rival(run: Callable[..., Tensor], decode: Callable[[Tensor], Tensor]) -> timing.Contestant:
        log_px = log_px_of(decode)
        return lambda: log_mean(run(log_px, rows, start.float(), single, ladder, steps))

    contestants: dict[str, Callable[[], timing.Contestant]] = {
        OURS: lambda: lambda: ours(step_size).log_px,
        TEXTBOOK: lambda: rival(textbook, decoder),
        CAREFUL: lambda: rival(careful, decoder),
    }
    if options.compile:
        contestants[CAREFUL + harness.COMPILED] = lambda: rival(careful, timing.compiled(decoder))
    wide = log_px_of(copy.deepcopy(decoder).double())
    exact = log_mean(careful(wide, rows.double(), start, noise, ladder, steps))
    forces = (num_temperatures - 2) * LEAPFROG_STEPS + 1
    layers = floors.products(decoder, start.float())
    operations = 2 * forces * sum(layer.operations for layer in layers)
    return harness.Trial(contestants, [exact], {OURS: 1e-4}, operations=operations)


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    settings = {"precision": "float32, TF32 off; weights in float64", "leapfrog steps": LEAPFROG_STEPS}
    of_cases = cases(options.quick)
    harness.Benchmark("ais", "Annealed importance sampling", of_cases, settings=settings).run(options)
