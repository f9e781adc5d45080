"""The two runs, and what their checkpoints say of the images."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.architectures import tracin_decoder, tracin_encoder
from fastvae.atomic import write_atomically
from fastvae.data import ImageDataset
from fastvae.influence import TracIn
from fastvae.metrics import ood_metrics
from fastvae.noise import keys_of

from ..shared import Row, stored

QUERY_SEED = 1
"""Of the queries' noise, other than that of the training images: common noise flatters an image's own gradient."""


def trained(x: Tensor, folder: Path, arguments: argparse.Namespace) -> tuple[fastvae.VAE, fastvae.History]:
    """A model trained on images [N, ...], going on from the states in ``folder``."""
    torch.manual_seed(arguments.seed)
    sizes = (x[0].numel(), arguments.latent_dim, arguments.width)
    model = fastvae.VAE(tracin_encoder(*sizes), tracin_decoder(*sizes), beta=arguments.beta)
    history = fastvae.fit(
        model,
        DataLoader(TensorDataset(x), arguments.batch_size, shuffle=True),
        epochs=arguments.epochs,
        optimizer=functools.partial(getattr(torch.optim, arguments.optimizer), lr=arguments.lr),
        run_dir=folder,
        checkpoint_every=arguments.epochs // arguments.checkpoints,
        seed=arguments.seed,
        device=arguments.device,
    )
    return model, history


def tracin_of(
    model: fastvae.VAE,
    x: Tensor,
    checkpoints: Sequence[Path],
    arguments: argparse.Namespace,
    query_seed: int | None = QUERY_SEED,
) -> TracIn:
    return TracIn(model, x, checkpoints, num_samples=arguments.num_samples, query_seed=query_seed)


def scores_of(tracin: Callable[[Path], TracIn], queries: Tensor, checkpoint: Path, file: Path) -> Tensor:
    """What one checkpoint adds to the scores of the queries, [M, N], for which the training images are gone through
    once; read from ``file`` where a run that was stopped had found it.

    It adds the same beside others: noise is keyed by a checkpoint's weights, and its part of the training is in it.
    """
    key = keys_of(queries).tolist()
    if file.exists() and (found := torch.load(file, weights_only=True))["key"] == key:
        return Tensor(found["scores"])
    scores = tracin(checkpoint).influence(queries, show_progress=True)
    assert isinstance(scores, Tensor)
    write_atomically(file, functools.partial(torch.save, {"key": key, "scores": scores}))
    return scores


def retrieval(train: ImageDataset, test: ImageDataset, arguments: argparse.Namespace) -> Iterator[Row]:
    """Strongest proponents of training images, of test images, of the first with common noise: all so far."""
    folder = arguments.checkpoint / "plain"
    x, labels = train.tensors()
    model, history = trained(x, folder, arguments)
    generator = torch.Generator().manual_seed(arguments.seed)
    own = torch.randperm(len(train), generator=generator)[: arguments.queries]
    others = torch.randperm(len(test), generator=generator)[: arguments.queries]

    def summed(images: Tensor, name: str, **options: Any) -> Iterator[Tensor]:
        """Scores after one checkpoint, after two, ..."""
        total = torch.zeros(len(images), len(x))
        for checkpoint in history.checkpoints:
            file = folder / f"{name}-S{arguments.num_samples}-{checkpoint.stem}.scores"
            total += scores_of(
                lambda of: tracin_of(model, x, [of], arguments, **options), images, checkpoint, file
            )
            yield total

    def shares(name: str, **options: Any) -> list[float]:
        """Of training images that are their own strongest proponent after each checkpoint."""
        return [
            float((scores.argmax(1) == own).double().mean()) for scores in summed(x[own], name, **options)
        ]

    def of_training_images() -> Row:
        found = shares("own")
        return {"own_strongest": found[-1], "own_strongest_by_checkpoints": found}

    def of_test_images() -> Row:
        *_, scores = summed(test.tensors()[0][others], "others")
        found = scores.topk(min(10, len(x)), 1).indices
        assert labels is not None and test.labels is not None
        same = (labels[found] == test.labels[others][:, None]).double()
        # Of ten proponents of one image: the images are what was drawn.
        of_ten = same.mean(1)
        return {
            "same_label": float(same[:, 0].mean()),
            "same_label_of_ten": float(of_ten.mean()),
            "same_label_of_ten_error": float(of_ten.std() / math.sqrt(len(of_ten))),
        }

    def with_common_noise() -> Row:
        """How much of what is missing is the error of S draws: here an image's own is left out."""
        return {"own_strongest_common_noise": shares("common", query_seed=None)[-1]}

    key = {name: getattr(arguments, name) for name in ("queries", "num_samples")}
    row: Row = {"train_loss": history.train_loss[-1], "queries": len(own)}
    parts = {"own": of_training_images}
    if labels is not None and test.labels is not None:
        parts["labels"] = of_test_images
    if not arguments.skip_common_noise:
        parts["common-noise"] = with_common_noise
    for name, compute in parts.items():
        row |= stored(folder / f"{name}.json", key, compute)
        yield dict(row)


def foreign(train: ImageDataset, strangers: ImageDataset, arguments: argparse.Namespace) -> Row:
    """Self-influence of the training images of a run with strangers among them."""
    if strangers.images.shape[1:] != train.images.shape[1:]:
        raise SystemExit(
            f"--foreign: expected images {list(train.images.shape[1:])} like --data, "
            f"found {list(strangers.images.shape[1:])}"
        )
    folder = arguments.checkpoint / "mixed"
    hidden = strangers.split(arguments.hidden, seed=arguments.seed)[0]
    x = torch.cat([train.tensors()[0], hidden.tensors()[0]])
    is_foreign = torch.arange(len(x)) >= len(train)
    model, history = trained(x, folder, arguments)

    def compute() -> Row:
        tracin = tracin_of(model, x, history.checkpoints, arguments)
        influence = tracin.self_influence(show_progress=True).double()
        scores = {"auroc": influence, "auroc_of_loss": mean_loss(model, x, arguments)}
        if arguments.num_samples > 1:
            # Without what the variance of S draws adds, which is larger for some images than for others.
            scores["auroc_unbiased"] = tracin.self_influence(show_progress=True, unbiased=True).double()
        found = is_foreign[influence.argsort(descending=True)].double().cumsum(0)
        row: Row = {
            "hidden": len(hidden),
            "of": len(x),
            "area": float((found / len(hidden)).mean()),
            "largest_area": 1 - (len(hidden) - 1) / (2 * len(x)),
            "rank_correlation_with_loss": rank_correlation(influence, scores["auroc_of_loss"]),
            "found": found.long().tolist(),
        }
        for name, values in scores.items():
            measures = ood_metrics(values[~is_foreign], values[is_foreign])
            row |= {name: measures.auroc, f"{name}_interval": measures.auroc_interval}
        return row

    key = {name: getattr(arguments, name) for name in ("hidden", "num_samples")}
    return {"train_loss": history.train_loss[-1], **stored(folder / "scores.json", key, compute)}


@torch.no_grad()
def mean_loss(model: fastvae.VAE, x: Tensor, arguments: argparse.Namespace) -> Tensor:
    """Of the trained model, the mean over as many draws as the influence has: [N] float64."""
    losses = torch.zeros(len(x), dtype=torch.float64)
    generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
    for first in range(0, len(x), 1000):
        part = x[first : first + 1000].to(arguments.device)
        for _ in range(arguments.num_samples):
            losses[first : first + len(part)] += model.eval().objective(part, generator=generator).loss.cpu()
    return losses / arguments.num_samples


def ranks(scores: Tensor) -> Tensor:
    """1 for the smallest; equal scores share the mean of their ranks: [n] float64."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])
