"""A Poisson factor model, x ~ Poisson(exp(W z + b)): its evidence and missing counts against quadrature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_problems import seeded
from torch import Tensor, nn

from fastvae import HVAE, IWAE, VAE
from fastvae.likelihoods import Poisson
from fastvae.models import BaseVAE

GENES = 5
KINDS: list[tuple[type[BaseVAE], dict[str, Any]]] = [
    (VAE, {}),
    (IWAE, {"num_samples": 3}),
    (HVAE, {"num_steps": 3, "step_size": 0.1}),
]


def problem(kind: type[BaseVAE], dim: int, **options: Any) -> tuple[BaseVAE, Tensor, Tensor]:
    """A model, counts that it could have made, and weights of zeros and ones."""
    torch.manual_seed(dim)
    model = kind(nn.Linear(GENES, 2 * dim), nn.Linear(dim, GENES), Poisson(), **options).double()
    # A proposal near the prior, and somewhat wider, so that no weight is large.
    nn.init.zeros_(model.encoder.weight)
    with torch.no_grad():
        model.encoder.bias.zero_()[dim:] = 0.2
        model.decoder.weight.normal_(0, 0.3)
        model.decoder.bias.fill_(0.5)
    z = torch.randn(3, dim, dtype=torch.float64, generator=seeded())
    x = torch.poisson(model.decoder(z).exp().detach(), generator=seeded())
    weight = torch.ones(3, GENES)
    weight[0, :2], weight[1, 3] = 0, 0
    return model, x, weight


def posterior(model: BaseVAE, x: Tensor, weight: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """log of prod_i p(x_i | z)^w_i times the share of z, [nodes^d, B], and the rates [nodes^d, GENES] there.

    By Gauss and Hermite's rule, whose nodes and shares stand for the standard normal prior.
    """
    numpy = pytest.importorskip("numpy")
    points, shares = (torch.as_tensor(each) for each in numpy.polynomial.hermite_e.hermegauss(nodes))
    dim = model.decoder.in_features
    z = torch.cartesian_prod(*[points] * dim).reshape(-1, dim)
    log_share = torch.cartesian_prod(*[(shares / shares.sum()).log()] * dim).reshape(-1, dim).sum(1)
    rate = model.decoder(z).exp().detach()
    each = torch.distributions.Poisson(rate[:, None]).log_prob(x)
    return log_share[:, None] + (each * weight).sum(2), rate


def evidence(model: BaseVAE, x: Tensor, weight: Tensor) -> Tensor:
    """log p of what was observed: [B], known to 9 digits, since fewer nodes say the same."""
    found, fewer = (posterior(model, x, weight, nodes)[0].logsumexp(0) for nodes in (60, 45))
    torch.testing.assert_close(found, fewer, rtol=1e-9, atol=1e-9)
    return found


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_evidence(kind: type[BaseVAE], options: dict[str, Any], dim: int) -> None:
    model, x, weight = problem(kind, dim, **options)
    for given, wanted in (
        ({}, evidence(model, x, torch.ones(3, GENES))),
        ({"weight": weight}, evidence(model, x, weight)),
    ):
        count = 40_000
        data = x if not given else x.masked_fill(weight == 0, float("nan"))
        parts = torch.stack(
            [model.log_likelihood(data, count // 20, generator=seeded(i), **given) for i in range(20)]
        )
        # Twenty estimates give their own standard error; four of them, and 1e-3 for the logarithm's bias.
        error = 4 * parts.std(0) / 20**0.5 + 1e-3
        assert bool(((parts.mean(0) - wanted).abs() < error).all())
        assert bool((error < 0.05).all())


@pytest.mark.parametrize("dim", [1, 2])
def test_missing_counts_are_filled_in_with_their_means(dim: int) -> None:
    model, x, weight = problem(VAE, dim)
    found = model.impute(
        x.masked_fill(weight == 0, float("nan")), weight, num_samples=40_000, generator=seeded()
    )
    log_share, rate = posterior(model, x, weight, 60)
    mean = log_share.softmax(0).T @ rate
    # Standard deviation of a rate over its posterior, at most 2, times that of weights, over 200.
    torch.testing.assert_close(found, torch.where(weight == 0, mean, x), rtol=0, atol=0.06)
