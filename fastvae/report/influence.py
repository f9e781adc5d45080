"""Training images or rows that shaped those of the test set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae import plot
from fastvae.influence import TracIn
from fastvae.report.page import Picture, Section, Table
from fastvae.report.rows import influential_rows, strange_rows
from fastvae.report.subject import Subject

__all__ = ["Influences", "influence", "influences_of"]

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
    condition: tuple[Tensor, ...] = ()
    if subject.train_condition is not None and subject.test_condition is not None:
        condition = subject.train_condition[:count], subject.test_condition[:_QUERIES]
    tracin = TracIn(
        subject.model,
        (train, condition[0]) if condition else train,
        [None],
        lambda model, checkpoint: 1.0,
        num_samples=_DRAWS,
        seed=subject.seed,
        uncovered="materialise",
        condition=1 if condition else None,
    )
    queries = torch.cat((train, test))
    both = tracin.influence((queries, torch.cat(condition)) if condition else queries)
    assert isinstance(both, Tensor)
    sizes = {name: parameter.numel() for name, parameter in subject.model.named_parameters()}
    slow = sum(sizes[row.name] for row in tracin.coverage().rows if row.rule == "autograd")
    return Influences(count, both[:count], both[count:], slow)


def influence(subject: Subject, found: Influences) -> Section:
    """Proponents and opponents of test samples, and the training samples of highest self-influence."""
    noun = subject.noun
    train, labels = subject.train[: found.count], subject.train_labels
    queries = subject.test[:_QUERIES]
    best, worst = (found.on_test.topk(min(_SHOWN, found.count), largest=largest) for largest in (True, False))
    order = found.own.argsort(descending=True)[:8]
    ratio = float(found.own.max() / found.own.median().clamp_min(1e-30))
    own = f"the most influential training {noun} pulls {ratio:.0f} times as hard as the median one"
    verdict, worked = own[0].upper() + own[1:] + ".", None
    rows = [
        [f"training {noun}s looked at", f"{found.count:,}"],
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
            [f"proponents that share the label, of test {noun}s", f"{share:.0%}"],
            [f"nearest gradients that share it, of training {noun}s", f"{neighbours:.0%}"],
            ["by chance", f"{chance:.0%}"],
        ]
        worked = neighbours > min(2 * chance, (1 + chance) / 2)
        verdict = (
            f"{neighbours:.0%} of the training {noun}s whose gradients are nearest share the label, of which the "
            f"model knows nothing (chance {chance:.0%}); {own}."
        )
        captions = [subject.label(label) for label in subject.test_labels[: len(queries)]]
    own_scores = [
        f"{value:.1f}" for value in (found.own[order] / found.own.median().clamp_min(1e-30)).tolist()
    ]
    pictures, listings = [], []
    ends = (best.indices, best.values), (worst.indices, worst.values)
    if subject.table is None:
        figure = plot.influences(queries, train, *ends, query_captions=captions)
        caption = "Test images, and the training images that shaped them; scores over the row's largest."
        pictures.append(Picture(plot.png(figure), caption))
        name = "highest self-influence, over the median"
        strongest = plot.image_blocks({name: train[order]}, captions={name: own_scores})
        pictures.append(Picture(plot.png(strongest), "The training images that pull hardest at the model."))
    else:
        listings.append(influential_rows(subject, len(queries), *ends))
        listings.append(strange_rows(subject, "train", order, own_scores, "self-influence, over the median"))
    text = f"""TracIn at the model's weights (Kong and Chaudhuri, NeurIPS 2021): the product of two {noun}s' loss
        gradients over all {subject.size:,} parameters, each averaged over {_DRAWS} codes. A step on a proponent lowers
        the loss of the test {noun}, one on an opponent raises it; self-influence is the squared norm of one's own
        gradient, large for {noun}s that the model finds hard."""
    if found.by_autograd:
        text += f" Gradients of {found.by_autograd:,} parameters were taken sample by sample, as no rule covers them."
    return Section(
        f"Influence of training {noun}s",
        verdict,
        worked,
        [text],
        Table(["", ""], rows),
        pictures,
        listings,
    )
