"""Outlier scores of conditional models and of samples of which a part is missing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from model_problems import seeded
from test_conditions import CLASSES, DIM, PIXELS, data, model_of, of_each
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastvae import VAE
from fastvae.likelihoods import Bernoulli, Gaussian
from fastvae.metrics import ais
from fastvae.models.base import BaseVAE
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import (
    Detector,
    InputComplexity,
    LikelihoodRatio,
    LikelihoodRegret,
    MutatedImages,
    NegativeLogLikelihood,
    SelfInfluence,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*copies are trained", "ignore:fastvae.ops.log_px"),
]

DETECTORS: dict[str, Callable[[BaseVAE], Detector]] = {
    "NegativeLogLikelihood": lambda model: NegativeLogLikelihood(model, num_samples=4),
    "LikelihoodRatio": lambda model: LikelihoodRatio(model, wider(model), num_samples=4),
    "SelfInfluence": lambda model: SelfInfluence(model, num_samples=3),
    "LikelihoodRegret": lambda model: LikelihoodRegret(model, num_steps=3, num_samples=4, lr=1e-2),
}
each = pytest.mark.parametrize("name", DETECTORS)


def wider(model: BaseVAE) -> BaseVAE:
    """Another model of the same networks: its likelihood has another scale."""
    return VAE(model.encoder, model.decoder, Gaussian(2.0), latent_dim=DIM)


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "LikelihoodRegret"])
def test_scores_under_a_condition_are_those_of_models_that_have_it_built_in(name: str) -> None:
    model = model_of("VAE").eval()
    x, labels = data(4)
    found = DETECTORS[name](model)(x, condition=labels)
    alone = [DETECTORS[name](of_each(model, label))(x[[i]]) for i, label in enumerate(labels)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-7, atol=1e-9)
    assert not torch.allclose(found, DETECTORS[name](model)(x, condition=(labels + 1) % CLASSES))
    with pytest.raises((TypeError, ValueError), match="condition"):
        DETECTORS[name](model)(x)
    with pytest.raises(ValueError, match="condition: expected 4 rows"):
        DETECTORS[name](model)(x, condition=labels[:2])


def blind(unseen: int) -> BaseVAE:
    """A model whose encoder makes nothing of its last inputs."""
    torch.manual_seed(0)
    encoder = nn.Linear(PIXELS, 2 * DIM)
    with torch.no_grad():
        encoder.weight[:, PIXELS - unseen :] = 0
    decoder = nn.Sequential(nn.Linear(DIM, 8), nn.Softplus(), nn.Linear(8, PIXELS))
    return VAE(encoder, decoder, "gaussian").double().eval()


@each
def test_what_stands_for_missing_values_does_not_change_a_score(name: str) -> None:
    """NaN, infinities and 0 are 0 to an encoder; other numbers are nothing to one that does not look at them."""
    x, _ = data(3)
    observed = torch.ones_like(x, dtype=torch.bool)
    observed[:, -2:] = False
    model = blind(2)
    # Its private encoder is trained on what it is given: of numbers it learns to make something.
    numbers = [] if name in ("LikelihoodRegret", "SelfInfluence") else [0.5, -3.0]
    scores = [
        DETECTORS[name](model)(x.masked_fill(~observed, value), weight=observed)
        for value in (0.0, math.nan, math.inf, *numbers)
    ]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=0)
    whole = DETECTORS[name](model)(x)
    assert bool(torch.isfinite(scores[0]).all()) and not torch.allclose(whole, scores[0])
    torch.testing.assert_close(DETECTORS[name](model)(x, weight=torch.ones_like(x)), whole)


def test_noise_is_keyed_by_what_was_observed() -> None:
    """Regret's and AIS's, too, where nothing else depends on what stands for the rest."""
    x, _ = data(3)
    observed = torch.ones_like(x)
    observed[:, -2:] = 0
    others = x.clone()
    others[:, -2:] = torch.rand(3, 2, generator=seeded(9), dtype=torch.float64)
    model = blind(2)
    regret = LikelihoodRegret(model, num_steps=3, num_samples=4, target="posterior")
    assert torch.equal(regret(x, weight=observed), regret(others, weight=observed))
    estimates = [ais(model, given, 5, 2, weight=observed, num_leapfrog_steps=2) for given in (x, others)]
    assert torch.equal(estimates[0].log_px, estimates[1].log_px)


def test_log_likelihood_of_the_observed_part() -> None:
    model, (x, _) = blind(0), data(3)
    weight = (torch.rand(x.shape, generator=seeded(5)) > 0.4).double()
    noise = SampleNoise(keys_of(x * weight), 0, 1)
    expected = -model.log_likelihood(x, 6, noise=noise, weight=weight)
    torch.testing.assert_close(NegativeLogLikelihood(model, num_samples=6)(x, weight=weight), expected)
    with pytest.raises(ValueError, match="NegativeLogLikelihood: weight: expected the shape of x"):
        NegativeLogLikelihood(model)(x, weight=weight[0])


def test_a_background_model_is_trained_on_conditions_and_weights() -> None:
    model, (x, labels) = model_of("VAE"), data(8)
    weight = (x > 0.2).double()
    loader = DataLoader(TensorDataset(x, labels, weight), 4)
    detector = LikelihoodRatio(model.eval(), epochs=1, num_samples=4)
    detector.fit(loader, condition=1, weight=2)
    assert bool(torch.isfinite(detector(x, condition=labels, weight=weight)).all())
    mutated, kept, weights = next(iter(MutatedImages(loader, 1.0)))
    assert torch.equal(kept, labels[:4]) and torch.equal(weights, weight[:4])
    assert not torch.allclose(mutated, x[:4])
    named = next(iter(MutatedImages([{"data": x, "label": labels}], 1.0)))
    assert torch.equal(named["label"], labels) and not torch.allclose(named["data"], x)


def test_the_length_of_a_file_has_no_missing_part() -> None:
    pytest.importorskip("PIL")
    decoder = nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4)))
    model = VAE(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), decoder, Bernoulli())
    x = torch.ones(2, 1, 4, 4)
    with pytest.raises(ValueError, match="InputComplexity: weight: expected none"):
        InputComplexity(model, num_samples=2)(x, weight=torch.ones_like(x))
