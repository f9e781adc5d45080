"""Other people's encoders: likelihood regret beside Adam on one image after another, TracIn beside torch.func.

    python -m benchmarks.speed encoders                    all entries of tests/zoo/encoders.py
    python -m benchmarks.speed encoders --quick            fewer steps, images and rounds: under 10 minutes
    python -m benchmarks.speed encoders --only vgg,lstm    these entries alone

A model has the encoder, a small decoder and a Bernoulli likelihood, float32. "regret": Adam on a private encoder for
each of 16 images, beside the careful loop (fastvae/ood/sequential.py). "tracin": scores of 16 queries and 512 training
images, one draw, beside vmap(grad), 64 at a time, and one product or, where torch.vmap cannot run the encoder, a
backward pass a sample. Both must agree with the rival before they are timed. Written are encoders-<device>.json, .md
and .png.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zoo.encoders import ENCODERS, EncoderEntry, encoder_of

import fastvae
from fastvae.models.inputs import JoinedEncoder
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood.sequential import refit_one

from . import command, common, report
from . import tracin_rivals as rivals

OURS = "ours"
IMAGES, STEPS = 16, 50
TOLERANCE = {"regret": 2e-2, "tracin": 1e-3}
"""|difference| / |rival's|: Adam's first steps are signs of gradients, of which one near zero may have either."""


def networks(entry: EncoderEntry, width: int) -> tuple[nn.Module, nn.Module]:
    encoder = encoder_of(entry, width)
    torch.manual_seed(1)
    wide, outputs = 64 * width, math.prod(entry.shape)
    decoder = nn.Sequential(
        nn.Linear(entry.latents, wide), nn.ReLU(), nn.Linear(wide, outputs), nn.Unflatten(1, entry.shape)
    )
    return encoder, decoder


def regret(entry: EncoderEntry, options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
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


def tracin(entry: EncoderEntry, options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """One checkpoint, one draw of noise."""
    encoder, decoder = networks(entry, options.width)
    model = fastvae.VAE(encoder, decoder, latent_dim=entry.latents).eval().to(options.device)
    generator = torch.Generator().manual_seed(3)
    train, queries = (
        torch.rand(count, *entry.shape, generator=generator).to(options.device) for count in (512, 16)
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


TASKS: dict[str, Callable[[EncoderEntry, argparse.Namespace], dict[str, Callable[[], Tensor]]]] = {
    "regret": regret,
    "tracin": tracin,
}


def run_entry(entry: EncoderEntry, options: argparse.Namespace) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    notes: list[str] = []
    by_kernels = True
    for task, make in TASKS.items():
        command.progress(f"{entry.name}: {task}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                contestants = make(entry, options)
                found = {name: contestant() for name, contestant in contestants.items()}
                ours, theirs = (value.detach() for value in found.values())
                error = float((ours - theirs).norm() / theirs.norm())
                if not error <= TOLERANCE[task]:
                    raise ArithmeticError(
                        f"differs from the rival by {error:.1e}, over {TOLERANCE[task]:.0e}"
                    )
            except Exception as failure:
                notes.append(f"{task}: {common.why(failure)}")
                continue
            by_kernels &= not any("copies are trained" in str(warning.message) for warning in caught)
            clock = common.wall_clock if options.device == "cpu" else common.cuda_clock
            timings = common.interleave(
                contestants,
                dict.fromkeys(contestants, clock),
                seconds=0.2 if options.quick else 2 * options.share,
                min_rounds=2 if options.quick else 5,
            )
        _, rival = timings
        results.append(
            {
                "task": task,
                "rival": rival,
                "timings_ms": timings,
                "speed_up": timings[rival].median / timings[OURS].median,
                "difference": error,
            }
        )
    return {
        "name": entry.name,
        "origin": entry.origin,
        "kernels": by_kernels,
        "results": results,
        "notes": notes,
    }


def speed_ups(records: Sequence[dict[str, Any]], task: str) -> list[float]:
    return [
        result["speed_up"] for record in records for result in record["results"] if result["task"] == task
    ]


def sections(records: Sequence[dict[str, Any]]) -> list[str]:
    groups = {
        "all": records,
        "PyPI's": [record for record in records if record["origin"] != "own"],
        "copies by kernels": [record for record in records if record["kernels"]],
        "copies by autograd": [record for record in records if not record["kernels"]],
    }

    def cell(found: list[float], summary: Callable[[list[float]], float]) -> str:
        return f"{summary(found):.2f}" if found else "-"

    medians = [
        [
            name,
            str(len(some)),
            *(cell(speed_ups(some, task), f) for task in TASKS for f in (statistics.median, min)),
        ]
        for name, some in groups.items()
    ]
    rows = [
        [
            record["name"],
            record["origin"],
            "yes" if record["kernels"] else "no",
            *(cell(speed_ups([record], task), min) for task in TASKS),
            ", ".join(result["rival"] for result in record["results"] if result["task"] == "tracin"),
        ]
        for record in records
    ]
    header = ["", "entries", *(f"{task}, {what}" for task in TASKS for what in ("median", "least"))]
    notes = [f"- {record['name']}, {note}" for record in records for note in record["notes"]]
    return [
        "# Encoders of the zoo",
        "The rival's time over ours, medians.",
        common.markdown_table(header, medians),
        common.markdown_table(["encoder", "origin", "kernels", *TASKS, "rival of tracin"], rows),
        *(["\n".join(notes)] if notes else []),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options_of = command.parser(__doc__, "20 steps, few rounds")
    options_of.add_argument("--only", default="", help="names of entries, by commas (default: all)")
    options_of.add_argument(
        "--width", type=int, default=4, help="of networks that have one (default 4; tests: 1)"
    )
    options = command.parse(options_of, arguments)
    options.only = command.names_of(options_of, options.only, ENCODERS)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device, path = command.begin(options, "encoders")
    environment = common.environment(device)
    settings = {"threads": options.threads, "images": IMAGES, "width": options.width, "precision": "float32"}
    chosen = [entry for entry in ENCODERS.values() if not options.only or entry.name in options.only]
    installed = [entry for entry in chosen if entry.is_installed]
    records: list[dict[str, Any]] = []
    for entry in installed:
        records.append(run_entry(entry, options))
        record = {
            "benchmark": "encoders",
            "environment": environment,
            "settings": settings,
            "entries": records,
            "not installed": [entry.name for entry in chosen if entry not in installed],
            "targets": [],
        }
        panels = {
            task: {r["name"]: value for r in records for value in speed_ups([r], task)} for task in TASKS
        }
        if last := entry is installed[-1]:
            command.draw(
                path, {task: bars for task, bars in panels.items() if bars}, "the rival's time / ours"
            )
        common.publish(
            path, record, [*sections(records), report.environment_table(environment, settings)], last=last
        )
