"""Step sizes that HVAE adapts while it trains: the measure, the search, what is saved, and what is left alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from model_problems import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae import HVAE
from fastvae.likelihoods import (
    ContinuousBernoulli,
    Gaussian,
    GaussianHead,
    Laplace,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from fastvae.models.adaptation import AdaptedStepSize, conservation
from fastvae.ops import trajectory

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(likelihood: str | Likelihood = "bernoulli", outputs: int = 8, **options: object) -> HVAE:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6))
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, outputs))
    return HVAE(encoder, decoder, likelihood, num_steps=3, **options)  # type: ignore[arg-type]


def some(count: int = 32) -> Tensor:
    """Of two factors, in (0, 1)."""
    codes, directions = torch.randn(count, 2, generator=seeded()), torch.randn(2, 8, generator=seeded(1))
    return torch.sigmoid(3 * codes @ directions)


def trained(model: HVAE, x: Tensor, steps: int) -> list[float]:
    optimizer, generator, losses = torch.optim.Adam(model.parameters(), 3e-3), seeded(1), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x, generator=generator).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_error_is_that_of_the_leapfrog_steps_alone() -> None:
    """Tempered steps change H by their tempering, exactly; without it the measure is HMC's, both ways."""
    model = model_of(Gaussian(0.3)).double()
    x = some(6).double()
    z, rho = (torch.randn(6, 3, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    for alpha in (torch.ones(4), torch.tensor([0.9, 0.7, 0.8, 0.95])):
        alpha = alpha.double()
        points = trajectory(model.decoder, z, rho, x, 0.15, alpha, Gaussian(0.3))
        # By hand, each step from its start to the momentum before alpha.
        error = torch.zeros(6, dtype=torch.float64)
        for k in range(4):
            one = trajectory(
                *(model.decoder, points.z[k], points.rho[k], x, 0.15, torch.ones(1).double(), Gaussian(0.3))
            ).energy()
            error += one[1] - one[0]
        assert float(error.abs().max()) > 1e-3
        temperature = points.rho.square().mean(2).median(0).values.clamp(min=1)
        expected = (-error.abs() / temperature).exp()
        torch.testing.assert_close(conservation(points, alpha), expected, rtol=1e-9, atol=1e-9)
    lost = points._replace(log_px=points.log_px.clone().index_fill_(1, torch.tensor([2]), math.nan))
    assert conservation(lost, alpha)[2] == 0 and bool((conservation(lost, alpha)[:2] > 0).all())


def test_in_equilibrium_it_is_the_acceptance_of_hmc() -> None:
    """E min(1, exp(-dH)) = 2 Phi(-s/2) of codes from the posterior, where dH is normal with variance s^2.

    Both ways it is less. T is 1 there, up to the noise of 200 momenta.
    """
    torch.manual_seed(0)
    d, rows = 200, 400
    decoder = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        decoder.weight.zero_()  # the posterior is the prior
    z, rho = (torch.randn(rows, d, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    alpha = torch.ones(3, dtype=torch.float64)
    points = trajectory(decoder, z, rho, torch.zeros(rows, 1).double(), 0.5, alpha, Gaussian(1.0))
    change = points.energy()[-1] - points.energy()[0]
    one_way = change.neg().clamp(max=0).exp().mean()
    spread = float(change.std())
    normal = 1 + math.erf(-spread / 2 / math.sqrt(2))
    # 0.35 / sqrt(400) of noise, three times.
    assert float(one_way) == pytest.approx(normal, abs=0.05)
    both_ways = conservation(points, alpha).mean()
    assert float(both_ways) == pytest.approx(float((-change.abs()).exp().mean()), abs=0.03)
    assert 0.5 * float(one_way) < float(both_ways) < float(one_way)


def test_a_divergence_is_not_excused_by_its_own_momentum() -> None:
    """Leapfrog steps of four times the limit of stability, in one dimension, down to a single step."""
    decoder = nn.Linear(1, 4).double()
    x, z, rho = (
        torch.rand(50, 4, dtype=torch.float64),
        torch.randn(50, 1).double(),
        torch.randn(50, 1).double(),
    )
    curvature = 1 + float(decoder.weight.detach().square().sum()) / 0.01**2
    for steps in (1, 2, 5):
        alpha = torch.ones(steps, dtype=torch.float64)
        points = trajectory(decoder, z, rho, x, 8 * curvature**-0.5, alpha, Gaussian(0.01))
        assert float(conservation(points, alpha).mean()) < 0.05


def test_rounding_of_large_energies_is_no_error() -> None:
    """Energies of 1e9 nats in float32 differ by tens at any step size; steps as small as these have no error."""
    model = model_of(Gaussian(1e-5))
    x, z, rho = some(16), torch.randn(16, 3, generator=seeded(1)), torch.randn(16, 3, generator=seeded(2))
    alpha = torch.full((3,), 0.9)
    points = trajectory(model.decoder, z, rho, x, 1e-9, alpha, Gaussian(1e-5))
    assert float(points.energy().max()) > 1e9
    assert float(conservation(points, alpha).min()) > 0.99


@pytest.mark.parametrize("target", [0.65, 0.9])
def test_it_comes_to_the_acceptance_asked_for(target: float) -> None:
    """Of a model whose weights stay, the mean over measurements; batches of 32 leave 0.06 of noise in each."""
    model = model_of(Gaussian(0.05), target_acceptance=target)
    x, generator = some(), seeded(1)
    for _ in range(80):
        model.adapt_step_size(x, generator=generator)
    late = [model.adapt_step_size(x, generator=generator) for _ in range(40)]
    assert abs(sum(late) / len(late) - target) < 0.03


def test_what_is_accepted_is_not_limited() -> None:
    """Losses and weights are those of the same step size given, bit for bit: it is trained, by the ELBO alone."""
    adapted, given = model_of(), model_of(step_size=0.2)
    assert trained(adapted, some(), 30) == trained(given, some(), 30)
    assert torch.equal(adapted.step_size, given.step_size) and float(
        given.step_size.detach()
    ) != pytest.approx(0.2, abs=1e-4)
    capped = model_of(Gaussian(0.01))
    capped(some()).mean().backward()
    gradient = capped.leapfrog_step.logit.grad
    assert float(capped.step_size.detach()) < 0.1 and gradient is not None and float(gradient) == 0


LIKELIHOODS: dict[str, tuple[str | Likelihood, int]] = {
    "bernoulli": ("bernoulli", 8),
    "gaussian 0.001": (Gaussian(1e-3), 8),
    "gaussian learned": (Gaussian("learned", initial=0.01), 8),
    "gaussian head": (GaussianHead(), 16),
    "laplace 0.001": (Laplace(1e-3), 8),
    "student": (StudentT(3.0, 0.02), 8),
    "continuous bernoulli": (ContinuousBernoulli(), 8),
    "poisson": (Poisson(), 8),
    "negative binomial": (NegativeBinomial("learned", shape=(8,)), 8),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_default_arguments_train(name: str) -> None:
    """The loss falls from the first batch on, and no gradient is of a trajectory that has lost its energy."""
    likelihood, outputs = LIKELIHOODS[name]
    x = some() if name not in ("poisson", "negative binomial") else torch.poisson(20 * some(), seeded(2))
    model = model_of(likelihood, outputs)
    before = model.stable_step_size(x)
    losses = trained(model, x, 40)
    assert sum(losses[-5:]) < sum(losses[:5])
    step = float(model.step_size.detach())
    assert 0 < step <= 0.5
    # Of one order with what the curvature allows, or the largest there is.
    assert step > min(0.2, before, model.stable_step_size(x)) / 50
    assert model.divergences == 0 and model.adapt_step_size(x) > 0.2


def test_a_step_size_that_was_given_is_never_adapted() -> None:
    model = model_of(Gaussian(0.05), step_size=0.01, learn_step_size=False)
    trained(model, some(), 3)
    assert float(model.step_size) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="adapt_step_size: expected a model of step_size='adapted'"):
        model.adapt_step_size(some())


def test_only_training_adapts() -> None:
    model, x = model_of(Gaussian(0.01)), some()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise = model.draw_noise(model.encode(x)[0], seeded())
    assert torch.equal(model(x, noise=noise), model(x, noise=noise))
    with torch.no_grad():
        model(x)
    model.log_likelihood(x, 5)
    model.reconstruct(x)
    model.eval()
    model(x).mean().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train()
    given = HVAE(model.encoder, model.decoder, Gaussian(0.01), num_steps=3, step_size=0.01)
    generators = seeded(), seeded()
    model(x, generator=generators[0])
    given(x, generator=generators[1])
    assert float(model.step_size) < 0.2 and int(model.leapfrog_step.calls) == 1  # type: ignore[arg-type]
    # It measures at the noise of the loss: the noise of the next is as if it did not.
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_a_trajectory_that_diverges_shortens_the_step() -> None:
    """Between measurements as well; NaN that no step size mends leaves it alone and is reported."""
    torch.manual_seed(0)
    model, x = HVAE(nn.Linear(8, 6), nn.Linear(3, 8), Gaussian(1e-3)), some()
    trained(model, x, 51)
    with torch.no_grad():
        model.leapfrog_step.logit.fill_(2.0)
        model.leapfrog_step.log_limit.fill_(math.log(0.4))  # type: ignore[operator]
    assert not model.leapfrog_step.is_due  # type: ignore[union-attr]
    assert bool(torch.isfinite(model(x)).all()) and float(model.step_size) < 0.1
    shortened = float(model.step_size)
    with torch.no_grad():
        model.decoder.weight.fill_(math.nan)  # type: ignore[operator]
    for calls in (0, 51):
        model.leapfrog_step.calls.fill_(calls)  # type: ignore[union-attr]
        with pytest.raises(fastvae.models.DivergenceError, match="before the first leapfrog step"):
            model(x)
    assert shortened / 2 < float(model.step_size) <= shortened


def test_a_resumed_run_ends_like_one_that_went_through(tmp_path: Path) -> None:
    def run(seed: int, folder: str, epochs: int) -> HVAE:
        torch.manual_seed(seed)
        model = model_of(Gaussian(0.02))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * seed)
        x = some(60)
        weight = (x > 0.1).float()
        loader = DataLoader(TensorDataset(x, weight), 10, shuffle=True, generator=seeded(3, x.device))
        fastvae.fit(model, loader, epochs=epochs, weight=1, run_dir=tmp_path / folder, progress=False)
        return model

    whole = run(0, "whole", 12)
    run(0, "parts", 7)
    parts = run(1, "parts", 12)
    assert int(whole.leapfrog_step.calls) == 72  # type: ignore[arg-type]
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True)
    )
    whole.save(tmp_path / "saved")
    again = fastvae.load(tmp_path / "saved", encoder=model_of().encoder, decoder=model_of().decoder)
    assert isinstance(again, HVAE) and isinstance(again.leapfrog_step, AdaptedStepSize)
    assert torch.equal(again.step_size, whole.step_size) and again.leapfrog_step.target == 0.65


def test_with_views_and_under_torch_compile() -> None:
    penalty = fastvae.penalties.Consistency(lambda x, generator=None: x.flip(1), weight=0.1)
    model = model_of(Gaussian(0.01), penalties=[penalty])
    model(some()).mean().backward()
    assert float(model.step_size) < 0.2 and int(model.leapfrog_step.calls) == 1  # type: ignore[arg-type]
    still = model_of(Gaussian(0.3), on_divergence="ignore")
    torch._dynamo.reset()
    compiled = torch.compile(still, backend="eager")
    compiled(some()).mean().backward()
    # What it knows of forward would be taken for other models' as well.
    torch._dynamo.reset()
    assert int(still.leapfrog_step.calls) == 0  # type: ignore[arg-type]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="HVAE: step_size: expected numbers or 'adapted', got learned"):
        model_of(step_size="learned")
    with pytest.raises(ValueError, match=r"target_acceptance: expected a number in \(0, 1\), got 1"):
        model_of(target_acceptance=1.0)
    with pytest.raises(ValueError, match="max_step_size: expected a finite number above 0"):
        model_of(max_step_size=math.inf)
