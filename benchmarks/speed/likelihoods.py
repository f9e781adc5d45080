"""Every likelihood behind the paper's, a single-cell-like and a large dense decoder, against careful eager PyTorch.

    python -m benchmarks.speed likelihoods             about five minutes on 2 cores
    python -m benchmarks.speed likelihoods --quick     tiny sizes: does everything run?

"flow": K = 3 leapfrog steps, forward and backward, beside the same by K + 1 forces of autograd (``fastvae.reference``).
"log_px": of 10 codes for each sample, beside the decoder and the density in PyTorch. float32; both must agree with the
rival before they are timed. Written are likelihoods-<device>.json, .md and .png.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import likelihoods as L
from fastvae import ops, reference

from . import command, common, report

OURS, EAGER = "ours", "eager"
TASKS = "flow", "log_px"
STEPS, CODES = 3, 10
TOLERANCE = 2e-3

LIKELIHOODS: dict[str, tuple[L.Likelihood, bool]] = {
    "Bernoulli": (L.Bernoulli(), False),
    "Gaussian": (L.Gaussian(0.3), False),
    "Laplace": (L.Laplace(0.5), False),
    "Poisson": (L.Poisson(), True),
    "NegativeBinomial": (L.NegativeBinomial(2.0), True),
    "StudentT": (L.StudentT(4.0, 0.5), False),
    "ContinuousBernoulli": (L.ContinuousBernoulli(), False),
    "GaussianHead": (L.GaussianHead(), False),
    "DiscretizedLogistic": (L.DiscretizedLogistic(), False),
    "ZeroInflatedNegativeBinomial": (L.ZeroInflatedNegativeBinomial(2.0), True),
    "NegativeBinomial, decoder": (L.NegativeBinomial("decoder"), True),
}
"""With whether its data are counts; those with kernels come first."""

SIZES: dict[str, tuple[tuple[int, ...], int]] = {
    "64-500-784, B 100": ((64, 500, 784), 100),
    "10-128-2000, B 128": ((10, 128, 2000), 128),
    "32-512-512-784, B 128": ((32, 512, 512, 784), 128),
}
QUICK: dict[str, tuple[tuple[int, ...], int]] = {"2-8-6, B 3": ((2, 8, 6), 3)}


def decoder_of(widths: Sequence[int], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise([*widths[:-1], outputs]):
        layers += [nn.Linear(a, b), nn.Softplus()]
    return nn.Sequential(*layers[:-1])


def contestants_of(
    name: str, size: str, options: argparse.Namespace
) -> dict[str, dict[str, Callable[[], list[Tensor]]]]:
    """By task, ours and the rival."""
    likelihood, counts = LIKELIHOODS[name]
    widths, batch = (QUICK if options.quick else SIZES)[size]
    torch.manual_seed(0)
    decoder = decoder_of(widths, widths[-1] * likelihood.values_per_element).to(options.device)
    z, rho = (torch.randn(batch, widths[0], device=options.device) for _ in range(2))
    x = torch.rand(batch, widths[-1])
    x = (torch.poisson(2 * x) if counts else x).to(options.device)
    alpha = torch.ones(STEPS, device=options.device)
    codes = torch.randn(CODES, batch, widths[0], device=options.device)
    parameters = list(decoder.parameters())

    def flow(of: Callable[..., Any]) -> list[Tensor]:
        start = z.clone().requires_grad_()
        found = of(decoder, start, rho, x, 0.01, alpha, likelihood)
        total = found[0].sum() + found[1].sum() + found[2].sum()
        return [found[2].detach(), *torch.autograd.grad(total, [start, *parameters])]

    @torch.no_grad()
    def log_px() -> list[Tensor]:
        every = likelihood.log_prob(decoder(codes.flatten(0, 1)), x.repeat(CODES, 1))
        return [every.reshape(CODES, batch)]

    return {
        "flow": {
            OURS: lambda: flow(ops.hamiltonian_flow),
            EAGER: lambda: flow(reference.hamiltonian_flow),
        },
        "log_px": {OURS: lambda: [ops.log_px(decoder, codes, x, likelihood)], EAGER: log_px},
    }


def run_case(name: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"likelihood": name, "size": size}
    clock = common.clock_of(torch.device(options.device))
    for task, contestants in contestants_of(name, size, options).items():
        command.progress(f"{name}, {size}: {task}")
        for _ in range(4):  # straight code is made and compared
            contestants[OURS]()
        error = common.relative_error(contestants[OURS](), contestants[EAGER]())
        if not error <= TOLERANCE:
            raise ArithmeticError(f"{name}, {size}, {task}: differs from eager by {error:.1e}")
        timings = common.interleave(
            contestants,
            dict.fromkeys(contestants, clock),
            seconds=0.05 if options.quick else 2 * options.share,
            min_rounds=2 if options.quick else 5,
        )
        found[task] = {
            "timings_ms": timings,
            "speed_up": timings[EAGER].median / timings[OURS].median,
            "difference": error,
        }
    return found


def sections(records: Sequence[dict[str, Any]]) -> list[str]:
    sizes = list(dict.fromkeys(record["size"] for record in records))
    by_case = {(record["likelihood"], record["size"]): record for record in records}
    names = list(dict.fromkeys(record["likelihood"] for record in records))

    def row(name: str, task: str) -> list[str]:
        found = [by_case.get((name, size)) for size in sizes]
        return [name, *("-" if each is None else f"{each[task]['speed_up']:.2f}" for each in found)]

    parts = ["# Likelihoods", "Eager's time over ours, medians."]
    for task in TASKS:
        every = [record[task]["speed_up"] for record in records]
        parts.append(f"## {task}: median {statistics.median(every):.2f}, least {min(every):.2f}")
        parts.append(common.markdown_table(["likelihood", *sizes], [row(name, task) for name in names]))
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    options = command.parse(command.parser(__doc__), arguments)
    device, path = command.begin(options, "likelihoods")
    environment = common.environment(device)
    settings = {"threads": options.threads, "steps": STEPS, "codes": CODES, "precision": "float32"}
    cases = list(itertools.product(LIKELIHOODS, QUICK if options.quick else SIZES))
    records: list[dict[str, Any]] = []
    for case in cases:
        records.append(run_case(*case, options))
        record = {
            "benchmark": "likelihoods",
            "environment": environment,
            "settings": settings,
            "cases": records,
            "targets": [],
        }
        if last := case is cases[-1]:
            bars = {
                task: {f"{r['likelihood']}, {r['size']}": r[task]["speed_up"] for r in records}
                for task in TASKS
            }
            command.draw(path, bars, "eager's time / ours")
        common.publish(
            path, record, [*sections(records), report.environment_table(environment, settings)], last=last
        )
