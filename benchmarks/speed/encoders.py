"""Other people's encoders: likelihood regret beside Adam on one image after another, TracIn beside torch.func.

    python -m benchmarks.speed encoders                    all entries of tests/zoo/encoders.py
    python -m benchmarks.speed encoders --quick            fewer steps, images and rounds: some 20 minutes
    python -m benchmarks.speed encoders --only vgg,lstm    these entries alone

A model has the encoder, a small decoder and a Bernoulli likelihood, float32. "regret": Adam on a private encoder for
each of 16 images, beside the careful loop (fastvae/ood/sequential.py). "tracin": scores of 16 queries and 512 training
images (128 with --quick), one draw, beside vmap(grad), 64 at a time, and one product or, where torch.vmap cannot run
the encoder, a backward pass a sample. Ours must agree with the rival before both are timed.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from zoo.encoders import ENCODERS, EncoderEntry, encoder_of

import fastvae
from fastvae.models.inputs import JoinedEncoder
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood.sequential import refit_one

from ..rivals import tracin as rivals
from . import harness, report
from .zoo import origin_of

OURS = "ours"
IMAGES, STEPS = 16, 50
TRAIN = {False: 512, True: 128}
TOLERANCE = {"regret": 2e-2, "tracin": 1e-3}
"""Adam's first steps are signs of gradients, of which one near zero may have either."""


def networks(entry: EncoderEntry, width: int) -> tuple[nn.Module, nn.Module]:
    encoder = encoder_of(entry, width)
    torch.manual_seed(1)
    wide, outputs = 64 * width, math.prod(entry.shape)
    decoder = nn.Sequential(
        nn.Linear(entry.latents, wide), nn.ReLU(), nn.Linear(wide, outputs), nn.Unflatten(1, entry.shape)
    )
    return encoder, decoder


def regret(entry: EncoderEntry, options: harness.Options) -> dict[str, Callable[[], Tensor]]:
    """Both train for the same steps, with the same noise."""
    model = fastvae.VAE(*networks(entry, options.width)).eval().to(options.device)
    x = torch.rand(IMAGES, *entry.shape, generator=torch.Generator().manual_seed(2)).to(options.device)
    steps = 20 if options.quick else STEPS
    detector = fastvae.ood.LikelihoodRegret(model, num_steps=steps, num_samples=1)

    def sequential() -> Tensor:
        found = []
        for image in x.split(1):
            own, _ = refit_one(model, image, SampleNoise(keys_of(image), 0, 1), num_steps=steps)
            with torch.no_grad():
                found.append(torch.cat(own.encode(image), 1))
        return torch.cat(found)

    return {OURS: lambda: torch.cat(detector.refit(x)[:2], 1), "one image after the other": sequential}


def tracin(entry: EncoderEntry, options: harness.Options) -> dict[str, Callable[[], Tensor]]:
    """One checkpoint, one draw of noise."""
    encoder, decoder = networks(entry, options.width)
    model = fastvae.VAE(encoder, decoder, latent_dim=entry.latents).eval().to(options.device)
    generator = torch.Generator().manual_seed(3)
    train, queries = (
        torch.rand(count, *entry.shape, generator=generator).to(options.device)
        for count in (TRAIN[options.quick], IMAGES)
    )
    ours = fastvae.influence.TracIn(
        model, train, [None], lambda *_: 1.0, num_samples=1, uncovered="materialise"
    )
    losses = (
        rivals.Losses(JoinedEncoder(copy.deepcopy(encoder)), copy.deepcopy(decoder), 1.0)
        .eval()
        .to(options.device)
    )
    noise = [rivals.noise_of(model, x, entry.latents) for x in (train, queries)]
    way: Callable[..., Tensor]
    try:
        rivals.vmap_grad(losses, train[:2], queries[:2], [each[:2] for each in noise])
        way, name = rivals.vmap_grad, "vmap(grad)"
    except Exception:
        way, name = rivals.loop, "a backward pass a sample"

    def scores() -> Tensor:
        found = ours.influence(queries)
        assert isinstance(found, Tensor)  # without k
        return found

    return {OURS: scores, name: lambda: way(losses, train, queries, noise)}


TASKS: dict[str, Callable[[EncoderEntry, harness.Options], dict[str, Callable[[], Tensor]]]] = {
    "regret": regret,
    "tracin": tracin,
}


def build(options: harness.Options, entry: EncoderEntry, task: str, labels: dict[str, str]) -> harness.Trial:
    contestants = TASKS[task](entry, options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, theirs = (run().detach() for run in contestants.values())
    if any("copies are trained" in str(warning.message) for warning in caught):
        labels["kernels"] = "no"
    return harness.Trial(harness.ready(contestants), [theirs], TOLERANCE[task])


def cases(entries: Sequence[EncoderEntry], quick: bool) -> Iterator[harness.Case]:
    for entry in entries:
        for task in TASKS:
            labels = {"encoder": entry.name, "origin": origin_of(entry), "kernels": "yes", "task": task}
            key, arguments = f"{entry.name}, {task}", (entry, task, labels)
            yield harness.Case(key, entry.name, build, arguments, 0.2 if quick else 2, labels, entry.name)


def summary(records: Sequence[report.Record]) -> list[str]:
    return report.grid(records, "encoder", "task", ["origin", "kernels"])


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = harness.parser(__doc__, "20 steps, few rounds")
    options_of.add_argument(
        "--width", type=int, default=4, help="of networks that have one (default 4; tests: 1)"
    )
    options = harness.parse(options_of, arguments)
    installed = [entry for entry in ENCODERS.values() if entry.is_installed]
    missing = ", ".join(entry.name for entry in ENCODERS.values() if not entry.is_installed)
    harness.Benchmark(
        "encoders",
        "Encoders of the zoo",
        cases(installed, options.quick),
        settings={
            "images": IMAGES,
            "training images": TRAIN[options.quick],
            "width": options.width,
            "not installed": missing or "none",
        },
        summary=summary,
        panel="task",
        ours_may_fail=True,
    ).run(options)
