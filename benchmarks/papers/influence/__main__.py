"""Influence of training points: closed forms against refits, and the sampling error of VAE-TracIn.

    python -m benchmarks.papers.influence                a minute on 2 cores
    python -m benchmarks.papers.influence --data mnist10k.npz

The analysis of Kong, Chaudhuri, Understanding Instance-based Interpretability of Variational Auto-Encoders, NeurIPS
2021, in small:

1. what leaving out a training point does to k-NN, kernel and Gaussian mixture densities, in closed form and by refits
   without it; in which of them a training point is its own strongest proponent;
2. VAE-TracIn averages gradients over S draws of z: its error falls with the root of S;
3. with fresh draws at every checkpoint its error averages out over checkpoints, too, and more training images are their
   own strongest proponent.

A run that was stopped goes on with --resume: training from its last checkpoint, and whatever was measured is kept.
Tables and figure are also written, as influence.json, .md and .png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastvae.data import load

from ..shared import Row, add_folder, circumstances, claim_for, stored, write_results
from . import measures, report


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    data = load(arguments.data, split="train")
    claim_for(arguments)
    classical: list[Row] = []
    for count in arguments.points:
        classical += kept(
            arguments,
            f"classical-{count}",
            measures.closed_forms,
            count,
            arguments.queries,
            arguments.seed,
        )
    images = data.tensors()[0]
    sampling = kept(arguments, "sampling", measures.sampling_error, images, arguments)
    noise = measures.checkpoint_noise(images, arguments)
    mixture = [row for row in classical if row["density"].startswith("Gaussian")]
    settings: Row = {
        "data": Path(data.name).name,
        "images": len(images),
        "fewest_draws": min(arguments.draws),
        **{
            name: getattr(arguments, name)
            for name in ("queries", "pairs", "trials", "reference", "epochs", "seed")
        },
        "mixture_slope": measures.slope(mixture, "train", "error"),
        "sampling_slope": measures.slope(sampling, "draws", "error"),
        **circumstances(),
    }
    text = report.as_text(classical, sampling, noise, settings)
    print(text)
    results = {"settings": settings, "classical": classical, "sampling": sampling, "noise": noise}
    write_results(arguments.out, "influence", results, text)
    report.draw(classical, sampling, noise, arguments.out / "influence.png")
    print(f"Written: {arguments.out}/influence.json, .md and .png")


def kept(
    arguments: argparse.Namespace, unit: str, measure: Callable[..., list[Row]], *given: Any
) -> list[Row]:
    """Rows that were measured once, from the folder if they are there."""
    file = arguments.checkpoint / f"{unit}.json"
    return list(stored(file, {}, lambda: {"rows": measure(*given)})["rows"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder or .npz (default: FASTVAE_DATA, else scikit-learn's digits)")
    parser.add_argument("--points", type=int, nargs="+", default=[60, 120, 240, 480, 960], help="N")
    parser.add_argument("--queries", type=int, default=30, help="training and new points (default: 30)")
    parser.add_argument("--draws", type=int, nargs="+", default=[4, 16, 64, 256], help="S")
    parser.add_argument("--reference", type=int, default=8192, help="S of the reference (default: 8192)")
    parser.add_argument("--trials", type=int, default=8, help="for each S (default: 8)")
    parser.add_argument(
        "--pairs", type=int, default=32, help="images on both sides, half of those retrieved (default: 32)"
    )
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[1, 2, 4, 12], help="of a run")
    parser.add_argument("--epochs", type=int, default=20, help="of training (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    add_folder(parser, "influence")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/papers"), help="folder")
    arguments = parser.parse_args(argv)
    if min(arguments.points) < max(arguments.queries, 2 * measures.COMPONENTS):
        parser.error(
            f"--points: expected at least --queries ({arguments.queries}), got {min(arguments.points)}"
        )
    for name in ("points", "draws"):
        if len(set(getattr(arguments, name))) < 2:
            parser.error(f"--{name}: expected at least two values")
    return arguments


if __name__ == "__main__":
    main()
