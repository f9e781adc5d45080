"""The two runs, and what their checkpoints say of the images."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.architectures import tracin_decoder, tracin_encoder
from fastvae.data import ImageDataset
from fastvae.influence import TracIn

from ..shared import Row, stored

QUERIES_AT_ONCE = 50
"""Each time all training images are gone through for every checkpoint, and what was found is kept."""

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
    history: fastvae.History,
    arguments: argparse.Namespace,
    query_seed: int | None = QUERY_SEED,
) -> TracIn:
    return TracIn(model, x, history.checkpoints, num_samples=arguments.num_samples, query_seed=query_seed)


def strongest(tracin: TracIn, queries: Tensor, k: int, file: Path, key: Row) -> Tensor:
    """Indices of the k strongest proponents, [M, k]; what a run that was stopped had found is read again."""
    found = []
    for index, part in enumerate(queries.split(QUERIES_AT_ONCE)):

        def compute(part: Tensor = part) -> Row:
            return {"indices": tracin.influence(part, k=k, show_progress=True)[0].tolist()}

        kept = file.with_name(f"{file.stem}-{index}.json")
        found.append(torch.tensor(stored(kept, key | {"part": len(part)}, compute)["indices"]))
    return torch.cat(found)


def retrieval(train: ImageDataset, test: ImageDataset, arguments: argparse.Namespace) -> Row:
    """Strongest proponents of training images and of test images."""
    folder = arguments.checkpoint / "plain"
    x, labels = train.tensors()
    model, history = trained(x, folder, arguments)
    generator = torch.Generator().manual_seed(arguments.seed)
    own = torch.randperm(len(train), generator=generator)[: arguments.queries]
    others = torch.randperm(len(test), generator=generator)[: arguments.queries]

    def with_common_noise() -> Row:
        """How much of what is missing is the error of S draws: here an image's own is left out."""
        same_noise = tracin_of(model, x, history, arguments, query_seed=None)
        common = strongest(same_noise, x[own], 1, folder / "common.json", key)
        return {"own_strongest_common_noise": float((common[:, 0] == own).double().mean())}

    def compute() -> Row:
        tracin = tracin_of(model, x, history, arguments)
        mine = strongest(tracin, x[own], 10, folder / "own.json", key)
        theirs = strongest(tracin, test.tensors()[0][others], 10, folder / "others.json", key)
        scores: Row = {
            "queries": len(own),
            "own_strongest": float((mine[:, 0] == own).double().mean()),
            "not_own": own[mine[:, 0] != own].tolist(),
        }
        if labels is not None and test.labels is not None:
            same = labels[theirs] == test.labels[others][:, None]
            scores["same_label"] = float(same[:, 0].double().mean())
            scores["same_label_of_ten"] = float(same.double().mean())
        return scores

    key = {name: getattr(arguments, name) for name in ("queries", "num_samples", "checkpoints", "epochs")}
    row = {"train_loss": history.train_loss[-1], **stored(folder / "scores.json", key, compute)}
    if not arguments.skip_common_noise:
        row |= stored(folder / "common-noise.json", key, with_common_noise)
    return row


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
        tracin = tracin_of(model, x, history, arguments)
        influence = tracin.self_influence(show_progress=True).double()
        model.eval()
        with torch.no_grad():
            loss = torch.cat([model(part.to(arguments.device)).cpu() for part in x.split(1000)]).double()
        found = is_foreign[influence.argsort(descending=True)].double().cumsum(0)
        return {
            "hidden": len(hidden),
            "auroc": auroc(influence, is_foreign),
            "auroc_of_loss": auroc(loss, is_foreign),
            "rank_correlation_with_loss": rank_correlation(influence, loss),
            "found": found.long().tolist(),
        }

    key = {name: getattr(arguments, name) for name in ("hidden", "num_samples", "checkpoints", "epochs")}
    return {"train_loss": history.train_loss[-1], **stored(folder / "scores.json", key, compute)}


def ranks(scores: Tensor) -> Tensor:
    """1 for the smallest; equal scores share the mean of their ranks: [n] float64."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive scores higher than a negative, ties counting half."""
    count = int(positive.sum())
    above = float(ranks(scores)[positive].sum()) - count * (count + 1) / 2
    return above / (count * (len(scores) - count))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])
