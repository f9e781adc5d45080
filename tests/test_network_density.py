"""Likelihoods of a user's own, in plain PyTorch, whose densities are read and swept like networks."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from flow_problems import assert_near
from torch import Tensor, nn

import fastvae
from fastvae.likelihoods import Categorical, Likelihood
from fastvae.network import density
from fastvae.network.heads import Head, make_head


class OfTwo(Likelihood):
    """Two numbers for each element."""

    @property
    def values_per_element(self) -> int:
        return 2

    def as_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)


@dataclass(frozen=True)
class NegativeBinomial(OfTwo):
    """Counts: logarithms of the mean and of the inverse dispersion."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, r = params.flatten(1).exp().chunk(2, 1)
        x = x.flatten(1).to(mean.dtype)
        log_px = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
        return (log_px + r * torch.log(r / (r + mean)) + x * torch.log(mean / (r + mean))).sum(1)


@dataclass(frozen=True)
class ZeroInflatedPoisson(OfTwo):
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        log_rate, gate = params.flatten(1).chunk(2, 1)
        x = x.flatten(1).to(gate.dtype)
        counted = x * log_rate - log_rate.exp() - torch.lgamma(x + 1) - nn.functional.softplus(gate)
        zero = torch.stack([counted, -nn.functional.softplus(-gate)], -1).logsumexp(-1)
        return torch.where(x == 0, zero, counted).sum(1)


@dataclass(frozen=True)
class Laplace(Likelihood):
    scale: float = 0.5

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        mean, x = self._match(params, x)
        return (-(x - mean).abs() / self.scale - math.log(2 * self.scale)).sum(1)


@dataclass(frozen=True)
class Distribution(OfTwo):
    """One of torch.distributions, without its checks, which look at numbers."""

    name: str

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        a, b = params.flatten(1).chunk(2, 1)
        density = {
            "normal": lambda: torch.distributions.Normal(a, b.exp(), validate_args=False),
            "negative binomial": lambda: torch.distributions.NegativeBinomial(
                a.exp(), logits=b, validate_args=False
            ),
            "beta": lambda: torch.distributions.Beta(a.exp(), b.exp(), validate_args=False),
        }[self.name]()
        return density.log_prob(x.flatten(1)).sum(1)


@dataclass(frozen=True)
class Loss(Likelihood):
    """One of torch.nn.functional."""

    name: str

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        losses = getattr(nn.functional, self.name)(
            params.flatten(1), x.flatten(1).to(params), reduction="none"
        )
        return -losses.sum(1)


@dataclass(frozen=True)
class Mixture(Likelihood):
    """Of two normal densities around each element's two means."""

    @property
    def values_per_element(self) -> int:
        return 2

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        means = params.flatten(1).unflatten(1, (-1, 2))
        parts = -0.5 * (x.flatten(1)[..., None] - means).square() - 0.5 * math.log(2 * math.pi)
        return (parts.logsumexp(-1) - math.log(2)).sum(1)


CASES: dict[str, tuple[Likelihood, int, str]] = {
    "negative binomial": (NegativeBinomial(), 2, "counts"),
    "zero-inflated Poisson": (ZeroInflatedPoisson(), 2, "counts"),
    "Laplace": (Laplace(), 1, "numbers"),
    "mixture": (Mixture(), 2, "numbers"),
    "categorical": (Categorical(5), 5, "classes"),
    "torch's normal": (Distribution("normal"), 2, "numbers"),
    "torch's negative binomial": (Distribution("negative binomial"), 2, "counts"),
    "torch's beta": (Distribution("beta"), 2, "probabilities"),
    "torch's mean squared error": (Loss("mse_loss"), 1, "numbers"),
    "torch's cross-entropy": (Loss("binary_cross_entropy_with_logits"), 1, "probabilities"),
}


def problem(name: str, batch: int = 3, elements: int = 4) -> tuple[nn.Module, Likelihood, Tensor, Tensor]:
    likelihood, outputs, kind = CASES[name]
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Linear(2, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, outputs * elements)
    ).double()
    x = {
        "counts": lambda: torch.poisson(torch.full((batch, elements), 2.0)),
        "numbers": lambda: torch.randn(batch, elements),
        "probabilities": lambda: torch.rand(batch, elements),
        "classes": lambda: torch.randint(0, 5, (batch, elements)),
    }[kind]()
    return decoder, likelihood, torch.randn(batch, 2, dtype=torch.float64), x


def flow(ops: Any, decoder: nn.Module, likelihood: Likelihood, z: Tensor, x: Tensor) -> list[Tensor]:
    z = z.clone().requires_grad_()
    alpha = torch.full((2,), 0.9, dtype=z.dtype)
    given = z, torch.ones_like(z), x, torch.tensor(0.05, dtype=z.dtype), alpha
    arguments = (decoder, *given, likelihood)
    results = ops.hamiltonian_flow(*arguments)[:3]
    total = sum((result * (1 + torch.arange(result.numel()).view_as(result))).sum() for result in results)
    return [*results, *torch.autograd.grad(total, [z, *decoder.parameters()])]


@pytest.mark.parametrize("name", CASES)
def test_a_flow_is_the_references(name: str) -> None:
    decoder, likelihood, z, x = problem(name)
    expected = flow(fastvae.reference, decoder, likelihood, z, x)
    # Once more than it takes to be written down as straight code.
    for _ in range(5):
        for found, wanted in zip(flow(fastvae.ops, decoder, likelihood, z, x), expected, strict=True):
            assert_near(found, wanted, 1e-10, name)
    y = decoder(z).detach()
    assert make_head(likelihood, x, y).at(y).kept is not None


@pytest.mark.parametrize("name", CASES)
def test_force_and_its_gradient(name: str) -> None:
    decoder, likelihood, z, x = problem(name)
    z.requires_grad_()
    log_px, force = fastvae.ops.log_px_and_force(decoder, z, x, likelihood)
    wanted = likelihood.log_prob(decoder(z), x)
    (own,) = torch.autograd.grad(wanted.sum(), z, create_graph=True)
    leaves = [z, *decoder.parameters()]
    found = torch.autograd.grad([log_px.sum(), force.sin().sum()], leaves)
    expected = torch.autograd.grad([wanted.sum(), own.sin().sum()], leaves)
    for a, e in zip((log_px, force, *found), (wanted, own, *expected), strict=True):
        assert_near(a.detach(), e.detach(), 1e-10, name)


@dataclass(frozen=True)
class Learned(Likelihood):
    """Holds a tensor, which another may change."""

    scale: Tensor

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -((x.flatten(1) - params.flatten(1)) / self.scale).square().sum(1)


@dataclass(frozen=True)
class LooksAtNumbers(Likelihood):
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        if bool((x < 0).any()):
            raise ValueError("negative")
        return -(x.flatten(1) - params.flatten(1)).square().sum(1)


@dataclass(frozen=True)
class OfTheBatch(Likelihood):
    """No density: a sample's depends on the others."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -(x - params).square().sum(1) * params.mean()


class Changed(Likelihood):
    factor = 1.0

    def __init__(self, power: float) -> None:
        self.power = power

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -self.power * (x - params).square().sum(1)


@pytest.mark.parametrize("likelihood", [Learned(torch.tensor(2.0)), LooksAtNumbers(), OfTheBatch()])
def test_what_cannot_be_read_goes_through_autograd(likelihood: Likelihood) -> None:
    y, x = torch.randn(3, 4), torch.rand(3, 4)
    head = make_head(likelihood, x, y)
    at, own = head.at(y), Head(likelihood, x).at(y)
    assert at.kept is None
    assert torch.equal(at.log_px, own.log_px) and torch.equal(at.residual, own.residual)


def test_another_number_is_another_density() -> None:
    y, x = torch.randn(3, 4), torch.rand(3, 4)
    likelihood = Changed(1.0)
    first = make_head(likelihood, x, y).at(y)
    likelihood.power = 2.0
    second = make_head(likelihood, x, y).at(y)
    assert first.kept is not None and second.kept is not None
    torch.testing.assert_close(second.log_px, 2 * first.log_px)


FACTOR = 1.0
TABLE = {"factor": 1.0}
LAYER = nn.Identity()


def helped(x: Tensor) -> Tensor:
    return FACTOR * x


class Global(Changed):
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -FACTOR * (x - params).square().sum(1)


class ByAFunction(Changed):
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -helped((x - params).square()).sum(1)


class OfTheClass(Changed):
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -self.factor * (x - params).square().sum(1)


class Tabled(Changed):
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -TABLE["factor"] * (x - params).square().sum(1)


class ByALayer(Changed):
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -LAYER((x - params).square()).sum(1)


def enclosed(factor: float) -> tuple[Likelihood, Any]:
    class Enclosed(Changed):
        def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
            return -factor * (x - params).square().sum(1)

    def change() -> None:
        nonlocal factor
        factor = 2.0

    return Enclosed(1.0), change


@pytest.mark.parametrize("kind", ["global", "function", "helper", "class", "closure", "table", "layer"])
def test_what_changes_around_a_density_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = sys.modules[__name__]
    likelihood, change = {
        "global": lambda: (Global(1.0), lambda: monkeypatch.setattr(here, "FACTOR", 2.0)),
        "function": lambda: (ByAFunction(1.0), lambda: monkeypatch.setattr(here, "FACTOR", 2.0)),
        "helper": lambda: (ByAFunction(1.0), lambda: monkeypatch.setattr(here, "helped", lambda x: 2 * x)),
        "class": lambda: (
            OfTheClass(1.0),
            lambda: monkeypatch.setattr(OfTheClass, "factor", 2.0, raising=False),
        ),
        "closure": lambda: enclosed(1.0),
        "table": lambda: (Tabled(1.0), lambda: monkeypatch.setitem(TABLE, "factor", 2.0)),
        "layer": lambda: (ByALayer(1.0), lambda: monkeypatch.setattr(LAYER, "forward", lambda x: 2 * x)),
    }[kind]()
    y, x = torch.randn(3, 4), torch.rand(3, 4)
    first = make_head(likelihood, x, y).at(y)
    change()
    second = make_head(likelihood, x, y).at(y)
    torch.testing.assert_close(second.log_px, 2 * first.log_px)
    torch.testing.assert_close(second.residual, 2 * first.residual)
    assert (first.kept is None) == (kind in ("table", "layer"))


def test_shapes_that_do_not_fit_are_the_likelihoods_own_error() -> None:
    y = torch.randn(3, 4)
    with pytest.raises(ValueError, match="Laplace: x: 5 elements a sample need 5 decoder outputs"):
        make_head(Laplace(), torch.rand(3, 5), y).at(y)


def test_the_gradient_to_the_data_is_the_likelihoods_own() -> None:
    decoder, likelihood, z, x = problem("Laplace")
    x = x.double().requires_grad_()
    results = []
    for ops in (fastvae.ops, fastvae.reference):
        log_px = ops.hamiltonian_flow(
            decoder, z, z, x, torch.tensor(0.05).double(), torch.ones(2).double(), likelihood
        )[2]
        results.append(torch.autograd.grad(log_px.sum(), x)[0])
    assert_near(results[0], results[1], 1e-10)


def test_few_are_remembered() -> None:
    y, x = torch.randn(2, 4), torch.rand(2, 4)
    for power in range(40):
        make_head(Changed(float(power)), x[:, :4], y).at(y)
    assert len(density._known) <= 32
