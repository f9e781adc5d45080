"""What the latents say, one by one and together."""

from __future__ import annotations

import math

from torch import Tensor

from fastvae import plot
from fastvae.metrics import active_units, divergence_by_latent, knn_accuracy, mutual_information, posteriors
from fastvae.report.page import Picture, Section, Table
from fastvae.report.subject import Subject

__all__ = ["latents"]

_NEIGHBOURS = 10


def latents(subject: Subject) -> Section:
    """Active units, mutual information, labels read from codes, traversals, a scatter of codes."""
    model = subject.model
    batches, places = subject.batches(subject.test, subject.test_condition)
    divergences = divergence_by_latent(model, batches, **places)
    active, count = active_units(model, batches, **places), len(divergences)
    information = mutual_information(model, batches, seed=subject.seed, **places)
    noun = subject.noun
    most = math.log(len(subject.test))
    rows = [
        ["active units (Var of the mean > 0.01)", f"{active} of {count}"],
        ["KL to the prior, all latents", f"{float(divergences.sum()):.2f} nats"],
        ["KL of the latent that says most", f"{float(divergences.max()):.2f} nats"],
        [f"mutual information of {noun} and code, at most {most:.2f}", f"{information:.2f} nats"],
    ]
    verdict = f"{active} of {count} latents are active" if active else f"None of {count} latents is active"
    worked: bool | None = active > 0
    labels = subject.train_labels, subject.test_labels
    if labels[0] is not None and labels[1] is not None and len(subject.train) >= _NEIGHBOURS:
        of_codes, of_pixels = _accuracies(subject, labels[0], labels[1])
        rows += [
            [f"label read from {_NEIGHBOURS} nearest codes", f"{of_codes:.1%}"],
            [f"label read from {_NEIGHBOURS} nearest {noun}s", f"{of_pixels:.1%}"],
        ]
        better = "more" if of_codes > of_pixels else "fewer" if of_codes < of_pixels else "as many"
        verdict += (
            f"; nearest codes name the label of {of_codes:.0%} of the test {noun}s, {better} than nearest {noun}s "
            f"({of_pixels:.0%})"
        ).replace("as many than", "as many as")
    x, besides = subject.here(subject.test), subject.given(subject.test_condition)
    few = min(6, count)
    if subject.table is None:
        moved = plot.traversals(model, x, latents=few, **besides)
        caption = "A test image as its code moves along one latent; a line for each of those that say most."
    else:
        moved = plot.column_effects(model, x, subject.table.columns, latents=few, **besides)
        caption = "How far a test row's columns move with one latent, of those that say most; columns that move most."
    scatter = plot.latent_scatter(model, x, subject.test_labels, **besides)
    figures = [
        (moved, caption),
        (scatter, f"Mean codes of the test {noun}s: the two latents that say most."),
    ]
    return Section(
        "Latents",
        verdict + ".",
        worked,
        [
            """Active units: Burda et al., ICLR 2016. Where few are active, the decoder does not need the others (or
            beta is too high). Mutual information near its bound says only that posteriors hardly overlap."""
        ],
        Table(["", ""], rows),
        [Picture(plot.png(figure), caption) for figure, caption in figures],
    )


def _accuracies(subject: Subject, train: Tensor, test: Tensor) -> tuple[float, float]:
    codes = []
    for x, condition in ((subject.train, subject.train_condition), (subject.test, subject.test_condition)):
        batches, places = subject.batches(x, condition)
        codes.append(posteriors(subject.model, batches, **places)[0])
    values = [subject.comparable(x).flatten(1) for x in (subject.train, subject.test)]
    of_values = values[0], train, values[1], test
    return (
        knn_accuracy(codes[0], train, codes[1], test, k=_NEIGHBOURS),
        knn_accuracy(*of_values, k=_NEIGHBOURS),
    )
