"""The step size that HVAE measures, against closed forms, and what it saves."""

from __future__ import annotations

import math

import pytest
import torch
from model_problems import seeded
from torch import Tensor, nn

from fastvae import HVAE
from fastvae.likelihoods import Gaussian, Likelihood, Poisson, StudentT
from fastvae.models.stability import largest_eigenvalues


def test_lanczos_finds_the_largest_eigenvalue() -> None:
    for d in (1, 2, 7, 40):
        a = torch.randn(5, d, d, generator=seeded(d), dtype=torch.float64)
        a = a + a.mT - 3 * torch.eye(d)
        start = torch.randn(5, d, generator=seeded(1), dtype=torch.float64)
        found = largest_eigenvalues(lambda v, a=a: torch.einsum("bij,bj->bi", a, v), start)
        exact = torch.linalg.eigvalsh(a)[:, -1]
        if d <= 12:
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
        else:
            assert (found <= exact + 1e-9).all() and (found > exact - 0.2 * exact.abs()).all()
    identity = largest_eigenvalues(lambda v: v, torch.ones(3, 4, dtype=torch.float64))
    torch.testing.assert_close(identity, torch.ones(3, dtype=torch.float64))


def linear(scale: float) -> HVAE:
    torch.manual_seed(0)
    return HVAE(nn.Linear(8, 6), nn.Linear(3, 8), Gaussian(scale), num_steps=3).double()


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3])
def test_of_a_linear_decoder_it_is_known(scale: float) -> None:
    model = linear(scale)
    weight = model.decoder.weight.detach()
    curvature = torch.eye(3) + weight.T @ weight / scale**2
    exact = float(torch.linalg.eigvalsh(curvature)[-1]) ** -0.5
    x = torch.rand(4, 8, generator=seeded(), dtype=torch.float64)
    assert model.stable_step_size(x, generator=seeded()) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("factor", [0.95, 2.2])
def test_twice_of_it_is_the_limit(factor: float) -> None:
    """Energy along 300 steps of a quadratic potential stays, or grows without bound."""
    model = linear(0.1)
    x = torch.rand(4, 8, generator=seeded(), dtype=torch.float64)
    eps = factor * model.stable_step_size(x)
    z, rho = (torch.randn(4, 3, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    from fastvae.ops import hamiltonian_flow

    end = hamiltonian_flow(model.decoder, z, rho, x, eps, torch.ones(300, dtype=torch.float64), Gaussian(0.1))
    assert (float(end[0].abs().max()) < 1e3) == (factor < 2)


@pytest.mark.parametrize("likelihood", [Poisson(), StudentT(3.0, 0.01)])
def test_any_likelihood_and_a_model_that_is_left_alone(likelihood: Likelihood) -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.PReLU(), nn.Linear(8, 5))
    model = HVAE(nn.Linear(5, 4), decoder, likelihood, num_steps=2).train()
    decoder[2].eval()
    x = torch.poisson(torch.full((6, 5), 2.0), generator=seeded())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.stable_step_size(x)
    assert 0 < found <= 1 and model.training and decoder[1].training and not decoder[2].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_sharp_likelihood_starts_where_it_can_be_trained() -> None:
    """At the default step size the first losses are of another order."""
    x = torch.rand(32, 8, generator=seeded())

    def losses(step_size: float) -> Tensor:
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 8))
        model = HVAE(
            nn.Linear(8, 6), decoder, Gaussian(0.01), num_steps=10, step_size=step_size, tempering="none"
        )
        return model(x, generator=seeded()).detach(), model.stable_step_size(x)  # type: ignore[return-value]

    default, stable = losses(0.2)
    found, _ = losses(float(stable))
    assert float(stable) < 0.05
    assert not default.mean() < 5 * found.mean() and bool(found.isfinite().all())


def test_refusals() -> None:
    model = linear(1.0)
    with pytest.raises(ValueError, match="stable_step_size: x: expected at least one sample"):
        model.stable_step_size(torch.zeros(0, 8).double())
    with torch.no_grad():
        model.decoder.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="expected a finite curvature"):
        model.stable_step_size(torch.zeros(2, 8).double())
