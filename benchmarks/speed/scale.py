"""What a million training images cost: measured on a few, extrapolated.

    python -m benchmarks.speed scale             about 3 minutes on 2 cores
    python -m benchmarks.speed scale --quick     tiny sizes: does everything run?

Each task is timed at two numbers of images, and the difference gives the time of one more image: what is done once does
not count. A million times that is the extrapolation; torchrun's processes share the images out, so that P of them on
machines of their own take a P-th of it (docs/several-processes.md). Written are scale-<device>.json and .md.

Tasks: an epoch of training, and TracIn of 100 queries (top 20, S = 16, one checkpoint), with the 3.0M-parameter model
of Kong and Chaudhuri (NeurIPS 2021); a pass of each outlier score of fastvae.ood with the DCGAN of Xiao, Yan, Amit
(NeurIPS 2020) at 1x32x32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae import architectures
from fastvae.influence import TracIn
from fastvae.models import BaseVAE

from . import command, common, report

MILLION = 1_000_000


@dataclass(frozen=True)
class Task:
    title: str
    work: Callable[[int], common.Contestant]
    """Of so many images."""
    few: int
    many: int
    seconds: float
    """how long it is timed"""


def epoch(model: BaseVAE, x: Tensor, batch_size: int) -> common.Contestant:
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def run() -> None:
        model.train()
        for batch in x.split(batch_size):
            optimizer.zero_grad()
            model(batch).mean().backward()
            optimizer.step()

    return run


def tasks(quick: bool, device: torch.device) -> list[Task]:
    torch.manual_seed(0)
    width, queries, draws, steps, samples = (16, 3, 2, 2, 4) if quick else (1024, 100, 16, 100, 1000)

    def dense(kind: type[BaseVAE], **options: Any) -> BaseVAE:
        networks = architectures.tracin_encoder(width=width), architectures.tracin_decoder(width=width)
        return kind(*networks, **options).to(device)

    vae, hvae = dense(fastvae.VAE, beta=4.0), dense(fastvae.HVAE, num_steps=5)
    dcgan_width = 2 if quick else 32
    dcgan = fastvae.VAE(
        architectures.dcgan_encoder(1, dcgan_width),
        architectures.dcgan_decoder(1, dcgan_width),
        "categorical",
    )
    dcgan = dcgan.to(device).eval()
    digits = torch.rand(8 if quick else 4096, 784).round().to(device)
    images = (torch.randint(256, (4 if quick else 8, 1, 32, 32)) / 255).to(device)

    def tracin(count: int) -> common.Contestant:
        influence = TracIn(vae, digits[:count], [None], lambda *_: 1.0, num_samples=draws)
        return lambda: influence.influence(digits[:queries], k=min(20, count))

    def regret(target: str) -> Callable[[int], common.Contestant]:
        detector = fastvae.ood.LikelihoodRegret(dcgan, num_steps=steps, num_samples=samples, target=target)
        return lambda count: lambda: detector.predict(images[:count])

    nll = fastvae.ood.NegativeLogLikelihood(dcgan, num_samples=samples)
    few, many = (4, 8) if quick else (1024, 4096)
    few_images, many_images = (2, 4) if quick else (4, 8)
    long = 0.1 if quick else 12
    mnist, foreign = "784-1024-512-256-256, latent 128", "DCGAN 1x32x32, categorical"
    return [
        Task(f"epoch of a VAE, {mnist}", lambda count: epoch(vae, digits[:count], 64), few, many, long),
        Task(
            f"epoch of an HVAE, K = 5, {mnist}",
            lambda count: epoch(hvae, digits[:count], 64),
            few,
            many,
            long,
        ),
        Task(f"TracIn of {queries} queries, S = {draws}, a checkpoint, {mnist}", tracin, few, many, long),
        Task(
            f"NLL, {samples} samples, {foreign}",
            lambda count: lambda: nll.predict(images[:count]),
            few_images,
            many_images,
            long,
        ),
        Task(
            f"likelihood regret, {steps} steps, {foreign}", regret("encoder"), few_images, many_images, long
        ),
        Task(
            f"likelihood regret over the posterior, {foreign}",
            regret("posterior"),
            few_images,
            many_images,
            long,
        ),
    ]


def run_task(task: Task, device: torch.device) -> dict[str, Any]:
    command.progress(task.title)
    contestants = {str(count): task.work(count) for count in (task.few, task.many)}
    clocks = dict.fromkeys(contestants, common.clock_of(device))
    timings = common.interleave(contestants, clocks, seconds=task.seconds, min_rounds=2, max_rounds=15)
    few, many = (timing.median for timing in timings.values())
    each = (many - few) / (task.many - task.few)
    return {
        "task": task.title,
        "timings_ms": timings,
        "milliseconds_an_image": each,
        "hours_a_million": each * MILLION / 3.6e6,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Measured in the first columns, extrapolated in the last two."""
    body = []
    for row in rows:
        (few, first), (many, second) = row["timings_ms"].items()
        hours = row["hours_a_million"]
        body.append(
            [
                row["task"],
                f"{first.median / 1e3:.3g} s of {few}, {second.median / 1e3:.3g} s of {many}",
                f"{row['milliseconds_an_image']:.3g} ms",
                f"{hours:.3g} h",
                f"{hours / 16:.2g} h",
            ]
        )
    header = ["task", "measured", "an image", "a million, extrapolated", "by 16 such machines"]
    return common.markdown_table(header, body)


def main(arguments: Sequence[str] | None = None) -> None:
    options: argparse.Namespace = command.parse(command.parser(__doc__), arguments)
    device, path = command.begin(options, "scale")
    environment = common.environment(device)
    rows = [run_task(task, device) for task in tasks(options.quick, device)]
    settings = {"threads": options.threads, "precision": "float32, TF32 off"}
    record = {"benchmark": "scale", "environment": environment, "settings": settings, "tasks": rows}
    sections = ["# A million images", table(rows), report.environment_table(environment, settings)]
    common.publish(path, record, sections)
