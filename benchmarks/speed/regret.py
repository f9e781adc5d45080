"""Likelihood regret of a batch against one image at a time.

    python -m benchmarks.speed regret             times and errors, a few minutes on 2 cores
    python -m benchmarks.speed regret --case mlp  one case, written as regret-mlp-<device>
    python -m benchmarks.speed regret --quick     tiny sizes: does everything run?

All numbers are milliseconds an image, float32, 100 steps of Adam and 1,000 importance samples before and after (Xiao,
Yan, Amit, NeurIPS 2020). The rivals take one image at a time: "as published" forms the decoder's gradients too and runs
encoder and decoder on 1,000 copies of the image for each likelihood, as the authors' code does; "careful" freezes the
decoder, encodes once, and takes our importance-sampled likelihood. "vmap" trains the copies of a batch by torch.vmap,
autograd and a functional Adam. Steps and whole scores are timed apart. Errors are those of the posterior's mean and log
variance after the steps, against the published procedure in float64 with the same noise. Written are
regret-<device>.json, .md and .png.

Floors, of the steps alone: "state floor", parameters and moments of each copy read and written once a step at the rate
of a large copy; "FLOP floor", the products of encoder (forward, reverse, weight gradient) and decoder (forward,
reverse) at the rate of a large square product.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.architectures import dcgan_decoder, dcgan_encoder
from fastvae.models import VAE
from fastvae.models.observation import Observation
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.differentiated import VmappedCopies
from fastvae.ood.objective import PosteriorObjective
from fastvae.ood.sequential import refit_one

from . import command, common, floors, report
from .networks import mlp

OURS, PUBLISHED, CAREFUL, VMAP = (
    "ours",
    "one image, as published",
    "one image, careful",
    "vmap, functional Adam",
)
STATE, FLOPS = "state floor", report.FLOPS
TOLERANCE = 1e-2
"""largest difference of a mean or log variance after 100 steps of float32: Adam divides by gradients near zero"""

TARGETS = [
    report.Target("cpu", "dcgan-score", PUBLISHED, 4, OURS),
    report.Target("cpu", "mlp-score", PUBLISHED, 10, OURS),
    report.Target("cpu", "mlp-steps", CAREFUL, 10, OURS),
    report.Target("cpu", "dcgan-steps", CAREFUL, 4, OURS),
]


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    model: Callable[[], VAE]
    shape: tuple[int, ...]
    bright: float
    """share of pixels that are not zero"""
    images: int
    """that are taken together"""
    steps: int
    samples: int
    seconds: float


def dcgan(channels: int, width: int = 32, latent_dim: int = 100) -> VAE:
    return VAE(
        dcgan_encoder(channels, width, latent_dim), dcgan_decoder(channels, width, latent_dim), "categorical"
    )


def small() -> VAE:
    return VAE(mlp(784, 400, 40), mlp(20, 400, 784))


def large() -> VAE:
    return VAE(mlp(784, 1024, 512, 256, 256), mlp(128, 256, 512, 1024, 784))


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("dcgan", "DCGAN, width 2", lambda: dcgan(1, 2, 3), (1, 32, 32), 1.0, 2, 2, 2, 0.1),
            Case("mlp", "12-8-6", lambda: VAE(mlp(12, 8, 6), mlp(3, 8, 12)), (12,), 0.5, 3, 2, 2, 0.1),
        ]
    return [
        Case("dcgan", "DCGAN 1x32x32, 256-way", lambda: dcgan(1), (1, 32, 32), 1.0, 8, 100, 1000, 20),
        Case("mlp", "784-400-40, 19% of pixels not zero", small, (784,), 0.19, 32, 100, 1000, 5),
        Case("mlp-bright", "784-400-40, no pixel zero", small, (784,), 1.0, 32, 100, 1000, 5),
        Case("mlp-large", "784-1024-512-256-256, 19% not zero", large, (784,), 0.19, 8, 100, 1000, 5),
    ]


def problem(case: Case, device: torch.device) -> tuple[VAE, Tensor]:
    torch.manual_seed(0)
    model = case.model().eval().to(device)
    x = torch.rand(case.images, *case.shape)
    return model, torch.where(torch.rand(x.shape) < case.bright, x, torch.zeros(())).to(device)


def published_steps(model: VAE, x: Tensor, case: Case) -> VAE:
    """The authors' loop over the steps: nothing is frozen, the optimiser has the encoder's parameters alone."""
    private = copy.deepcopy(model)
    optimizer = torch.optim.Adam(private.encoder.parameters(), lr=2e-4, weight_decay=5e-5)
    for _ in range(case.steps):
        optimizer.zero_grad()
        private(x).sum().backward()
        optimizer.step()
    return private


@torch.no_grad()
def published_likelihood(model: VAE, x: Tensor, case: Case) -> Tensor:
    """log p(x) from as many copies of one image, encoder and decoder run on each."""
    copies = x.expand(case.samples, *x.shape[1:]).contiguous()
    mu, logvar = model.encode(copies)
    weights = model.log_weight(copies, mu, logvar, torch.randn(1, *mu.shape, device=x.device))
    return weights.logsumexp(0)


def published_score(model: VAE, x: Tensor, case: Case) -> Tensor:
    before = published_likelihood(model, x, case)
    return published_likelihood(published_steps(model, x, case), x, case) - before


def careful_score(model: VAE, x: Tensor, case: Case) -> Tensor:
    noise = SampleNoise(keys_of(x), 0)
    private, _ = refit_one(model, x, noise, num_steps=case.steps)
    before, after = (m.log_likelihood(x, case.samples, noise=noise) for m in (model, private))
    return after - before


def vmapped_steps(detector: LikelihoodRegret, x: Tensor) -> Tensor:
    """Mean and log variance of each image's own posterior, [B, 2 d]."""
    copies = VmappedCopies(detector.model, x, detector.adam)
    with torch.no_grad():
        output = copies.forward()
        mu = output.chunk(2, 1)[0]
        objective = PosteriorObjective(detector.model, Observation(x), mu)
        noise = SampleNoise(keys_of(x), 0)(0, detector.num_steps, mu)
        for step in range(detector.num_steps):
            copies.update(objective(output, noise[:, step])[1])
            output = copies.forward()
    return output


def run_case(case: Case, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The steps alone and the whole scores."""
    model, x = problem(case, device)
    one = x[:1]
    detector = LikelihoodRegret(model, num_steps=case.steps, num_samples=case.samples)
    command.progress(f"{case.title}: errors")
    exact, _ = refit_one(
        copy.deepcopy(model).double(), one, SampleNoise(keys_of(one), 0), num_steps=case.steps
    )
    expected = torch.cat(exact.encode(one), 1)

    def ours() -> Tensor:
        refit = detector.refit(x)
        return torch.cat((refit.mu, refit.logvar), 1)[:1]

    def careful() -> Tensor:
        single, _ = refit_one(model, one, SampleNoise(keys_of(one), 0), num_steps=case.steps)
        return torch.cat(single.encode(one), 1)

    checked = {OURS: ours, CAREFUL: careful, VMAP: lambda: vmapped_steps(detector, x)[:1]}
    outputs, failures = command.those_that_run(checked, OURS, case.title)
    errors = {name: (output - expected).abs().max().item() for name, output in outputs.items()}
    if not errors[OURS] <= TOLERANCE:
        raise ArithmeticError(f"ours is off by {errors[OURS]:.1e}, over {TOLERANCE:.1e}")

    steps: dict[str, common.Contestant] = {
        OURS: lambda: detector.refit(x),
        PUBLISHED: lambda: published_steps(model, one, case),
        CAREFUL: lambda: refit_one(model, one, SampleNoise(keys_of(one), 0), num_steps=case.steps),
        VMAP: lambda: vmapped_steps(detector, x),
    }
    scores: dict[str, common.Contestant] = {
        OURS: lambda: detector.predict(x),
        PUBLISHED: lambda: published_score(model, one, case),
        CAREFUL: lambda: careful_score(model, one, case),
    }
    side = common.square_side(device, quick=options.quick)
    gflops = next(iter(common.gemm_rate([(side, side, side)], device).values()))
    bandwidth = common.copy_rate(device, 1 if options.quick else 256)
    operations = case.steps * operations_of(model, one)
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
    floor_ms = {STATE: case.steps * 24 * parameters / bandwidth / 1e6, FLOPS: operations / gflops / 1e6}
    records = []
    for part, contestants, floor in (("steps", steps, floor_ms), ("score", scores, {})):
        alive = {name: run for name, run in contestants.items() if name not in failures}
        results, notes = command.those_that_run(alive, OURS, f"{case.title}, {part}")
        contestants = {name: contestants[name] for name in results}
        notes |= {name: note for name, note in failures.items() if name not in notes}
        command.progress(f"{case.title}: timing the {part}")
        timings = common.interleave(
            contestants,
            dict.fromkeys(contestants, common.clock_of(device)),
            seconds=case.seconds * options.share,
            min_rounds=2 if options.quick else 3,
        )
        timings = {
            name: per_image(timing, 1 if name in (PUBLISHED, CAREFUL) else case.images)
            for name, timing in timings.items()
        }
        mine = timings[OURS].median
        records.append(
            {
                "case": f"{case.key}-{part}",
                "title": f"{case.title}: {'100 steps' if part == 'steps' else 'the whole score'}, an image",
                "images": case.images,
                "operations": operations,
                "square_gemm_gflops": gflops,
                "copy_gb_per_s": bandwidth,
                "encoder_parameters": parameters,
                "timings_ms": timings,
                "floor_ms": floor,
                "ratio_to_ours": {name: timing.median / mine for name, timing in timings.items()},
                "largest_difference": errors,
                "notes": notes,
            }
        )
    return records


def per_image(timing: common.Timing, images: int) -> common.Timing:
    return replace(
        timing,
        median=timing.median / images,
        lower_quartile=timing.lower_quartile / images,
        upper_quartile=timing.upper_quartile / images,
    )


@torch.no_grad()
def operations_of(model: VAE, x: Tensor) -> int:
    """Floating-point operations of one image's step: three products a layer of the encoder, two of the decoder."""
    total, h = 0, x
    for layer in model.encoder:  # type: ignore[attr-defined]
        h = layer(h)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            total += 3 * 2 * h.numel() * layer.weight[0].numel()
    z = model.encode(x)[0]
    decoder: Any = model.decoder
    if isinstance(decoder[0], nn.Unflatten):
        z, decoder = decoder[0](z), decoder[1:]
    return total + 2 * sum(product.operations for product in floors.products(decoder, z))


def error_table(record: dict[str, Any]) -> str:
    rows = [[name, f"{error:.1e}"] for name, error in record["largest_difference"].items()]
    return common.markdown_table(["contestant", "largest difference of a mean or log variance"], rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    options = command.parse(parser, arguments)
    known = [case.key for case in cases(options.quick)]
    for key in options.case or ():
        if key not in known:
            parser.error(f"--case: expected one of {', '.join(known)}, got {key!r}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # A part does not overwrite the whole.
    device, path = command.begin(options, "-".join(["regret", *(options.case or ())]))
    environment = common.environment(device)
    chosen = [case for case in cases(options.quick) if not options.case or case.key in options.case]
    settings = {"threads": options.threads, "precision": "float32, TF32 off"}
    records: list[dict[str, Any]] = []
    for case in chosen:
        records += run_case(case, device, options)
        record: dict[str, Any] = {
            "benchmark": "regret",
            "environment": environment,
            "settings": settings,
            "cases": records,
            "targets": [] if options.quick else report.judge(records, device.type, TARGETS),
        }
        sections = ["# Likelihood regret"]
        if record["targets"]:
            sections.append(report.target_table(record["targets"]))
        for found in records:
            sections.append(report.case_section(found, OURS))
            if found["case"].endswith("-steps"):
                sections.append(error_table(found))
        sections.append(report.environment_table(environment, settings))
        command.draw(path, report.panels(records, OURS), "time / ours, medians")
        common.publish(path, record, sections, last=case is chosen[-1])
