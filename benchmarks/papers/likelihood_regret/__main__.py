"""Out-of-distribution scores of Fashion-MNIST against MNIST: likelihood regret, and what it is measured against.

    python -m benchmarks.papers.likelihood_regret --data fashion-mnist --ood mnist10k.npz
    python -m benchmarks.papers.likelihood_regret --data fashion-mnist --ood mnist10k.npz --full
    python -m benchmarks.papers.likelihood_regret --data fashion-mnist --ood mnist10k.npz --resume
    python -m benchmarks.papers.likelihood_regret --data mnist10k.npz --ood fashion-mnist --name likelihood_regret-mnist

Setting of Xiao, Yan, Amit, Likelihood Regret, NeurIPS 2020: DCGAN networks at 32x32, 100 latent variables, a
256-way categorical likelihood of every pixel, Adam. The paper trains for 200 epochs of batches of 128; the
default here is a small part of that, ``--full`` all of it. Scores: likelihood regret over the encoder and over
the posterior of each image alone; NLL; input complexity; the likelihood ratio to a background model.

A run that was stopped goes on with --resume: training from its last checkpoint, and scores from the last chunk of
images; more --steps than before continue the training. Tables and figure are also written, after each score, as
likelihood_regret.json, .md and .png (or another --name).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastvae import plot
from fastvae.data import load

from ..shared import Row, circumstances, claim_folder, write_results
from .report import as_text, measures, published_for
from .scores import OPTIONAL, all_scores
from .training import resized, trained


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    train, held_out = load(arguments.data, split="train"), load(arguments.data, split="test")
    foreign = load(arguments.ood, split="test")
    channels = train.images.shape[1]
    names = ("batch_size", "lr", "width", "latent_dim", "seed")
    settings: Row = {"data": Path(arguments.data).name, "train_images": len(train)}
    settings |= {name: getattr(arguments, name) for name in names}
    claim_folder(arguments.checkpoint, settings, arguments.resume)
    images = resized(train, channels)
    model = trained(images, arguments, background=False)
    background = trained(images, arguments, background=True)

    # Files are often sorted by label: the first images would not do.
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = {
        name: resized(
            of.subset(torch.randperm(len(of), generator=generator)[: arguments.images]), channels
        ).images
        for name, of in (("held out", held_out), ("foreign", foreign))
    }
    settings |= {
        "steps": arguments.steps,
        "background_steps": arguments.background_steps,
        "epochs": arguments.steps * arguments.batch_size / len(train),
        "ood": Path(arguments.ood).name,
        "images": len(chosen["held out"]),
        "ood_images": len(chosen["foreign"]),
        "num_samples": arguments.num_samples,
        "regret_steps": arguments.regret_steps,
        **circumstances(),
    }
    published = published_for(settings["data"], settings["ood"])
    for scores in all_scores(model, background, chosen, arguments):
        rows = measures(scores, "held out", "foreign", published)
        text = as_text(rows, settings)
        values = {name: {key: value.tolist() for key, value in by.items()} for name, by in scores.items()}
        results = {"settings": settings, "measures": rows, "scores": values}
        write_results(arguments.out, arguments.name, results, text)
        (arguments.out / f"{arguments.name}.png").write_bytes(plot.png(plot.score_histograms(scores)))
    print(text)
    print(f"Written: {arguments.out / arguments.name}.json, .md and .png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="folder or .npz to train on")
    parser.add_argument("--ood", required=True, help="folder or .npz of foreign images")
    parser.add_argument("--full", action="store_true", help="93800 steps of 128, as in the paper")
    parser.add_argument("--steps", type=int, help="of the model (default: 2400)")
    parser.add_argument("--background-steps", type=int, help="of the background model (default: 1200)")
    parser.add_argument("--checkpoint-steps", type=int, default=100, help="between checkpoints")
    parser.add_argument("--batch-size", type=int, help="default: 32")
    parser.add_argument("--lr", type=float, help="of Adam (default: 1e-3; --full: 3e-4)")
    parser.add_argument("--width", type=int, default=32, help="channels of the first convolution")
    parser.add_argument("--latent-dim", type=int, default=100)
    parser.add_argument("--images", type=int, help="of each kind to score (default: 200; --full: 1000)")
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples of a likelihood")
    parser.add_argument(
        "--regrets", nargs="*", choices=OPTIONAL, default=OPTIONAL, help="which of them (default: both)"
    )
    parser.add_argument("--regret-steps", type=int, default=100, help="of optimisation for each image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/likelihood_regret"), help="of states")
    parser.add_argument("--resume", action="store_true", help="go on from the states in --checkpoint")
    parser.add_argument("--name", default="likelihood_regret", help="of the files written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/papers"), help="folder")
    arguments = parser.parse_args(argv)
    for name, usual, full in (
        ("steps", 2400, 93800),
        ("background_steps", 1200, 93800),
        ("batch_size", 32, 128),
        ("lr", 1e-3, 3e-4),
        ("images", 200, 1000),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, full if arguments.full else usual)
    for name in (
        "steps",
        "background_steps",
        "checkpoint_steps",
        "batch_size",
        "num_samples",
        "regret_steps",
    ):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if arguments.images < 2:
        parser.error(f"--images: expected at least 2, got {arguments.images}")
    return arguments


if __name__ == "__main__":
    main()
