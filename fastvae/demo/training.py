"""Training of several models side by side, within a time."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from fastvae.demo.problem import Batches, Problem
from fastvae.models import BaseVAE
from fastvae.training import History, fit

__all__ = ["train_in_turns"]

# A slice of training of one model before it is the other's turn: both then meet the same disturbances.
_SLICE_SECONDS = 1.0


def train_in_turns(
    models: Mapping[str, BaseVAE], problem: Problem, epochs: int, seconds: float, seed: int, label: str
) -> tuple[dict[str, History], str]:
    """Train all models for the same number of epochs, in turns, and leave them in eval mode.

    Args:
        models: by name.
        problem: images, batch size and learning rate.
        epochs: at most.
        seconds: wall-clock time, approximately at most.
        seed: of shuffling and noise.
        label: of the progress bar.

    Returns:
        The histories by name, and what ended training: "epochs" or "time".
    """
    batches = Batches(problem.train, problem.batch_size, problem.epoch_limit)
    held_out = problem.held_out.repeat(problem.curve_draws, 1, 1, 1).split(problem.batch_size)
    histories: dict[str, History] = {}
    started = time.perf_counter()
    done, turn, stopped = 0, 1, "epochs"
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=epochs, desc=label, unit="epoch", dynamic_ncols=True, mininterval=0.5) as bar,
    ):
        while done < epochs:
            turn_started = time.perf_counter()
            turn = min(turn, epochs - done)
            for name, model in models.items():
                # Resumed from its own checkpoint, which gives what one uninterrupted run gives, bit for bit.
                histories[name] = fit(
                    model,
                    batches,
                    epochs=done + turn,
                    optimizer=functools.partial(torch.optim.Adam, lr=problem.learning_rate),
                    val_loader=held_out,
                    run_dir=Path(folder) / name,
                    checkpoint_every=epochs,
                    seed=seed,
                    binarize=True,
                    progress=False,
                )
            done += turn
            bar.update(turn)
            bar.set_postfix({f"{name} loss": f"{h.val_loss[-1]:.2f}" for name, h in histories.items()})
            now = time.perf_counter()
            each = (now - turn_started) / turn
            if done < epochs and now - started + each > seconds:
                stopped = "time"
                break
            left = seconds - (now - started)
            turn = max(1, int(min(len(models) * _SLICE_SECONDS, left) / each))
    for model in models.values():
        model.eval()
    return histories, stopped
