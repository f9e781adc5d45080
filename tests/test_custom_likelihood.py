"""A density of one's own, in plain PyTorch, in every place that takes a likelihood."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_problems import DIM, PIXELS, data, make, mlp, seeded
from torch import Tensor

from fastvae import HVAE, IWAE, VAE, fit, metrics, ood, ops, reference
from fastvae.influence import TracIn
from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood


class Normal(Likelihood):
    """A Gaussian in disguise, of which the package knows nothing."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return Gaussian(0.7).log_prob(params, x)


class WithMoments(Normal):
    def mean(self, params: Tensor) -> Tensor:
        return Gaussian(0.7).mean(params)

    def sample(self, params: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return Gaussian(0.7).sample(params, generator=generator)


@dataclass(frozen=True)
class Tempered(Bernoulli):
    """A subclass of a stock likelihood with another density: its kernel would compute the old one."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return 0.5 * super().log_prob(params, x)


class Counts(Likelihood):
    """Poisson, of data that are far from [0, 1]."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        rate, x = params.flatten(1), x.flatten(1).to(params)
        return (x * rate - rate.exp() - torch.lgamma(x + 1)).sum(1)


pytestmark = pytest.mark.filterwarnings("ignore:.*likelihood of its own:UserWarning")


def pair(kind: Any, own: Likelihood, stock: Likelihood, **options: Any) -> tuple[Any, Any]:
    return (
        make(kind, own, **options).double(),
        make(kind, stock, **options).double(),
    )


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_what_has_a_kernel() -> None:
    assert Bernoulli().has_kernel and Bernoulli(probs=True).has_kernel and Gaussian(0.3).has_kernel
    assert not Normal().has_kernel and not Tempered().has_kernel and Normal().spec == ""

    class Again(Bernoulli):
        def mean(self, params: Tensor) -> Tensor:
            return params

    assert Again().has_kernel


@pytest.mark.parametrize("kind", [VAE, IWAE, HVAE])
def test_models_train_and_score_as_with_the_stock_density(kind: Any) -> None:
    own, stock = pair(kind, Normal(), Gaussian(0.7))
    x = data(5, torch.float64)
    same(own(x, generator=seeded()), stock(x, generator=seeded()))
    own(x, generator=seeded()).sum().backward()
    stock(x, generator=seeded()).sum().backward()
    for mine, theirs in zip(own.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            same(mine.grad, theirs.grad)
    found = own.log_likelihood(x, 7, generator=seeded())
    same(found, stock.log_likelihood(x, 7, generator=seeded()))
    fit(own, [x], epochs=2, progress=False)


def test_a_redefined_density_is_not_taken_for_its_parent() -> None:
    own = make(HVAE, Tempered()).double()
    x = data(5, torch.float64)
    z, rho = torch.randn(2, 5, DIM, dtype=torch.float64, generator=seeded())
    alpha = torch.ones(3, dtype=torch.float64)
    found = ops.hamiltonian_flow(own.decoder, z, rho, x, 0.1, alpha, Tempered())
    expected = reference.hamiltonian_flow(own.decoder, z, rho, x, 0.1, alpha, Tempered())
    stock = ops.hamiltonian_flow(own.decoder, z, rho, x, 0.1, alpha, "bernoulli")
    for mine, theirs, old in zip(found, expected, stock, strict=True):
        same(mine, theirs)
        assert not torch.allclose(mine, old)


@pytest.mark.parametrize("kind", [VAE, HVAE])
def test_scores_metrics_and_influence(kind: Any) -> None:
    own, stock = pair(kind, Normal(), Gaussian(0.7))
    x = data(4, torch.float64)
    for score in (
        lambda model: ood.NegativeLogLikelihood(model, num_samples=5).predict(x),
        lambda model: ood.LikelihoodRegret(model, num_steps=4, num_samples=5, lr=0.01).predict(x),
        lambda model: torch.tensor(metrics.negative_log_likelihood(model, x, 5).mean),
        lambda model: torch.tensor(metrics.mutual_information(model, x)),
    ):
        same(score(own), score(stock))
    if kind is VAE:
        scores = [
            TracIn(model, x, [None], lambda *_: 1.0, num_samples=3).influence((x,)) for model in (own, stock)
        ]
        same(*scores)  # type: ignore[arg-type]


def test_influence_of_an_hvae_is_that_of_any_decoder_that_is_not_lowered() -> None:
    own, stock = pair(HVAE, Normal(), Gaussian(0.7), num_steps=2)
    x = data(3, torch.float64)
    scores = [
        TracIn(model, x, [None], lambda *_: 1.0, num_samples=2, uncovered="materialise").influence((x,))
        for model in (own, stock)
    ]
    same(*scores)  # type: ignore[arg-type]


def test_mean_and_sample_are_asked_for_by_name() -> None:
    with pytest.raises(NotImplementedError, match="Normal: mean: this likelihood defines none"):
        make(VAE, Normal()).reconstruct(data())
    with pytest.raises(NotImplementedError, match="Normal: sample: this likelihood defines none"):
        Normal().sample(torch.zeros(1, 2))
    model = make(VAE, WithMoments())
    assert model.reconstruct(data()).shape == (5, PIXELS)
    assert model.sample(3).shape == (3, PIXELS)
    assert model.likelihood.sample(model.decode(torch.zeros(3, DIM))).shape == (3, PIXELS)


def test_data_are_as_the_density_wants_them() -> None:
    model = VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), Counts())
    x = torch.tensor([[0.0, 1.0, 5.0, 17.0, 2.0, 3.0]])
    assert torch.isfinite(model(x)).all() and torch.isfinite(model.log_likelihood(x, 3)).all()
    with pytest.raises(ValueError, match="Counts: x holds 1 NaN"):
        model(x / x)


def test_one_warning_for_an_operator_and_a_likelihood() -> None:
    """Of log_px; a flow sweeps a density that it can read, without a warning."""

    class Fresh(Normal):
        pass

    models = [make(HVAE, Fresh()), make(HVAE, Fresh())]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for model in models:
            model(data())
        assert not seen
        for vae in (make(VAE, Fresh()), make(VAE, Fresh())):
            vae.log_likelihood(data(), 2)
    messages = [str(warning.message) for warning in seen]
    assert len(messages) == 1 and "Fresh is a likelihood of its own" in messages[0], messages
    assert "same result, slower" in messages[0]


def test_one_warning_for_a_density_that_is_by_autograd() -> None:
    """The flow's own, where it cannot be read; the decoder before it is swept all the same."""

    class Checked(Likelihood):
        def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
            if not bool(params.isfinite().all()):  # a look at numbers
                raise ValueError("not finite")
            return Gaussian(0.7).log_prob(params, x)

    own, stock = pair(HVAE, Checked(), Gaussian(0.7))
    x = data(5, torch.float64)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            same(own(x, generator=seeded()), stock(x, generator=seeded()))
        own.loss(x).backward()
    messages = [str(warning.message) for warning in seen]
    assert len(messages) == 1, messages
    assert "Checked is a likelihood of its own" in messages[0] and "autograd" in messages[0]
