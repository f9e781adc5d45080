"""Every likelihood behind the paper's, a single-cell-like and a large dense decoder, against careful eager PyTorch.

    python -m benchmarks.speed likelihoods             about five minutes on 2 cores
    python -m benchmarks.speed likelihoods --quick     tiny sizes: does everything run?

"flow": K = 3 leapfrog steps, forward and backward, beside the same by K + 1 forces of autograd (``fastvae.reference``).
"log_px": of 10 codes for each sample, beside the decoder and the density in PyTorch. float32; ours must agree with the
rival before both are timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae import likelihoods as L
from fastvae import ops, reference

from ..networks import softplus_mlp
from . import harness, report

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
    "NegativeBinomial (decoder)": (L.NegativeBinomial("decoder"), True),
    "ZeroInflatedNegativeBinomial (decoder)": (L.ZeroInflatedNegativeBinomial("decoder"), True),
    "Categorical (16 classes)": (L.Categorical(16), False),
    "Gaussian (learned)": (L.Gaussian("learned", initial=0.3), False),
    "NegativeBinomial (learned)": (L.NegativeBinomial("learned"), True),
}
"""With whether its data are counts; those with kernels come first."""

SIZES: tuple[dict[str, tuple[tuple[int, ...], int]], ...] = (
    {
        "64-500-784, B 100": ((64, 500, 784), 100),
        "10-128-2000, B 128": ((10, 128, 2000), 128),
        "32-512-512-784, B 128": ((32, 512, 512, 784), 128),
    },
    {"2-8-6, B 3": ((2, 8, 6), 3)},
)
"""Widths and batch; then those of --quick."""


def build(
    options: harness.Options, name: str, widths: tuple[int, ...], batch: int, task: str
) -> harness.Trial:
    likelihood, counts = LIKELIHOODS[name]
    torch.manual_seed(0)
    decoder = softplus_mlp(*widths[:-1], widths[-1] * likelihood.values_per_element).to(options.device)
    z, rho = (torch.randn(batch, widths[0], device=options.device) for _ in range(2))
    x = torch.rand(batch, widths[-1])
    x = (torch.poisson(2 * x) if counts else x).to(options.device)
    alpha = torch.ones(STEPS, device=options.device)
    codes = torch.randn(CODES, batch, widths[0], device=options.device)
    parameters = list(decoder.parameters())
    if isinstance(likelihood, L.LearnedLikelihood):
        likelihood.to(options.device)
        parameters += likelihood.parameters()

    def flow(of: Callable[..., Any]) -> list[Tensor]:
        start = z.clone().requires_grad_()
        found = of(decoder, start, rho, x, 0.01, alpha, likelihood)
        total = found[0].sum() + found[1].sum() + found[2].sum()
        return [found[2].detach(), *torch.autograd.grad(total, [start, *parameters])]

    @torch.no_grad()
    def log_px() -> list[Tensor]:
        every = likelihood.log_prob(decoder(codes.flatten(0, 1)), x.repeat(CODES, 1))
        return [every.reshape(CODES, batch)]

    ours: Callable[[], list[Tensor]]
    if task == "flow":
        ours, eager = lambda: flow(ops.hamiltonian_flow), lambda: flow(reference.hamiltonian_flow)
    else:
        ours, eager = lambda: [ops.log_px(decoder, codes, x, likelihood)], log_px
    for _ in range(4):  # straight code is made and compared
        ours()
    return harness.Trial(harness.ready({OURS: ours, EAGER: eager}), eager(), TOLERANCE)


def cases(quick: bool) -> list[harness.Case]:
    found = []
    for name, (size, (widths, batch)), task in itertools.product(LIKELIHOODS, SIZES[quick].items(), TASKS):
        labels = {"likelihood": name, "size": size, "task": task}
        title, arguments = f"{name}, {size}", (name, widths, batch, task)
        key = f"{title}, {task}"
        found.append(harness.Case(key, title, build, arguments, 0.05 if quick else 2, labels, name))
    return found


def summary(records: Sequence[report.Record]) -> list[str]:
    parts = []
    for task in TASKS:
        some = [record for record in records if record["task"] == task]
        parts += [f"## {task}", *report.grid(some, "likelihood", "size")] if some else []
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    of = cases(options.quick)
    settings = {"steps": STEPS, "codes": CODES}
    harness.Benchmark("likelihoods", "Likelihoods", of, settings=settings, summary=summary, panel="task").run(
        options
    )
