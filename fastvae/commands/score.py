"""``fastvae score``: a number for each image or row, as CSV."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fastvae import ood
from fastvae.atomic import write_atomically
from fastvae.commands.errors import CommandError, mendable, positive, seed
from fastvae.commands.runs import RunData, load_data, load_run
from fastvae.data import TableDataset
from fastvae.models import BaseVAE
from fastvae.noise import Stream, draws_of, keys_of
from fastvae.progress import bar_of

__all__ = ["SCORES", "add_arguments", "run"]

SCORES: dict[str, tuple[str, int, Callable[[BaseVAE, int, int], ood.Detector]]] = {
    "nll": (
        "-log p(x) in nats, by importance sampling",
        1000,
        lambda model, samples, seed: ood.NegativeLogLikelihood(model, num_samples=samples, seed=seed),
    ),
    "regret": (
        "likelihood regret in nats: what an encoder of its own gains an image",
        200,
        lambda model, samples, seed: ood.LikelihoodRegret(model, num_samples=samples, seed=seed),
    ),
    "posterior-regret": (
        "its faster variant, which fits mean and variance of the image's posterior alone",
        200,
        lambda model, samples, seed: ood.LikelihoodRegret(
            model, num_samples=samples, seed=seed, target="posterior"
        ),
    ),
    "complexity": (
        "-log p(x) less the length of the image as PNG, in nats (likelihoods of discrete values)",
        1000,
        lambda model, samples, seed: ood.InputComplexity(model, num_samples=samples, seed=seed),
    ),
    "self-influence": (
        "squared norm of the loss's gradient: how hard the image pulls at the model",
        16,
        lambda model, samples, seed: ood.SelfInfluence(
            model, num_samples=samples, seed=seed, uncovered="materialise"
        ),
    ),
}
"""By name: what it is, samples unless told otherwise, and how it is made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", type=Path, help="a folder that fastvae train wrote")
    parser.add_argument("data", help="images, as of fastvae train; one picture is fine, too")
    listed = "; ".join(f"{name}: {what}" for name, (what, _, _) in SCORES.items())
    parser.add_argument("--score", choices=SCORES, default="nll", help=f"higher is more foreign. {listed}")
    parser.add_argument(
        "--split", choices=("all", "train", "test"), default="all", help="the part of the images"
    )
    parser.add_argument("--samples", type=positive(int), help="draws of noise for each image")
    parser.add_argument("--batch-size", type=positive(int), default=100, help="images at once")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise, which is keyed by the image")
    parser.add_argument("--out", type=Path, help="a file for the CSV; standard output, unless given")
    parser.add_argument("--device", help='"cpu", "cuda", ...; a GPU if there is one')


def run(options: argparse.Namespace) -> int:
    """Write file (or index) and score of every image; 0."""
    model, settings = load_run(options.run, options.device)
    images = load_data(options.data, settings, options.split, labelled=False)
    if options.out is not None and not options.out.parent.is_dir():
        raise CommandError(f"--out {options.out}: expected a file in a folder that is there")
    _, samples, make = SCORES[options.score]
    with mendable():
        if isinstance(images, TableDataset) and options.score == "complexity":
            raise CommandError("--score complexity: expected images, got a table")
        detector = make(model, options.samples or samples, options.seed)
        values = _scores(detector, images, options, settings.binarize)
    # Names as the file system has them, whatever the terminal's encoding.
    content = _as_csv(images, values).encode("utf-8", "surrogateescape")
    if options.out is None:
        stream = getattr(sys.stdout, "buffer", None)
        if stream is None:  # a notebook's
            sys.stdout.write(content.decode("utf-8", "replace"))
        else:
            sys.stdout.flush()
            stream.write(content)
            stream.flush()
    else:
        with mendable():
            if options.out.is_symlink() or (options.out.exists() and not options.out.is_file()):
                # A device, a pipe, or what stands for one (/dev/stdout) is written to and not replaced.
                options.out.write_bytes(content)
            else:
                write_atomically(options.out, lambda file: file.write(content))
        print(f"{len(values)} scores in {options.out}, median {values.median():.6g}", file=sys.stderr)
    return 0


def _scores(
    detector: ood.Detector, images: RunData, options: argparse.Namespace, binarised: bool
) -> torch.Tensor:
    device = next(detector.model.parameters()).device
    found = []
    is_table = isinstance(images, TableDataset)
    with bar_of(len(images), options.score, "row" if is_table else "image") as bar:
        for start in range(0, len(images), options.batch_size):
            chosen = slice(start, start + options.batch_size)
            besides: dict[str, torch.Tensor] = {}
            if isinstance(images, TableDataset):
                x = ((images.values[chosen] - images.mean) / images.scale).to(device)
                if images.condition is not None:
                    besides = {"condition": images.condition[chosen].to(device)}
            else:
                batch = images.images[chosen]
                x = (_drawn(batch, options.seed) if binarised else batch.float() / 255).to(device)
            found.append(detector.predict(x, **besides).double().cpu())
            bar.update(len(x))
    return torch.cat(found)


def _drawn(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Black and white pixels, as a binarised run saw them: float32. Every image has noise of its own."""
    noise = Stream(draws_of(keys_of(images), seed, 1)).uniform(images.shape[1:])
    return (noise < images.double() / 255).float()


def _as_csv(images: RunData, values: torch.Tensor) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names, kind = (images.rows, "row") if isinstance(images, TableDataset) else (images.files, "file")
    writer.writerow(("index" if names is None else kind, "score"))
    writer.writerows(
        (name, f"{value:.9g}")
        for name, value in zip(names or range(len(images)), values.tolist(), strict=True)
    )
    return text.getvalue()
