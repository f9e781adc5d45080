"""Run as a script: start a training over and over and kill it at a random moment. killed_training.py FOLDER COUNT

Each start is a fork of this process, so that it costs milliseconds. Between the kills every checkpoint must load; at
the end the run goes on to its last epoch. Writes the final losses and weights to FOLDER/end.pt.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from training_problems import Annealed, batches, images, make, quiet_fit, weights

from fastvae.training import load_checkpoint

EPOCHS = 12


def train(folder: Path | None, seed: int) -> tuple[list[float], torch.Tensor]:
    """Initial weights differ from start to start: what counts comes from the checkpoint."""
    model = make(seed, penalties=(Annealed(),))
    history = quiet_fit(model, batches(), epochs=EPOCHS, run_dir=folder, val_loader=batches(images(16, 1)))
    return history.train_loss, weights(model)


def start_and_kill(folder: Path, seed: int, after: float) -> bool:
    """Whether the training was over before it was killed."""
    child = os.fork()
    if child == 0:
        train(folder, seed)
        os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def main(folder: Path, count: int) -> None:
    random.seed(0)
    run = folder / "run"
    started = time.perf_counter()
    expected = train(folder / "whole", 0)
    whole = time.perf_counter() - started
    kills = 0
    for seed in range(count):
        # A start makes progress about every third time, so that there are kills at all stages.
        first = seed if any(run.glob("epoch-*.pt")) else 0
        kills += not start_and_kill(run, first, random.uniform(0, 1.5 * whole / EPOCHS))
        for path in run.glob("epoch-*.pt"):
            load_checkpoint(make(penalties=(Annealed(),)), path)
    finished = train(run, count if any(run.glob("epoch-*.pt")) else 0)
    same = finished[0] == expected[0] and torch.equal(finished[1], expected[1])
    names = {path.name for path in run.iterdir()}
    left = names - {"history.json", *(f"epoch-{number:04d}.pt" for number in range(EPOCHS + 1))}
    assert not left, f"left behind: {left}"
    print(f"{kills} killed; {'the same' if same else 'another'} end")
    sys.exit(0 if same else 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
