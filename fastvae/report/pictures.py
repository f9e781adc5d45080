"""What the model makes up, and what it makes of test images."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastvae import plot
from fastvae.models import BaseVAE
from fastvae.plot.images import as_images
from fastvae.report.page import Picture, Section
from fastvae.report.rows import explained_by_column
from fastvae.report.subject import Subject

__all__ = ["reconstructions", "samples"]

_COMPARED = 200


def samples(subject: Subject) -> Section:
    """Samples, and how well the nearest neighbour tells them from test images."""
    count = min(_COMPARED, len(subject.test))
    drawn = _draws(subject, count)
    share = neighbour_accuracy(subject.comparable(drawn), subject.comparable(subject.test[:count]))
    noun = subject.noun
    how = "" if subject.test_condition is None else ", each under the condition of a test sample"
    if subject.table is None:
        picture = Picture(
            plot.png(_sample_grid(subject)), "Training images as the model sees them, and samples."
        )
        shown = "Shown is the mean of p(x | z) for codes of the prior, not selected."
    else:
        moments = plot.column_moments(
            *(subject.table.original(each) for each in (subject.test[:count], drawn))
        )
        picture = Picture(plot.png(moments), "Columns of samples against those of test rows.")
        shown = "Shown are means and standard deviations of the columns."
    return Section(
        "Samples",
        f"A nearest-neighbour test tells samples from test {noun}s in {share:.0%} of the cases (50%: not at all).",
        None if 0.7 < share < 0.95 else share <= 0.7,
        [
            f"""{shown} For the test {count} {noun}s were drawn from p(x | z), {subject.element}s with their noise{how},
            and each of them and of as many test {noun}s was asked whether the {noun} nearest to it is of its own kind
            (leave one out; Lopez-Paz and Oquab, ICLR 2017)."""
        ],
        pictures=[picture],
    )


def _sample_grid(subject: Subject) -> Figure:
    model: BaseVAE | Tensor = subject.model
    if subject.test_condition is not None:
        count = min(32, len(subject.test))
        model = subject.model.sample(
            count, generator=subject.generator(), **subject.given(subject.test_condition, count)
        )
    return plot.samples(model, subject.train, count=32, seed=subject.seed, shape=subject.shape)


def neighbour_accuracy(first: Tensor, second: Tensor) -> float:
    """Share of samples whose nearest other sample, in Euclidean distance, is of their own set."""
    both = torch.cat((first, second)).flatten(1)
    distances = torch.cdist(both, both)
    distances.fill_diagonal_(torch.inf)
    is_first = torch.arange(len(both), device=both.device) < len(first)
    # Equal distances, common among binary images: the share of them.
    nearest = distances == distances.min(1, keepdim=True).values
    same = nearest & (is_first[:, None] == is_first[None])
    return float((same.sum(1) / nearest.sum(1)).mean())


@torch.no_grad()
def _draws(subject: Subject, count: int) -> Tensor:
    model, generator = subject.model, subject.generator()
    if model.latent_dim is None:
        model.encode(subject.here(subject.test[:1]), **subject.given(subject.test_condition, 1))
    z = subject.here(torch.randn(count, model.latent_dim or 1, generator=generator, device="cpu"))
    given = subject.given(subject.test_condition, count)
    parameters = model.decode(z.to(next(model.parameters()).dtype), **given)
    own = torch.Generator(device=parameters.device).manual_seed(subject.seed)
    drawn = model.likelihood.sample(parameters, generator=own)
    if subject.table is not None:
        return drawn.reshape(count, -1).float().cpu()
    return as_images("write_report", drawn, subject.shape).float()


def reconstructions(subject: Subject) -> Section:
    """Test images or rows beside their reconstructions."""
    x, noun = subject.test, subject.noun
    made = subject.reconstructed(x, subject.test_condition)
    left = float((x - made).square().sum() / (x - subject.train.mean(0)).square().sum().clamp_min(1e-12))
    explained = 1 - left
    if subject.table is None:
        listings, figure = [], plot.reconstructions(made[:16], x[:16])
        caption = "Test images, and below each its reconstruction."
    else:
        listings = [explained_by_column(subject, x, made)]
        figure = plot.reconstructed_values(subject.table.original(x), subject.table.original(made))
        caption = "Values of the test rows against their reconstructions."
    return Section(
        "Reconstructions",
        f"Reconstructions explain {max(explained, 0):.0%} of the variance of the test {noun}s' {subject.element}s"
        + (", their noise included." if subject.is_binarised else "."),
        True if explained > 0.4 else None if explained > 0.1 else False,
        [
            f"""The mean of p(x | z) for one code of each {noun}'s posterior, against the mean training {noun}, over
            {len(x)} test {noun}s."""
        ],
        pictures=[Picture(plot.png(figure), caption)],
        listings=listings,
    )
