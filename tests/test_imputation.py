"""What is missing, given what was observed: exact where posteriors are known, by every model, part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_problems import DIM, PIXELS, data, linear_gaussian, make, seeded
from torch import Tensor, nn
from weight_problems import holed, weights

from fastvae import HVAE, IWAE, VAE
from fastvae.likelihoods import Categorical, Gaussian, Likelihood
from fastvae.models import BaseVAE

WEIGHT = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
each = pytest.mark.parametrize("kind", [VAE, IWAE, HVAE])


def conditional(model: BaseVAE, row: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what is missing of N(b, W W^T + s^2 I), by the formulas for normal variables."""
    factor, bias = model.decoder.weight.detach(), model.decoder.bias.detach()
    covariance = factor @ factor.T + 0.36 * torch.eye(PIXELS, dtype=torch.float64)
    gain = covariance[~seen][:, seen] @ torch.linalg.inv(covariance[seen][:, seen])
    mean = bias[~seen] + gain @ (row[seen] - bias[seen])
    return mean, covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]


@each
def test_the_mean_is_the_conditional_one(kind: type[BaseVAE]) -> None:
    model, x, _ = linear_gaussian(kind)
    found = model.impute(holed(x, WEIGHT.double()), WEIGHT, num_samples=20_000, generator=seeded())
    assert torch.equal(found[WEIGHT], x[WEIGHT])
    for row, filled, seen in zip(x, found, WEIGHT, strict=True):
        mean, _ = conditional(model, row, seen)
        # Codes have a standard deviation below 1, weights one of about their mean: four standard errors are 0.04.
        torch.testing.assert_close(filled[~seen], mean, rtol=0, atol=0.04)


@each
def test_draws_have_the_conditional_distribution(kind: type[BaseVAE]) -> None:
    model, x, _ = linear_gaussian(kind)
    row, seen = x[0], WEIGHT[0]
    copies = holed(x, WEIGHT.double())[:1].expand(4000, -1)
    found = model.impute(
        copies, WEIGHT[:1], num_samples=60, draw=True, chunk_size=30_000, generator=seeded(device=x.device)
    )
    assert torch.equal(found[:, seen], row[seen].expand(4000, -1))
    mean, covariance = conditional(model, row, seen)
    # Of 4000 draws with variances of about 1: four standard errors of a mean are 0.06, of a covariance 0.1.
    torch.testing.assert_close(found[:, ~seen].mean(0), mean, rtol=0, atol=0.07)
    torch.testing.assert_close(found[:, ~seen].T.cov(), covariance, rtol=0, atol=0.12)


def test_a_posterior_that_is_exact_has_weights_of_one() -> None:
    """One latent variable, an encoder that is right: draws are codes of the posterior, all of the same weight."""
    torch.manual_seed(0)
    model = VAE(nn.Linear(PIXELS, 2), nn.Linear(1, PIXELS), Gaussian(0.6)).double()
    slope = model.decoder.weight[:, 0].detach()
    x, weight = data(4, torch.float64), torch.tensor([[1, 0, 1, 1, 0, 1]]).double()
    precision = 1 + (weight[0] * slope.square()).sum() / 0.36
    with torch.no_grad():
        model.encoder.weight[0] = weight[0] * slope / 0.36 / precision
        model.encoder.bias[0] = -(model.encoder.weight[0] * model.decoder.bias).sum()
        model.encoder.weight[1], model.encoder.bias[1] = 0, -precision.log()
    noise = torch.stack(
        [model.draw_noise(torch.zeros(4, 1).double(), g) for g in [seeded()] for _ in range(5)]
    )
    mu, logvar = model.encode(x, weight=weight)
    wanted = model.decoder(mu + torch.exp(logvar / 2) * noise[:, 0].mean(0))
    found = model.impute(holed(x, weight), weight, num_samples=5, generator=seeded())
    torch.testing.assert_close(found, torch.where(weight == 0, wanted, x).detach(), rtol=1e-12, atol=1e-12)


@each
@pytest.mark.parametrize("draw", [False, True])
def test_parts_and_what_does_not_matter(kind: type[BaseVAE], draw: bool) -> None:
    model, weight = make(kind, "gaussian").double(), weights(5)
    x = holed(data(5, torch.float64), weight)
    whole = model.impute(x, weight, num_samples=8, generator=seeded(device=x.device), draw=draw)
    assert (
        whole.isfinite().all() and not whole.requires_grad and torch.equal(whole[weight > 0], x[weight > 0])
    )
    if not draw:
        for size in (1, 3, 10, 40):
            found = model.impute(x, weight, num_samples=8, generator=seeded(device=x.device), chunk_size=size)
            torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
    assert model.impute(x[:0], weight[:0], num_samples=3, draw=draw).shape == (0, PIXELS)
    complete = model.impute(whole, torch.ones(1, 1), num_samples=2, draw=draw)
    assert torch.equal(complete, whole)


def test_images_of_classes_and_conditions() -> None:
    class Labelled(nn.Module):
        def __init__(self, inputs: int, outputs: int, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.labels, self.layers = nn.Embedding(3, 4), nn.Linear(inputs + 4, outputs)
            self.shape = shape

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return self.layers(torch.cat((x.flatten(1), self.labels(label)), 1)).reshape(-1, *self.shape)

    torch.manual_seed(0)
    encoder, decoder = Labelled(24, 2 * DIM, (2 * DIM,)), Labelled(DIM, 48, (12, 2, 2))
    model = VAE(encoder, decoder, Categorical(4), latent_dim=DIM)
    x = torch.randint(4, (5, 3, 2, 2), generator=seeded()).to(torch.uint8)
    model.encoder = Labelled(12, 2 * DIM, (2 * DIM,))
    weight = torch.rand(5, 1, 2, 2, generator=seeded(1)) < 0.5
    label = torch.tensor([0, 1, 2, 0, 1])
    for draw in (False, True):
        found = model.impute(x, weight, num_samples=6, condition=label, draw=draw, chunk_size=7)
        assert found.shape == x.shape and bool(((found >= 0) & (found <= 1)).all())
        kept = weight.expand(x.shape)
        torch.testing.assert_close(found[kept], x[kept] / 3)
        assert not draw or torch.equal(found * 3, (found * 3).round())


def test_trajectories_that_diverge_have_no_weight() -> None:
    model = make(HVAE, "gaussian", step_size=0.05, on_divergence="drop").double()
    x, weight = data(3, torch.float64), weights(3)

    def wild(mu: Tensor, *_: Any) -> Tensor:
        noise = torch.randn(2, *mu.shape, generator=wild.generator, dtype=mu.dtype)  # type: ignore[attr-defined]
        noise[1, 0] = 1e200
        noise[1, 1] *= 1e200 if torch.rand(1, generator=wild.generator) < 0.5 else 1  # type: ignore[attr-defined]
        return noise

    model.draw_noise = wild  # type: ignore[method-assign, assignment]
    for draw in (False, True):
        wild.generator = seeded(3)  # type: ignore[attr-defined]
        with pytest.warns(RuntimeWarning, match="HVAE: impute: NaN for 1 of 3 samples"):
            found = model.impute(holed(x, weight), weight, num_samples=10, chunk_size=6, draw=draw)
        assert found[1:].isfinite().all() and found[0].isnan().any()


class Meanless(Likelihood):
    """A density alone."""

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return Gaussian().log_prob(params, x, weight)


class Plain(VAE):
    """Of somebody who has ``log_weight`` alone."""

    weighted_codes = BaseVAE.weighted_codes


def test_refusals() -> None:
    x, weight = data(3), torch.ones(3, PIXELS)
    model = make(VAE, "gaussian")
    for options, message in (
        ({"num_samples": 0}, "impute: num_samples: expected at least 1, got 0"),
        ({"chunk_size": 0}, "impute: chunk_size: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.impute(x, weight, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="impute: weight: expected a tensor, got NoneType"):
        model.impute(x, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="impute: weight: expected the shape of x"):
        model.impute(x, weight[0])
    with pytest.raises(ValueError, match="weight: expected finite numbers of at least 0, got -1"):
        model.impute(x, -weight)
    with pytest.raises(NotImplementedError, match="Meanless: mean: this likelihood defines none"):
        make(VAE, Meanless()).impute(x, weight)
    with pytest.raises(NotImplementedError, match="Plain: impute: this model has no weighted_codes"):
        make(Plain).impute(x, weight)
