"""Networks that write into what they are given: data and codes stay as they are, and every result too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_problems import seeded
from network_modules import Plain, of
from torch import Tensor, nn

from fastvae import HVAE, IWAE, VAE, JacobianL1VAE, metrics, ood, ops, reference
from fastvae.influence import TracIn
from fastvae.models import BaseVAE
from fastvae.network.cache import read_network

ROWS, PIXELS, DIM = 4, 12, 3

plain: Any = Plain.forward

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be lowered|.*is not read|.*trained by torch.vmap")


class Centred(nn.Module):
    """What people write before the first layer: x -= mean; x /= deviation."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.layer, self.in_place = nn.Linear(PIXELS, 2 * DIM), in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x -= 0.5
            x /= 0.3
        else:
            x = (x - 0.5) / 0.3
        found: Tensor = self.layer(x)
        return found


class Scaled(nn.Module):
    """Codes are scaled before they are decoded, as latent diffusion does."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.layer, self.in_place = nn.Linear(DIM, PIXELS), in_place

    def forward(self, z: Tensor) -> Tensor:
        if self.in_place:
            z *= 3
        else:
            z = z * 3
        found: Tensor = self.layer(z.tanh())
        return found


def rectified(in_place: bool) -> nn.Module:
    return nn.Sequential(nn.LeakyReLU(0.1, inplace=in_place), nn.Linear(DIM, PIXELS))


def model_of(
    decoder: Callable[[bool], nn.Module], in_place: bool, kind: Any = VAE, **options: Any
) -> BaseVAE:
    torch.manual_seed(0)
    made: BaseVAE = kind(Centred(in_place), decoder(in_place), latent_dim=DIM, **options).double()
    return made


def trained(model: BaseVAE, x: Tensor) -> Tensor:
    losses = model(x, generator=seeded())
    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)
    return torch.cat([losses, *(g.flatten() for g in gradients if g is not None)])


def codes() -> Tensor:
    return torch.randn(ROWS, DIM, dtype=torch.float64, generator=seeded(1))


def force(model: BaseVAE, x: Tensor) -> Tensor:
    z = codes()
    found = torch.cat([part.flatten() for part in ops.log_px_and_force(model.decoder, z, x)])
    assert torch.equal(z, codes())
    return found


def of_codes(model: BaseVAE, x: Tensor) -> Tensor:
    z, alpha = codes(), torch.ones(2, dtype=torch.float64)
    found = [
        ops.hamiltonian_flow(model.decoder, z, z, x, 0.1, alpha)[2],
        ops.log_px(model.decoder, z[None], x)[0],
        ops.jacobian_l1(model.decoder, z, "none"),
        ops.jacobian_l1(model.decoder, z, "none", estimator="difference"),
        reference.jacobian_l1(model.decoder, z, "none"),
        ops.elbo(model.encoder, model.decoder, x, z),
        ops.iwae_bound(model.encoder, model.decoder, x, num_samples=2, noise=torch.stack([z, 2 * z])),
    ]
    assert torch.equal(z, codes())
    return torch.cat(found)


CALLS: dict[str, tuple[Any, dict[str, Any], Callable[[Any, Tensor], Tensor]]] = {
    "VAE": (VAE, {}, trained),
    "HVAE": (HVAE, {"num_steps": 2}, trained),
    "IWAE": (IWAE, {"num_samples": 3}, trained),
    "JacobianL1VAE": (JacobianL1VAE, {"beta": 1.0, "gamma": 0.1}, trained),
    "operators": (VAE, {}, of_codes),
    "force": (VAE, {}, force),
    "log_likelihood": (VAE, {}, lambda model, x: model.log_likelihood(x, 5, generator=seeded())),
    "reconstruct": (VAE, {}, lambda model, x: model.reconstruct(x)),
    "regret": (VAE, {}, lambda model, x: ood.LikelihoodRegret(model, num_steps=2, num_samples=3).predict(x)),
    "ais": (VAE, {}, lambda model, x: metrics.ais(model, x, 5, 2, num_leapfrog_steps=2).log_px),
    "TracIn": (
        VAE,
        {},
        lambda model, x: TracIn(model, x, [None], lambda m, c: 1.0, num_samples=2).influence(x.clone()),
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("decoder", [Scaled, rectified], ids=["scaled", "rectified"])
def test_a_network_that_changes_its_input_in_place(decoder: Callable[[bool], nn.Module], call: str) -> None:
    kind, options, function = CALLS[call]
    given = torch.rand(ROWS, PIXELS, dtype=torch.float64, generator=seeded(2)).round()
    results = []
    for in_place in (True, False):
        x = given.clone()
        results.append(function(model_of(decoder, in_place, kind, **options), x).detach())
        assert torch.equal(x, given)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)  # the same numbers, in float64


class Loss(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.encoder = Centred(in_place)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).square().sum(1)


def test_tracin_of_any_module_that_changes_its_input() -> None:
    given = torch.rand(ROWS, PIXELS, dtype=torch.float64, generator=seeded(2))
    results = []
    for in_place in (True, False):
        torch.manual_seed(0)
        x = given.clone()
        results.append(TracIn(Loss(in_place).double(), x, [None], lambda m, c: 1.0).influence(x[:2]))
        assert torch.equal(x, given)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def shifts(m: Any, z: Tensor) -> Tensor:
    z -= 0.5
    z.clamp_(-1, 1)
    return plain(m, z)


def sets_an_entry(m: Any, z: Tensor) -> Tensor:
    z[:, 0] = 0.25
    z[:, 1] *= 2
    return plain(m, z)


def through_a_view(m: Any, z: Tensor) -> Tensor:
    view = z.view(-1, 3, 1)
    view.mul_(2)
    return plain(m, z)


def fills(m: Any, z: Tensor) -> Tensor:
    h, y = m.first(z), z.new_zeros(len(z), 6)
    for place in range(6):
        y[:, place] = h[:, place].sin() * place
    y[:, -2] = 1.5
    return m.last(y)


def in_parts(m: Any, z: Tensor) -> Tensor:
    h = m.first(z).view(-1, 2, 3)
    h[:, 0, 1:] += h[:, 1, :2].tanh()
    h[..., 0:1] = z[:, None, :1]
    return m.last(h.flatten(1).sin())


def masked(m: Any, z: Tensor) -> Tensor:
    h = m.first(z)
    h[h > 0.5] = 0.25
    h[h.sum(1) < -1] = 0
    return m.last(h.sin())


def copied(m: Any, z: Tensor) -> Tensor:
    h = m.first(z)
    return m.last(torch.empty_like(h).copy_(h.sin()) * torch.empty_like(h).copy_(h[:, :1]))


WRITE = {
    each.__name__: each for each in (shifts, sets_an_entry, through_a_view, fills, in_parts, masked, copied)
}


@pytest.mark.parametrize("name", WRITE)
def test_what_is_written_in_place_is_read(name: str) -> None:
    torch.manual_seed(0)
    decoder = of(WRITE[name])().double()
    z, x = codes().requires_grad_(), torch.rand(ROWS, 4, dtype=torch.float64)
    network = read_network(decoder, z)
    assert network.sweeps.by_autograd == []
    results = []
    for each in (ops, reference):
        log_px, force = each.log_px_and_force(decoder, z, x, "gaussian")
        total = each.jacobian_l1(decoder, z) + log_px.sin().sum() + force.sin().sum()
        found = torch.autograd.grad(total, [z, *decoder.parameters()])
        results.append([log_px, force, total, *found])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)  # rounding in float64
    assert torch.equal(z.detach(), codes())


def test_a_condition_that_is_written_to_is_read() -> None:
    def centres(m: Any, z: Tensor, condition: Tensor) -> Tensor:
        condition -= 1
        z += condition
        return plain(m, z)

    decoder, z, given = of(centres)().double(), codes(), codes()
    read_network(decoder, z, condition=given)
    x = torch.rand(ROWS, 4, dtype=torch.float64)
    found = ops.log_px_and_force(decoder, z, x, "gaussian", condition=given)
    wanted = reference.log_px_and_force(lambda each: plain(decoder, each + codes() - 1), z, x, "gaussian")
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(z, codes()) and torch.equal(given, codes())
