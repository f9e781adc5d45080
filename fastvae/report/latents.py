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
    divergences = divergence_by_latent(model, subject.test)
    active, count = active_units(model, subject.test), len(divergences)
    information = mutual_information(model, subject.test, seed=subject.seed)
    most = math.log(len(subject.test))
    rows = [
        ["active units (Var of the mean > 0.01)", f"{active} of {count}"],
        ["KL to the prior, all latents", f"{float(divergences.sum()):.2f} nats"],
        ["KL of the latent that says most", f"{float(divergences.max()):.2f} nats"],
        [f"mutual information of image and code, at most {most:.2f}", f"{information:.2f} nats"],
    ]
    verdict = f"{active} of {count} latents are active" if active else f"None of {count} latents is active"
    worked: bool | None = active > 0
    labels = subject.train_labels, subject.test_labels
    if labels[0] is not None and labels[1] is not None and len(subject.train) >= _NEIGHBOURS:
        of_codes, of_pixels = _accuracies(subject, labels[0], labels[1])
        rows += [
            [f"label read from {_NEIGHBOURS} nearest codes", f"{of_codes:.1%}"],
            [f"label read from {_NEIGHBOURS} nearest images", f"{of_pixels:.1%}"],
        ]
        better = "more" if of_codes > of_pixels else "fewer" if of_codes < of_pixels else "as many"
        verdict += (
            f"; nearest codes name the label of {of_codes:.0%} of the test images, {better} than nearest images "
            f"({of_pixels:.0%})"
        ).replace("as many than", "as many as")
    figures = [
        (
            plot.traversals(model, subject.here(subject.test), latents=min(6, count)),
            "A test image as its code moves along one latent; a line for each of those that say most.",
        ),
        (
            plot.latent_scatter(model, subject.here(subject.test), subject.test_labels),
            "Mean codes of the test images: the two latents that say most.",
        ),
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
    codes = [posteriors(subject.model, x)[0] for x in (subject.train, subject.test)]
    return (
        knn_accuracy(codes[0], train, codes[1], test, k=_NEIGHBOURS),
        knn_accuracy(subject.train.flatten(1), train, subject.test.flatten(1), test, k=_NEIGHBOURS),
    )
