"""Likelihood regret of a batch against one image at a time.

    python -m benchmarks.speed regret             times and errors, a few minutes on 2 cores
    python -m benchmarks.speed regret --only mlp  one model, written as regret-mlp-<device>
    python -m benchmarks.speed regret --quick     tiny sizes: does everything run?

All numbers are milliseconds an image, float32, 100 steps of Adam and 1,000 importance samples before and after (Xiao,
Yan, Amit, NeurIPS 2020). The rivals take one image at a time: "as published" forms the decoder's gradients too and runs
encoder and decoder on 1,000 copies of the image for each likelihood, as the authors' code does; "careful" freezes the
decoder, encodes once, and takes our importance-sampled likelihood. "vmap" trains the copies of a batch by torch.vmap,
autograd and a functional Adam. Steps and whole scores are timed apart. Errors are those of the posterior's mean and log
variance after the steps, against the careful procedure in float64 with the same noise.

Floors, of the steps alone: "copy floor", parameters and moments of each copy read and written once a step at the rate
of a large copy; "FLOP floor", the products of encoder (forward, reverse, weight gradient) and decoder (forward,
reverse) at the rate of a large square product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvae.architectures import dcgan_decoder, dcgan_encoder
from fastvae.models import VAE
from fastvae.ood import LikelihoodRegret

from ..networks import mlp
from ..rivals.regret import careful_score, careful_steps, published_score, published_steps, vmapped_steps
from . import harness, report
from .timing import Timing

OURS, PUBLISHED, CAREFUL = "ours", "one image, as published", "one image, careful"
VMAP = "vmap, functional Adam"
TOLERANCE = 1e-2
"""after 100 steps of float32: Adam divides by gradients near zero"""

TARGETS = [
    report.Target("cpu", "dcgan-score", PUBLISHED, 4, OURS),
    report.Target("cpu", "mlp-score", PUBLISHED, 10, OURS),
    report.Target("cpu", "mlp-steps", CAREFUL, 10, OURS),
    report.Target("cpu", "dcgan-steps", CAREFUL, 4, OURS),
]


@dataclass(frozen=True)
class Setting:
    key: str
    title: str
    model: Callable[[], VAE]
    shape: tuple[int, ...]
    bright: float
    """share of pixels that are not zero"""
    images: int
    """that are taken together"""
    steps: int = 100
    samples: int = 1000
    seconds: float = 5

    def problem(self, device: torch.device) -> tuple[VAE, Tensor]:
        torch.manual_seed(0)
        model = self.model().eval().to(device)
        x = torch.rand(self.images, *self.shape)
        return model, torch.where(torch.rand(x.shape) < self.bright, x, torch.zeros(())).to(device)


def dcgan(channels: int, width: int = 32, latent_dim: int = 100) -> VAE:
    sizes = channels, width, latent_dim
    return VAE(dcgan_encoder(*sizes), dcgan_decoder(*sizes), "categorical")


def small() -> VAE:
    return VAE(mlp(784, 400, 40), mlp(20, 400, 784))


def large() -> VAE:
    return VAE(mlp(784, 1024, 512, 256, 256), mlp(128, 256, 512, 1024, 784))


def settings(quick: bool) -> list[Setting]:
    if quick:
        tiny = VAE(mlp(12, 8, 6), mlp(3, 8, 12))
        return [
            Setting("dcgan", "DCGAN, width 2", lambda: dcgan(1, 2, 3), (1, 32, 32), 1.0, 2, 2, 2, 0.1),
            Setting("mlp", "12-8-6", lambda: tiny, (12,), 0.5, 3, 2, 2, 0.1),
        ]
    return [
        Setting("dcgan", "DCGAN 1x32x32, 256-way", lambda: dcgan(1), (1, 32, 32), 1.0, 8, seconds=20),
        Setting("mlp", "784-400-40, 19% of pixels not zero", small, (784,), 0.19, 32),
        Setting("mlp-bright", "784-400-40, no pixel zero", small, (784,), 1.0, 32),
        Setting("mlp-large", "784-1024-512-256-256, 19% not zero", large, (784,), 0.19, 8),
    ]


def build(options: harness.Options, setting: Setting, part: str) -> harness.Trial:
    """The steps alone, or the whole scores."""
    model, x = setting.problem(options.device)
    one = x[:1]
    amounts = setting.steps, setting.samples
    detector = LikelihoodRegret(model, num_steps=setting.steps, num_samples=setting.samples)

    def an_image(timings: dict[str, Timing]) -> dict[str, Timing]:
        alone = (PUBLISHED, CAREFUL)
        return {name: t if name in alone else t.scaled(1 / setting.images) for name, t in timings.items()}

    if part == "score":
        return harness.Trial(
            harness.ready(
                {
                    OURS: lambda: detector.predict(x),
                    PUBLISHED: lambda: published_score(model, one, *amounts),
                    CAREFUL: lambda: careful_score(model, one, *amounts),
                }
            ),
            adjust=an_image,
        )
    parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
    return harness.Trial(
        harness.ready(
            {
                OURS: lambda: torch.cat(detector.refit(x)[:2], 1)[:1],
                PUBLISHED: lambda: published_steps(model, one, setting.steps),
                CAREFUL: lambda: careful_steps(model, one, setting.steps),
                VMAP: lambda: vmapped_steps(detector, x)[:1],
            }
        ),
        [careful_steps(copy.deepcopy(model).double(), one, setting.steps)],
        TOLERANCE,
        [PUBLISHED],  # draws other noise
        operations=setting.steps * operations_of_step(model, one),
        bytes=setting.steps * 24 * parameters,
        adjust=an_image,
    )


def operations_of_step(model: VAE, x: Tensor) -> int:
    """Floating-point operations of one image's step, of which nothing is the decoder's gradient."""
    private = copy.deepcopy(model)
    private.decoder.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        private(x).sum().backward()
    return int(counter.get_total_flops())


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    parts = {"steps": "100 steps", "score": "the whole score"}
    cases = [
        harness.Case(
            f"{s.key}-{part}", f"{s.title}: {what}, an image", build, (s, part), s.seconds, group=s.key
        )
        for s in settings(options.quick)
        for part, what in parts.items()
    ]
    harness.Benchmark("regret", "Likelihood regret", cases, targets=TARGETS).run(options)
