"""Two models trained in turns, with states from which an interrupted run goes on."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

import fastvae

from ..shared import Row, keep_epochs, last_epoch, training_seconds, write
from .networks import Model


@dataclass
class Run:
    """A model in training. ``folder`` holds the state after the last epoch, from which it goes on."""

    model: Model
    folder: Path
    images: Tensor
    """[N, C, H, W] grey training images."""
    test: Tensor
    """[M, C, H, W] binary test images, for the curve."""
    seed: int
    batch_size: int
    learning_rate: float
    history: fastvae.History = field(default_factory=fastvae.History)
    """Of whole epochs."""
    curve: list[Row] = field(default_factory=list)
    """Steps, seconds, minus the test images' ELBO, trajectories given up so far; after each turn."""

    def __post_init__(self) -> None:
        self.loader: DataLoader[Any] = DataLoader(
            TensorDataset(self.images),
            sampler=BatchSampler(RandomSampler(self.images), self.batch_size, drop_last=False),
            batch_size=None,
        )
        if saved := last_epoch(self.folder):
            self.history = self._fit(epochs=saved)
            curve = self.folder / "curve.json"
            self.curve = json.loads(curve.read_text()) if curve.exists() else []

    @property
    def epochs(self) -> int:
        return len(self.history.steps)

    @property
    def seconds(self) -> float:
        return training_seconds(self.history)

    @property
    def divergences(self) -> int:
        """Trajectories given up so far, in this process."""
        return self.model.divergences if isinstance(self.model, fastvae.HVAE) else 0

    @torch.no_grad()
    def test_loss(self) -> float:
        """Mean of minus the ELBO over the test images, with the same noise at each call."""
        generator = torch.Generator().manual_seed(0)
        losses = [self.model(part, generator=generator) for part in self.test.split(self.batch_size)]
        return float(torch.cat(losses).double().mean())

    def advance(self, epochs: int, keep: int) -> None:
        """Train to the end of that epoch; of older states, keep the start and that after ``keep`` epochs."""
        before = self.divergences
        self.history = self._fit(epochs=epochs)
        diverged = self.divergences - before
        self.curve.append(
            {
                "steps": self.history.steps[-1],
                "seconds": self.seconds,
                "test_loss": self.test_loss(),
                "diverged": diverged + (self.curve[-1]["diverged"] if self.curve else 0),
            }
        )
        write(self.folder / "curve.json", json.dumps(self.curve))
        keep_epochs(self.folder, (0, keep, self.epochs))

    def stop_at(self, steps: int) -> fastvae.History:
        """Put the model into its state after so many steps, trained from the last state kept before."""
        return self._fit(epochs=steps // len(self.loader) + 1, max_steps=steps)

    def _fit(self, epochs: int, max_steps: int | None = None) -> fastvae.History:
        return fastvae.fit(
            self.model,
            self.loader,
            epochs=epochs,
            max_steps=max_steps,
            optimizer=functools.partial(torch.optim.Adamax, lr=self.learning_rate),
            run_dir=self.folder,
            # The end of each call is stored anyway.
            checkpoint_every=10**9,
            seed=self.seed,
            binarize=True,
            progress=False,
        )


def train_in_turns(hvae: Run, vae: Run, steps: int, label: str) -> None:
    """Train the HVAE for the whole epochs of ``steps``, the VAE for those that fit in the same time."""
    whole = steps // len(hvae.loader)
    with tqdm(total=whole, initial=min(hvae.epochs, whole), desc=label, unit="epoch", disable=None) as bar:
        while True:
            while room := epochs_in(hvae.seconds, vae):
                target = vae.epochs + room
                # At the epoch of the equal steps it stops, which stores its state.
                vae.advance(whole if vae.epochs < whole < target else target, keep=whole)
            if hvae.epochs >= whole:
                return
            hvae.advance(hvae.epochs + 1, keep=whole)
            bar.update(1)
            bar.set_postfix_str(f"test loss {hvae.curve[-1]['test_loss']:.2f}", refresh=False)


def epochs_in(seconds: float, run: Run) -> int:
    """How many more epochs of ``run`` end within so many seconds of training in all."""
    if not run.epochs:
        return int(seconds > 0)
    return max(0, math.floor((seconds - run.seconds) / (run.seconds / run.epochs)))


def steps_in(seconds: float, history: fastvae.History) -> int:
    """How many steps from the start end within so many seconds, at the median pace of ``history``."""
    return max(1, math.floor(seconds * history.steps[-1] / training_seconds(history)))
