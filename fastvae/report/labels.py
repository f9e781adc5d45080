"""Training images or rows whose labels do not fit those that are nearest to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae import plot
from fastvae.metrics import posteriors
from fastvae.report.influence import Influences
from fastvae.report.page import Picture, Section, Table
from fastvae.report.rows import named_row
from fastvae.report.subject import Subject
from fastvae.report.wording import listed

__all__ = ["auroc", "suspicious_labels"]

_SHOWN = 16


def suspicious_labels(subject: Subject, found: Influences, *, wrong: Tensor | None = None) -> Section | None:
    """Training images whose label few of the images nearest by gradient and by code share; None without labels.

    Args:
        subject: of the page.
        found: influences among its training images.
        wrong: bool [all training images] whose labels were made wrong on purpose, to see whether they are found.
    """
    if subject.train_labels is None or found.count < 3:
        return None
    labels, by_gradient = subject.train_labels[: found.count], found.proponents()
    k = by_gradient.shape[1]
    train = subject.train[: found.count]
    condition = None if subject.train_condition is None else subject.train_condition[: found.count]
    batches, places = subject.batches(train, condition)
    by_code = _nearest(posteriors(subject.model, batches, **places)[0], k)
    noun = subject.noun
    votes = labels[torch.cat((by_gradient, by_code), 1)]
    majority, doubt = votes.mode(1).values, _doubt(votes, labels)
    order = doubt.argsort(descending=True, stable=True)[:_SHOWN]
    alone = int((doubt > 0.5).sum())
    verdict = (
        f"{alone} of {found.count:,} labels look wrong: {noun}s nearest by gradient and by code agree on another one."
        if alone
        else f"No label of {found.count:,} stands against what the {noun}s nearest by gradient and by code agree on."
    )
    worked: bool | None = None
    table = None
    planted = None if wrong is None else wrong[subject.train_indices[: found.count]]
    if planted is not None and bool(planted.any()):
        ways = {
            "both together": doubt,
            "nearest by gradient (TracIn)": _doubt(labels[by_gradient], labels),
            "nearest codes": _doubt(labels[by_code], labels),
            f"nearest {subject.element}s": _doubt(
                labels[_nearest(subject.comparable(train).flatten(1), k)], labels
            ),
        }
        verdict, worked, table = _as_planted(ways, planted)
    pictures, listings = [], []
    if subject.table is None:
        name = "given label>what nearest images agree on"
        figure = plot.image_blocks(
            {name: train[order]},
            columns=8 if subject.classes is None else 4,  # names take more room than numbers
            captions={
                name: [f"{subject.label(labels[index])}>{subject.label(majority[index])}" for index in order]
            },
        )
        pictures.append(Picture(plot.png(figure), "The most suspicious labels, the worst first."))
    else:
        cells = [
            [named_row(subject, "train", index), subject.label(majority[index]), f"{float(doubt[index]):.2f}"]
            for index in order.tolist()
            if doubt[index] > 0
        ]
        if cells:
            listings.append(
                Table(["row (its label)", "what nearest rows agree on", "doubt, at most 1"], cells, 2)
            )
    return Section(
        "Suspicious labels",
        verdict,
        worked,
        [
            f"""The model never sees labels. For each training {noun} vote the {k} others whose loss gradients point
            most the same way (by the cosine), and the {k} whose codes are nearest; suspicious is one whose label
            they do not share, most of all where they agree on another."""
        ],
        table,
        pictures,
        listings,
    )


def _nearest(points: Tensor, k: int) -> Tensor:
    """[n, k] for points [n, d], each itself left out."""
    return torch.cdist(points, points).fill_diagonal_(math.inf).topk(k, largest=False).indices


def _doubt(votes: Tensor, labels: Tensor) -> Tensor:
    """[n] the share of votes [n, k] for the label that most are for, less that for the given one."""
    return ((votes == votes.mode(1).values[:, None]).double() - (votes == labels[:, None]).double()).mean(1)


def _as_planted(ways: dict[str, Tensor], wrong: Tensor) -> tuple[str, bool | None, Table]:
    """How well doubt by each way finds labels that are known to be wrong: verdict, whether it worked, AUROCs."""
    areas = {name: auroc(doubt[~wrong], doubt[wrong]) for name, doubt in ways.items()}
    (first, own), *others = areas.items()
    count = int(wrong.sum())
    hits = int(wrong[ways[first].argsort(descending=True, stable=True)[:count]].sum())
    gains = areas["nearest codes"] < own
    verdict = (
        f"Of {count} labels that were made wrong on purpose {hits} are among the {count} most suspicious: AUROC "
        f"{own:.3f}; alone {listed([f'{name} {area:.3f}' for name, area in others])}."
        + ("" if gains else " Gradients add nothing to codes here.")
    )
    return (
        verdict,
        own > 0.9,
        Table(["way to look", "AUROC"], [[name, f"{area:.3f}"] for name, area in areas.items()]),
    )


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that one of ``outside`` is larger than one of ``inside``; ties count half."""
    greater = (outside[:, None] > inside[None]).double() + 0.5 * (outside[:, None] == inside[None]).double()
    return float(greater.mean())
