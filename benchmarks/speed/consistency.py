"""What a step of consistency regularisation costs, beside a plain step on a batch of twice the size.

    python -m benchmarks.speed consistency             about a minute on 2 cores
    python -m benchmarks.speed consistency --quick     tiny sizes: does everything run?

A step is the mean loss of a batch and its gradient to all parameters, float32. The consistency step gets B images and
puts them and B given views through the networks as one batch of 2 B; the plain step gets the 2 B images. What is
compared is therefore the divergence, its gradient and the book-keeping of views; the augmentation itself
(``fastvae.data.RandomAffine``) is timed apart. "two batches": the same objective as users write it, two passes of B
through the networks and torch.distributions' divergence. Written are consistency-<device>.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae.architectures import hvae_decoder, hvae_encoder
from fastvae.data import RandomAffine
from fastvae.models import BaseVAE
from fastvae.penalties import Consistency

from . import command, common, networks, report

OURS, PLAIN, TWICE, AUGMENT = "consistency, B", "plain, 2 B", "two batches of B", "RandomAffine of B"
BOUND = 1.05
"""consistency, B over plain, 2 B, at most"""


@dataclass(frozen=True)
class Case:
    key: str
    title: str
    networks: Callable[[], tuple[nn.Module, nn.Module]]
    model: Callable[..., BaseVAE]
    options: dict[str, Any]
    batch: int
    size: int
    """of the images, in pixels either way"""


def convolutional(width: int) -> tuple[nn.Module, nn.Module]:
    return hvae_encoder(width), hvae_decoder(width)


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("vae-mlp", "VAE, 16-8-8-8, B = 5", lambda: networks.dense(4, 8, 4), fastvae.VAE, {}, 5, 4),
            Case(
                "hvae-conv",
                "HVAE, width 2, B = 2",
                lambda: convolutional(2),
                fastvae.HVAE,
                {"num_steps": 2},
                2,
                28,
            ),
        ]
    title = "784-512-512-64, 32-512-512-784, B = 100"
    steps = {"num_steps": 3}
    return [
        Case("vae-mlp", f"VAE, {title}", lambda: networks.dense(28, 512, 32), fastvae.VAE, {}, 100, 28),
        Case(
            "iwae-mlp",
            f"IWAE, K = 5, {title}",
            lambda: networks.dense(28, 512, 32),
            fastvae.IWAE,
            {"num_samples": 5},
            100,
            28,
        ),
        Case(
            "hvae-mlp",
            f"HVAE, K = 3, {title}",
            lambda: networks.dense(28, 512, 32),
            fastvae.HVAE,
            steps,
            100,
            28,
        ),
        Case(
            "vae-conv",
            "VAE, the HVAE paper's convolutional, B = 100",
            lambda: convolutional(16),
            fastvae.VAE,
            {},
            100,
            28,
        ),
    ]


def step(model: nn.Module, loss: Callable[[], Tensor]) -> common.Contestant:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(loss(), parameters)


def two_batches(model: BaseVAE, x: Tensor, view: Tensor, weight: float) -> Tensor:
    steps = [model.objective(images) for images in (x, view)]
    q, q_view = (torch.distributions.Normal(s.mu, torch.exp(s.logvar / 2)) for s in steps)
    divergence = torch.distributions.kl_divergence(q_view, q).sum(1)
    return (steps[0].loss + steps[1].loss + weight * divergence).mean()


def run_case(case: Case, device: torch.device, quick: bool) -> dict[str, Any]:
    command.progress(case.title)
    torch.manual_seed(0)
    encoder, decoder = case.networks()
    x = torch.rand(case.batch, 1, case.size, case.size)
    augment = RandomAffine()
    x, view = x.to(device), augment(x).to(device)
    both = torch.cat([x, view])
    # Steps do not change the weights, so that one model's networks serve all.
    plain = case.model(encoder, decoder, **case.options).to(device)
    penalty = Consistency(lambda _: view)
    consistent = case.model(encoder, decoder, penalties=[penalty], **case.options).to(device)
    contestants: dict[str, common.Contestant] = {
        OURS: step(consistent, lambda: consistent.loss(x)),
        PLAIN: step(plain, lambda: plain.loss(both)),
        TWICE: step(plain, lambda: two_batches(plain, x, view, penalty.weight)),
        AUGMENT: lambda: augment(x),
    }
    for contestant in contestants.values():
        contestant()
    clocks = dict.fromkeys(contestants, common.clock_of(device))
    timings = common.interleave(
        contestants, clocks, seconds=0.2 if quick else 8, min_rounds=2 if quick else 11
    )
    return {
        "case": case.key,
        "title": case.title,
        "timings_ms": timings,
        "ratio_to_plain": {name: timing.median / timings[PLAIN].median for name, timing in timings.items()},
    }


def case_section(record: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{timing.median:.3g}",
            f"{timing.lower_quartile:.3g} to {timing.upper_quartile:.3g}",
            f"{record['ratio_to_plain'][name]:.3f}",
        ]
        for name, timing in record["timings_ms"].items()
    ]
    return f"## {record['title']}\n\n" + common.markdown_table(
        ["contestant", "median ms", "quartiles", f"/ {PLAIN}"], rows
    )


def targets_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        report.verdict(record["title"], OURS, PLAIN, BOUND, record["ratio_to_plain"][OURS], at_most=True)
        for record in records
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return command.parse(command.parser(__doc__), arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device, path = command.begin(options, "consistency")
    environment = common.environment(device)
    settings = {"threads": options.threads, "precision": "float32, TF32 off"}
    records = [run_case(case, device, options.quick) for case in cases(options.quick)]
    targets = [] if options.quick else targets_of(records)
    sections = ["# A step of consistency regularisation"]
    if targets:
        sections.append(report.target_table(targets))
    sections += [case_section(record) for record in records]
    sections.append(report.environment_table(environment, settings))
    record = {
        "benchmark": "consistency",
        "environment": environment,
        "settings": settings,
        "cases": records,
        "targets": targets,
    }
    common.publish(path, record, sections)
