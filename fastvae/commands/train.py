"""``fastvae train``: from images to a trained model in a folder."""

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
from fastvae.commands.models import LIKELIHOODS, MODELS, build_model
from fastvae.commands.runs import RunSettings, device_of, load_images
from fastvae.data import ImageDataset
from fastvae.models import BaseVAE
from fastvae.network import Network
from fastvae.training import Callback, History, Training, fit, load_checkpoint

__all__ = ["add_arguments", "run"]

# Unless told otherwise: optimisation steps that show what a model can do, and how many checkpoints stay.
_STEPS, _FEWEST_EPOCHS = 3000, 10
_KEPT = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. Those that belong to a run have no default here: they may come from its folder."""
    default = RunSettings()
    given: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "data",
        nargs="?",
        help='a folder of pictures (subfolders: labels), IDX files, an .npy or .npz file or "digits"',
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
        help=f"of images without parts of their own ({default.test_fraction})",
        **given,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, help=f"({default.model})", **given)
    model.add_argument(
        "--likelihood",
        choices=LIKELIHOODS,
        help="of a pixel; bernoulli for grey images and gaussian, of learned scale, for colour",
        **given,
    )
    model.add_argument(
        "--latent-dim", type=positive(int), help=f"latent variables ({default.latent_dim})", **given
    )
    model.add_argument(
        "--width", type=positive(int), help=f"channels of the first layer ({default.width})", **given
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
    train, test = (
        load_images(settings.data, settings, split, options.size, options.channels)
        for split in ("train", "test")
    )
    settings = _chosen(settings, train)
    with mendable():
        model = build_model(settings, tuple(train.images.shape[1:]))
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
            'DATA: expected a folder of pictures, IDX files, an .npy or .npz file or "digits", got nothing'
        )
    return RunSettings(**given)


def _chosen(settings: RunSettings, train: ImageDataset) -> RunSettings:
    """With what the images decide, where nobody else has."""
    # What is scored later is brought into the same form.
    chosen = replace(settings, shape=list(train.images.shape[1:]))
    if chosen.likelihood == "auto":
        chosen.likelihood = "bernoulli" if train.images.shape[1] == 1 else "gaussian"
    if chosen.binarize and chosen.likelihood != "bernoulli":
        raise CommandError(f"--binarize: expected --likelihood bernoulli, got {chosen.likelihood}")
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
    train: ImageDataset,
    test: ImageDataset,
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
            on_nonfinite="skip",
        )
        model.save(folder)
    return history


def _introduced(
    train: ImageDataset, test: ImageDataset, model: BaseVAE, settings: RunSettings, device: torch.device
) -> str:
    shape = "x".join(map(str, train.images.shape[1:]))
    labels = "" if train.labels is None else f", {train.labels.unique().numel()} labels"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    share = Network(
        model.decoder, model.likelihood, z=torch.zeros(2, settings.latent_dim, device="cpu")
    ).lowered
    return (
        f"images: {len(train):,} to train on and {len(test):,} to test on, {shape}{labels}\n"
        f"model: {type(model).__name__}, {model.latent_dim} latent variables, {settings.likelihood} likelihood, "
        f"{parameters:,} parameters; decoder: {share:.0%} of its work in fused sweeps; on {device}\n"
        f"training: {settings.epochs} epochs of {math.ceil(len(train) / settings.batch_size)} steps"
    )


def _concluded(model: BaseVAE, history: History, folder: Path, settings: RunSettings) -> str:
    best = history.val_loss[history.best_epoch - 1] if history.best_epoch else None
    found = "-" if best is None else f"{best:.2f} nats an image, after epoch {history.best_epoch}"
    stopped = {"callback": "time", "patience": "patience"}.get(history.stopped, "epochs")
    skipped = sum(history.skipped)
    part = ", the last in part" if history.checkpoints[-1].name.startswith("step-") else ""
    return (
        f"trained: {len(history.steps)} epochs{part}, {history.steps[-1]:,} steps in {sum(history.seconds):.0f} s; "
        f"ended by {stopped}{f'; {skipped} steps were skipped, not finite' if skipped else ''}\n"
        f"lowest loss of test images: {found}\n"
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
