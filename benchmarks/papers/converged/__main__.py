"""HVAE against VAE, each trained until its validation bound stops improving.

    python -m benchmarks.papers.converged --data fashion-mnist
    python -m benchmarks.papers.converged --data fashion-mnist --minutes 60     end in time, and go on with --resume
    python -m benchmarks.papers.converged --data mnist10k.npz --network convolutional --width 8

What Caterini, Doucet, Sejdinovic, Hamiltonian Variational Auto-Encoder, NeurIPS 2018, compare (83.20 nats for the VAE
on 50,000 MNIST images, 82.62 for the HVAE with K = 10 and free tempering), on the images, networks and time at hand:
dynamic binarisation, batches of 100, Adam; a dense 784-200-200-20 network, or the paper's convolutional one.

For each seed both models start from the same weights and see the same batches. A model has converged when the best
validation loss (minus the ELBO, on binary images kept from training) gained less than --gain nats in --window epochs;
its best epoch is what is measured, by importance sampling and, on the first --ais-images, by annealed importance
sampling, on the same binary test images. Besides, the best validation losses at equal steps and at equal time.

Each (seed, model) is a unit of work that may be stopped at any time and goes on from its last epoch with --resume; its
row is in the files as it ends: converged.json, .md and .png (or another --name).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastvae.data import binarize, load

from ..shared import Row, circumstances, claim_folder
from . import report
from .training import MODELS, Unit


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    started = time.perf_counter()
    train, held_out = load(arguments.data, split="train"), load(arguments.data, split="test")
    generator = torch.Generator().manual_seed(0)
    # Files are often sorted by label: the first images would not do.
    images = train.tensors()[0][torch.randperm(len(train), generator=generator)]
    validation = binarize(images[: arguments.validation], generator)
    binary = binarize(held_out.tensors()[0], generator)
    test = binary[torch.randperm(len(binary), generator=generator)[: arguments.test_images]]
    names = (
        "network",
        "width",
        "initialization",
        "padding",
        "batch_size",
        "lr",
        "leapfrog_steps",
        "step_size",
    )
    settings: Row = {"data": Path(train.name).name, "train_images": len(images) - len(validation)}
    settings |= {name: getattr(arguments, name) for name in (*names, "validation", "gain", "window")}
    claim_folder(arguments.checkpoint, settings, arguments.resume)
    settings |= {
        "max_epochs": arguments.max_epochs,
        "test_images": len(test),
        "num_samples": arguments.num_samples,
        "ais_images": min(arguments.ais_images, len(test)),
        "ais_temperatures": arguments.ais_temperatures,
        **circumstances(),
    }
    rows: list[Row] = []
    for seed in range(arguments.seeds):
        for kind in MODELS:
            unit = Unit(kind, seed, images[len(validation) :], validation, arguments)
            if not unit.train(60 * arguments.minutes - (time.perf_counter() - started)):
                print(f"Stopped in time: seed {seed}, {kind} after {unit.epochs} epochs; --resume goes on")
                return
            rows.append(unit.row(test))
            report.write_all(rows, settings, arguments.out / arguments.name)
    print(report.as_text(rows, settings))
    print(f"Written: {arguments.out / arguments.name}.json, .md and .png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder or .npz (default: FASTVAE_DATA, else scikit-learn's digits)")
    parser.add_argument("--network", choices=("dense", "convolutional"), default="dense")
    parser.add_argument("--width", type=int, default=8, help="of the convolutional one (default: 8, half)")
    parser.add_argument("--initialization", choices=("torch", "paper"), default="torch", help="of the same")
    parser.add_argument("--padding", choices=("centred", "same"), default="centred", help="of the same")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of training (default: no limit)")
    parser.add_argument("--max-epochs", type=int, default=2000, help="cap (default: 2000, the paper's)")
    parser.add_argument("--window", type=int, default=20, help="epochs without gain (default: 20)")
    parser.add_argument("--gain", type=float, default=0.05, help="nats that count as one (default: 0.05)")
    parser.add_argument("--validation", type=int, default=1000, help="images kept from training")
    parser.add_argument("--test-images", type=int, default=1000, help="at most (default: 1000)")
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples (default: 1000)")
    parser.add_argument("--ais-images", type=int, default=100, help="of the test images; 0: no AIS")
    parser.add_argument("--ais-temperatures", type=int, default=500, help="default: 500, of 16 chains")
    parser.add_argument("--batch-size", type=int, default=100, help="default: 100")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam (default: 1e-3)")
    parser.add_argument("--leapfrog-steps", type=int, default=5, help="K (default: 5)")
    parser.add_argument("--step-size", type=float, default=0.1, help="at the start (default: 0.1)")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/converged"), help="folder of states")
    parser.add_argument("--resume", action="store_true", help="go on from the states in --checkpoint")
    parser.add_argument("--name", default="converged", help="of the files written (default: converged)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/papers"), help="folder")
    arguments = parser.parse_args(argv)
    counts = ("width", "seeds", "max_epochs", "window", "validation", "num_samples", "batch_size")
    for name, least in (*((name, 1) for name in (*counts, "leapfrog_steps")), ("test_images", 2)):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    return arguments


if __name__ == "__main__":
    main()
