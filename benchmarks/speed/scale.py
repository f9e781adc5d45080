"""What a million training images cost: measured on a few, extrapolated.

    python -m benchmarks.speed scale             about 3 minutes on 2 cores
    python -m benchmarks.speed scale --quick     tiny sizes: does everything run?

Each task is timed at two numbers of images, and the difference gives the time of one more image: what is done once does
not count. A million times that is the extrapolation; torchrun's processes share the images out, so that P of them on
machines of their own take a P-th of it (docs/several-processes.md).

Tasks: an epoch of training, and TracIn of 100 queries (top 20, S = 16, one checkpoint), with the 3.0M-parameter model
of Kong and Chaudhuri (NeurIPS 2021); a pass of each outlier score of fastvae.ood with the DCGAN of Xiao, Yan, Amit
(NeurIPS 2020) at 1x32x32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae import architectures
from fastvae.influence import TracIn
from fastvae.models import BaseVAE

from ..writing import table
from . import harness, report, timing

MILLION = 1_000_000

Work = Callable[[int], timing.Contestant]
"""Of so many images."""


def epoch(model: BaseVAE, x: Tensor, batch_size: int) -> timing.Contestant:
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def run() -> None:
        model.train()
        for batch in x.split(batch_size):
            optimizer.zero_grad()
            model(batch).mean().backward()
            optimizer.step()

    return run


def cases(quick: bool, device: torch.device) -> list[harness.Case]:
    torch.manual_seed(0)
    width, queries, draws, steps, samples = (16, 3, 2, 2, 4) if quick else (1024, 100, 16, 100, 1000)

    def dense(kind: type[BaseVAE], **options: Any) -> BaseVAE:
        networks = architectures.tracin_encoder(width=width), architectures.tracin_decoder(width=width)
        return kind(*networks, **options).to(device)

    vae, hvae = dense(fastvae.VAE, beta=4.0), dense(fastvae.HVAE, num_steps=5)
    channels, filters = 1, 2 if quick else 32
    networks = architectures.dcgan_encoder(channels, filters), architectures.dcgan_decoder(channels, filters)
    dcgan = fastvae.VAE(*networks, "categorical").to(device).eval()
    digits = torch.rand(8 if quick else 4096, 784).round().to(device)
    images = (torch.randint(256, (4 if quick else 8, 1, 32, 32)) / 255).to(device)

    def tracin(count: int) -> timing.Contestant:
        influence = TracIn(vae, digits[:count], [None], lambda *_: 1.0, num_samples=draws)
        return lambda: influence.influence(digits[:queries], k=min(20, count))

    def regret(target: str) -> Work:
        detector = fastvae.ood.LikelihoodRegret(dcgan, num_steps=steps, num_samples=samples, target=target)
        return lambda count: lambda: detector.predict(images[:count])

    nll = fastvae.ood.NegativeLogLikelihood(dcgan, num_samples=samples)
    many, many_images = (4, 8) if quick else (1024, 4096), (2, 4) if quick else (4, 8)
    mnist, foreign = "784-1024-512-256-256, latent 128", "DCGAN 1x32x32, categorical"
    tasks: dict[str, tuple[str, Work, tuple[int, int]]] = {
        "epoch-vae": (f"epoch of a VAE, {mnist}", lambda n: epoch(vae, digits[:n], 64), many),
        "epoch-hvae": (f"epoch of an HVAE, K = 5, {mnist}", lambda n: epoch(hvae, digits[:n], 64), many),
        "tracin": (f"TracIn of {queries} queries, S = {draws}, a checkpoint, {mnist}", tracin, many),
        "nll": (f"NLL, {samples} samples, {foreign}", lambda n: lambda: nll.predict(images[:n]), many_images),
        "regret": (f"likelihood regret, {steps} steps, {foreign}", regret("encoder"), many_images),
        "regret-posterior": (
            *(f"likelihood regret over the posterior, {foreign}", regret("posterior")),
            many_images,
        ),
    }
    return [
        harness.Case(key, title, build, (work, counts), 0.1 if quick else 12)
        for key, (title, work, counts) in tasks.items()
    ]


def build(options: harness.Options, work: Work, counts: tuple[int, int]) -> harness.Trial:
    return harness.Trial({str(count): functools.partial(work, count) for count in counts})


def each_image(record: report.Record) -> float:
    """Milliseconds of one more image."""
    (few, first), (many, second) = record["timings_ms"].items()
    return float((second.median - first.median) / (int(many) - int(few)))


def summary(records: Sequence[report.Record]) -> list[str]:
    """Measured in the first columns, extrapolated in the last two."""
    rows = []
    for record in records:
        (few, first), (many, second) = record["timings_ms"].items()
        hours = each_image(record) * MILLION / 3.6e6
        measured = f"{first.median / 1e3:.3g} s of {few}, {second.median / 1e3:.3g} s of {many}"
        rows.append(
            [
                record["title"],
                measured,
                f"{each_image(record):.3g} ms",
                f"{hours:.3g} h",
                f"{hours / 16:.2g} h",
            ]
        )
    header = ["task", "measured", "an image", "a million, extrapolated", "by 16 such machines"]
    return [table(header, rows)]


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    all_cases = cases(options.quick, options.device)
    harness.Benchmark("scale", "A million images", all_cases, summary=summary).run(options)
