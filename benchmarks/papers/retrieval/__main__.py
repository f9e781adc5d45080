"""VAE-TracIn on images: who is whose strongest proponent, and do foreign images stand out?

    python -m benchmarks.papers.retrieval --data mnist10k.npz --foreign fashion-mnist
    python -m benchmarks.papers.retrieval --data mnist10k.npz --foreign fashion-mnist --resume

Setting of Kong, Chaudhuri, Understanding Instance-based Interpretability of Variational Auto-Encoders, NeurIPS 2021:
their MNIST model of 3.0M parameters, beta 4, S = 16 draws, several checkpoints of a run of ``fastvae.fit``. Three
figures of theirs:

1. training images that are their own strongest proponent among all, with independent noise on both sides, and with
   common noise;
2. strongest proponents of test images that have the test image's label;
3. images of another kind (--foreign) hidden in the training set of a second run, found by their self-influence.

A run that was stopped goes on with --resume: training and proponents from the last checkpoint.
Tables and figure are also written as each figure is there, as retrieval.json, .md and .png (or another --name).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastvae.data import load

from ..shared import Row, circumstances, claim_folder
from . import experiment, report


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    train, test = load(arguments.data, split="train"), load(arguments.data, split="test")
    names = (
        *("width", "latent_dim", "beta", "optimizer", "lr", "batch_size", "epochs", "checkpoints", "seed"),
        "device",
    )
    settings: Row = {"data": Path(train.name).name, "train_images": len(train)}
    settings |= {name: getattr(arguments, name) for name in names}
    claim_folder(arguments.checkpoint, settings, arguments.resume)
    settings |= {
        "num_samples": arguments.num_samples,
        **circumstances(),
    }
    results: Row = {}
    for found in experiment.retrieval(train, test, arguments):
        results["retrieval"] = found
        report.write_all(results, settings, arguments.out / arguments.name)
    if arguments.foreign is not None:
        results["foreign"] = experiment.foreign(train, load(arguments.foreign, split="test"), arguments)
        report.write_all(results, settings, arguments.out / arguments.name)
    print(report.as_text(results, settings))
    print(f"Written: {arguments.out / arguments.name}.json, .md and .png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder or .npz (default: FASTVAE_DATA, else scikit-learn's digits)")
    parser.add_argument("--foreign", help="folder or .npz of other images of the same shape")
    parser.add_argument("--hidden", type=int, default=100, help="foreign images to hide (default: 100)")
    parser.add_argument("--queries", type=int, default=128, help="training and test images (default: 128)")
    parser.add_argument("--epochs", type=int, default=60, help="default: 60")
    parser.add_argument("--checkpoints", type=int, default=4, help="of a run, evenly spaced (default: 4)")
    parser.add_argument("--num-samples", type=int, default=16, help="S (default: 16)")
    parser.add_argument(
        "--skip-common-noise", action="store_true", help="leave out what common noise on both sides gives"
    )
    parser.add_argument("--optimizer", choices=("SGD", "Adam"), default="Adam", help="default: Adam")
    parser.add_argument("--lr", type=float, default=3e-4, help="default: 3e-4")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--beta", type=float, default=4.0, help="default: 4")
    parser.add_argument("--width", type=int, default=1024, help="of the widest layer (default: 1024)")
    parser.add_argument("--latent-dim", type=int, default=128, help="default: 128")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/retrieval"), help="folder of states")
    parser.add_argument("--resume", action="store_true", help="go on from the states in --checkpoint")
    parser.add_argument("--name", default="retrieval", help="of the files written (default: retrieval)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/papers"), help="folder")
    arguments = parser.parse_args(argv)
    for name, least in (
        ("hidden", 1),
        ("queries", 1),
        ("epochs", 1),
        ("checkpoints", 1),
        ("num_samples", 1),
        ("batch_size", 1),
        ("width", 4),
        ("latent_dim", 1),
    ):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if arguments.epochs % arguments.checkpoints:
        parser.error(
            f"--epochs: expected a multiple of --checkpoints ({arguments.checkpoints}), got {arguments.epochs}"
        )
    return arguments


if __name__ == "__main__":
    main()
