"""One seed of the comparison, and the paired differences of all of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import fastvae

from ..shared import Row, stored, training_seconds
from .networks import Model, build
from .training import Run, steps_in, train_in_turns

HVAE, EQUAL_STEPS, EQUAL_TIME = "HVAE", "VAE, equal steps", "VAE, equal time"
SCORED_AT_ONCE = 50
"""Test images: the progress bar moves by as many."""


def compare(seed: int, train: Tensor, test: Tensor, arguments: argparse.Namespace) -> dict[str, Row]:
    """Train and score the three models of a seed; their NLL [M] is under "nll"."""
    folder = arguments.checkpoint / f"seed-{seed}"
    runs = {
        kind: Run(
            build(kind, train.shape[1:], seed, arguments),
            folder / kind.lower(),
            train,
            test,
            seed,
            arguments.batch_size,
            arguments.lr,
        )
        for kind in ("HVAE", "VAE")
    }
    hvae, vae = runs["HVAE"], runs["VAE"]
    train_in_turns(hvae, vae, arguments.steps, f"seed {seed}: training")
    rows: dict[str, Row] = {}

    def take(name: str, run: Run, steps: int) -> fastvae.History:
        before = run.divergences
        history = run.stop_at(steps)
        rows[name] = {
            "steps": history.steps[-1],
            "epochs": steps / len(run.loader),
            "seconds": training_seconds(history),
            "train_loss": history.train_loss[-1],
            "diverged": run.divergences - before + (run.curve[-1]["diverged"] if run.curve else 0),
            "test_loss": run.test_loss(),
        }
        file = run.folder / f"scores-{'time' if name == EQUAL_TIME else 'steps'}.json"
        rows[name] |= stored_scores(
            file, run.model, test, steps, arguments.num_samples, f"seed {seed}: {name}"
        )
        return history

    ended = take(HVAE, hvae, arguments.steps)
    if isinstance(hvae.model, fastvae.HVAE):
        rows[HVAE]["step_size"] = hvae.model.step_size.flatten().tolist()
        rows[HVAE]["alpha"] = hvae.model.alpha.tolist()
    equal = take(EQUAL_STEPS, vae, arguments.steps)
    longest = max(equal, vae.history, key=lambda history: history.steps[-1] if history.steps else 0)
    take(EQUAL_TIME, vae, steps_in(training_seconds(ended), longest))
    rows[HVAE]["curve"], rows[EQUAL_TIME]["curve"] = hvae.curve, vae.curve
    return rows


def stored_scores(file: Path, model: Model, x: Tensor, steps: int, num_samples: int, label: str) -> Row:
    """NLL [M] in nats, its mean estimate from either half of the samples; from ``file`` if they are there."""

    def compute() -> Row:
        nll, half = score(model, x, num_samples, label)
        return {"nll": nll.tolist(), "nll_half": half.tolist()}

    return stored(file, {"steps": steps, "num_samples": num_samples, "test_images": len(x)}, compute)


def score(model: Model, x: Tensor, num_samples: int, label: str) -> tuple[Tensor, Tensor]:
    """Importance-sampled NLL in nats, [M] float64: from all samples, and the mean from either half."""
    generator = torch.Generator().manual_seed(0)
    counts = (num_samples // 2, num_samples - num_samples // 2)
    both: list[tuple[Tensor, Tensor]] = []
    with tqdm(total=len(x), desc=f"{label}: NLL", unit="image", disable=None) as bar:
        for part in x.split(SCORED_AT_ONCE):
            first, second = (
                model.log_likelihood(part, count, generator=generator).double().cpu() for count in counts
            )
            whole = torch.logaddexp(first + math.log(counts[0]), second + math.log(counts[1]))
            both.append((math.log(num_samples) - whole, -(first + second) / 2))
            bar.update(len(part))
    return torch.cat([whole for whole, _ in both]), torch.cat([half for _, half in both])


def differences(seeds: Sequence[dict[str, Row]]) -> list[Row]:
    """Paired differences HVAE - VAE for each seed, then for the means over seeds ("seed" is None)."""
    rows: list[Row] = []
    for name in (EQUAL_STEPS, EQUAL_TIME):
        paired, half = (
            torch.tensor([rows[HVAE][key] for rows in seeds], dtype=torch.float64)
            - torch.tensor([rows[name][key] for rows in seeds], dtype=torch.float64)
            for key in ("nll", "nll_half")
        )
        for seed, values in [*enumerate(paired), (None, paired.mean(0))]:
            rows.append(
                {
                    "against": name,
                    "seed": seed,
                    "difference": float(values.mean()),
                    "se_images": float(values.std() / math.sqrt(len(values))),
                    "sd_seeds": float(paired.mean(1).std()) if seed is None and len(seeds) > 1 else None,
                    "difference_half": float((half.mean(0) if seed is None else half[seed]).mean()),
                    "lower_share": float((values < 0).double().mean()),
                }
            )
    return rows


def summaries(seeds: Sequence[dict[str, Row]]) -> list[Row]:
    """What is reported of each trained model: means in place of values per image."""
    return [
        {"seed": seed, "model": name}
        | {key: value for key, value in row.items() if key != "curve"}
        | {key: float(torch.tensor(row[key], dtype=torch.float64).mean()) for key in ("nll", "nll_half")}
        for seed, rows in enumerate(seeds)
        for name, row in rows.items()
    ]
