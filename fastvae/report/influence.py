"""Training images that shaped test images, and those whose labels do not fit what shaped them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae import plot
from fastvae.influence import TracIn
from fastvae.metrics import posteriors
from fastvae.report.page import Picture, Section, Table
from fastvae.report.subject import Subject
from fastvae.report.wording import listed

__all__ = ["Influences", "influence", "influences_of", "suspicious"]

_DRAWS, _PROPONENTS = 16, 10
_QUERIES, _SHOWN = 5, 4


@dataclass(frozen=True)
class Influences:
    """TracIn at the model's weights, among the first n training images, and on the first test images."""

    count: int
    """n"""
    scores: Tensor
    """[n, n] of each training image (column) on each (row)."""
    on_test: Tensor
    """[Q, n]"""
    by_autograd: int
    """Parameters whose gradients were taken sample by sample."""

    @property
    def own(self) -> Tensor:
        """[n] self-influence: the squared norm of an image's gradient."""
        return self.scores.diagonal()

    def proponents(self) -> Tensor:
        """[n, k] the training images whose gradients point most the same way as each one's, itself left out.

        By the cosine, without the norms: else a few images of large gradients are everybody's proponents.
        """
        norms = self.own.clamp_min(1e-30).sqrt()
        cosine = self.scores / norms[:, None] / norms[None]
        return cosine.fill_diagonal_(-math.inf).topk(min(_PROPONENTS, self.count - 1)).indices


def influences_of(subject: Subject) -> Influences:
    """Of as many training images as can be afforded."""
    of_gradient = _DRAWS * 3 * (subject.flops[0] + subject.flops_of_weight)
    count = subject.afford(len(subject.train), of_gradient, least=min(50, len(subject.train)))
    # A pair of images takes a product of two gradients at most.
    pairs = subject.afford(count**2, 2 * subject.size, least=min(50, count) ** 2)
    count = min(count, math.isqrt(pairs))
    train, test = subject.train[:count], subject.test[:_QUERIES]
    tracin = TracIn(
        subject.model,
        train,
        [None],
        lambda model, checkpoint: 1.0,
        num_samples=_DRAWS,
        seed=subject.seed,
        uncovered="materialise",
    )
    both = tracin.influence(torch.cat((train, test)))
    assert isinstance(both, Tensor)
    sizes = {name: parameter.numel() for name, parameter in subject.model.named_parameters()}
    slow = sum(sizes[row.name] for row in tracin.coverage().rows if row.rule == "autograd")
    return Influences(count, both[:count], both[count:], slow)


def influence(subject: Subject, found: Influences) -> Section:
    """Proponents and opponents of test images, and the training images of highest self-influence."""
    train, labels = subject.train[: found.count], subject.train_labels
    queries = subject.test[:_QUERIES]
    best, worst = (found.on_test.topk(min(_SHOWN, found.count), largest=largest) for largest in (True, False))
    order = found.own.argsort(descending=True)[:8]
    ratio = float(found.own.max() / found.own.median().clamp_min(1e-30))
    own = f"the most influential training image pulls {ratio:.0f} times as hard as the median one"
    verdict, worked = own[0].upper() + own[1:] + ".", None
    rows = [
        ["training images looked at", f"{found.count:,}"],
        ["highest self-influence, over the median", f"{ratio:.1f}"],
    ]
    captions = None
    if labels is not None and subject.test_labels is not None:
        labels = labels[: found.count]
        near = found.on_test.topk(min(_PROPONENTS, found.count)).indices
        share = float((labels[near] == subject.test_labels[:_QUERIES, None]).float().mean())
        neighbours = float((labels[found.proponents()] == labels[:, None]).float().mean())
        chance = float(sum((labels == label).float().mean() ** 2 for label in labels.unique()))
        rows += [
            ["proponents that share the label, of test images", f"{share:.0%}"],
            ["nearest gradients that share it, of training images", f"{neighbours:.0%}"],
            ["by chance", f"{chance:.0%}"],
        ]
        worked = neighbours > 2 * chance
        verdict = (
            f"{neighbours:.0%} of the training images whose gradients are nearest share an image's label, of which the "
            f"model knows nothing (chance {chance:.0%}); {own}."
        )
        captions = [subject.label(label) for label in subject.test_labels[: len(queries)]]
    figure = plot.influences(
        queries, train, (best.indices, best.values), (worst.indices, worst.values), query_captions=captions
    )
    strongest = plot.image_blocks(
        {"highest self-influence, over the median": train[order]},
        captions={
            "highest self-influence, over the median": [
                f"{value:.1f}" for value in (found.own[order] / found.own.median().clamp_min(1e-30)).tolist()
            ]
        },
    )
    text = f"""TracIn at the model's weights (Kong and Chaudhuri, NeurIPS 2021): the product of two images' loss
        gradients over all {subject.size:,} parameters, each averaged over {_DRAWS} codes. A step on a proponent lowers
        the loss of the test image, one on an opponent raises it; self-influence is the squared norm of an image's own
        gradient, large for images that the model finds hard."""
    if found.by_autograd:
        text += f" Gradients of {found.by_autograd:,} parameters were taken sample by sample, as no rule covers them."
    return Section(
        "Influence of training images",
        verdict,
        worked,
        [text],
        Table(["", ""], rows),
        [
            Picture(
                plot.png(figure),
                "Test images, and the training images that shaped them; scores over the row's largest.",
            ),
            Picture(plot.png(strongest), "The training images that pull hardest at the model."),
        ],
    )


def suspicious(subject: Subject, found: Influences, *, wrong: Tensor | None = None) -> Section | None:
    """Training images whose label few of the images nearest by gradient share; None without labels.

    Args:
        subject: of the page.
        found: influences among its training images.
        wrong: bool [all training images] whose labels were made wrong on purpose, to see whether they are found.
    """
    if subject.train_labels is None or found.count < 3:
        return None
    labels = subject.train_labels[: found.count]
    near = labels[found.proponents()]
    agreement = (near == labels[:, None]).double().mean(1)
    majority = near.mode(1).values
    # Of as little agreement the one whose neighbours agree most with one another.
    unity = (near == majority[:, None]).double().mean(1)
    doubt = unity - agreement
    order = doubt.argsort(descending=True, stable=True)[:16]
    alone = int((doubt > 0.5).sum())
    verdict = (
        f"{alone} of {found.count:,} labels look wrong: the images nearest by gradient agree on another one."
        if alone
        else f"No label of {found.count:,} stands against what the images nearest by gradient agree on."
    )
    worked: bool | None = None
    rows: list[list[str]] = []
    planted = None if wrong is None else wrong[subject.train_indices[: found.count]]
    if planted is not None and bool(planted.any()):
        verdict, worked, rows = _as_planted(subject, doubt, labels, planted)
    name = "given label>that of the images nearest by gradient"
    figure = plot.image_blocks(
        {name: subject.train[order]},
        columns=8 if subject.classes is None else 4,  # names take more room than numbers
        captions={
            name: [f"{subject.label(labels[index])}>{subject.label(majority[index])}" for index in order]
        },
    )
    return Section(
        "Suspicious labels",
        verdict,
        worked,
        [
            f"""The model never sees labels. For each training image the {min(_PROPONENTS, found.count - 1)} others
            whose loss gradients point most the same way (cosine) vote for theirs; suspicious is an image whose label
            they do not share, most of all where they agree on another."""
        ],
        Table(["way to look", "AUROC"], rows) if rows else None,
        [Picture(plot.png(figure), "The labels that are most suspicious, first the most.")],
    )


def _as_planted(
    subject: Subject, doubt: Tensor, labels: Tensor, wrong: Tensor
) -> tuple[str, bool | None, list[list[str]]]:
    """How well doubt finds labels that are known to be wrong, beside the nearest codes and pixels."""
    train = subject.train[: len(doubt)]
    ways = {"nearest by gradient (TracIn)": doubt}
    for name, points in (
        ("nearest codes", posteriors(subject.model, train)[0]),
        ("nearest pixels", train.flatten(1)),
    ):
        near = labels[
            torch.cdist(points, points).fill_diagonal_(math.inf).topk(_PROPONENTS, largest=False).indices
        ]
        unity = (near == near.mode(1).values[:, None]).double().mean(1)
        ways[name] = unity - (near == labels[:, None]).double().mean(1)
    areas = {name: auroc(each[~wrong], each[wrong]) for name, each in ways.items()}
    (_, own), *others = areas.items()
    rivals = listed([f"{name} {area:.3f}" for name, area in others])
    is_best = all(own > area for _, area in others)
    count = int(wrong.sum())
    hits = int(wrong[doubt.argsort(descending=True, stable=True)[:count]].sum())
    verdict = (
        f"Of {count} labels that were made wrong on purpose {hits} are among the {count} most suspicious: AUROC "
        f"{own:.3f}; without a gradient {rivals}" + ("." if is_best else ", so gradients gain nothing here.")
    )
    return (
        verdict,
        True if is_best else None if own > 0.9 else False,
        [[name, f"{area:.3f}"] for name, area in areas.items()],
    )


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that one of ``outside`` is larger than one of ``inside``; ties count half."""
    greater = (outside[:, None] > inside[None]).double() + 0.5 * (outside[:, None] == inside[None]).double()
    return float(greater.mean())
