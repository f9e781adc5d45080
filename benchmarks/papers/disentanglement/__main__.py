"""JL1-VAE against beta-VAE on three dots: local MIG and modularity beside the published medians.

    python -m benchmarks.papers.disentanglement                    10,000 steps of every model: hours on a CPU
    python -m benchmarks.papers.disentanglement --full             the paper's 300,000 steps: for a GPU
    python -m benchmarks.papers.disentanglement --minutes 60       stop in time, all models at the same step
    python -m benchmarks.papers.disentanglement --resume           go on after an interruption

Setting of Rhodes, Lee, Local Disentanglement in Variational Auto-Encoders Using Jacobian L1 Regularization,
NeurIPS 2021: three dots of 64 x 64 values each, beta 4, gamma 0.1, 10 latents, Adam 1e-4, batches of 64, of images
drawn anew in every step. For each seed both models start from the same weights and see the same images. Beta
and gamma grow linearly from 0 over the first third of --steps. Models train in turns, an epoch (--epoch-steps)
each. Tables and figure are also written, as disentanglement.json, .md and .png. Sizes other than 64 get small
dense networks: they are for trials, not for comparison with the paper.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ..shared import Row, circumstances, claim_folder, write_results
from . import comparison, report


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    names = ("size", "seeds", "batch_size", "lr", "beta", "gamma", "anneal_steps", "epoch_steps", "device")
    settings: Row = {name: getattr(arguments, name) for name in names}
    claim_folder(arguments.checkpoint, settings, arguments.resume)
    runs = comparison.start(arguments)
    comparison.train(runs, math.ceil(arguments.steps / arguments.epoch_steps), arguments.minutes)
    rows = [comparison.scores_of(run, arguments) for run in runs]
    settings |= {
        "steps": arguments.steps,
        "steps_taken": rows[0]["steps"],
        "rho": arguments.rho,
        "points": arguments.points,
        "clusters": arguments.clusters,
        "test_images": arguments.test_images,
        **circumstances(),
    }
    summary = comparison.summaries(rows, arguments.rho)
    text = report.as_text(rows, summary, settings)
    print(text)
    results = {"settings": settings, "summary": summary, "runs": rows}
    write_results(arguments.out, "disentanglement", results, text)
    report.draw(rows, arguments.rho, arguments.out / "disentanglement.png")
    print(f"Written: {arguments.out}/disentanglement.json, .md and .png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="300,000 steps")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--steps", type=int, help="of each model (default: 10000)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="limit on all training (default: none)"
    )
    parser.add_argument("--anneal-steps", type=int, help="default: a third of --steps")
    parser.add_argument("--epoch-steps", type=int, default=100, help="steps between states (default: 100)")
    parser.add_argument("--size", type=int, default=64, help="side of the images (default: 64)")
    parser.add_argument("--beta", type=float, default=4.0, help="default: 4")
    parser.add_argument("--gamma", type=float, default=0.1, help="default: 0.1")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--lr", type=float, default=1e-4, help="of Adam (default: 1e-4)")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.1, 1.0], help="default: 0.1 1")
    parser.add_argument("--points", type=int, default=10_000, help="in a cluster (default: 10000)")
    parser.add_argument("--clusters", type=int, default=20, help="default: 20")
    parser.add_argument("--test-images", type=int, default=1000, help="for ELBO and J1 (default: 1000)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/disentanglement"), help="folder of states"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the states in --checkpoint")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/papers"), help="folder")
    arguments = parser.parse_args(argv)
    if arguments.steps is None:
        arguments.steps = 300_000 if arguments.full else 10_000
    if arguments.anneal_steps is None:
        arguments.anneal_steps = arguments.steps // 3
    for name, least in (
        ("seeds", 1),
        ("steps", 1),
        ("anneal_steps", 0),
        ("epoch_steps", 1),
        ("size", 2),
        ("batch_size", 1),
        ("points", 2),
        ("clusters", 1),
        ("test_images", 2),
    ):
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    return arguments


if __name__ == "__main__":
    main()
