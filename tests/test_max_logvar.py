"""A bound of the encoder's log variances: no overflow, gradients and scores that know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_problems import DIM, data, make, seeded
from torch import Tensor, nn

from fastvae import HVAE, IWAE, VAE, ConsistencyVAE, JacobianL1VAE
from fastvae.influence import TracIn
from fastvae.models import BaseVAE
from fastvae.noise import SampleNoise, Stream, draws_of, key_of_weights, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.sequential import refit_one

KINDS: dict[type[BaseVAE], dict[str, Any]] = {
    VAE: {},
    IWAE: {"num_samples": 2},
    HVAE: {"step_size": 1e-3},
    ConsistencyVAE: {"augment": lambda x: x.flip(1)},
    JacobianL1VAE: {},
}
each = pytest.mark.parametrize("kind", KINDS)


class Wide(nn.Module):
    """An encoder whose variances overflow."""

    def __init__(self, inner: nn.Module, shift: float = 100.0) -> None:
        super().__init__()
        self.inner, self.shift = inner, shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.inner(x).chunk(2, 1)
        return mu, logvar + self.shift


@each
def test_variances_do_not_overflow(kind: type[BaseVAE]) -> None:
    model = make(kind, "gaussian", max_logvar=3.0, **KINDS[kind])
    model.encoder = Wide(model.encoder)
    logvar = model.encode(data())[1]
    assert logvar.max() <= 3 and model(data()).isfinite().all()
    model.max_logvar = None
    assert model.encode(data())[1].min() > 90


@each
def test_small_variances_are_as_they_were(kind: type[BaseVAE]) -> None:
    bounded, plain = (make(kind, max_logvar=bound, **KINDS[kind]).double() for bound in (35, None))
    x = data(dtype=torch.float64)
    assert plain.max_logvar is None
    for mine, theirs in zip(bounded.encode(x), plain.encode(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_the_bound_is_smooth() -> None:
    model = make(VAE, max_logvar=1.0).double()
    x = data(25, torch.float64)
    for shift in (-6.0, 0.0, 1.0, 6.0):
        model.encoder = Wide(make(VAE).encoder.double(), shift)
        logvar = model.encoder(x)[1].detach().requires_grad_()
        model.encoder = Given(logvar)
        found = model.encode(x)[1]
        torch.testing.assert_close(found, -torch.logaddexp(-logvar, torch.tensor(-1.0).double()))
        (slope,) = torch.autograd.grad(found.sum(), logvar)
        torch.testing.assert_close(slope, torch.sigmoid(1 - logvar).detach())


class Given(nn.Module):
    """Means of 0 and these log variances, whatever x is."""

    def __init__(self, logvar: Tensor) -> None:
        super().__init__()
        self.logvar = logvar

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.logvar), self.logvar


@pytest.mark.parametrize("bound", [0.1, None])
def test_the_loss_by_hand(bound: float | None) -> None:
    model = make(VAE, max_logvar=bound)
    x, noise = data(), torch.randn(1, 5, DIM, generator=seeded())
    mu, logvar = model.encoder(x).chunk(2, 1)
    if bound is not None:
        logvar = bound - torch.nn.functional.softplus(bound - logvar)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    logits = model.decoder(mu + torch.exp(logvar / 2) * noise[0])
    log_px = torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(1)
    torch.testing.assert_close(model(x, noise=noise), kl - log_px)


def test_influence_and_regret_know_of_it() -> None:
    model = make(VAE, max_logvar=0.1).double().eval()
    x = data(4, torch.float64)
    rows = []
    for sample in x.split(1):
        mean: Any = 0
        for key in draws_of(keys_of(sample) ^ key_of_weights(model), 0, 2):
            noise = Stream(key[None]).normal((1, DIM)).transpose(0, 1)
            grads = torch.autograd.grad(model(sample, noise=noise).sum(), list(model.parameters()))
            mean = mean + torch.cat([grad.flatten() for grad in grads]) / 2
        rows.append(mean)
    g = torch.stack(rows)
    found = TracIn(model, x, None, num_samples=2).influence(x)
    torch.testing.assert_close(found, g @ g.T, rtol=1e-10, atol=1e-10)
    detector = LikelihoodRegret(model, num_steps=5, num_samples=3, lr=1e-2)
    refit = detector.refit(x)
    for i in range(4):
        _, losses = refit_one(model, x[[i]], SampleNoise(keys_of(x[[i]]), 0, 1), num_steps=5, lr=1e-2)
        torch.testing.assert_close(refit.losses[i], losses, rtol=1e-8, atol=1e-8)


def test_refusals_and_files(tmp_path: Path) -> None:
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="VAE: max_logvar: expected a finite number or None"):
            make(VAE, max_logvar=value)
    with pytest.raises(TypeError, match="VAE: max_logvar: expected a number, got str"):
        make(VAE, max_logvar="3")
    torch.save(make(VAE, max_logvar=3), tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert again.max_logvar == 3.0
    assert torch.equal(again(data(), generator=seeded()), make(VAE, max_logvar=3)(data(), generator=seeded()))
