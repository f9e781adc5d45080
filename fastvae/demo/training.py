"""Models that start alike, trained for as many steps each, within a time."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastvae.architectures import image_networks
from fastvae.models import BaseVAE
from fastvae.training import Callback, History, Training, fit

__all__ = ["Batches", "TimeLimit", "alike", "train_alike"]


class Batches:
    """Batches of images in a new random order at every iteration, the last one smaller.

    Args:
        images: [N, C, H, W] in [0, 1].
        batch_size: images in a batch.
        limit: images in an iteration; larger data sets give a random part each time.
    """

    def __init__(self, images: Tensor, batch_size: int = 100, limit: int = 2000) -> None:
        self.images, self.batch_size, self.size = images, batch_size, min(limit, len(images))

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for indices in torch.randperm(len(self.images), device="cpu")[: self.size].split(self.batch_size):
            yield self.images[indices]


class TimeLimit(Callback):
    """Ends a run after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def on_step(self, training: Training) -> None:
        """See ``Callback``."""
        if time.monotonic() >= self.end:
            training.stop()


def alike(
    kinds: Mapping[str, Callable[[nn.Module, nn.Module], BaseVAE]],
    shape: torch.Size,
    latent_dim: int,
    seed: int,
) -> dict[str, BaseVAE]:
    """A model of each kind, by name, around copies of the same encoder and decoder for images [C, H, W]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = image_networks(tuple(shape), latent_dim, width=16)
        return {name: kind(*copy.deepcopy(networks)) for name, kind in kinds.items()}


def train_alike(
    models: Mapping[str, BaseVAE],
    images: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    seconds: float,
    seed: int,
    batch_size: int = 100,
    progress: bool = True,
) -> dict[str, History]:
    """Train all models for the same number of steps on the same images in the same order; leave them in eval mode.

    Args:
        models: by name. The first has two thirds of the time, and where it ends decides for the others: name the
            slowest first.
        images: [N, C, H, W] in [0, 1], binarised anew in every step.
        held_out: [M, C, H, W] zeros and ones, for the curves.
        steps: of each, at most.
        seconds: wall-clock time of all, approximately at most.
        seed: of shuffling and noise.
        batch_size: images of a step.
        progress: show a bar.
    """
    histories: dict[str, History] = {}
    for name, model in models.items():
        histories[name] = fit(
            model,
            Batches(images, batch_size),
            epochs=steps,
            max_steps=steps,
            optimizer=functools.partial(torch.optim.Adam, lr=2e-3),
            val_loader=held_out.split(500),
            callbacks=[TimeLimit(seconds * 2 / 3)] if not histories else [],
            seed=seed,
            binarize=True,
            progress=progress,
        )
        steps = min(steps, histories[name].steps[-1])
        model.eval()
    return histories
