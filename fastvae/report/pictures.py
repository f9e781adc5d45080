"""What the model makes up, and what it makes of test images."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae import plot
from fastvae.plot.images import as_images
from fastvae.report.page import Picture, Section
from fastvae.report.subject import Subject

__all__ = ["reconstructions", "samples"]

_COMPARED = 200


def samples(subject: Subject) -> Section:
    """Samples, and how well the nearest neighbour tells them from test images."""
    count = min(_COMPARED, len(subject.test))
    drawn = _draws(subject, count)
    share = neighbour_accuracy(drawn, subject.test[:count])
    figure = plot.samples(subject.model, subject.train, count=32, seed=subject.seed, shape=subject.shape)
    return Section(
        "Samples",
        f"A nearest-neighbour test tells samples from test images in {share:.0%} of the cases (50%: not at all).",
        None if 0.7 < share < 0.95 else share <= 0.7,
        [
            f"""Shown is the mean of p(x | z) for codes of the prior, not selected. For the test {count} images were
            drawn from p(x | z), pixels with their noise, and each of them and of as many test images was asked whether
            the image nearest to it is of its own kind (leave one out; Lopez-Paz and Oquab, ICLR 2017)."""
        ],
        pictures=[Picture(plot.png(figure), "Training images as the model sees them, and samples.")],
    )


def neighbour_accuracy(first: Tensor, second: Tensor) -> float:
    """Share of images whose nearest other image, in Euclidean distance, is of their own set."""
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
        model.encode(subject.here(subject.test[:1]))
    z = subject.here(torch.randn(count, model.latent_dim or 1, generator=generator, device="cpu"))
    parameters = model.decode(z.to(next(model.parameters()).dtype))
    own = torch.Generator(device=parameters.device).manual_seed(subject.seed)
    return as_images(
        "write_report", model.likelihood.sample(parameters, generator=own), subject.shape
    ).float()


@torch.no_grad()
def reconstructions(subject: Subject) -> Section:
    """Test images beside their reconstructions."""
    x = subject.test
    made = subject.model.reconstruct(subject.here(x), generator=subject.generator()).cpu()
    left = float((x - made).square().sum() / (x - subject.train.mean(0)).square().sum().clamp_min(1e-12))
    explained = 1 - left
    figure = plot.reconstructions(made[:16], x[:16])
    return Section(
        "Reconstructions",
        f"Reconstructions explain {max(explained, 0):.0%} of the variance of the test images' pixels"
        + (", their noise included." if subject.is_binarised else "."),
        True if explained > 0.4 else None if explained > 0.1 else False,
        [
            f"""The mean of p(x | z) for one code of each image's posterior, against the mean training image, over
            {len(x)} test images."""
        ],
        pictures=[Picture(plot.png(figure), "Test images, and below each its reconstruction.")],
    )
