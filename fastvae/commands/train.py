"""``fastvae train``: from images or a table to a trained model in a folder."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from fastvae.commands.errors import CommandError, at_least, mendable, positive, seed, sides
from fastvae.commands.models import (
    LIKELIHOODS,
    MODELS,
    TABLE_LIKELIHOODS,
    build_model,
    likelihood_of,
    start_at_means,
)
from fastvae.commands.runs import RunData, RunSettings, device_of, load_data
from fastvae.data import ImageDataset, TableDataset
from fastvae.data.tables import is_named, is_table
from fastvae.models import BaseVAE
from fastvae.network import Network
from fastvae.training import Callback, History, Training, fit, load_checkpoint

__all__ = ["add_arguments", "run"]

# Unless told otherwise: optimisation steps that show what a model can do, and how many checkpoints stay.
_STEPS, _FEWEST_EPOCHS = 3000, 10
_KEPT = 10
# Of a model: images' and, at most, tables'.
_LATENTS, _TABLE_LATENTS = 32, 16
_CHANNELS, _UNITS = 16, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. Those that belong to a run have no default here: they may come from its folder."""
    default = RunSettings()
    given: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "data",
        nargs="?",
        help="a folder of pictures (subfolders: labels), IDX files, a table (.csv, .tsv), an .npy or .npz file of "
        'images or of a table, or "digits"',
    )
    parser.add_argument(
        "--out", type=Path, default=Path("fastvae-run"), help="the run's folder (%(default)s)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, with its settings"
    )
    parser.add_argument("--device", help='"cpu", "cuda", ...; a GPU if there is one')
    parser.add_argument(
        "--minutes", type=positive(float), help="stop training after so long; --resume goes on from there"
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--size", type=sides, help="scale and crop images to this side, or height x width", metavar="SIDE"
    )
    images.add_argument("--channels", type=int, choices=(1, 3), help="1 for grey, 3 for colour")
    images.add_argument(
        "--test-fraction",
        type=float,
        help=f"of images without parts of their own, and of tables ({default.test_fraction})",
        **given,
    )
    tables = parser.add_argument_group("tables (.csv, .tsv)")
    tables.add_argument("--label", metavar="COLUMN", help='of labels ("label", if there is one)', **given)
    tables.add_argument(
        "--condition", nargs="+", metavar="COLUMN", help="given to the model, and not modelled", **given
    )
    tables.add_argument("--ignore", nargs="+", metavar="COLUMN", help="left out", **given)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, help=f"({default.model})", **given)
    model.add_argument(
        "--likelihood",
        choices=[*LIKELIHOODS, *(name for name in TABLE_LIKELIHOODS if name not in LIKELIHOODS)],
        help="of a pixel; bernoulli for grey images and gaussian, of learned scale, for colour; of a number in a "
        "table: bernoulli for 0 and 1, negative-binomial for counts, gaussian of standardised columns for others",
        **given,
    )
    model.add_argument(
        "--latent-dim",
        type=positive(int),
        help=f"latent variables ({_LATENTS}; of tables at most {_TABLE_LATENTS})",
        **given,
    )
    model.add_argument(
        "--width",
        type=positive(int),
        help=f"channels of the first layer ({_CHANNELS}); of tables hidden units ({_UNITS})",
        **given,
    )
    model.add_argument("--beta", type=at_least(0), help=f"weight of the KL ({default.beta})", **given)
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive(int), help=f"about {_STEPS} steps, unless given", **given)
    training.add_argument("--batch-size", type=positive(int), help=f"({default.batch_size})", **given)
    training.add_argument(
        "--learning-rate", type=positive(float), help=f"of Adam ({default.learning_rate})", **given
    )
    training.add_argument(
        "--patience", type=positive(int), help="stop after so many epochs without a better test loss", **given
    )
    training.add_argument(
        "--binarize", action="store_true", help="draw black and white pixels anew each step", **given
    )
    training.add_argument("--seed", type=seed, help=f"of weights, noise and split ({default.seed})", **given)


def run(options: argparse.Namespace) -> int:
    """Train, write the run's folder and say what came of it; 0, 1 without finite numbers, 130 after Ctrl-C."""
    folder: Path = options.out
    settings = _settings(options, folder)
    if is_table(settings.data):
        _check_nothing_is_of_images(options, settings)
    train, test = (
        load_data(settings.data, settings, split, options.size, options.channels)
        for split in ("train", "test")
    )
    if isinstance(train, TableDataset) and isinstance(test, TableDataset):
        settings, train, test = _chosen_of_table(settings, train, test)
    else:
        settings = _chosen_of_images(settings, train)
    settings = _chosen(settings, train)
    with mendable():
        assert settings.shape is not None
        model = build_model(settings, settings.shape)
    if isinstance(train, TableDataset):
        start_at_means(model, train, settings.likelihood)
    device = device_of(options.device)
    print(_introduced(train, test, model, settings, device), flush=True)
    try:
        history = _fit(model, train, test, settings, folder, device, options.minutes)
    except KeyboardInterrupt:
        print(f"\n{_interrupted(model, folder, settings)}", file=sys.stderr)
        return 130
    except CommandError as error:
        # What fit says to whoever calls it from Python is not for here.
        found, differs, _ = str(error).partition(". Choose another run_dir")
        raise CommandError(f"{found}; --out FOLDER begins another run" if differs else found) from error
    except FloatingPointError as error:
        print(f"fastvae train: {error}", file=sys.stderr)
        return 1
    print(_concluded(model, history, folder, settings), flush=True)
    return 0


def _settings(options: argparse.Namespace, folder: Path) -> RunSettings:
    """Of a new run, or of one that goes on with what was given changed."""
    names = set(asdict(RunSettings()))
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if given.get("data") and Path(given["data"]).exists():
        # The run may be looked at from elsewhere.
        given["data"] = str(Path(given["data"]).resolve())
    is_there = (folder / "run.json").exists()
    if options.resume:
        if not is_there:
            raise CommandError(
                f"--resume: expected a run in {folder}, found none; leave --resume out to begin one"
            )
        settings = replace(RunSettings.load(folder), **given)
        for name in ("size", "channels"):
            if getattr(options, name) is not None:
                raise CommandError(
                    f"--{name}: the run in {folder} has images of {settings.shape}; leave it out"
                )
        return settings
    if is_there:
        raise CommandError(
            f"{folder} holds a run already; --resume goes on with it, --out FOLDER begins another"
        )
    if not given.get("data"):
        raise CommandError(
            'DATA: expected a folder of pictures, IDX files, a table, an .npy or .npz file or "digits", got nothing'
        )
    return RunSettings(**given)


def _chosen_of_images(settings: RunSettings, train: RunData) -> RunSettings:
    """With what the images decide, where nobody else has."""
    assert isinstance(train, ImageDataset)
    for name in ("label", "condition", "ignore"):
        if getattr(settings, name) is not None:
            raise CommandError(f"--{name}: expected a table with columns, got images")
    # What is scored later is brought into the same form.
    chosen = replace(settings, shape=list(train.images.shape[1:]))
    if chosen.likelihood == "auto":
        chosen.likelihood = "bernoulli" if train.images.shape[1] == 1 else "gaussian"
    if chosen.likelihood not in LIKELIHOODS:
        raise CommandError(
            f"--likelihood: expected {', '.join(LIKELIHOODS)} of images, got {chosen.likelihood}"
        )
    if chosen.binarize and chosen.likelihood != "bernoulli":
        raise CommandError(f"--binarize: expected --likelihood bernoulli, got {chosen.likelihood}")
    chosen.latent_dim, chosen.width = chosen.latent_dim or _LATENTS, chosen.width or _CHANNELS
    return chosen


def _check_nothing_is_of_images(options: argparse.Namespace, settings: RunSettings) -> None:
    """CommandError for options of images, with a table."""
    of_images = {
        "--size": options.size,
        "--channels": options.channels,
        "--binarize": settings.binarize or None,
    }
    for name, value in of_images.items():
        if value is not None:
            raise CommandError(f"{name}: expected images, got a table")
    if settings.model == "consistency":
        raise CommandError("--model consistency: expected images, which it turns and shifts, got a table")
    if settings.likelihood not in ("auto", *TABLE_LIKELIHOODS):
        names = ", ".join(TABLE_LIKELIHOODS)
        raise CommandError(f"--likelihood: expected {names} of a table, got {settings.likelihood}")


def _chosen_of_table(
    settings: RunSettings, train: TableDataset, test: TableDataset
) -> tuple[RunSettings, TableDataset, TableDataset]:
    """With what the rows decide, where nobody else has; and the rows as the model sees them."""
    chosen = replace(settings, shape=[train.values.shape[1]])
    if chosen.likelihood == "auto":
        chosen.likelihood = likelihood_of(train)
    if chosen.likelihood == "gaussian" and chosen.mean is None:
        train = train.standardized()
        test = test.standardized(train.mean, train.scale)
        chosen.mean, chosen.scale = train.mean.tolist(), train.scale.tolist()
    if is_named(chosen.data):
        chosen.columns = list(train.columns)
    chosen.levels = dict(train.levels) or None
    chosen.condition_dim = 0 if train.condition is None else train.condition.shape[1]
    chosen.latent_dim = chosen.latent_dim or min(_TABLE_LATENTS, max(2, train.values.shape[1] // 2))
    chosen.width = chosen.width or _UNITS
    return chosen, train, test


def _chosen(settings: RunSettings, train: RunData) -> RunSettings:
    """With what the number of images or rows decides."""
    chosen = replace(settings)
    if chosen.epochs is None:
        chosen.epochs = max(_FEWEST_EPOCHS, math.ceil(_STEPS / math.ceil(len(train) / chosen.batch_size)))
    if chosen.checkpoint_every is None:
        chosen.checkpoint_every = math.ceil(chosen.epochs / _KEPT)
    return chosen


class _KeepRun(Callback):
    """The run's settings, and the model as of the last epoch, are there to be scored at any time."""

    def __init__(self, folder: Path, settings: RunSettings) -> None:
        self.folder, self.settings = folder, settings

    def on_start(self, training: Training) -> None:
        # Not before: a checkpoint may refuse what was changed.
        assert isinstance(training.model, BaseVAE)
        training.model.save(self.folder)
        self.settings.save(self.folder)

    def on_epoch(self, training: Training) -> None:
        assert isinstance(training.model, BaseVAE)
        training.model.save(self.folder)


class _TimeLimit(Callback):
    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def on_step(self, training: Training) -> None:
        if time.monotonic() >= self.end:
            training.stop()

    def on_epoch(self, training: Training) -> None:
        # A validation may take long, too.
        self.on_step(training)


def _fit(
    model: BaseVAE,
    train: RunData,
    test: RunData,
    settings: RunSettings,
    folder: Path,
    device: torch.device,
    minutes: float | None,
) -> History:
    callbacks: list[Callback] = [_KeepRun(folder, settings)]
    if minutes is not None:
        callbacks.append(_TimeLimit(minutes))
    assert settings.epochs is not None
    with mendable():
        history = fit(
            model,
            train,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            optimizer=functools.partial(torch.optim.Adam, lr=settings.learning_rate),
            val_loader=test,
            run_dir=folder / "checkpoints",
            checkpoint_every=settings.checkpoint_every,
            keep_latest=True,
            device=device,
            seed=settings.seed,
            patience=settings.patience,
            callbacks=callbacks,
            binarize=settings.binarize,
            condition=1 if settings.condition_dim else None,
            on_nonfinite="skip",
        )
        model.save(folder)
    return history


def _introduced(
    train: RunData, test: RunData, model: BaseVAE, settings: RunSettings, device: torch.device
) -> str:
    assert settings.shape is not None and settings.latent_dim is not None
    if isinstance(train, TableDataset):
        noun, shape = "rows", f"{settings.shape[0]:,} columns"
        if settings.condition_dim:
            shape += f" given {settings.condition_dim} others"
    else:
        noun, shape = "images", "x".join(map(str, settings.shape))
    labels = "" if train.labels is None else f", {train.labels.unique().numel()} labels"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    z, given = (torch.zeros(2, size, device="cpu") for size in (settings.latent_dim, settings.condition_dim))
    share = Network(
        model.decoder, model.likelihood, z=z, condition=given if settings.condition_dim else None
    ).lowered
    return (
        f"{noun}: {len(train):,} to train on and {len(test):,} to test on, {shape}{labels}\n"
        f"model: {type(model).__name__}, {model.latent_dim} latent variables, {settings.likelihood} likelihood, "
        f"{parameters:,} parameters; decoder: {share:.0%} of its work in fused sweeps; on {device}\n"
        f"training: {settings.epochs} epochs of {math.ceil(len(train) / settings.batch_size)} steps"
    )


def _concluded(model: BaseVAE, history: History, folder: Path, settings: RunSettings) -> str:
    noun, each = ("rows", "a row") if len(settings.shape or ()) == 1 else ("images", "an image")
    best = history.val_loss[history.best_epoch - 1] if history.best_epoch else None
    found = "-" if best is None else f"{best:.2f} nats {each}, after epoch {history.best_epoch}"
    stopped = {"callback": "time", "patience": "patience"}.get(history.stopped, "epochs")
    skipped = sum(history.skipped)
    part = ", the last in part" if history.checkpoints[-1].name.startswith("step-") else ""
    return (
        f"trained: {len(history.steps)} epochs{part}, {history.steps[-1]:,} steps in {sum(history.seconds):.0f} s; "
        f"ended by {stopped}{f'; {skipped} steps were skipped, not finite' if skipped else ''}\n"
        f"lowest loss of test {noun}: {found}\n"
        f"saved in {folder}; next: fastvae score {quote(str(folder))} DATA, "
        f"fastvae report {quote(str(folder))} {quote(settings.data)}"
    )


def _interrupted(model: BaseVAE, folder: Path, settings: RunSettings) -> str:
    """Saves the model as of the newest checkpoint, and says what there is."""
    checkpoints = folder / "checkpoints"
    # One in the middle of an epoch goes when the next is there.
    newest = max(checkpoints.glob("step-*.pt"), default=max(checkpoints.glob("epoch-*.pt"), default=None))
    if newest is None:
        return f"stopped before the first checkpoint; delete {folder} and begin again"
    with mendable():
        load_checkpoint(model, newest)
        model.save(folder)
    kind, number = newest.stem.split("-")
    where = (
        f"epoch {int(number)} of {settings.epochs}" if kind == "epoch" else f"step {int(number):,} of the run"
    )
    return (
        f"stopped; {newest} holds {where}, and {folder} the model\n"
        f"to go on from there: fastvae train --out {quote(str(folder))} --resume"
    )
