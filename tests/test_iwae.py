"""IWAE: the bound by hand, the three estimators of its gradient, evidence, contract."""

from __future__ import annotations

import math

import pytest
import torch
from model_problems import DIM, PIXELS, Skip, data, linear_gaussian, make, mlp, seeded
from torch import Tensor, nn

import fastvae
from fastvae.models import IWAE, VAE
from fastvae.penalties import BetaAnnealing, JacobianL1


def by_hand(model: IWAE, x: Tensor, noise: Tensor, beta: float = 1.0, detached: bool = False) -> Tensor:
    """log w [K, B], one decoder call a draw; with ``detached``, q is given and only z depends on the encoder."""
    mu, logvar = model.encoder(x).chunk(2, 1)
    rows = []
    for eps in noise:
        z = mu + (logvar / 2).exp() * eps
        q = torch.distributions.Normal(
            *((mu.detach(), (logvar.detach() / 2).exp()) if detached else (mu, (logvar / 2).exp()))
        )
        p = torch.distributions.Normal(0.0, 1.0)
        log_px = model.likelihood.log_prob(model.decoder(z), x)
        rows.append(log_px + beta * (p.log_prob(z) - q.log_prob(z)).sum(1))
    return torch.stack(rows)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("beta", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 4])
def test_the_bound_and_its_gradient_by_hand(count: int, beta: float) -> None:
    model = make(IWAE, num_samples=count, beta=beta).double()
    x = data(dtype=torch.float64)
    noise = model.draw_noise(model.encode(x)[0], seeded())
    assert noise.shape == (count, len(x), DIM) == (model.noise_draws, len(x), DIM)
    expected = math.log(count) - torch.logsumexp(by_hand(model, x, noise, beta), 0)
    got = model(x, noise=noise)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    cotangents = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    wanted, found = gradients(model, expected @ cotangents), gradients(model, got @ cotangents)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_other_estimators_by_hand(estimator: str) -> None:
    """The same value and decoder gradient; the encoder's: sum_k w_k^(1 or 2) d log w_k/dz_k dz_k, q given."""
    model = make(IWAE, num_samples=4, estimator=estimator).double()
    x = data(dtype=torch.float64)
    noise = model.draw_noise(model.encode(x)[0], seeded())
    plain = make(IWAE, num_samples=4).double()
    cotangents = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    got = model(x, noise=noise)
    torch.testing.assert_close(got, plain(x, noise=noise), rtol=1e-13, atol=0)
    logs = by_hand(model, x, noise, detached=True)
    share = torch.softmax(logs.detach(), 0) ** (2 if estimator == "dreg" else 1)
    wanted = torch.autograd.grad(-(share * logs).sum(0) @ cotangents, list(model.encoder.parameters()))
    found = torch.autograd.grad(got @ cotangents, list(model.encoder.parameters()), retain_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    decoders = [list(m.decoder.parameters()) for m in (model, plain)]
    torch.testing.assert_close(
        torch.autograd.grad(got @ cotangents, decoders[0]),
        torch.autograd.grad(plain(x, noise=noise) @ cotangents, decoders[1]),
        rtol=1e-10,
        atol=1e-12,
    )


def test_dreg_is_unbiased_and_quieter() -> None:
    """Over many draws, DReG's mean gradient is the standard one's, with less spread."""
    x = data(1, torch.float64).expand(4000, PIXELS)
    stats = {}
    for estimator in ("standard", "dreg"):
        model = make(IWAE, num_samples=8, estimator=estimator).double()
        mu, logvar = (part.detach().requires_grad_() for part in model.encode(x))
        model.encode = lambda _, pair=(mu, logvar): pair  # type: ignore[method-assign]
        (each,) = torch.autograd.grad(model(x, generator=seeded()).sum(), mu)
        stats[estimator] = (each.mean(0), each.std(0))
    for j in range(DIM):
        gap = abs(float(stats["standard"][0][j] - stats["dreg"][0][j]))
        error = math.hypot(float(stats["standard"][1][j]), float(stats["dreg"][1][j])) / 4000**0.5
        assert gap < 4 * error
    assert (stats["dreg"][1] < stats["standard"][1]).all()


def test_the_bound_rises_with_samples_to_the_evidence() -> None:
    bounds = []
    for count in (1, 10, 300):
        model, x, exact = linear_gaussian(IWAE, num_samples=count)
        with torch.no_grad():
            bounds.append(model.elbo(x.repeat(300, 1), generator=seeded()).reshape(300, -1).mean(0))
    assert (
        (bounds[0] < bounds[1]).all() and (bounds[1] < bounds[2]).all() and (bounds[2] < exact + 0.05).all()
    )
    estimate = model.log_likelihood(x, 20000, generator=seeded())
    torch.testing.assert_close(estimate, exact, atol=0.05, rtol=0)


def test_evidence_takes_as_many_decodes_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(IWAE, num_samples=50), data()
    codes = 0

    def count(decoder: nn.Module, z: Tensor, *rest: object, **options: object) -> Tensor:
        nonlocal codes
        codes += z.shape[0] * z.shape[1]
        return log_px(decoder, z, *rest, **options)

    log_px = fastvae.ops.log_px
    monkeypatch.setattr(fastvae.ops, "log_px", count)
    model.log_likelihood(x, 10)
    assert codes == 10 * len(x)


def test_log_weight_of_several_draws_is_their_mean() -> None:
    model, x = make(IWAE, num_samples=4).double(), data(dtype=torch.float64)
    mu, logvar = model.encode(x)
    noise = model.draw_noise(mu, seeded())
    expected = torch.logsumexp(by_hand(model, x, noise), 0) - math.log(4)
    torch.testing.assert_close(model.log_weight(x, mu, logvar, noise), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.elbo(x, generator=seeded()), expected, rtol=1e-12, atol=0)


def test_one_sample_is_the_vae() -> None:
    """With the KL sampled: the same in the mean, and the same codes."""
    x, many = data(), 20_000
    one, vae = (make(kind, **options) for kind, options in ((IWAE, {"num_samples": 1}), (VAE, {})))
    each = [m(x.repeat(many, 1), generator=seeded()).detach().reshape(many, 5) for m in (one, vae)]
    error = sum(values.var(0) for values in each).sqrt() / many**0.5
    assert ((each[0].mean(0) - each[1].mean(0)).abs() < 5 * error).all()
    assert torch.equal(
        one.sample_posterior(x, generator=seeded()), vae.sample_posterior(x, generator=seeded())
    )


def test_surroundings() -> None:
    x = data()
    model = make(IWAE)
    assert model.num_samples == 50 and model.loss(x).shape == () and "num_samples=50" in repr(model)
    penalised = make(IWAE, penalties=[JacobianL1(0.1)])
    assert penalised(x).shape == (5,)
    hidden = IWAE(mlp(PIXELS, 2 * DIM), Skip(), num_samples=3)
    assert hidden(x).shape == (5,) and hidden.latent_dim == DIM
    images = x.reshape(5, 1, 2, 3)
    assert IWAE(nn.Sequential(nn.Flatten(), mlp(PIXELS, 2 * DIM)), mlp(DIM, PIXELS))(images).shape == (5,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.float32
    assert model(x[:0]).shape == (0,)


def test_refusals() -> None:
    for count in (0, 1.5, True):
        with pytest.raises(ValueError, match="IWAE: num_samples: expected an int of at least 1"):
            make(IWAE, num_samples=count)
    with pytest.raises(
        ValueError, match=r"estimator: expected one of \('standard', 'stl', 'dreg'\), got 'path'"
    ):
        make(IWAE, estimator="path")
    with pytest.raises(ValueError, match=r"linear in beta \(VAE, HVAE\), got IWAE"):
        make(IWAE, penalties=[BetaAnnealing(3)])(data())
    with pytest.raises(ValueError, match=r"noise: expected \[50, 5, 2\], got \[1, 5, 2\]"):
        make(IWAE)(data(), noise=torch.zeros(1, 5, 2))
