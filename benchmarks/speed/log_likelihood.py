"""The importance-sampled log-likelihood of images under a VAE, against eager PyTorch.

    python -m benchmarks.speed log_likelihood             about a minute on 2 cores
    python -m benchmarks.speed log_likelihood --quick     tiny sizes: does everything run?

Every contestant computes log p(x) of the same images from the same noise, in float32, without gradients. The rivals:
"eager, copies", as code around likelihood regret does it (Xiao, Yan, Amit, NeurIPS 2020): the image repeated for every
sample, encoder and decoder on all copies, F.cross_entropy on the decoder's output; "eager, careful": the encoder once,
the decoder in channels_last in tiles of 64 codes, F.cross_entropy on its rows, in inference mode, and the same through
torch.compile. Errors are against float64. Written are log_likelihood-<device>.json, .md and .png.

Floor: "FLOP floor", the decoder's floating-point operations at the rate of a large square product.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastvae
from fastvae.architectures import dcgan_decoder, dcgan_encoder

from . import command, common, floors, report

OURS, COPIES, CAREFUL = "ours", "eager, copies", "eager, careful"
COMPILED = ", torch.compile"
TILE = 64
"""codes that the careful rival decodes at once"""


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    channels: int
    width: int
    images: int
    samples: int
    seconds: float
    """how long its contestants are timed"""


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("dcgan", "DCGAN of width 2, 1 image, 3 samples", 1, 2, 1, 3, 0.1)]
    return [
        Case("dcgan", "DCGAN 1x32x32, 256 classes, 1 image, 200 samples", 1, 32, 1, 200, 12),
        Case("color", "DCGAN 3x32x32, 256 classes, 4 images, 25 samples", 3, 32, 4, 25, 12),
    ]


Noise = Callable[[int, int, Tensor], Tensor]


def log_px(logits: Tensor, classes: Tensor) -> Tensor:
    """log p(x | z), [N], of logits [N, C 256, H, W] and classes [N, C, H, W], as F.cross_entropy takes them."""
    rows = logits.unflatten(1, (-1, 256)).movedim(2, -1)
    losses = F.cross_entropy(rows.reshape(-1, 256), classes.flatten(), reduction="none")
    return -losses.reshape(len(logits), -1).sum(1)


def tiled_log_px(decode: Callable[[Tensor], Tensor], codes: Tensor, classes: Tensor) -> Tensor:
    """The same for a few codes at a time; the image of code i is i modulo the number of images."""
    rows = torch.arange(len(codes)) % len(classes)
    parts = torch.arange(len(codes)).split(TILE)
    return torch.cat([log_px(decode(codes[part]), classes[rows[part]]) for part in parts])


def log_prior_ratio(z: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """log p(z) - log q(z | x) of codes [..., d]."""
    return 0.5 * (noise.square() + logvar - z.square()).sum(-1)


def copies(model: fastvae.VAE, x: Tensor, noise: Tensor) -> Tensor:
    """One image at a time, as published code does it."""
    found = []
    for image, drawn in zip(x, noise.unbind(1), strict=True):
        repeated = image.expand(len(drawn), *image.shape)
        mu, logvar = model.encoder(repeated).chunk(2, 1)
        z = mu + torch.exp(logvar / 2) * drawn
        classes = (repeated * 255).round().long()
        weights = log_px(model.decoder(z), classes) + log_prior_ratio(z, logvar, drawn)
        found.append(weights.logsumexp(0) - math.log(len(drawn)))
    return torch.stack(found)


def careful(model: fastvae.VAE, decode: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor) -> Tensor:
    mu, logvar = model.encoder(x).chunk(2, 1)
    z = mu + torch.exp(logvar / 2) * noise
    weights = tiled_log_px(decode, z.flatten(0, 1), (x * 255).round().long()).reshape(z.shape[:2])
    return (weights + log_prior_ratio(z, logvar, noise)).logsumexp(0) - math.log(len(noise))


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Errors against float64 of every contestant, then their times and the floor."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = fastvae.VAE(
        dcgan_encoder(case.channels, case.width), dcgan_decoder(case.channels, case.width), "categorical"
    )
    model = model.to(device).eval().requires_grad_(False)
    fast = copy.deepcopy(model)
    fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = (torch.randint(256, (case.images, case.channels, 32, 32)) / 255).to(device)
    noise = torch.randn(case.samples, case.images, 100, device=device)

    def ours() -> Tensor:
        return model.log_likelihood(
            x, case.samples, noise=lambda first, count, _: noise[None, first : first + count]
        )

    def inference(work: Callable[[], Tensor]) -> common.Contestant:
        def run() -> Tensor:
            with torch.inference_mode():
                return work()

        return run

    contestants: dict[str, common.Contestant] = {
        OURS: ours,
        COPIES: inference(lambda: copies(model, x, noise)),
        CAREFUL: inference(lambda: careful(fast, fast.decoder, x, noise)),
    }
    if options.compile:
        compiled = torch.compile(fast.decoder)
        contestants[CAREFUL + COMPILED] = inference(lambda: careful(fast, compiled, x, noise))
    exact = careful(
        copy.deepcopy(model).double(), copy.deepcopy(model.decoder).double(), x.double(), noise.double()
    )
    results, notes = command.those_that_run(contestants, OURS, case.title)
    errors = {name: common.relative_error([result], [exact]) for name, result in results.items()}
    contestants = {name: contestants[name] for name in results}
    if not errors[OURS] < 1e-5:
        raise ArithmeticError(f"ours is off by {errors[OURS]:.1e}")

    decoder = model.decoder
    assert isinstance(decoder, nn.Sequential)
    layers = floors.products(decoder, torch.randn(case.images * case.samples, 100, device=device))
    operations = sum(layer.operations for layer in layers)
    command.progress(f"{case.title}: timing")
    timings, gflops = common.interleave_with_gemm(
        contestants, device, seconds=case.seconds * options.share, quick=options.quick
    )
    floor_ms = {report.FLOPS: operations / gflops / 1e6}
    return report.case_record(
        case, OURS, timings, floor_ms, operations=operations, gflops=gflops, errors=errors, notes=notes
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return command.parse_with_compilers(__doc__, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device, path = command.begin(options, "log_likelihood")
    environment = common.environment(device)
    settings = {"threads": options.threads, "precision": "float32, TF32 off"}
    records: list[dict[str, Any]] = []
    chosen = cases(options.quick)
    for case in chosen:
        records.append(run_case(case, options))
        sections = ["# Importance-sampled log-likelihood"]
        for found in records:
            sections += [report.case_section(found, OURS), report.error_table(found)]
        sections.append(report.environment_table(environment, settings))
        command.draw(path, report.panels(records, OURS), "time / ours, medians")
        record = {
            "benchmark": "log_likelihood",
            "environment": environment,
            "settings": settings,
            "cases": records,
        }
        common.publish(path, record, sections, last=case is chosen[-1])
