"""Negative log-likelihood, mutual information, active units, probes: against closed forms and plain loops."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from model_problems import DIM, PIXELS, data, linear_gaussian, make, mlp, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastvae.metrics import (
    active_units,
    knn_accuracy,
    linear_probe,
    mutual_information,
    negative_log_likelihood,
    posteriors,
)
from fastvae.models import HVAE, VAE


class Fixed(nn.Module):
    """An encoder that reads mu from x, with one log variance for all."""

    def __init__(self, logvar: float) -> None:
        super().__init__()
        self.logvar = logvar

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = x[:, :DIM]
        return mu, torch.full_like(mu, self.logvar)


def fixed(logvar: float) -> VAE:
    return VAE(Fixed(logvar), nn.Linear(DIM, PIXELS), "gaussian")


def test_posteriors_of_tensors_and_loaders() -> None:
    model = VAE(nn.Sequential(nn.BatchNorm1d(PIXELS), mlp(PIXELS, 2 * DIM)), mlp(DIM, PIXELS))
    x = data(1200)
    mu, logvar = posteriors(model, x)
    assert model.training and model.encoder[0].num_batches_tracked == 0 and not mu.requires_grad
    loader = DataLoader(TensorDataset(x, torch.zeros(1200)), batch_size=700)
    for found, expected in zip(posteriors(model, loader), (mu, logvar), strict=True):
        torch.testing.assert_close(found, expected)
    model.eval()
    torch.testing.assert_close(mu, model.encode(x)[0].detach())


def test_negative_log_likelihood_of_a_known_evidence() -> None:
    model, x, exact = linear_gaussian(VAE)
    found = negative_log_likelihood(model, x, 5000)
    assert found.mean == pytest.approx(-float(exact.mean()), abs=0.05)
    assert found.standard_error == pytest.approx(float(exact.std()) / math.sqrt(3), abs=0.05)
    assert found == negative_log_likelihood(model, x, 5000) != negative_log_likelihood(model, x, 5000, seed=1)
    assert negative_log_likelihood(make(HVAE), data(), 10).mean > 0


def test_mutual_information_of_gaussian_codes() -> None:
    """mu ~ N(0, a), q = N(mu, v): q(z) = N(0, a + v) and I = d/2 log(1 + a / v)."""
    x = torch.randn(1500, PIXELS, generator=seeded())
    for logvar in (-1.0, 0.5):
        exact = DIM / 2 * math.log(1 + math.exp(-logvar))
        assert mutual_information(fixed(logvar), x) == pytest.approx(exact, abs=0.05)


def test_mutual_information_by_loops() -> None:
    model, x = make(VAE), data(7)
    mu, logvar = (part.double() for part in posteriors(model, x))
    noise = torch.randn(3, 7, DIM, generator=seeded(5), dtype=torch.float64)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    p = torch.distributions.Normal(torch.zeros(DIM).double(), 1.0)
    outer, inner = [], []
    for eps in noise:
        for n in range(7):
            z = mu[n] + (logvar[n] / 2).exp() * eps[n]
            outer.append((q.log_prob(z)[n] - p.log_prob(z)).sum())
            inner.append(torch.logsumexp(q.log_prob(z).sum(1), 0) - math.log(7) - p.log_prob(z).sum())
    expected = torch.stack(outer).mean() - torch.stack(inner).mean()
    for chunk in (None, 1, 4):
        found = mutual_information(model, x, num_samples=3, chunk_size=chunk, seed=5)
        assert found == pytest.approx(float(expected), rel=1e-9)


def test_mutual_information_of_codes_apart_and_alike() -> None:
    x = torch.arange(50.0)[:, None].expand(50, PIXELS)
    assert mutual_information(fixed(-14.0), x) == pytest.approx(math.log(50), rel=1e-6)
    assert mutual_information(fixed(0.0), x[:1].expand(50, PIXELS)) == pytest.approx(0, abs=1e-12)


def test_active_units() -> None:
    x = torch.randn(500, PIXELS, generator=seeded())
    x[:, 1] *= 0.09
    assert active_units(fixed(0.0), x) == 1 and active_units(fixed(0.0), x, threshold=0.005) == 2


def test_probes_read_what_is_there() -> None:
    generator = seeded()
    labels = torch.randint(0, 3, (300,), generator=generator)
    codes = torch.randn(300, 4, generator=generator) * 0.1
    codes[torch.arange(300), labels] += 1
    split = (codes[:200], labels[:200], codes[200:], labels[200:])
    assert knn_accuracy(*split) == linear_probe(*split) == 1.0
    ring = torch.linspace(0, 2 * math.pi, 301)[:300]
    inside = (torch.arange(300) % 2).float()[:, None]
    circles = (1 + inside) * torch.stack([ring.cos(), ring.sin()], 1)
    order = torch.randperm(300, generator=generator)
    circles, kinds = circles[order], inside[order, 0].long()
    split = (circles[:200], kinds[:200], circles[200:], kinds[200:])
    assert knn_accuracy(*split, k=5) > 0.95 and linear_probe(*split) < 0.7


def test_knn_by_loops() -> None:
    codes, labels = torch.randn(60, 2, generator=seeded()), torch.arange(60) % 2
    right = 0
    for code, label in zip(codes[40:], labels[40:], strict=True):
        nearest = (codes[:40] - code).norm(dim=1).topk(3, largest=False).indices
        right += int((labels[:40][nearest] == label).sum() >= 2)
    assert knn_accuracy(codes[:40], labels[:40], codes[40:], labels[40:], k=3) == pytest.approx(right / 20)


def test_refusals() -> None:
    model, x, labels = make(VAE), data(), torch.zeros(5).long()
    codes = torch.rand(5, 2)
    for call, message in (
        (lambda: posteriors(model, []), "posteriors: images: expected some, got none"),
        (lambda: negative_log_likelihood(model, x[:1], 2), "expected at least 2, got 1"),
        (lambda: negative_log_likelihood(model, x, 0), "num_samples: expected at least 1, got 0"),
        (lambda: mutual_information(model, x, num_samples=0), "num_samples: expected at least 1"),
        (lambda: mutual_information(model, x, chunk_size=0), "chunk_size: expected at least 1"),
        (lambda: active_units(model, x[:1]), "active_units: images: expected at least 2, got 1"),
        (lambda: knn_accuracy(codes, labels, codes, labels, k=6), "k: expected 1 to 5, got 6"),
        (lambda: knn_accuracy(codes[0], labels, codes, labels), r"codes: expected floating \[N, d\]"),
        (
            lambda: knn_accuracy(codes, labels[:3], codes, labels),
            r"knn_accuracy: labels: expected integers \[5\]",
        ),
        (
            lambda: linear_probe(codes, labels, codes, codes[:, 0]),
            "linear_probe: test_labels: expected integers",
        ),
        (
            lambda: linear_probe(codes, labels, codes[:, :1], labels),
            r"test_codes: expected \[M, 2\], got \[5, 1\]",
        ),
        (lambda: linear_probe(codes * math.nan, labels, codes, labels), "codes: expected finite values"),
        (lambda: linear_probe(codes, labels, codes, labels, penalty=0), "penalty: expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_probe_converges_on_usual_codes() -> None:
    codes, labels = torch.randn(500, 8, generator=seeded()), torch.arange(500) % 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe(codes, labels, codes, labels)
