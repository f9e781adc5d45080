"""HVAE against VAE on MNIST: paired differences of the negative log-likelihood, at equal steps and time.

    python -m benchmarks.papers.mnist_hvae --data mnist10k.npz
    python -m benchmarks.papers.mnist_hvae --data mnist10k.npz --full     9000 steps, every test image
    python -m benchmarks.papers.mnist_hvae --data mnist10k.npz --resume   go on after an interruption

Setting of Caterini, Doucet, Sejdinovic, Hamiltonian Variational Auto-Encoder, NeurIPS 2018: free tempering,
one step size a leapfrog step, dynamic binarisation, Adamax. For each seed an HVAE is trained for N steps. A
VAE from the same initial networks, with the same order of batches, is scored after N steps, and again after
as many as it takes in the HVAE's training time. All are scored on the same binary test images. The two
train in turns, so that both meet the same disturbances; seconds are of training steps alone, at the median
pace of a run's epochs. Images other than 1x28x28 get a small dense network.

Importance sampling overestimates the NLL, by an amount that differs between models: "half" is the mean
estimate from half of the samples, which shows how much that matters. Tables and figure are also written, after each
seed, as mnist_hvae.json, .md and .png. A few thousand steps end on the plateau on which both networks start, where a
comparison says little: ``benchmarks.papers.converged`` trains both until they stop improving.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastvae.data import binarize, load

from ..shared import Row, circumstances, claim_folder, write_results
from . import report
from .comparison import HVAE, compare, differences, summaries


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    train, held_out = load(arguments.data, split="train"), load(arguments.data, split="test")
    generator = torch.Generator().manual_seed(0)
    binary = binarize(held_out.tensors()[0], generator)
    # Files are often sorted by label: the first images would not do.
    test = binary[torch.randperm(len(binary), generator=generator)[: arguments.test_images]]
    names = ("batch_size", "lr", "leapfrog_steps", "step_size", "device")
    settings: Row = {"data": Path(train.name).name, "train_images": len(train)}
    settings |= {name: getattr(arguments, name) for name in names}
    claim_folder(arguments.checkpoint, settings, arguments.resume)
    settings |= {
        "steps": arguments.steps,
        "test_images": len(test),
        "num_samples": arguments.num_samples,
        **circumstances(),
    }
    seeds: list[dict[str, Row]] = []
    for seed in range(arguments.seeds):
        seeds.append(compare(seed, train.tensors()[0], test.to(arguments.device), arguments))
        settings["epochs"] = seeds[0][HVAE]["epochs"]
        models, paired = summaries(seeds), differences(seeds)
        text = report.as_text(models, paired, settings)
        curves = [
            {"seed": seed, "model": name, "points": row["curve"]}
            for seed, rows in enumerate(seeds)
            for name, row in rows.items()
            if "curve" in row
        ]
        results = {"settings": settings, "models": models, "differences": paired, "curves": curves}
        write_results(arguments.out, "mnist_hvae", results, text)
        report.draw(seeds, paired, arguments.out / "mnist_hvae.png")
    print(text)
    print(f"Written: {arguments.out}/mnist_hvae.json, .md and .png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder or .npz (default: FASTVAE_DATA, else scikit-learn's digits)")
    parser.add_argument("--full", action="store_true", help="9000 steps, 1000 test images, 1000 samples")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--steps", type=int, help="of the HVAE and the VAE at equal steps (default: 1800)")
    parser.add_argument("--test-images", type=int, help="at most (default: 200)")
    parser.add_argument("--num-samples", type=int, help="importance samples an image (default: 500)")
    parser.add_argument("--batch-size", type=int, default=100, help="default: 100")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adamax (default: 1e-3)")
    parser.add_argument("--leapfrog-steps", type=int, default=10, help="K (default: 10)")
    parser.add_argument("--step-size", type=float, default=0.1, help="at the start (default: 0.1)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/mnist_hvae"), help="folder of states")
    parser.add_argument("--resume", action="store_true", help="go on from the states in --checkpoint")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/papers"), help="folder")
    arguments = parser.parse_args(argv)
    for name, usual, full in (("steps", 1800, 9000), ("test_images", 200, 1000), ("num_samples", 500, 1000)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, full if arguments.full else usual)
    for name, least in (
        ("seeds", 1),
        ("steps", 1),
        ("test_images", 2),
        ("num_samples", 2),
        ("batch_size", 1),
    ):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    return arguments


if __name__ == "__main__":
    main()
