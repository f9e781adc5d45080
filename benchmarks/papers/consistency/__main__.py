"""What consistency regularisation changes: models with and without it on small networks, by the paper's measures.

    python -m benchmarks.papers.consistency --data mnist10k.npz
    python -m benchmarks.papers.consistency --data mnist10k.npz --resume          go on after an interruption

Sinha and Dieng, Consistency Regularization for Variational Auto-Encoders, NeurIPS 2021, tables 1 to 3, scaled down: the
paper trains 3x1000 dense and 128-256-512-1024 convolutional networks with 32 latents, NVAE among them, for hundreds of
epochs on GPUs. Here dense networks of 3x200 and convolutional ones of 16-32 channels, 16 latents, ELU and no
BatchNorm (a Hamiltonian flow refuses it in training) are trained for a few epochs; NVAE is not covered. Each model is
trained twice from the same weights with the same order of batches: alone, and with ELBO(x~) - lambda KL added,
lambda 1e-3, x~ a random affine view (15 degrees, 5 %, 0.9 to 1.1, by the nearest pixel as in the authors' code, or
bilinear with --interpolation) binarised anew. A consistency step sees twice as many images.

NLL: importance sampling on binary test images, +- its standard error over images. MI, active units: of q over the
training images; MI is at most log of their number. k-NN and linear: accuracy on test images from the means of q, the
classifiers fitted to the training images' means. All are means over seeds, +- the standard deviation over seeds. The
table is also written, as consistency.json and .md, after every seed of a network.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

import fastvae
from fastvae import metrics
from fastvae.data import Compose, RandomAffine, binarize, load
from fastvae.models import BaseVAE
from fastvae.penalties import Consistency

from ..shared import Row, circumstances, claim_folder, measured_on, stored, table, write_results

LATENTS = 16
MODELS: dict[str, tuple[type[BaseVAE], dict[str, Any]]] = {
    "VAE": (fastvae.VAE, {}),
    "beta-VAE, beta = 4": (fastvae.VAE, {"beta": 4.0}),
    "IWAE, K = 10": (fastvae.IWAE, {"num_samples": 10}),
    # "drop": one trajectory that diverges should not end a run of hours.
    "HVAE, K = 3": (fastvae.HVAE, {"num_steps": 3, "step_size": 0.1, "on_divergence": "drop"}),
}
NETWORKS = ("dense", "convolutional")
ADDED = ("nll", "linear")
MEASURES = {"nll": "test NLL", "mi": "MI", "active": "active units", "knn": "k-NN", "linear": "linear"}


def dense(shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    size = int(torch.Size(shape).numel())

    def layers(*widths: int) -> list[nn.Module]:
        found: list[nn.Module] = []
        for pair in itertools.pairwise(widths):
            found += [nn.Linear(*pair), nn.ELU()]
        return found[:-1]

    encoder = nn.Sequential(nn.Flatten(), *layers(size, 200, 200, 200, 2 * LATENTS))
    return encoder, nn.Sequential(*layers(LATENTS, 200, 200, 200, size), nn.Unflatten(1, tuple(shape)))


def convolutional(shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    channels, height, width = shape
    small = (32, height // 4, width // 4)
    numel = small[0] * small[1] * small[2]
    encoder = nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, 1),
        nn.ELU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(numel, 128),
        nn.ELU(),
        nn.Linear(128, 2 * LATENTS),
    )
    decoder = nn.Sequential(
        nn.Linear(LATENTS, 128),
        nn.ELU(),
        nn.Linear(128, numel),
        nn.ELU(),
        nn.Unflatten(1, small),
        nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.ELU(),
        nn.ConvTranspose2d(16, channels, 4, 2, 1),
    )
    return encoder, decoder


def build(
    network: str, kind: str, consistent: bool, shape: Sequence[int], seed: int, interpolation: str
) -> BaseVAE:
    """For one seed and network all models have the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, decoder = {"dense": dense, "convolutional": convolutional}[network](shape)
    # The images are binary: so are their views.
    view = Compose(RandomAffine(interpolation=interpolation), binarize)
    penalties = [Consistency(view)] if consistent else []
    model, options = MODELS[kind]
    return model(encoder, decoder, penalties=penalties, **options)


Labelled = tuple[Tensor, Tensor]


def measure(model: BaseVAE, train: Labelled, test: Labelled, arguments: argparse.Namespace) -> Row:
    nll = metrics.negative_log_likelihood(model, test[0][: arguments.test_images], arguments.num_samples)
    train_codes, codes = metrics.posteriors(model, train[0])[0], metrics.posteriors(model, test[0])[0]
    probe = (train_codes, train[1], codes, test[1])
    return {
        "nll": nll.mean,
        "nll_error": nll.standard_error,
        "mi": metrics.mutual_information(model, train[0]),
        "active": metrics.active_units(model, train[0]),
        "knn": metrics.knn_accuracy(*probe),
        "linear": metrics.linear_probe(*probe),
    }


def train_and_measure(
    network: str,
    kind: str,
    consistent: bool,
    seed: int,
    grey: Tensor,
    train: Labelled,
    test: Labelled,
    arguments: argparse.Namespace,
) -> Row:
    name = f"{network} {kind}{' consistent' if consistent else ''} {seed}"
    folder = arguments.checkpoint / "".join(c if c.isalnum() else "-" for c in name)
    model = build(network, kind, consistent, grey.shape[1:], seed, arguments.interpolation)

    def compute() -> Row:
        loader = DataLoader(
            TensorDataset(grey),
            sampler=BatchSampler(RandomSampler(grey), arguments.batch_size, drop_last=False),
            batch_size=None,
        )
        history = fastvae.fit(
            model,
            loader,
            epochs=arguments.epochs,
            optimizer=functools.partial(torch.optim.Adam, lr=arguments.lr),
            run_dir=folder,
            checkpoint_every=2,
            seed=seed,
            binarize=True,
            progress=False,
        )
        given_up = {"diverged": model.divergences} if isinstance(model, fastvae.HVAE) else {}
        return {"loss": history.train_loss[-1], **given_up, **measure(model, train, test, arguments)}

    folder.mkdir(parents=True, exist_ok=True)
    row = stored(folder / "scores.json", {"epochs": arguments.epochs}, compute)
    return {"network": network, "model": kind, "consistent": consistent, "seed": seed, **row}


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means over seeds, and the standard deviations over seeds where there are several."""
    found: list[Row] = []
    for network in NETWORKS:
        for kind in MODELS:
            for consistent in (False, True):
                key = {"network": network, "model": kind, "consistent": consistent}
                same = [row for row in rows if key.items() <= row.items()]
                if not same:
                    continue
                line: Row = {
                    **key,
                    "name": kind + (" + consistency" if consistent else ""),
                    "seeds": len(same),
                }
                for measure in MEASURES:
                    values = [float(row[measure]) for row in same]
                    line[measure] = statistics.fmean(values)
                    line[f"{measure}_sd"] = statistics.stdev(values) if len(values) > 1 else None
                line["nll_error"] = statistics.fmean(row["nll_error"] for row in same)
                if consistent:
                    without = [row for row in rows if {**key, "consistent": False}.items() <= row.items()]
                    line |= differences(same, without)
                found.append(line)
    return found


def differences(rows: Sequence[Row], without: Sequence[Row]) -> Row:
    """What consistency adds to each measure: mean over seeds, and its standard error where there are several.

    Both models of a seed begin with the same weights and see the same batches: seeds are paired.
    """
    before = {row["seed"]: row for row in without}
    pairs = [(row, before[row["seed"]]) for row in rows if row["seed"] in before]
    found: Row = {}
    for measure in MEASURES:
        values = [float(row[measure]) - float(other[measure]) for row, other in pairs]
        found[f"{measure}_gain"] = statistics.fmean(values)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        found[f"{measure}_gain_error"] = error
    return found


def as_text(lines: Sequence[Row], settings: Row) -> str:
    def shown(line: Row, measure: str) -> str:
        digits = 3 if measure in ("knn", "linear") else 2
        spread = "" if line[f"{measure}_sd"] is None else f" ± {line[f'{measure}_sd']:.{digits}f}"
        return f"{line[measure]:.{digits}f}{spread}"

    def added(line: Row, measure: str) -> str | None:
        if f"{measure}_gain" not in line:
            return None
        digits = 3 if measure in ("knn", "linear") else 2
        error = line[f"{measure}_gain_error"]
        return f"{line[f'{measure}_gain']:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    rows = [{**line, **{measure: shown(line, measure) for measure in MEASURES}} for line in lines]
    for row, line in zip(rows, lines, strict=True):
        row |= {f"{measure} added": added(line, measure) for measure in ADDED}
    columns = [("network", "network", ""), ("name", "model", ""), ("seeds", "seeds", "d")]
    columns += [(measure, heading, "") for measure, heading in MEASURES.items()]
    columns.insert(4, ("nll_error", "s.e. over images", ".2f"))
    columns += [(f"{measure} added", f"{MEASURES[measure]}, minus without", "") for measure in ADDED]
    return (
        f"Consistency regularisation: {settings['data']}, {settings['train_images']} training images, "
        f"{settings['epochs']} epochs of batches of {settings['batch_size']}, {LATENTS} latents, lambda 1e-3; NLL in "
        f"nats on {settings['test_images']} test images with {settings['num_samples']} importance samples; views by "
        f"{settings['interpolation']} interpolation. Means "
        f"over seeds ± standard deviation over seeds; differences are paired by seed, ± standard error. "
        "The paper finds every model improved, and 76.93 nats on "
        f"binarised MNIST for its NVAE, which is not covered; networks and epochs are far below the paper's.\n\n"
        f"{table(rows, columns)}\n\n{measured_on(settings)}"
    )


def draw(lines: Sequence[Row], path: Path) -> None:
    """NLL of every model with and without, a panel a network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(line["network"] for line in lines))
    figure = Figure(figsize=(5 * len(networks), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(networks), squeeze=False)[0]
    for axis, network in zip(axes, networks, strict=True):
        here = [line for line in lines if line["network"] == network]
        for consistent, label, color in (
            (False, "without", "#b8c4d0"),
            (True, "with consistency", "#2f6f9f"),
        ):
            group = [line for line in here if line["consistent"] == consistent]
            places = [index + (0.2 if consistent else -0.2) for index in range(len(group))]
            values, spread = ([line[key] or 0 for line in group] for key in ("nll", "nll_sd"))
            axis.bar(places, values, 0.38, yerr=spread, capsize=3, color=color, label=label)
            axis.set_xticks(range(len(group)), [line["model"].replace(", ", "\n") for line in group])
        axis.set(title=network, ylabel="test NLL, nats", ylim=(0.9 * min(line["nll"] for line in here), None))
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    train, held_out = load(arguments.data, split="train"), load(arguments.data, split="test")
    generator = torch.Generator().manual_seed(0)
    # Files are often sorted by label: the first images would not do.
    order = torch.randperm(len(held_out), generator=generator)
    (grey, labels), (grey_test, test_labels) = (part.tensors() for part in (train, held_out))
    if labels is None or test_labels is None:
        raise SystemExit(f"{train.name}: expected labels, for the classifiers")
    binary = (binarize(grey, generator), labels)
    test = (binarize(grey_test, generator)[order], test_labels[order])
    names = ("epochs", "batch_size", "lr", "interpolation", "test_images", "num_samples")
    settings: Row = {"data": Path(train.name).name, "train_images": len(train)}
    settings |= {name: getattr(arguments, name) for name in names}
    settings["test_images"] = min(arguments.test_images, len(test[0]))
    claim_folder(arguments.checkpoint, settings, arguments.resume)
    jobs = [
        (network, seed, kind, consistent)
        for network in arguments.networks
        for seed in range(arguments.seeds)
        for kind in MODELS
        for consistent in (False, True)
    ]
    rows: list[Row] = []
    settings |= circumstances()
    for index, (network, seed, kind, consistent) in enumerate(tqdm(jobs, unit="model", disable=None), 1):
        rows.append(train_and_measure(network, kind, consistent, seed, grey, binary, test, arguments))
        if index % (2 * len(MODELS)) == 0:
            lines = summary(rows)
            results = {"settings": settings, "summary": lines, "runs": rows}
            write_results(arguments.out, "consistency", results, as_text(lines, settings))
            draw(lines, arguments.out / "consistency.png")
    print(as_text(summary(rows), settings))
    print(f"Written: {arguments.out}/consistency.json, .md and .png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder or .npz (default: FASTVAE_DATA, else scikit-learn's digits)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="default: both")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--epochs", type=int, default=10, help="default: 10")
    parser.add_argument("--batch-size", type=int, default=100, help="default: 100")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam (default: 1e-3)")
    parser.add_argument(
        "--interpolation", choices=("nearest", "bilinear"), default="nearest", help="of views"
    )
    parser.add_argument("--test-images", type=int, default=500, help="for the NLL, at most (default: 500)")
    parser.add_argument("--num-samples", type=int, default=200, help="importance samples (default: 200)")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/consistency"), help="folder of states")
    parser.add_argument("--resume", action="store_true", help="go on from the states in --checkpoint")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/papers"), help="folder")
    arguments = parser.parse_args(argv)
    for name in ("seeds", "epochs", "batch_size", "num_samples", "test_images"):
        least = 2 if name == "test_images" else 1
        if (value := getattr(arguments, name)) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    return arguments


if __name__ == "__main__":
    main()
