"""What the approximate posteriors of a model say: codes, mutual information, active units, evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.arguments import expect, expect_at_least, expect_numbers
from fastvae.models import BaseVAE
from fastvae.models.observation import Observation
from fastvae.private import private_copy
from fastvae.training.batches import Place, batch_of
from fastvae.wrappers import unwrap

__all__ = [
    "Estimate",
    "active_units",
    "divergence_by_latent",
    "mutual_information",
    "negative_log_likelihood",
    "posteriors",
]

Images = Tensor | Iterable[object]

# Images in a model at once, and entries of a matrix of densities at once: 32 MiB of float64.
_BATCH = 500
_PAIRS = 2**22


class Estimate(NamedTuple):
    """A mean over images, and how far the choice of images moves it."""

    mean: float
    standard_error: float
    """Standard deviation over the images / sqrt(number of images)."""


@torch.no_grad()
def posteriors(
    model: BaseVAE, images: Images, *, condition: Place | None = None, weight: Place | None = None
) -> tuple[Tensor, Tensor]:
    """Means and log variances of q(z_0 | x): [N, d] each, on the CPU, detached.

    Args:
        model: a copy of it is measured, in eval mode.
        images: a tensor [N, ...], or an iterable of batches such as ``fit`` takes.
        condition, weight: where in such a batch they are, as for ``fit``.

    Raises:
        ValueError: no images.
    """
    places = {"condition": condition, "weight": weight}
    found = _of_batches(
        "posteriors",
        model,
        images,
        lambda private, observation: private.encode(observation.x, **observation.given),
        places,
    )
    return torch.cat([mu.cpu() for mu, _ in found]), torch.cat([logvar.cpu() for _, logvar in found])


@torch.no_grad()
def negative_log_likelihood(
    model: BaseVAE,
    images: Images,
    num_samples: int = 1000,
    *,
    seed: int = 0,
    condition: Place | None = None,
    weight: Place | None = None,
) -> Estimate:
    """-log p(x) by importance sampling, in nats: its mean over images, and the standard error of that.

    See ``BaseVAE.log_likelihood``: an upper bound in expectation, tight for many samples. The standard error is that of
    the choice of images; the noise of the sampling is part of it.

    Args:
        model: a copy of it is measured, in eval mode.
        images: see :func:`posteriors`; at least two.
        num_samples: importance samples an image.
        seed: of the noise.
        condition, weight: where in a batch of an iterable they are, as for ``fit``. With weights of 0 and 1 it is that
            of the elements that were observed.

    Raises:
        ValueError: fewer than two images, or num_samples below 1.
    """
    expect_numbers("negative_log_likelihood", num_samples=num_samples, seed=seed)
    generator = torch.Generator().manual_seed(int(seed))
    found = _of_batches(
        "negative_log_likelihood",
        model,
        images,
        lambda private, observation: private.log_likelihood(
            observation.x, num_samples, generator=generator, **observation.given
        ),
        {"condition": condition, "weight": weight},
    )
    return estimate_of("negative_log_likelihood", -torch.cat([value.double().cpu() for value in found]))


def mutual_information(
    model: BaseVAE,
    images: Images,
    *,
    num_samples: int = 1,
    chunk_size: int | None = None,
    seed: int = 0,
    condition: Place | None = None,
) -> float:
    """Mutual information of N images and their codes in nats: E_x KL(q(z | x) || p) - KL(q(z) || p).

    q(z) = 1/N sum_n q(z | x_n) (Hoffman and Johnson, "ELBO surgery", NeurIPS 2016 workshop). A Monte Carlo average of
    log q(z | x_n) - log q(z) over ``num_samples`` draws from each q(z | x_n): both divergences by the same draws, so
    that their noise cancels. q(z) is summed over all N images: N^2 num_samples densities, in float64 and in chunks. At
    most log N, near which it says only that the images' posteriors hardly overlap.

    Args:
        model: a copy of it is measured, in eval mode; z is z_0 for an HVAE.
        images: see :func:`posteriors`.
        num_samples: codes an image.
        chunk_size: codes against all images at once; by default as many as give 2**22 densities.
        seed: of the codes.
        condition: see :func:`posteriors`.

    Raises:
        ValueError: no images, num_samples or chunk_size below 1.
    """
    expect_numbers("mutual_information", seed=seed)
    expect_at_least("mutual_information", 1, num_samples=num_samples)
    expect_at_least("mutual_information", 1, optional=True, chunk_size=chunk_size)
    mu, logvar = (part.double() for part in posteriors(model, images, condition=condition))
    generator = torch.Generator().manual_seed(int(seed))
    noise = torch.randn(num_samples, *mu.shape, generator=generator, dtype=torch.float64, device="cpu")
    codes = (mu + torch.exp(logvar / 2) * noise).flatten(0, 1)
    # log q(z | x_n) = z^2 . a_n + z . b_n + c_n: two products of matrices for all pairs.
    precision = torch.exp(-logvar)
    a, b = -0.5 * precision.T, (mu * precision).T
    c = -0.5 * (mu.square() * precision + logvar).sum(1)
    chunk = int(chunk_size) if chunk_size is not None else max(1, _PAIRS // len(mu))
    log_q = torch.cat(
        [torch.logsumexp(z.square() @ a + z @ b + c, 1) - math.log(len(mu)) for z in codes.split(chunk)]
    )
    # log q(z | x_n) for the x_n of each code; the constants of the two densities cancel.
    own = -0.5 * (noise.square() + logvar).sum(2).flatten()
    return float((own - log_q).mean())


def active_units(
    model: BaseVAE, images: Images, threshold: float = 0.01, *, condition: Place | None = None
) -> int:
    """How many latents tell images apart: those with Var_x(E[z | x]) > threshold.

    Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, section 5.

    Args:
        model: a copy of it is measured, in eval mode; z is z_0 for an HVAE.
        images: see :func:`posteriors`; at least two.
        threshold: of the variance of the posterior means.
        condition: see :func:`posteriors`.

    Raises:
        ValueError: fewer than two images.
    """
    expect_numbers("active_units", threshold=threshold)
    means = posteriors(model, images, condition=condition)[0].double()
    expect(len(means) >= 2, "active_units: images: expected at least 2", len(means))
    return int((means.var(0) > threshold).sum())


def divergence_by_latent(model: BaseVAE, images: Images, *, condition: Place | None = None) -> Tensor:
    """KL(q(z_i | x) || N(0, 1)) in nats, its mean over images: float64 [d], on the CPU.

    What each latent says of an image on average; near 0 of those that the model does not use.

    Args:
        model: a copy of it is measured, in eval mode; z is z_0 for an HVAE.
        images: see :func:`posteriors`.
        condition: see :func:`posteriors`.

    Raises:
        ValueError: no images.
    """
    mu, logvar = (part.double() for part in posteriors(model, images, condition=condition))
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean(0)


def estimate_of(name: str, values: Tensor) -> Estimate:
    """The mean over images, of a value for each: float64 [N], N at least 2."""
    expect(len(values) >= 2, f"{name}: images: expected at least 2", len(values))
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def private_model(name: str, model: BaseVAE) -> BaseVAE:
    """A copy in eval mode to measure. TypeError, in the caller's name, for what is no model."""
    inner = unwrap(model)
    if not isinstance(inner, BaseVAE):
        raise TypeError(f"{name}: model: expected a fastvae model, got {type(inner).__name__}")
    return private_copy(inner)


def observations(batches: Iterable[object], places: Mapping[str, Place | None]) -> Iterator[Observation]:
    """Batches such as ``fit`` takes, but for empty ones."""
    given = (batch_of(batch, places, binarize=False).observation for batch in batches)
    return (observation for observation in given if len(observation.x))


def _of_batches(
    name: str,
    model: BaseVAE,
    images: Images,
    call: Callable[[BaseVAE, Observation], object],
    places: Mapping[str, Place | None],
) -> list:
    """``call`` of every batch on the model's device, with a copy of the model in eval mode."""
    if isinstance(images, Tensor) and any(place is not None for place in places.values()):
        raise ValueError(
            f"{name}: images: expected batches of images and of {' and '.join(places)}, got a tensor"
        )
    batches = images.split(_BATCH) if isinstance(images, Tensor) else images
    private = private_model(name, model)
    device = next(private.parameters()).device
    found = [
        call(private, observation.each(lambda t: t.to(device)))
        for observation in observations(batches, places)
    ]
    expect(bool(found), f"{name}: images: expected some", "none")
    return found
