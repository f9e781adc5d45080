"""HVAE: exact evidence, identities with the VAE, tempering, step sizes and divergence."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from model_problems import DIM, PIXELS, Skip, data, linear_gaussian, make, mlp, seeded, weights_of
from torch import Tensor, nn

from fastvae import reference
from fastvae.likelihoods import Gaussian
from fastvae.models import HVAE, VAE, DivergenceError
from fastvae.models.tempering import KINDS, fixed_alpha, fixed_temperature_alpha

# --- exact evidence ----------------------------------------------------------------------------


@pytest.mark.parametrize("tempering", [None, *KINDS])
def test_importance_weights_estimate_the_exact_evidence(tempering: str | None) -> None:
    if tempering is None:
        model, x, exact = linear_gaussian(VAE)
    else:
        model, x, exact = linear_gaussian(HVAE, tempering=tempering, num_steps=4, step_size=0.3, beta_0=0.4)
    count = 8000
    logs = weights_of(model, x, count)
    ratio = (logs - exact).exp()
    error = ratio.std(0) / math.sqrt(count)
    # A good enough proposal, or the standard error means nothing.
    assert (error < 0.03).all()
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()
    estimate = model.log_likelihood(x, count, generator=seeded())
    torch.testing.assert_close(estimate, exact + ratio.mean(0).log(), rtol=0, atol=1e-9)
    # The ELBO lies below the evidence, by Jensen; its mean over draws with 4 standard errors of room.
    assert (logs.mean(0) < exact + 4 * logs.std(0) / math.sqrt(count)).all()


def test_flow_brings_the_elbo_closer_to_the_evidence() -> None:
    vae, x, exact = linear_gaussian(VAE)
    hvae, _, _ = linear_gaussian(HVAE, tempering="none", num_steps=5, step_size=0.3)
    gap_vae = exact - weights_of(vae, x, 4000).mean(0)
    gap_hvae = exact - weights_of(hvae, x, 4000).mean(0)
    assert (gap_hvae < gap_vae).all() and (gap_vae > 0).all()


# --- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "categorical"])
def test_hvae_without_motion_is_the_vae(likelihood: str) -> None:
    hvae = make(HVAE, likelihood, tempering="none", step_size=1e-9).double()
    vae = VAE(hvae.encoder, hvae.decoder, likelihood)
    x = data(dtype=torch.float64)
    mu, logvar = vae.encode(x)
    noise = hvae.draw_noise(mu, seeded())
    expected = vae.log_weight(x, mu, logvar, noise[:1])
    # Step 1e-9 moves z by 1e-9 times momentum and force.
    torch.testing.assert_close(-hvae(x, noise=noise), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hvae.elbo(x, generator=seeded()), expected, rtol=1e-6, atol=1e-6)


def test_elbo_of_the_vae_is_the_mean_of_its_sample_elbos() -> None:
    model = make(VAE)
    x = data(2)
    repeated = x.repeat(4000, 1)
    closed = model.elbo(repeated, generator=seeded()).reshape(4000, 2)
    sampled = weights_of(model, x, 4000)
    error = (closed.std(0) + sampled.std(0)) / math.sqrt(4000)
    assert ((closed.mean(0) - sampled.mean(0)).abs() < 4 * error).all()


@pytest.mark.parametrize("schedule", [fixed_alpha, fixed_temperature_alpha])
def test_schedules_end_at_temperature_one(schedule) -> None:  # type: ignore[no-untyped-def]
    beta_0 = torch.tensor(0.2, dtype=torch.float64)
    alpha = schedule(beta_0, 7)
    assert alpha.shape == (7,) and (alpha < 1).all()
    torch.testing.assert_close(alpha.prod(), beta_0.sqrt(), rtol=1e-12, atol=0)
    assert torch.equal(schedule(torch.tensor(1.0), 3), torch.ones(3))
    # The first steps as the formulas give them by hand, for K = 2 and beta_0 = 1/4.
    by_hand = {
        fixed_alpha: [1.75 / 2, 1 / 1.75],
        fixed_temperature_alpha: [math.sqrt(3.25 / 4), math.sqrt(1 / 3.25)],
    }
    got = schedule(torch.tensor(0.25, dtype=torch.float64), 2)
    assert got.tolist() == pytest.approx(by_hand[schedule], rel=1e-12)


@pytest.mark.parametrize("tempering", KINDS)
def test_tempering_starts_as_asked_and_is_learnt(tempering: str) -> None:
    model = make(HVAE, tempering=tempering, beta_0=0.4)
    assert isinstance(model, HVAE)
    assert model.beta_0.item() == pytest.approx(1.0 if tempering == "none" else 0.4, rel=1e-5)
    torch.testing.assert_close(model.alpha.prod().square(), model.beta_0)
    model.loss(data(), generator=seeded()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    fixed = make(HVAE, tempering=tempering, learn_tempering=False, learn_step_size=False)
    fixed.loss(data(), generator=seeded()).backward()
    flow = [p for name, p in fixed.named_parameters() if "logit" in name]
    assert len(flow) == (1 if tempering == "none" else 2) and not any(p.requires_grad for p in flow)


@pytest.mark.parametrize("tempering", KINDS)
def test_gradient_of_the_loss(tempering: str) -> None:
    """Against central differences of the loss in a random direction of all parameters."""
    model = make(HVAE, tempering=tempering, step_size=[[0.1, 0.2], [0.3, 0.1], [0.2, 0.2]]).double()
    x = data(dtype=torch.float64)
    noise = model.draw_noise(model.encode(x)[0], seeded())
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(model(x, noise=noise).mean(), parameters)
    g = seeded()
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
    slope = sum(float((a * b).sum()) for a, b in zip(gradient, direction, strict=True))
    h = 1e-5
    with torch.no_grad():
        values = []
        for move in (h, -2 * h):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=move)
            values.append(float(model(x, noise=noise).mean()))
    # Truncation is of order h^2 and rounding of order 1e-16 / h.
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("tempering", KINDS)
def test_moving(tempering: str) -> None:
    model = make(HVAE, tempering=tempering).double()
    assert isinstance(model, HVAE)
    assert {model.step_size.dtype, model.alpha.dtype, model.beta_0.dtype} == {torch.float64}
    assert model(data()).dtype == torch.float64
    model = model.to("meta")
    assert {model.step_size.device.type, model.alpha.device.type, model.beta_0.device.type} == {"meta"}


def test_a_decoder_that_cannot_be_lowered_gives_the_same() -> None:
    torch.manual_seed(0)
    model = HVAE(mlp(PIXELS, 2 * DIM), Skip(), num_steps=3, latent_dim=DIM).double()
    x = data(dtype=torch.float64)
    loss = model(x, generator=seeded())
    mu, logvar = model.encode(x)
    eps, gamma = model.draw_noise(mu, seeded())
    z_0 = mu + torch.exp(logvar / 2) * eps
    z, rho, log_px = reference.hamiltonian_flow(
        model.decoder, z_0, gamma / model.beta_0.sqrt(), x, model.step_size, model.alpha
    )
    log_normal = -0.5 * (z.square() + rho.square() - gamma.square()).sum(1)
    elbo = log_px + log_normal + 0.5 * (logvar + eps.square()).sum(1)
    torch.testing.assert_close(-loss, elbo, rtol=1e-10, atol=0)


# --- step size ---------------------------------------------------------------------------------


def test_step_size_shapes() -> None:
    cases: list[tuple[object, tuple[int, ...]]] = [
        (0.2, ()),
        (torch.tensor(0.2), ()),
        ([0.1, 0.2], (2,)),
        ([0.1, 0.2, 0.3], (3, 1)),
        ([[0.1], [0.2], [0.3]], (3, 1)),
        (torch.full((3, 2), 0.25), (3, 2)),
        ([[0.1, 0.2]], (2,)),
    ]
    for value, shape in cases:
        model = make(HVAE, step_size=value)
        assert isinstance(model, HVAE)
        assert model.step_size.shape == shape
        expected = torch.as_tensor(value, dtype=torch.float32).reshape(shape)
        torch.testing.assert_close(model.step_size, expected, rtol=1e-5, atol=0)
        assert torch.isfinite(model(data())).all()


def test_step_size_errors() -> None:
    for value in (0.5, 0.0, -0.1, float("nan"), [0.1, 0.7]):
        with pytest.raises(ValueError, match=r"step_size: expected values in \(0, max_step_size = 0.5\)"):
            make(HVAE, step_size=value)
    with pytest.raises(ValueError, match=r"step_size: expected a number.*K = 3 and d = 2, got \[5\]"):
        make(HVAE, step_size=[0.1] * 5)
    with pytest.raises(
        ValueError, match=r"2 values may be one a step or one a dimension.*\[K, 1\] or \[1, d\]"
    ):
        make(HVAE, step_size=[0.1, 0.2], num_steps=2)
    with pytest.raises(ValueError, match="max_step_size: expected a finite number above 0"):
        make(HVAE, max_step_size=0.0)
    assert make(HVAE, step_size=0.7, max_step_size=1.0).step_size.item() == pytest.approx(0.7)  # type: ignore[operator]


# --- divergence --------------------------------------------------------------------------------


def unstable(**options: Any) -> tuple[HVAE, Tensor, Tensor]:
    """Samples 0 and 2 sit still at the mode of p(z | x); the others meet a far too large step and explode."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(PIXELS, 2 * DIM), nn.Linear(DIM, PIXELS)
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.bias.zero_()
        decoder.bias.copy_(torch.linspace(0.1, 0.6, PIXELS))
    model = HVAE(encoder, decoder, Gaussian(1e-3), num_steps=12, tempering="free", step_size=0.4, **options)
    x = data(4)
    x[[0, 2]] = decoder.bias.detach()
    noise = torch.randn(2, 4, DIM, generator=seeded())
    noise[:, [0, 2]] = 0
    return model, x, noise


def test_divergence_is_reported() -> None:
    model, x, noise = unstable()
    with pytest.raises(
        DivergenceError, match=r"2 of 4 trajectories left the finite range, .* leapfrog step"
    ) as caught:
        model(x, noise=noise)
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert error.num_samples == 2 and error.step is not None and 1 <= error.step <= 12
    assert error.energy_error > 1e6
    assert error.step_size == pytest.approx((0.4, 0.4))
    assert "step size 0.4 to 0.4" in str(error) and "on_divergence='drop'" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.step == error.step and again.num_samples == 2
    with pytest.raises(DivergenceError):
        model.log_likelihood(x, 3, generator=seeded())


def test_divergence_can_be_survived() -> None:
    model, x, noise = unstable(on_divergence="drop")
    loss = model(x, noise=noise)
    assert torch.isfinite(loss).all() and model.divergences == 2
    mu, logvar = model.encode(x)
    vae = VAE(model.encoder, model.decoder, model.likelihood)
    plain = -vae.log_weight(x, mu, logvar, noise[:1])
    torch.testing.assert_close(loss[[1, 3]], plain[[1, 3]])
    alone = model(x[[0, 2]], noise=noise[:, [0, 2]])
    torch.testing.assert_close(loss[[0, 2]], alone)
    assert model.divergences == 2
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    step = model.objective(x, noise=noise)
    assert torch.equal(step.z[[1, 3]], step.z_0[[1, 3]])
    assert model.divergences == 4
    weights = model.log_weight(x, mu, logvar, noise)
    assert torch.equal(weights[[1, 3]], torch.full((2,), -math.inf))
    assert torch.isfinite(weights[[0, 2]]).all()


def test_divergence_of_a_whole_batch_is_survived() -> None:
    model, x, noise = unstable(on_divergence="drop")
    loss = model(x[[1, 3]], noise=noise[:, [1, 3]])
    assert torch.isfinite(loss).all() and model.divergences == 2


def test_divergence_can_be_ignored() -> None:
    model, x, noise = unstable(on_divergence="ignore")
    finite = torch.isfinite(model(x, noise=noise))
    assert finite.tolist() == [True, False, True, False] and model.divergences == 0


@pytest.mark.parametrize("on_divergence", ["raise", "drop"])
def test_broken_encoder_is_not_blamed_on_the_step_size(on_divergence: str) -> None:
    model, x, noise = unstable(on_divergence=on_divergence)
    with torch.no_grad():
        model.encoder.bias[0] = float("nan")  # type: ignore[operator]
    with pytest.raises(
        DivergenceError, match=r"4 of 4 samples have no finite .* before the first leapfrog step"
    ) as caught:
        model(x, noise=noise)
    assert caught.value.step == 0


def test_healthy_batches_run_the_flow_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvae.models import hvae

    calls = []
    original = hvae.hamiltonian_flow

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(kwargs)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(hvae, "hamiltonian_flow", counted)
    make(HVAE)(data())
    assert len(calls) == 1


def test_repr_names_the_model() -> None:
    text = repr(make(HVAE, "gaussian"))
    assert "Gaussian(scale=1.0)" in text and "num_steps=3" in text and "kind='free'" in text


def test_hvae_argument_errors() -> None:
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        make(HVAE, num_steps=0)
    with pytest.raises(
        ValueError, match="tempering: expected one of free, fixed, fixed-temperature, none, got 'no'"
    ):
        make(HVAE, tempering="no")
    with pytest.raises(ValueError, match=r"beta_0: expected a number in \(0, 1\), got 1"):
        make(HVAE, beta_0=1.0)
    with pytest.raises(ValueError, match="on_divergence: expected one of"):
        make(HVAE, on_divergence="skip")
