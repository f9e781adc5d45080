"""Models of data with weights: missing values, weighted elements, evidence of what was observed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_problems import DIM, PIXELS, data, linear_gaussian, make, mlp, seeded
from torch import Tensor, nn
from weight_problems import SumOfElements, holed, weights

from fastvae import HVAE, IWAE, VAE, ConsistencyVAE, JacobianL1VAE
from fastvae.likelihoods import Categorical, Gaussian, Likelihood, Poisson
from fastvae.models import BaseVAE

NAN = float("nan")
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "VAE": (VAE, {}),
    "IWAE": (IWAE, {"num_samples": 3}),
    "HVAE": (HVAE, {"step_size": 0.05}),
    "HVAE, dropping": (HVAE, {"step_size": 0.05, "on_divergence": "drop"}),
    "JacobianL1VAE": (JacobianL1VAE, {}),
}
each = pytest.mark.parametrize("name", KINDS)


def model_of(name: str, likelihood: str | Likelihood = "gaussian", **options: Any) -> BaseVAE:
    kind, own = KINDS[name]
    return make(kind, likelihood, **own, **options).double()


def loss_and_gradients(model: BaseVAE, x: Tensor, **given: Any) -> list[Tensor]:
    noise = torch.randn(model.noise_draws, len(x), DIM, generator=seeded(), dtype=torch.float64)
    losses = model(x, noise=noise, **given)
    return [losses, *torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)]


@each
@pytest.mark.filterwarnings("ignore:fastvae.ops")
def test_missing_values_may_be_nan(name: str) -> None:
    """The loss and all gradients are those of a model whose density never looks at what is left out."""
    x, weight = data(5, torch.float64), weights(5)
    model = model_of(name)
    found = loss_and_gradients(model, holed(x, weight), weight=weight)
    # As far as the encoder goes, 0 is what NaN is.
    model.likelihood = SumOfElements(Gaussian(), weight)
    wanted = loss_and_gradients(model, x.where(weight != 0, 0))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@each
def test_weights_of_one_change_nothing(name: str) -> None:
    x = data(5, torch.float64)
    model = model_of(name, "bernoulli")
    for weight in (torch.ones(5, PIXELS), torch.ones(1, 1, dtype=torch.bool)):
        for mine, theirs in zip(
            loss_and_gradients(model, x, weight=weight), loss_and_gradients(model, x), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@each
def test_what_the_encoder_sees_is_the_users(name: str) -> None:
    """Numbers in place of missing values reach the encoder alone."""
    x, weight = data(5, torch.float64), (weights(5) != 0).double()
    model = model_of(name)
    first, other = (
        loss_and_gradients(model, x.where(weight != 0, fill), weight=weight)[0] for fill in (0, 0.7)
    )
    assert not torch.isclose(first, other).any()
    model.encoder = nn.Linear(PIXELS, 2 * DIM).double()
    nn.init.zeros_(model.encoder.weight)
    first, other = (
        loss_and_gradients(model, x.where(weight != 0, fill), weight=weight)[0] for fill in (0, 0.7)
    )
    assert torch.equal(first, other)


@pytest.mark.parametrize("kind", [VAE, IWAE, HVAE])
def test_evidence_of_what_was_observed(kind: type[BaseVAE]) -> None:
    model, x, _ = linear_gaussian(kind)
    weight = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    covariance = model.decoder.weight @ model.decoder.weight.T + 0.36 * torch.eye(PIXELS)
    exact = [
        torch.distributions.MultivariateNormal(model.decoder.bias[seen], covariance[seen][:, seen]).log_prob(
            row[seen]
        )
        for row, seen in zip(x, weight, strict=True)
    ]
    found = model.log_likelihood(holed(x, weight.double()), 20_000, weight=weight, generator=seeded())
    # The weights' standard deviation is about that of p(x): four standard errors of their mean are 0.03.
    torch.testing.assert_close(found, torch.stack(exact).detach(), rtol=0, atol=0.03)


def test_a_posterior_that_is_exact_gives_exact_evidence() -> None:
    """One latent variable: the posterior of what was observed is a normal one, and all its weights are the same."""
    torch.manual_seed(0)
    model = VAE(nn.Linear(PIXELS, 2), nn.Linear(1, PIXELS), Gaussian(0.6)).double()
    x, weight = data(4, torch.float64), weights(4)
    slope, bias = model.decoder.weight[:, 0].detach(), model.decoder.bias.detach()
    # An element of weight w has precision w / scale^2, and its constant counts w times.
    precision = 1 + (weight * slope.square()).sum(1) / 0.36
    mean = (weight * slope * (x - bias)).sum(1) / 0.36 / precision
    posterior = mean[:, None], -precision.log()[:, None]
    found = [
        model.log_likelihood(holed(x, weight), count, weight=weight, posterior=posterior, generator=seeded())
        for count in (1, 7)
    ]
    alone = model.log_px(torch.zeros(4, 1).double(), x, weight=weight) + 0.5 * mean.square() * precision
    torch.testing.assert_close(found[0], (alone - 0.5 * precision.log()).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@each
def test_other_methods_take_weights(name: str) -> None:
    model = model_of(name, Poisson())
    weight = weights(5)
    x = holed(torch.poisson(3 * data(5, torch.float64), generator=seeded()), weight)
    for method in (model.elbo, model.sample_posterior, model.reconstruct, model.loss):
        assert method(x, weight=weight, generator=seeded()).isfinite().all(), method
    found = model.log_likelihood(x, 6, weight=weight, chunk_size=2, generator=seeded())
    torch.testing.assert_close(found, model.log_likelihood(x, 6, weight=weight, generator=seeded()))
    one = model.log_likelihood(x[:1], 6, weight=weight[:1], generator=seeded())
    for rows in (x[:1], x[:1].expand(3, -1)):
        assert model.log_likelihood(rows, 6, weight=weight[:1], generator=seeded()).shape == (len(rows),)
    assert one.isfinite().all()


@each
def test_half_precision_and_whole_numbers(name: str) -> None:
    model = model_of(name, Categorical(256)) if name != "JacobianL1VAE" else model_of(name)
    if name != "JacobianL1VAE":
        model.decoder = mlp(DIM, 256 * PIXELS).double()
    x = (255 * data(5)).to(torch.uint8)
    weight = (weights(5) != 0).to(torch.float16)
    found = loss_and_gradients(model, x, weight=weight)
    other = loss_and_gradients(model, x, weight=weight.bool())
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True) if a is not None)


def test_unfit_weights_are_refused() -> None:
    x, ones = data(5, torch.float64), torch.ones(5, PIXELS)
    for name in KINDS:
        model = model_of(name)
        for value in (-1.0, NAN, float("inf")):
            weight = ones.clone()
            weight[1, 2] = value
            with pytest.raises(
                ValueError, match=r"weight: expected finite numbers of at least 0, got (-1|nan|inf)"
            ):
                model(x, weight=weight)
        with pytest.raises(ValueError, match=r"weight: expected the shape of x, \[5, 6\]"):
            model(x, weight=ones[0])
        with pytest.raises(ValueError, match="expected the shape of x"):
            model.log_likelihood(x, 2, weight=ones[:3], posterior=model.encode(x))
        holes = x.clone()
        holes[2, 3] = NAN
        with pytest.raises(ValueError, match="1 NaN or infinite value"):
            model(holes, weight=ones)
    consistent = make(ConsistencyVAE, augment=lambda x: x.flip(1))
    with pytest.raises(
        ValueError, match="Consistency: weight: expected one weight for all elements of a sample"
    ):
        consistent(x.float(), weight=(x > 0.5).float())


class Labelled(nn.Module):
    """A network given labels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.labels, self.layers = nn.Embedding(3, 4), mlp(inputs + 4, outputs)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.layers(torch.cat((x, self.labels(label)), 1))


@pytest.mark.parametrize("kind", [VAE, IWAE, HVAE])
def test_weights_and_conditions(kind: type[BaseVAE]) -> None:
    torch.manual_seed(0)
    model = kind(Labelled(PIXELS, 2 * DIM), Labelled(DIM, PIXELS), "gaussian", latent_dim=DIM).double()
    weight, label = weights(4), torch.tensor([0, 1, 2, 1])
    x = holed(data(4, torch.float64), weight)
    found = loss_and_gradients(model, x, weight=weight, condition=label)[0]
    one_by_one = [
        loss_and_gradients(model, x.roll(-i, 0), weight=weight.roll(-i, 0), condition=label.roll(-i, 0))[0]
        for i in range(4)
    ]
    assert found.isfinite().all() and all(losses.isfinite().all() for losses in one_by_one)
    evidence = model.log_likelihood(x, 5, weight=weight, condition=label, chunk_size=3, generator=seeded())
    whole = model.log_likelihood(x, 5, weight=weight, condition=label, generator=seeded())
    torch.testing.assert_close(evidence, whole)


def test_trajectories_that_are_given_up() -> None:
    """Diverged samples go back to the VAE's bound with their own weights."""
    model = make(HVAE, "gaussian", step_size=0.05, on_divergence="drop").double()
    weight = weights(5)
    x = holed(data(5, torch.float64), weight)
    noise = torch.randn(2, 5, DIM, generator=seeded(), dtype=torch.float64)
    noise[1, 3] = 1e200
    found = model.objective(x, noise=noise, weight=weight).loss
    vae = VAE(model.encoder, model.decoder, "gaussian").double()
    mu, logvar = vae.encode(x, weight=weight)
    plain = -vae.log_weight(x, mu, logvar, noise[:1], weight=weight)
    torch.testing.assert_close(found[3], plain[3], rtol=1e-12, atol=1e-12)
    assert model.divergences == 1 and found.isfinite().all()


def test_step_sizes_follow_the_weights() -> None:
    """Of a linear decoder the curvature is I + W^T diag(w) W / scale^2, whatever the code is."""
    model, x, _ = linear_gaussian(HVAE)
    weight = weights(3)
    factor = model.decoder.weight.detach()
    largest = max(
        float(torch.linalg.eigvalsh(torch.eye(DIM) + factor.T @ (row[:, None] * factor) / 0.36)[-1])
        for row in weight
    )
    found = model.stable_step_size(holed(x, weight), weight=weight)  # type: ignore[operator]
    assert found == pytest.approx(largest**-0.5, rel=1e-6)
