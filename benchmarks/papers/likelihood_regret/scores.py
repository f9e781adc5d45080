"""The outlier scores of the experiment, each computed once and kept."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

import fastvae
from fastvae.noise import keys_of
from fastvae.ood import Detector, LikelihoodRegret, NegativeLogLikelihood, compressed_bits

from ..shared import Row, stored

CHUNK = 20  # images scored between two writes to the disk

OPTIONAL = ("regret", "regret, posterior")
"""Scores that take most of the time."""


def all_scores(
    model: fastvae.VAE, background: fastvae.VAE, images: Mapping[str, Tensor], arguments: Namespace
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """[N] by score and set, higher = more foreign, for uint8 images [N, C, 32, 32] by set: all there are so far."""
    options = {"num_samples": arguments.num_samples, "seed": arguments.seed}
    detectors: dict[str, Detector] = {
        "NLL": NegativeLogLikelihood(model, **options),
        "background NLL": NegativeLogLikelihood(background, **options),
        "regret": LikelihoodRegret(model, num_steps=arguments.regret_steps, **options),
        "regret, posterior": LikelihoodRegret(
            model, num_steps=arguments.regret_steps, target="posterior", **options
        ),
    }

    def scores(name: str) -> dict[str, Tensor]:
        return {key: _kept(detectors[name], f"{name} of {key}", x, arguments) for key, x in images.items()}

    # One likelihood serves several scores.
    nll, of_background = scores("NLL"), scores("background NLL")
    found = {"NLL": nll}
    for compressor in ("png", "jpeg2000"):
        found[f"complexity, {compressor}"] = {
            key: nll[key] - math.log(2) * compressed_bits(x, compressor) for key, x in images.items()
        }
    found["likelihood ratio"] = {key: nll[key] - of_background[key] for key in images}
    yield found
    for name in OPTIONAL:
        if name in arguments.regrets:
            found = {**found, name: scores(name)}
            yield found


def _kept(score: Callable[[Tensor], Tensor], name: str, x: Tensor, arguments: Namespace) -> Tensor:
    """The scores of x, chunk by chunk from the folder of states where they are there."""
    key: Row = {
        name: getattr(arguments, name)
        for name in ("steps", "background_steps", "num_samples", "regret_steps", "seed")
    }
    folder = arguments.checkpoint / "scores"
    folder.mkdir(exist_ok=True)
    parts = []
    for index, part in enumerate(x.split(CHUNK)):

        def compute(part: Tensor = part) -> Row:
            return {"values": score(part.to(arguments.device)).double().tolist()}

        # By the images' bytes: another number of images cuts them into other chunks.
        of_part = key | {"images": keys_of(part).tolist()}
        row = stored(folder / f"{name.replace(' ', '-').replace(',', '')}-{index}.json", of_part, compute)
        parts.append(torch.tensor(row["values"], dtype=torch.float64))
    print(f"scored: {name}", flush=True)
    return torch.cat(parts)
