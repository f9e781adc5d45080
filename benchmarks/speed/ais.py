"""Annealed importance sampling of log p(x), against eager PyTorch with forces by autograd.

    python -m benchmarks.speed ais             about two minutes on 2 cores
    python -m benchmarks.speed ais --quick     tiny sizes: does everything run?

Every contestant runs the same chains in float32: same images, schedule, step sizes (found beforehand) and noise, which
the rivals are given and ours draws, keyed by image. The rivals: "eager, textbook", whose transition of K leapfrog steps
evaluates K + 1 forces, two energies and two densities of the weight, each for itself; "eager, careful", which has
log p(x | z) and its gradient from one evaluation, keeps both of the current code for the next temperature and so
evaluates K; and the same with decoder and density through torch.compile. Errors are against the careful one in float64.
Written are ais-<device>.json, .md and .png.

Floor: "FLOP floor", forward and reverse sweeps of the careful one's forces at the rate of a large square product.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastvae
from fastvae.architectures import hvae_decoder
from fastvae.metrics.annealing import temperatures
from fastvae.metrics.evidence import FIRST_DRAW
from fastvae.noise import Stream, draws_of, keys_of

from . import command, common, floors, report

OURS, TEXTBOOK, CAREFUL = "ours", "eager, textbook", "eager, careful"
COMPILED = ", torch.compile"
LEAPFROG_STEPS = 10

LogPx = Callable[[Tensor, Tensor], Tensor]
Noise = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    decoder: Callable[[], nn.Sequential]
    latent_dim: int
    images: int
    chains: int
    temperatures: int
    seconds: float
    """how long its contestants are timed"""


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Softplus()]
    return nn.Sequential(*layers[:-1])


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("small", "2-8-16, 2 x 2 chains", lambda: mlp(2, 8, 16), 2, 2, 2, 5, 0.1)]
    return [
        Case("small", "2-64-64-64, 8 x 8 chains", lambda: mlp(2, 64, 64, 64), 2, 8, 8, 100, 10),
        Case("dense", "20-200-200-784, 16 x 16 chains", lambda: mlp(20, 200, 200, 784), 20, 16, 16, 30, 20),
        Case("conv", "HVAE's convolutional, 8 x 16 chains", hvae_decoder, 64, 8, 16, 5, 20),
    ]


def log_px_of(decoder: Callable[[Tensor], Tensor]) -> LogPx:
    """log p(x | z) [rows] of Bernoulli pixels."""

    def log_px(z: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(decoder(z), x, reduction="none").flatten(1).sum(1)

    return log_px


def log_px_and_force(log_px: LogPx, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_(True)
    found = log_px(z, x)
    return found.detach(), torch.autograd.grad(found.sum(), z)[0]


def half_squares(*tensors: Tensor) -> Tensor:
    return 0.5 * torch.cat(tensors, 1).double().square().sum(1)


def careful(log_px: LogPx, x: Tensor, start: Tensor, noise: Noise, ladder: Tensor, steps: Tensor) -> Tensor:
    """log weights [rows]; a force for each leapfrog step, none for a temperature."""
    z, (value, force) = start, log_px_and_force(log_px, start, x)
    log_weight = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for t, change in enumerate(ladder.diff().tolist()):
        log_weight += change * value.double()
        if t == len(noise):
            break
        b, (rho, uniform) = float(ladder[t + 1]), noise[t]
        eps = (steps[t] * (0.8 + 0.4 * uniform[:, 0])).to(z)[:, None]
        end, momentum, of_end, push = z, rho, value, force
        for _ in range(LEAPFROG_STEPS):
            momentum = momentum + eps / 2 * (b * push - end)
            end = end + eps * momentum
            of_end, push = log_px_and_force(log_px, end, x)
            momentum = momentum + eps / 2 * (b * push - end)
        gain = b * (of_end.double() - value.double()) - half_squares(end, momentum) + half_squares(z, rho)
        accepted = uniform[:, 1].log() < gain
        z, force = (torch.where(accepted[:, None], new, old) for new, old in ((end, z), (push, force)))
        value = torch.where(accepted, of_end, value)
    return log_weight


def textbook(log_px: LogPx, x: Tensor, start: Tensor, noise: Noise, ladder: Tensor, steps: Tensor) -> Tensor:
    """The same by functions of a density at a temperature, as the algorithm is usually written down."""

    def log_density(z: Tensor, b: Tensor) -> Tensor:
        return b * log_px(z, x).double() - half_squares(z)

    def force(z: Tensor, b: Tensor) -> Tensor:
        return b.to(z) * log_px_and_force(log_px, z, x)[1] - z

    z, log_weight = start, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for t in range(len(ladder) - 1):
        with torch.no_grad():
            log_weight += log_density(z, ladder[t + 1]) - log_density(z, ladder[t])
        if t == len(noise):
            break
        b, (rho, uniform) = ladder[t + 1], noise[t]
        eps = (steps[t] * (0.8 + 0.4 * uniform[:, 0])).to(z)[:, None]
        end, momentum = z, rho + eps / 2 * force(z, b)
        for k in range(LEAPFROG_STEPS):
            end = end + eps * momentum
            momentum = momentum + (eps if k < LEAPFROG_STEPS - 1 else eps / 2) * force(end, b)
        with torch.no_grad():
            gain = log_density(end, b) - half_squares(momentum) - log_density(z, b) + half_squares(rho)
        z = torch.where((uniform[:, 1].log() < gain)[:, None], end, z)
    return log_weight


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Errors against float64 of every contestant, then their times and the floor."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    decoder = case.decoder()
    model = fastvae.VAE(nn.Flatten(), decoder, latent_dim=case.latent_dim)
    model = model.to(device).eval().requires_grad_(False)
    x = torch.bernoulli(model.sample(case.images))
    settings: dict[str, Any] = {
        "num_temperatures": case.temperatures,
        "num_chains": case.chains,
        "num_leapfrog_steps": LEAPFROG_STEPS,
    }
    step_size = fastvae.metrics.ais(model, x, **settings).step_size

    stream = Stream(draws_of(keys_of(x), 0, case.chains, FIRST_DRAW))
    start = stream.normal((case.latent_dim,))
    noise = [(stream.normal((case.latent_dim,)), stream.uniform((2,))) for _ in step_size]
    single = [(rho.float(), uniform) for rho, uniform in noise]
    ladder = temperatures(case.temperatures, "sigmoid").to(device)
    steps = step_size.repeat_interleave(case.chains, 1).to(device)
    rows = x.repeat_interleave(case.chains, 0)

    def log_mean(log_weights: Tensor) -> Tensor:
        return log_weights.view(case.images, -1).exp().mean(1).log()

    def rival(run: Callable[..., Tensor], decode: Callable[[Tensor], Tensor]) -> common.Contestant:
        log_px = log_px_of(decode)
        return lambda: log_mean(run(log_px, rows, start.float(), single, ladder, steps))

    contestants: dict[str, common.Contestant] = {
        OURS: lambda: fastvae.metrics.ais(model, x, **settings, step_size=step_size).log_px,
        TEXTBOOK: rival(textbook, decoder),
        CAREFUL: rival(careful, decoder),
    }
    if options.compile:
        contestants[CAREFUL + COMPILED] = rival(careful, torch.compile(decoder))
    wide = log_px_of(copy.deepcopy(decoder).double())
    exact = log_mean(careful(wide, rows.double(), start, noise, ladder, steps))
    results, notes = command.those_that_run(contestants, OURS, case.title)
    errors = {name: common.relative_error([result], [exact]) for name, result in results.items()}
    contestants = {name: contestants[name] for name in results}
    if not errors[OURS] < 1e-4:
        raise ArithmeticError(f"ours is off by {errors[OURS]:.1e}")

    layers = floors.products(decoder, start.float())
    forces = (case.temperatures - 2) * LEAPFROG_STEPS + 1
    operations = 2 * forces * sum(layer.operations for layer in layers)
    command.progress(f"{case.title}: timing")
    timings, gflops = common.interleave_with_gemm(
        contestants, device, seconds=case.seconds * options.share, quick=options.quick
    )
    floor_ms = {report.FLOPS: operations / gflops / 1e6}
    return report.case_record(
        case, OURS, timings, floor_ms, operations=operations, gflops=gflops, errors=errors, notes=notes
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = command.parse_with_compilers(__doc__, arguments)
    device, path = command.begin(options, "ais")
    environment = common.environment(device)
    settings = {
        "threads": options.threads,
        "precision": "float32, TF32 off; weights in float64",
        "leapfrog steps": LEAPFROG_STEPS,
    }
    records: list[dict[str, Any]] = []
    chosen = cases(options.quick)
    for case in chosen:
        records.append(run_case(case, options))
        sections = ["# Annealed importance sampling"]
        for found in records:
            sections += [report.case_section(found, OURS), report.error_table(found)]
        sections.append(report.environment_table(environment, settings))
        command.draw(path, report.panels(records, OURS), "time / ours, medians")
        record = {"benchmark": "ais", "environment": environment, "settings": settings, "cases": records}
        common.publish(path, record, sections, last=case is chosen[-1])
