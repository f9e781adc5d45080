"""The Jacobian penalty of decoders with kinks: exact gradients against those of differences.

    python -m benchmarks.papers.kinks                        scikit-learn's digits, 2 minutes on 2 cores
    python -m benchmarks.papers.kinks --data mnist10k.npz    5 minutes

Between kinks a ReLU network's Jacobian is constant, so that the mean of exact gradients over codes is not the gradient
of the mean (Rhodes, Lee, NeurIPS 2021, take differences of 1e-3, which see some of what happens at kinks):

1. error of the mean and noise of the gradient's estimators, of a 4-32-32-20 decoder with ReLU and with Softplus;
2. what training reaches with each, in the exact objective, of that decoder and of a dense one on images.

A run that was stopped goes on with --resume: whatever training or table was done is kept.
Tables and figure are also written, as kinks.json, .md and .png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastvae.data import load

from ..shared import Row, add_folder, circumstances, claim_for, stored, write_results
from . import gradients, report, training


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    claim_for(arguments, free=["seeds"])
    found = [row for name in gradients.ACTIVATIONS for row in kept_gradients(name, arguments)]
    rows = training.compared(arguments)
    widths = {row["network"]: row["widths"] for row in rows}
    names = (
        "directions",
        "codes",
        "gamma",
        "small_gamma",
        "seeds",
        "lr",
        "batch_size",
        "small_steps",
        "steps",
        "seed",
    )
    settings: Row = {
        "data": Path(load(arguments.data).name).name,
        **{name: getattr(arguments, name) for name in names},
        **widths,
        **circumstances(),
    }
    summary = report.summaries(rows)
    text = report.as_text(found, summary, settings)
    print(text)
    results = {"settings": settings, "gradients": found, "summary": summary, "runs": rows}
    write_results(arguments.out, "kinks", results, text)
    report.draw(found, summary, arguments.out / "kinks.png")
    print(f"Written: {arguments.out}/kinks.json, .md and .png")


def kept_gradients(activation: str, arguments: argparse.Namespace) -> list[Row]:
    """Of one activation, from the folder if they are there."""
    file = arguments.checkpoint / f"gradients-{activation}.json"
    return list(stored(file, {}, lambda: {"rows": gradients.compared(activation, arguments)})["rows"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder or .npz (default: FASTVAE_DATA, else scikit-learn's digits)")
    parser.add_argument("--codes", type=int, default=2**17, help="of each mean (default: 131072)")
    parser.add_argument("--directions", type=int, default=24, help="in parameter space (default: 24)")
    parser.add_argument("--gamma", type=float, nargs="+", default=[0.1, 1.0], help="default: 0.1 1")
    parser.add_argument(
        "--small-gamma",
        type=float,
        nargs="+",
        default=[0.01, 0.03],
        help="4-32-32-20 VAE's (default: 0.01 0.03)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of training (default: 3)")
    parser.add_argument("--small-steps", type=int, default=1000, help="of the 4-32-32-20 VAE (default: 1000)")
    parser.add_argument("--steps", type=int, default=400, help="of the dense VAE (default: 400)")
    parser.add_argument("--width", type=int, default=128, help="of the dense VAE's layers (default: 128)")
    parser.add_argument("--latent-dim", type=int, default=8, help="of the dense VAE (default: 8)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: 1e-3")
    parser.add_argument("--seed", type=int, default=0, help="of data and directions (default: 0)")
    add_folder(parser, "kinks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/papers"), help="folder")
    arguments = parser.parse_args(argv)
    for name in ("directions", "seeds", "small_steps", "steps", "batch_size"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if arguments.codes < gradients.CHUNK:
        parser.error(f"--codes: expected at least {gradients.CHUNK}, got {arguments.codes}")
    return arguments


if __name__ == "__main__":
    main()
