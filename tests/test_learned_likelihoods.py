"""Likelihoods with parameters of their own: trained, saved, moved, exact through a flow, counted by TracIn."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from influence_problems import tracin, vae_gradients
from model_problems import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastvae import HVAE, IWAE, VAE, fit, ood, ops, reference
from fastvae.likelihoods import (
    Gaussian,
    GaussianHead,
    LearnedLikelihood,
    Likelihood,
    NegativeBinomial,
    ZeroInflatedNegativeBinomial,
)

PIXELS = 6
ALL: dict[str, Callable[[], Any]] = {
    "one scale": lambda: Gaussian("learned", initial=0.5),
    "a scale an element": lambda: Gaussian("learned", shape=(PIXELS,)),
    "given scales": lambda: Gaussian(torch.linspace(0.2, 1, PIXELS)),
    "one dispersion": lambda: NegativeBinomial("learned", initial=2.0),
    "a dispersion a gene": lambda: NegativeBinomial("learned", shape=(PIXELS,)),
    "zero-inflated": lambda: ZeroInflatedNegativeBinomial("learned", shape=(PIXELS,), initial=0.7),
}
each = pytest.mark.parametrize("name", ALL)


def make(name: str) -> Any:
    likelihood = ALL[name]()
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(1)))
    return likelihood


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Softplus(), nn.Linear(8, outputs))


def data(likelihood: Any, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.rand(rows, PIXELS, generator=seeded(2), dtype=torch.float64)
    return (x if isinstance(likelihood.head, GaussianHead) else torch.poisson(3 * x, generator=seeded(3))).to(
        dtype
    )


def model_of(name: str, kind: Any = VAE, **options: Any) -> Any:
    torch.manual_seed(0)
    likelihood = make(name)
    return kind(
        mlp(PIXELS, 4), mlp(2, PIXELS * likelihood.values_per_element), likelihood, **options
    ).double()


@each
def test_the_density_is_the_heads(name: str) -> None:
    likelihood = make(name).double()
    params = torch.randn(5, PIXELS * likelihood.values_per_element, generator=seeded(), dtype=torch.float64)
    x = data(likelihood, 5)
    whole = torch.cat((params, likelihood.logarithm.expand(5, PIXELS)), 1)
    torch.testing.assert_close(likelihood.log_prob(params, x), likelihood.head.log_prob(whole, x))
    assert likelihood.mean(params).shape == x.shape == likelihood.sample(params).shape
    if not isinstance(likelihood.head, ZeroInflatedNegativeBinomial):
        fixed: list[Likelihood] = [
            Gaussian(v) if isinstance(likelihood.head, GaussianHead) else NegativeBinomial(v)
            for v in likelihood.logarithm.exp().expand(PIXELS).tolist()
        ]
        parts = [like.log_prob(params[:, [i]], x[:, [i]]) for i, like in enumerate(fixed)]
        torch.testing.assert_close(likelihood.log_prob(params, x), torch.stack(parts).sum(0))


@each
def test_flows_and_forces_have_all_gradients(name: str) -> None:
    likelihood = make(name).double()
    torch.manual_seed(0)
    decoder = mlp(3, PIXELS * likelihood.values_per_element).double()
    x = data(likelihood, 4)
    z, rho = (0.5 * torch.randn(4, 3, generator=seeded(i), dtype=torch.float64) for i in (7, 8))
    eps, alpha = torch.full((2, 3), 0.01, dtype=torch.float64), torch.tensor([0.9, 1.0], dtype=torch.float64)
    leaves = [*decoder.parameters(), *likelihood.parameters()]

    def gradients(run: Callable[..., Any]) -> list[Tensor]:
        start = z.clone().requires_grad_()
        found = run(decoder, start, rho, x, eps, alpha, likelihood)
        total = sum((part * (i + 1)).square().sum() for i, part in enumerate(found))
        return [*found, *torch.autograd.grad(total, [start, *leaves])]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = [gradients(ops.hamiltonian_flow) for _ in range(4)]
    expected = gradients(reference.hamiltonian_flow)
    for found in runs:
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))
    forces = [f(decoder, z, x, likelihood) for f in (ops.log_px_and_force, reference.log_px_and_force)]
    for a, b in zip(*forces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        ops.log_px(decoder, z[None], x, likelihood)[0], likelihood.log_prob(decoder(z), x).detach()
    )


@each
@pytest.mark.parametrize("kind", [VAE, IWAE, HVAE])
def test_it_trains_with_the_model_and_resumes(name: str, kind: Any, tmp_path: Path) -> None:
    options = {"num_steps": 2, "step_size": 0.01} if kind is HVAE else {}

    def make_model() -> Any:
        return model_of(name, kind, **options).float()

    x = data(make_model().likelihood, 24, torch.float32)
    loader = DataLoader(TensorDataset(x), 8)
    whole, before = make_model(), make_model()
    fit(whole, loader, epochs=4, progress=False)
    parameter = whole.likelihood.logarithm
    assert torch.equal(parameter, before.likelihood.logarithm) == ("given" in name)
    first = make_model()
    fit(first, loader, epochs=2, progress=False, run_dir=tmp_path)
    second = make_model()
    fit(second, loader, epochs=4, progress=False, run_dir=tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert any("likelihood.log_" in key for key in whole.state_dict())
    again = pickle.loads(pickle.dumps(copy.deepcopy(whole)))
    assert torch.equal(again.likelihood.logarithm, parameter)
    assert torch.equal(again(x, generator=seeded()), whole(x, generator=seeded()))
    whole.double()
    assert whole(x.double()).dtype == torch.float64
    assert whole.sample(3).shape == (3, PIXELS) and whole.log_likelihood(x[:3].double(), 5).isfinite().all()


@each
@pytest.mark.filterwarnings("error")
def test_tracin_counts_it_without_being_asked(name: str) -> None:
    model = model_of(name)
    x = data(model.likelihood, 6)
    found = tracin(model, x)
    g = vae_gradients(model, x, 3).mean(1)
    torch.testing.assert_close(found.influence(x[:2]), g[:2] @ g.T, rtol=1e-10, atol=1e-10)
    assert ("likelihood.log_" in str(found.coverage())) == ("given" not in name)


@each
@pytest.mark.filterwarnings("ignore:.*copies are trained")
def test_regret(name: str) -> None:
    model = model_of(name)
    x = data(model.likelihood, 3)
    before = copy.deepcopy(model.state_dict())
    found = ood.LikelihoodRegret(model, num_steps=3, num_samples=2).refit(x)
    assert found.losses.isfinite().all()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])


def test_a_scale_a_channel_of_images() -> None:
    likelihood = Gaussian("learned", shape=(3, 1, 1), initial=0.2)
    decoder = nn.Sequential(
        nn.Linear(4, 48), nn.Unflatten(1, (3, 4, 4)), nn.ConvTranspose2d(3, 3, 3, padding=1)
    )
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    model = HVAE(encoder, decoder, likelihood, num_steps=2, step_size=0.01)
    x = torch.rand(5, 3, 4, 4, generator=seeded())
    model.loss(x).backward()
    assert likelihood.log_scale.grad.shape == (3, 1, 1) and (likelihood.log_scale.grad != 0).all()
    scales = likelihood.log_scale.exp().detach()
    params = torch.rand(5, 3, 4, 4, generator=seeded(1))
    expected = torch.distributions.Normal(params, scales).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(params, x).detach(), expected)


@pytest.mark.parametrize("kind", [VAE, HVAE])
def test_the_optimum_is_that_of_probabilistic_pca(kind: Any) -> None:
    """Tipping, Bishop 1999: linear networks with a learned scale reach the mean of the discarded eigenvalues."""
    torch.manual_seed(0)
    samples, dim, latents = 2000, 6, 2
    factors = torch.randn(dim, latents, generator=seeded(11)) * 1.5
    x = torch.randn(samples, latents, generator=seeded(12)) @ factors.T
    x = x + 0.5 * torch.randn(samples, dim, generator=seeded(13))
    x = x - x.mean(0)
    values = torch.linalg.eigvalsh(x.T @ x / samples)
    noise = float(values[:-latents].mean())
    options = {"num_steps": 1, "step_size": 0.01, "tempering": "none"} if kind is HVAE else {}
    model = kind(nn.Linear(dim, 2 * latents), nn.Linear(latents, dim), Gaussian("learned"), **options)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(900):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, 3 * (1 - step / 900))
        optimizer.zero_grad()
        model.loss(x, generator=seeded(step)).backward()
        optimizer.step()
    found = float(model.likelihood.log_scale.exp().square())
    assert found == pytest.approx(noise, rel=0.02)
    # log N(x; 0, W W^T + s^2 I) at the optimum, in closed form.
    kept = values[-latents:].log().sum()
    evidence = -0.5 * (dim * math.log(2 * math.pi) + float(kept) + (dim - latents) * math.log(noise) + dim)
    estimates = model.log_likelihood(x, 200, generator=seeded(14))
    error = float(estimates.std()) / math.sqrt(samples)
    assert abs(float(estimates.mean()) - evidence) < max(0.02, 0.2 * error)


def test_refusals() -> None:
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (
            lambda: Gaussian("learned", shape=5),
            TypeError,
            "Gaussian: shape: expected a sequence of .*, got int",
        ),
        (
            lambda: Gaussian("learned", initial="a"),
            TypeError,
            "Gaussian: initial: expected a number, got str",
        ),
        (
            lambda: Gaussian("learnt"),
            ValueError,
            "scale: expected a number, a tensor or 'learned', got 'learnt'",
        ),
        (
            lambda: Gaussian("learned", initial=0.0),
            ValueError,
            "initial: expected a finite number above 0, got 0",
        ),
        (
            lambda: Gaussian("learned", shape=(3, -1)),
            ValueError,
            r"shape: expected positive integers, got \(3, -1\)",
        ),
        (lambda: Gaussian(torch.tensor([1.0, -1.0])), ValueError, "scale: expected finite numbers above 0"),
        (
            lambda: Gaussian(nn.Parameter(torch.ones(3))),
            TypeError,
            "for a learned scale pass scale='learned'",
        ),
        (
            lambda: Gaussian("learned", shape=(5,)).log_prob(torch.zeros(2, 3), torch.zeros(2, 3)),
            ValueError,
            r"a learned parameter of shape \[5\] does not fit a sample of shape \[3\]",
        ),
        (
            lambda: ZeroInflatedNegativeBinomial("learned").log_prob(torch.zeros(2, 3), torch.zeros(2, 3)),
            ValueError,
            r"expected \[B, C \* 2, ...\], got \[2, 3\]",
        ),
    ]
    for run, kind, message in cases:
        with pytest.raises(kind, match=message):
            run()
    assert Gaussian(0.3) == Gaussian(scale=0.3) != Gaussian(0.4)
    assert isinstance(Gaussian("learned"), LearnedLikelihood) and not isinstance(Gaussian(), nn.Module)


def test_modes_inside_a_decoder_stay() -> None:
    """A frozen BatchNorm in a decoder that trains, and the other way round."""
    decoder = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    model = HVAE(nn.Linear(4, 6), decoder, Gaussian("learned"), num_steps=2, step_size=0.01).train()
    decoder[1].eval()
    model.loss(torch.rand(6, 4)).backward()
    assert not decoder[1].training and decoder[2].training
    decoder.eval()
    decoder[2].train()
    ops.log_px_and_force(decoder, torch.rand(6, 3), torch.rand(6, 4), Gaussian("learned"))
    assert decoder[2].training and not decoder[1].training


def test_likelihoods_of_both_kinds_take_each_others_place() -> None:
    model = model_of("one scale").float()
    x = data(model.likelihood, 3, torch.float32)
    model.likelihood = Gaussian(0.5)
    assert "likelihood.log_scale" not in model.state_dict() and model(x).isfinite().all()
    model.likelihood = Gaussian("learned")
    assert "likelihood.log_scale" in model.state_dict() and model(x).isfinite().all()


@pytest.mark.filterwarnings("error")
def test_scales_of_another_precision_are_read() -> None:
    model = HVAE(
        nn.Linear(5, 6), nn.Linear(3, 5), Gaussian(torch.full((5,), 0.5, dtype=torch.float64)), num_steps=2
    )
    for _ in range(2):
        model.loss(torch.rand(4, 5)).backward()


@pytest.mark.parametrize("name", ["one scale", "one dispersion"])
def test_a_backward_pass_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    model = model_of(name, HVAE, num_steps=2, step_size=0.01).float()
    decoder = nn.Sequential(
        nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 1, 2), nn.Flatten()
    )
    model.decoder = nn.Sequential(decoder, nn.Linear(9, PIXELS))
    x = data(model.likelihood, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(x).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.decoder.parameters())


def test_networks_in_another_precision_than_the_likelihood() -> None:
    networks = nn.Linear(PIXELS, 4).double(), nn.Linear(2, PIXELS).double()
    x = torch.rand(3, PIXELS, dtype=torch.float64)
    for kind in (VAE, HVAE):
        model = kind(*networks, Gaussian("learned"))
        assert model.loss(x).isfinite() and model.sample(2).dtype == torch.float64
        assert model.log_likelihood(x, 3).isfinite().all()
