"""What makes the flow a tempered leapfrog flow, whatever the decoder: reversal, volume, energy, tempering."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flow_problems import LIKELIHOODS, Problem, conv, mlp, problem
from torch import Tensor, nn

from fastvae import ops

each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
each_decoder = pytest.mark.parametrize("decoder", [mlp, conv], ids=["mlp", "conv"])


def untempered(p: Problem, steps: int, step_size: object) -> Problem:
    return replace(p, step_size=step_size, alpha=torch.ones(steps, dtype=p.z.dtype, device=p.z.device))


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"]
)
@each_likelihood
@each_decoder
def test_reversible(
    decoder, likelihood: str, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    """Forward, momentum reversed, forward: back at the start, up to the rounding of 2 K steps."""
    p = untempered(problem(decoder, likelihood).to(device, dtype), 8, 0.1)
    z, rho, _ = p.run()
    assert (z - p.z).abs().max() > 0.1
    z_back, rho_back, _ = replace(p, z=z.detach(), rho=-rho.detach()).run()
    torch.testing.assert_close(z_back, p.z, rtol=0, atol=tolerance)
    torch.testing.assert_close(-rho_back, p.rho, rtol=0, atol=tolerance)


def test_reversible_with_a_step_size_a_step(device: torch.device) -> None:
    p = problem(steps=3).to(device)
    p = untempered(p, 3, p.step_size)
    z, rho, _ = p.run()
    z_back, rho_back, _ = replace(p, z=z.detach(), rho=-rho.detach(), step_size=p.step_size.flip(0)).run()
    torch.testing.assert_close(z_back, p.z, rtol=0, atol=1e-13)
    torch.testing.assert_close(-rho_back, p.rho, rtol=0, atol=1e-13)


@each_likelihood
@each_decoder
def test_volume(decoder, likelihood: str, device: torch.device) -> None:
    """log |det d(z_K, rho_K) / d(z, rho)| = d * sum_k log alpha_k, from the op's own gradient."""
    p = problem(decoder, likelihood, batch=1).to(device)
    p = replace(p, step_size=torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64, device=device))

    def run(state: Tensor) -> Tensor:
        z, rho, _ = replace(p, z=state[None, :3], rho=state[None, 3:]).run()
        return torch.cat((z, rho), 1)[0]

    state = torch.cat((p.z[0], p.rho[0]))
    for alpha in (p.alpha, torch.ones_like(p.alpha)):
        p = replace(p, alpha=alpha)
        sign, log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(run, state))
        assert sign == 1
        # The determinant of a 6 x 6 matrix of order one: a few hundred roundings.
        assert log_det.item() == pytest.approx(3 * alpha.log().sum().item(), abs=1e-12)


@each_likelihood
@each_decoder
def test_energy_error_is_of_second_order(decoder, likelihood: str, device: torch.device) -> None:
    p = problem(decoder, likelihood, batch=16).to(device)
    errors = []
    for steps in (16, 32, 64):
        energy = untempered(p, steps, 1.2 / steps).trajectory().energy()
        errors.append((energy[-1] - energy[0]).abs().mean().item())
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    # 2 in the limit; at these steps the next order moves it by a few hundredths.
    assert all(1.9 < order < 2.1 for order in orders), orders


def test_momentum_is_tempered_exactly(device: torch.device) -> None:
    """At step size 0 the momentum is multiplied by each alpha, to the last bit, and nothing moves."""
    p = problem(steps=6).to(device)
    still = replace(p, step_size=0.0)
    (z, rho, _), trajectory = still.run(), still.trajectory()
    expected = p.rho
    for k in range(6):
        assert torch.equal(trajectory.rho[k], expected)
        expected = expected * p.alpha[k]
    assert torch.equal(rho, expected)
    assert torch.equal(z, p.z)


def test_alpha_scales_the_last_momentum(device: torch.device) -> None:
    """The last alpha is a factor of rho_K, in effect on the returned momentum and on nothing else."""
    p = problem(steps=3).to(device)
    one = replace(p, alpha=torch.cat((p.alpha[:2], p.alpha.new_ones(1))))
    z, rho, log_px = p.run()
    z_one, rho_one, log_px_one = one.run()
    assert torch.equal(z, z_one) and torch.equal(log_px, log_px_one)
    assert torch.equal(rho, p.alpha[2] * rho_one)


def test_steps_compose(device: torch.device) -> None:
    """K steps are K flows of one step; the force in between is the same to the last bit."""
    p = problem(conv, "gaussian", steps=5).to(device)
    z, rho = p.z, p.rho
    for k in range(5):
        one = replace(p, z=z, rho=rho, step_size=p.step_size[k : k + 1], alpha=p.alpha[k : k + 1])
        z, rho, log_px = (t.detach() for t in one.run())
    for composed, whole in zip((z, rho, log_px), p.run(), strict=True):
        torch.testing.assert_close(composed, whole.detach(), rtol=1e-13, atol=1e-13)


def test_samples_do_not_see_each_other(device: torch.device) -> None:
    p = problem(conv, "bernoulli", batch=4).to(device).require(["z", "rho"])
    out = p.run()
    found = torch.autograd.grad(sum(o[1].sum() for o in out), (p.z, p.rho))
    for gradient in found:
        assert gradient[1].any()
        assert not gradient[[0, 2, 3]].any()


def test_harmonic_oscillator(device: torch.device) -> None:
    """A linear decoder under a Gaussian is a quadratic potential, whose trajectory is known."""
    decoder = nn.Linear(1, 1, bias=False).double().to(device)
    nn.init.constant_(decoder.weight, 2.0)
    z, rho = (
        torch.tensor([[1.0]], dtype=torch.float64, device=device),
        torch.zeros(1, 1).to(device, torch.float64),
    )
    frequency = math.sqrt(1 + 4.0)
    steps, time = 4000, 1.0
    alpha = torch.ones(steps, dtype=torch.float64, device=device)
    with torch.no_grad():
        z_K, rho_K, _ = ops.hamiltonian_flow(decoder, z, rho, z * 0, time / steps, alpha, "gaussian")
    # Second order: (frequency * step)^2 / 24 in the phase.
    assert z_K.item() == pytest.approx(math.cos(frequency * time), abs=1e-6)
    assert rho_K.item() == pytest.approx(-frequency * math.sin(frequency * time), abs=1e-6)
