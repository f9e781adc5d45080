"""One model of one seed: trained until it stops improving, then measured."""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

import fastvae
from fastvae.architectures import hvae_decoder, hvae_encoder
from fastvae.metrics import ais

from ..shared import Row, build_model, keep_epochs, last_epoch, stored, training_seconds, write

MODELS = ("VAE", "HVAE")
LATENTS = 20
SCORED_AT_ONCE = 50
"""Test images: the progress bar moves by as many."""


def networks(shape: Sequence[int], arguments: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder for images [C, H, W], the convolutional ones for 1x28x28."""
    if arguments.network == "convolutional":
        options = {"padding": arguments.padding, "initialization": arguments.initialization}
        return hvae_encoder(arguments.width, **options), hvae_decoder(arguments.width, **options)
    size = math.prod(shape)

    def dense(*sizes: int) -> list[nn.Module]:
        first, second, third, last = sizes
        layers = [nn.Linear(first, second), nn.Softplus(), nn.Linear(second, third), nn.Softplus()]
        return [*layers, nn.Linear(third, last)]

    encoder = nn.Sequential(nn.Flatten(), *dense(size, 200, 200, 2 * LATENTS))
    return encoder, nn.Sequential(*dense(LATENTS, 200, 200, size), nn.Unflatten(1, tuple(shape)))


class Unit:
    """A model in training. Its folder holds the states after its best and after its last epoch."""

    def __init__(
        self, kind: str, seed: int, images: Tensor, validation: Tensor, arguments: argparse.Namespace
    ) -> None:
        self.kind, self.seed, self.arguments = kind, seed, arguments
        self.model = build_model(kind, lambda: networks(images.shape[1:], arguments), seed, arguments)
        self.folder = arguments.checkpoint / f"seed-{seed}" / kind.lower()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.loader: DataLoader[Any] = DataLoader(
            TensorDataset(images),
            sampler=BatchSampler(RandomSampler(images), arguments.batch_size, drop_last=False),
            batch_size=None,
        )
        self.validation = [
            TensorDataset(validation)[start : start + 500] for start in range(0, len(validation), 500)
        ]
        self.history = fastvae.History()
        lost = self.folder / "diverged.json"
        self.diverged = int(json.loads(lost.read_text())) if lost.exists() else 0
        if saved := last_epoch(self.folder):
            self._train_to(saved)

    @property
    def epochs(self) -> int:
        return len(self.history.steps)

    @property
    def best(self) -> list[float]:
        """The lowest validation loss so far, after each epoch."""
        losses = [math.inf if loss is None else loss for loss in self.history.val_loss]
        return [min(losses[: epoch + 1]) for epoch in range(len(losses))]

    @property
    def converged(self) -> bool:
        best, window = self.best, self.arguments.window
        return len(best) > window and best[-1 - window] - best[-1] < self.arguments.gain

    def train(self, seconds: float) -> bool:
        """Train to convergence or the cap; False if the time ends first."""
        started = time.perf_counter()
        label = f"seed {self.seed}: {self.kind}"
        with tqdm(initial=self.epochs, desc=label, unit="epoch", disable=None) as bar:
            while not self.converged and self.epochs < self.arguments.max_epochs:
                if time.perf_counter() - started > seconds:
                    return False
                self._train_to(self.epochs + 1)
                bar.update(1)
                bar.set_postfix_str(f"validation {self.best[-1]:.2f}", refresh=False)
        return True

    def _train_to(self, epoch: int) -> None:
        lost = self.model.divergences if isinstance(self.model, fastvae.HVAE) else 0
        self.history = fastvae.fit(
            self.model,
            self.loader,
            epochs=epoch,
            optimizer=functools.partial(torch.optim.Adam, lr=self.arguments.lr),
            val_loader=self.validation,
            run_dir=self.folder,
            seed=self.seed,
            binarize=True,
            progress=False,
        )
        if isinstance(self.model, fastvae.HVAE):
            self.diverged += self.model.divergences - lost
            write(self.folder / "diverged.json", json.dumps(self.diverged))
        keep_epochs(self.folder, (epoch, self.history.best_epoch or epoch))

    def row(self, test: Tensor) -> Row:
        """What the best epoch gives on binary test images [M, ...], computed once."""
        best = self.history.best_epoch or self.epochs
        options = self.arguments
        key = {name: getattr(options, name) for name in ("num_samples", "ais_images", "ais_temperatures")}
        key |= {"epoch": best, "test_images": len(test)}

        def measured() -> Row:
            fastvae.training.load_checkpoint(self.model, self.folder / f"epoch-{best:04d}.pt")
            return self._measured(test)

        row: Row = {
            "seed": self.seed,
            "model": self.kind,
            "epochs": self.epochs,
            "best_epoch": best,
            "converged": self.converged,
            "steps": self.history.steps[-1],
            "steps_to_best": self.history.steps[best - 1],
            "seconds": training_seconds(self.history),
            "validation": self.best[-1],
            "diverged": self.diverged,
            "curve": {"steps": self.history.steps, "validation": self.history.val_loss},
        }
        return row | stored(self.folder / "scores.json", key, measured)

    def _measured(self, test: Tensor) -> Row:
        options, nll = self.arguments, []
        generator = torch.Generator().manual_seed(0)
        label = f"seed {self.seed}: {self.kind}, NLL"
        self.model.eval()
        with torch.no_grad(), tqdm(total=len(test), desc=label, unit="image", disable=None) as bar:
            for part in test.split(SCORED_AT_ONCE):
                nll.append(
                    -self.model.log_likelihood(part, options.num_samples, generator=generator).double()
                )
                bar.update(len(part))
        found: Row = {"nll": torch.cat(nll).tolist()}
        if options.ais_images:
            x = test[: options.ais_images]
            annealed = ais(self.model, x, options.ais_temperatures, initial="posterior", show_progress=True)
            found["ais"] = (-annealed.log_px).tolist()
        if isinstance(self.model, fastvae.HVAE):
            found["step_size"] = self.model.step_size.flatten().tolist()
            found["alpha"] = self.model.alpha.tolist()
        return found
