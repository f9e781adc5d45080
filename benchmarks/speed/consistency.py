"""What a step of consistency regularisation costs, beside a plain step on a batch of twice the size.

    python -m benchmarks.speed consistency             about a minute on 2 cores
    python -m benchmarks.speed consistency --quick     tiny sizes: does everything run?

A step is the mean loss of a batch and its gradient to all parameters, float32. The consistency step gets B images and
puts them and B given views through the networks as one batch of 2 B; the plain step gets the 2 B images. What is
compared is therefore the divergence, its gradient and the book-keeping of views; the augmentation itself
(``fastvae.data.RandomAffine``) is timed apart. "two batches": the same objective as users write it, two passes of B
through the networks and torch.distributions' divergence. Models and networks are those of the benchmark ``models``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastvae.data import RandomAffine
from fastvae.models import BaseVAE
from fastvae.penalties import Consistency

from . import harness, models, report, timing

OURS, PLAIN, TWICE, AUGMENT = "ours, B", "plain, 2 B", "two batches of B", "RandomAffine of B"
KEYS = ("vae-mlp", "iwae-mlp", "hvae-mlp", "vae-conv")
TARGETS = [report.Target("cpu", key, PLAIN, 1.05, OURS, at_most=True) for key in KEYS]


def step(model: nn.Module, loss: Callable[[], Tensor]) -> timing.Contestant:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(loss(), parameters)


def two_batches(model: BaseVAE, x: Tensor, view: Tensor, weight: float) -> Tensor:
    steps = [model.objective(images) for images in (x, view)]
    q, q_view = (torch.distributions.Normal(s.mu, torch.exp(s.logvar / 2)) for s in steps)
    divergence = torch.distributions.kl_divergence(q_view, q).sum(1)
    return (steps[0].loss + steps[1].loss + weight * divergence).mean()


def build(options: harness.Options, of: models.Step) -> harness.Trial:
    torch.manual_seed(0)
    pair = of.networks()
    augment = RandomAffine()
    x = torch.rand(of.batch, of.channels, of.size, of.size)
    x, view = x.to(options.device), augment(x).to(options.device)
    both = torch.cat([x, view])
    # Steps do not change the weights, so that one model's networks serve all.
    plain = of.model(*pair, **of.options).to(options.device)
    penalty = Consistency(lambda _: view)
    consistent = of.model(*pair, penalties=[penalty], **of.options).to(options.device)
    return harness.Trial(
        {
            OURS: lambda: step(consistent, lambda: consistent.loss(x)),
            PLAIN: lambda: step(plain, lambda: plain.loss(both)),
            TWICE: lambda: step(plain, lambda: two_batches(plain, x, view, penalty.weight)),
            AUGMENT: lambda: lambda: augment(x),
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    cases = [replace(case, build=build) for case in models.cases(options.quick) if case.key in KEYS]
    title = "A step of consistency regularisation"
    harness.Benchmark("consistency", title, cases, targets=TARGETS).run(options)
