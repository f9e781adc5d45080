"""What pythae 0.1.2's HVAE does otherwise than the paper, by name: the table of docs/bring-your-model.md.

With all of them a few lines of PyTorch are pythae's HVAE; with none, they are ours.
"""

from __future__ import annotations

import math
from collections.abc import Set

import pytest
import torch
from peers import peer
from torch import Tensor, nn
from torch.nn import functional as F

import fastvae
from fastvae.integrations.pythae import from_pythae

# Of an HVAE of theirs with "bce": that it takes logits.
pytestmark = pytest.mark.filterwarnings("ignore:Carefull, this model expects")

DIM, STEPS, EPS, BETA_0 = 4, 5, 0.1, 0.3
IN_TRAINING = ("old momentum moves", "momentum not tempered", "softplus scale", "constant forces")
IN_LIKELIHOOD = "final momentum in the weight"


def pythae_hvae() -> nn.Module:
    """With a decoder of logits, which their HVAE takes, and weights large enough that forces matter."""
    models = peer("pythae.models")
    torch.manual_seed(0)

    class Logits(models.base.base_model.BaseDecoder):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(DIM, 32), nn.Softplus(), nn.Linear(32, 784))

        def forward(self, z: Tensor) -> dict[str, Tensor]:
            return {"reconstruction": self.layers(z)}

    config = models.HVAEConfig(
        input_dim=(1, 28, 28), latent_dim=DIM, n_lf=STEPS, eps_lf=EPS, beta_zero=BETA_0
    )
    config.reconstruction_loss = "bce"
    model: nn.Module = models.HVAE(config, decoder=Logits())
    model.double()
    with torch.no_grad():
        model.decoder.layers[2].weight.mul_(2)
        # Not as rounded to float32.
        model.eps_lf.fill_(EPS)
        model.beta_zero_sqrt.fill_(BETA_0**0.5)
    return model


def binary(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(1)).round().double()


def log_px_of(model: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    logits = model.decoder(z)["reconstruction"]
    return -F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(1)


def weights(model: nn.Module, x: Tensor, eps: Tensor, gamma: Tensor, deviations: Set[str]) -> Tensor:
    """log w of each sample with those deviations: that of training, or with the last of them that of get_nll."""
    encoded = model.encoder(x)
    mu, logvar = encoded.embedding, encoded.log_covariance
    z_0 = mu + eps * (F.softplus(logvar) if "softplus scale" in deviations else (logvar / 2).exp())

    def force(z: Tensor) -> Tensor:
        if "constant forces" in deviations:
            at = z if z.requires_grad else z.detach().requires_grad_()
            return torch.autograd.grad(log_px_of(model, at, x).sum(), at)[0].detach() - z
        return torch.autograd.grad(log_px_of(model, z, x).sum(), z, create_graph=True)[0] - z

    def sqrt_beta(k: int) -> float:
        return 1 / ((1 - BETA_0**-0.5) * (k / STEPS) ** 2 + BETA_0**-0.5)

    z, rho = z_0, gamma / BETA_0**0.5
    rho_0 = rho
    for k in range(STEPS):
        half = rho + EPS / 2 * force(z)
        z = z + EPS * (rho if "old momentum moves" in deviations else half)
        rho = half + EPS / 2 * force(z)
        if "momentum not tempered" not in deviations:
            rho = sqrt_beta(k) / sqrt_beta(k + 1) * rho
    start = (logvar + eps.square()).sum(1) / 2 + BETA_0 * rho_0.square().sum(1) / 2
    if IN_LIKELIHOOD in deviations:
        start = (logvar + eps.square()).sum(1) / 2 + BETA_0**0.5 * rho.square().sum(1) / 2
    return log_px_of(model, z, x) - (z.square() + rho.square()).sum(1) / 2 + start


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def noise(count: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    like = torch.empty(count, DIM, dtype=torch.float64)
    return torch.randn_like(like), torch.randn_like(like)


def test_with_all_deviations_it_is_pythaes() -> None:
    model, x = pythae_hvae(), binary()
    drawn = noise()
    loss = -weights(model, x, *drawn, set(IN_TRAINING)).mean()
    # What theirs leaves out: minus log densities of the noise, without their constants.
    loss = loss + sum(part.square().sum(1).mean() / 2 for part in drawn)
    torch.manual_seed(5)
    expected = model({"data": x}).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # Products of 784 terms, summed in other orders.
    torch.testing.assert_close(gradient(model, loss), gradient(model, expected), rtol=1e-9, atol=1e-11)


def test_with_none_it_is_ours() -> None:
    theirs, x = pythae_hvae(), binary()
    options = {"tempering": "fixed", "beta_0": BETA_0, "step_size": EPS, "num_steps": STEPS}
    # Bernoulli of logits, which their HVAE takes and their other models do not.
    ours = from_pythae(theirs, fastvae.HVAE, likelihood="bernoulli", **options).double()
    drawn = noise()
    loss = -weights(theirs, x, *drawn, set()).mean()
    found = ours.objective(x, noise=torch.stack(drawn)).loss.mean()
    # A step size is max sigmoid(parameter), rounded once in float32 before .double().
    torch.testing.assert_close(found, loss, rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient(theirs, found), gradient(theirs, loss), rtol=1e-5, atol=1e-6)


def test_the_likelihood_with_its_deviation_is_get_nll() -> None:
    """Its trajectories are right; only the weight's momentum is not."""
    model, x = pythae_hvae(), binary(2)
    torch.manual_seed(3)
    expected = model.get_nll(x, n_samples=7, batch_size=7)
    torch.manual_seed(3)
    estimates = []
    for image in x:
        like = torch.empty(7, DIM, dtype=torch.float64)
        drawn = torch.randn_like(like), torch.randn_like(like)
        log_w = weights(model, image.expand(7, 1, 28, 28), *drawn, {IN_LIKELIHOOD})
        estimates.append(float(log_w.detach().logsumexp(0)) - math.log(7))
    assert expected == pytest.approx(sum(estimates) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("deviation", "percent"),
    [
        ("old momentum moves", 38),
        ("momentum not tempered", 132),
        ("softplus scale", 22),
        ("constant forces", 52),
    ],
)
def test_what_each_does_to_the_gradient(deviation: str, percent: float) -> None:
    """|change| / |gradient| of one batch with the same noise, as the table of docs/bring-your-model.md has it."""
    model, x, drawn = pythae_hvae(), binary(200), noise(200)
    right, wrong = (
        gradient(model, -weights(model, x, *drawn, which).mean()) for which in (set(), {deviation})
    )
    assert float(100 * (wrong - right).norm() / right.norm()) == pytest.approx(percent, abs=0.5)


def test_what_the_last_does_to_the_likelihood() -> None:
    """Nats that get_nll is off in the mean, from 200 samples of 20 images, as the same table has it."""
    model, x = pythae_hvae(), binary(20).repeat_interleave(200, 0)
    # Constant forces have the same values, and take less memory.
    right, wrong = (
        weights(model, x, *noise(4000), {"constant forces", *which})
        .detach()
        .view(20, 200)
        .logsumexp(1)
        .mean()
        for which in ([], [IN_LIKELIHOOD])
    )
    assert float(wrong - right) == pytest.approx(0.7, abs=0.05)
