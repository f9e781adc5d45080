"""The oracle itself: derivatives, and the properties that make a trajectory a leapfrog trajectory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fastvae.reference import (
    expand_step_size,
    hamiltonian_flow,
    hamiltonian_flow_2k,
    leapfrog_kick_drift,
    leapfrog_kick_temper,
    trajectory,
)

LIKELIHOODS: list[Likelihood] = [Bernoulli(), Gaussian(0.6), Categorical(4)]
IDS = ["bernoulli", "gaussian", "categorical"]


def problem(
    likelihood: Likelihood, batch: int = 3, dim: int = 2, pixels: int = 4, steps: int = 3
) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    outputs = pixels * likelihood.values_per_element
    decoder = nn.Sequential(nn.Linear(dim, 5), nn.Softplus(), nn.Linear(5, outputs)).double()
    z, rho = torch.randn(2, batch, dim, dtype=torch.float64)
    x = torch.rand(batch, pixels, dtype=torch.float64)
    alpha = torch.linspace(0.8, 0.95, steps, dtype=torch.float64)
    return decoder, z, rho, x, alpha


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=IDS)
def test_gradients_to_every_input(likelihood: Likelihood) -> None:
    decoder, z, rho, x, alpha = problem(likelihood, steps=2)
    eps = torch.tensor([[0.1, 0.2], [0.15, 0.05]], dtype=torch.float64)
    inputs = tuple(t.clone().requires_grad_() for t in (z, rho, eps, alpha, *decoder.parameters()))
    names = [name for name, _ in decoder.named_parameters()]

    def run(z: Tensor, rho: Tensor, eps: Tensor, alpha: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, weights, strict=True))
        return hamiltonian_flow(
            lambda point: torch.func.functional_call(decoder, named, (point,)),
            z,
            rho,
            x,
            eps,
            alpha,
            likelihood,
        )

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=IDS)
def test_second_derivative(likelihood: Likelihood) -> None:
    decoder, z, rho, x, alpha = problem(likelihood, batch=2, steps=1)
    eps = torch.tensor(0.1, dtype=torch.float64)
    inputs = tuple(t.clone().requires_grad_() for t in (z, rho, eps, alpha))
    assert torch.autograd.gradgradcheck(
        lambda z, rho, eps, alpha: hamiltonian_flow(decoder, z, rho, x, eps, alpha, likelihood), inputs
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=IDS)
def test_force_is_the_gradient_of_the_joint_density(likelihood: Likelihood) -> None:
    """One step, written out by hand with a force from central differences."""
    decoder, z, rho, x, _ = problem(likelihood, batch=1, steps=1)
    eps, alpha, h = 0.1, 0.9, 1e-5

    def joint(point: Tensor) -> float:
        return float((likelihood.log_prob(decoder(point), x) - point.square().sum() / 2).detach())

    def force(point: Tensor) -> Tensor:
        out = torch.zeros_like(point)
        for i in range(point.shape[1]):
            shift = torch.zeros_like(point)
            shift[0, i] = h
            out[0, i] = (joint(point + shift) - joint(point - shift)) / (2 * h)
        return out

    z1, half = leapfrog_kick_drift(z, rho, force(z), eps)
    rho1 = leapfrog_kick_temper(half, force(z1), eps, alpha)
    got = hamiltonian_flow(decoder, z, rho, x, eps, torch.tensor([alpha], dtype=torch.float64), likelihood)
    # Central differences are good to about h^2 = 1e-10, times the step.
    torch.testing.assert_close(got[0], z1, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(got[1], rho1, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(got[2], likelihood.log_prob(decoder(got[0]), x), rtol=1e-12, atol=0)


def test_reversible() -> None:
    decoder, z, rho, x, _ = problem(Bernoulli(), steps=20)
    one = torch.ones(20, dtype=torch.float64)
    z1, rho1, _ = hamiltonian_flow(decoder, z, rho, x, 0.2, one)
    z0, rho0, _ = hamiltonian_flow(decoder, z1, -rho1, x, 0.2, one)
    assert not torch.allclose(z1, z, atol=0.1)
    torch.testing.assert_close(z0, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(-rho0, rho, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tempered", [False, True])
def test_volume_changes_by_the_tempering_alone(tempered: bool) -> None:
    decoder, z, rho, x, alpha = problem(Bernoulli(), batch=1, dim=3, steps=5)
    alpha = alpha if tempered else torch.ones_like(alpha)

    def run(state: Tensor) -> Tensor:
        z1, rho1, _ = hamiltonian_flow(decoder, state[None, :3], state[None, 3:], x, 0.3, alpha)
        return torch.cat((z1, rho1), 1)[0]

    jacobian = torch.autograd.functional.jacobian(run, torch.cat((z[0], rho[0])))
    sign, log_det = torch.linalg.slogdet(jacobian)
    assert sign == 1
    assert log_det.item() == pytest.approx(3 * alpha.log().sum().item(), abs=1e-12)


def test_energy_error_is_of_second_order() -> None:
    decoder, z, rho, x, _ = problem(Gaussian(0.6), batch=16)
    errors = []
    for steps in (16, 32, 64):
        one = torch.ones(steps, dtype=torch.float64)
        energy = trajectory(decoder, z, rho, x, 1.6 / steps, one, Gaussian(0.6)).energy()
        errors.append((energy[-1] - energy[0]).abs().mean().item())
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    # The limit is 2; at these step sizes the next order moves it by a few hundredths.
    assert all(1.9 < order < 2.1 for order in orders), orders


def test_tempering_is_in_effect() -> None:
    """Far from the data the momentum shrinks by each alpha, once a step."""
    _, z, rho, x, alpha = problem(Gaussian())
    points = trajectory(lambda point: point.repeat(1, 2) * 0, z, rho, x, 1e-9, alpha, "gaussian")
    expected = rho * torch.cumprod(alpha, 0)[:, None, None]
    torch.testing.assert_close(points.rho[1:], expected, rtol=1e-7, atol=1e-8)


def test_two_k_forces_give_the_same() -> None:
    decoder, z, rho, x, alpha = problem(Bernoulli())
    torch.testing.assert_close(
        hamiltonian_flow_2k(decoder, z, rho, x, 0.1, alpha), hamiltonian_flow(decoder, z, rho, x, 0.1, alpha)
    )


def test_trajectory_and_detached_modes() -> None:
    decoder, z, rho, x, alpha = problem(Bernoulli())
    z.requires_grad_()
    full = hamiltonian_flow(decoder, z, rho, x, 0.1, alpha)
    points = trajectory(decoder, z, rho, x, 0.1, alpha)
    assert points.z.shape == points.rho.shape == (4, 3, 2) and points.log_px.shape == (4, 3)
    assert full[2].requires_grad and not any(t.requires_grad for t in points)
    assert torch.equal(points.z[0], z) and torch.equal(points.rho[0], rho)
    for column, end in zip(points, full, strict=True):
        assert torch.equal(column[-1], end)
    detached = hamiltonian_flow(decoder, z, rho, x, 0.1, alpha, create_graph=False)
    with torch.no_grad():
        no_grad = hamiltonian_flow(decoder, z, rho, x, 0.1, alpha)
    with torch.inference_mode():
        inference = hamiltonian_flow(decoder, z * 1, rho * 1, x, torch.tensor(0.1), alpha * 1)
    for other in (detached, no_grad, inference):
        assert not any(t.requires_grad for t in other)
        torch.testing.assert_close(other, full, rtol=1e-7, atol=0)
    empty = hamiltonian_flow(decoder, z, rho, x, 0.1, alpha[:0])
    assert torch.equal(empty[0], z) and torch.equal(empty[1], rho)


def test_expand_step_size() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(expand_step_size(0.5, 3, 2, like), torch.full((3, 2), 0.5, dtype=torch.float64))
    assert expand_step_size(torch.tensor(0.5), 3, 2, like).dtype == torch.float64
    per_dim = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    out = expand_step_size(per_dim, 3, 2, like)
    assert torch.equal(out, per_dim.expand(3, 2))
    out.sum().backward()
    assert per_dim.grad is not None
    assert torch.equal(per_dim.grad, torch.tensor([3.0, 3.0], dtype=torch.float64))
    per_step = torch.tensor([[1.0], [2.0], [3.0]])
    assert torch.equal(expand_step_size(per_step, 3, 2, like)[:, 1], torch.tensor([1.0, 2.0, 3.0]).double())
    with pytest.raises(
        ValueError, match=r"step_size: expected .* K = 3 and d = 2, got \[3\]; .*step_size\[:, None\]"
    ):
        expand_step_size(torch.ones(3), 3, 2, like)
    with pytest.raises(ValueError, match=r"got \[2, 2\]"):
        expand_step_size(torch.ones(2, 2), 3, 2, like)


def test_shape_errors() -> None:
    decoder, z, rho, x, alpha = problem(Bernoulli())
    with pytest.raises(ValueError, match=r"rho: expected torch.float64 \[3, 2\]"):
        hamiltonian_flow(decoder, z, rho[:2], x, 0.1, alpha)
    with pytest.raises(ValueError, match=r"z: expected a floating tensor \[B, d\]"):
        hamiltonian_flow(decoder, z[0], rho[0], x, 0.1, alpha)
    with pytest.raises(ValueError, match=r"alpha: expected \[K\]"):
        hamiltonian_flow(decoder, z, rho, x, 0.1, alpha[0])
    with pytest.raises(ValueError, match="x: 3 elements a sample need 3 decoder outputs"):
        hamiltonian_flow(decoder, z, rho, x[:, :3], 0.1, alpha)
