"""Weights of x's elements: densities, flows and forces with them against sums over single elements; missing values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_problems import seeded
from torch import Tensor, nn
from weight_problems import LIKELIHOODS, PIXELS, SumOfElements, data, holed, weights

from fastvae import Network, ops, reference
from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood, NegativeBinomial, Poisson

each = pytest.mark.parametrize("name", LIKELIHOODS)
# As of the flow without weights: sums of some hundred products in another order, below 1e-12 after K steps.
EXACT = 1e-10


@each
def test_log_prob_is_the_weighted_sum_of_elements(name: str) -> None:
    likelihood, weight = LIKELIHOODS[name], weights(5)
    x = holed(data(likelihood, 5), weight)
    params = torch.randn(5, PIXELS * likelihood.values_per_element, generator=seeded(), dtype=torch.float64)
    (params,) = leaves = [params.requires_grad_()]
    found, wanted = (
        density.log_prob(params, x, *given)
        for density, given in ((likelihood, (weight,)), (SumOfElements(likelihood, weight), ()))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    cotangents = torch.randn(5, generator=seeded(), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad(y, leaves, cotangents, create_graph=True)[0] for y in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    left_out = likelihood._weight_of_outputs(weight, params) == 0
    assert left_out.any() and bool((mine[left_out] == 0).all())
    directions = torch.randn(params.shape, generator=seeded(2), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((g * directions).sum(), leaves)[0] for g in (mine, theirs))
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@each
def test_weights_of_one_change_nothing(name: str) -> None:
    likelihood, x = LIKELIHOODS[name], data(LIKELIHOODS[name], 5)
    params = torch.randn(5, PIXELS * likelihood.values_per_element, generator=seeded(), dtype=torch.float64)
    wanted = likelihood.log_prob(params, x)
    for ones in (
        torch.ones(5, PIXELS),
        torch.ones(1, 1, dtype=torch.bool),
        torch.ones(5, 1, dtype=torch.int8),
    ):
        torch.testing.assert_close(likelihood.log_prob(params, x, ones), wanted, rtol=1e-12, atol=0)


@each
def test_what_is_left_out_is_never_computed(name: str) -> None:
    """Decoder outputs whose exponential overflows, where nothing was observed."""
    likelihood = LIKELIHOODS[name]
    weight = torch.tensor([[1, 0, 1, 0, 1, 1]], dtype=torch.bool)
    x = holed(data(likelihood, 2), weight)
    params = torch.zeros(2, PIXELS * likelihood.values_per_element, dtype=torch.float64)
    params[likelihood._weight_of_outputs(weight.expand(2, -1), params) == 0] = 1e300
    params.requires_grad_()
    found = likelihood.log_prob(params, x, weight)
    (grad,) = torch.autograd.grad(found.sum(), params)
    assert found.isfinite().all() and grad.isfinite().all()


def test_images_with_a_weight_a_pixel() -> None:
    """[B, 1, H, W] for [B, 3, H, W], whatever the decoder's layout is."""
    x = torch.rand(2, 3, 4, 5, generator=seeded(), dtype=torch.float64)
    weight = (torch.rand(2, 1, 4, 5, generator=seeded(1)) < 0.5).double()
    for likelihood in (LIKELIHOODS["categorical"], LIKELIHOODS["Gaussian head"], Bernoulli()):
        params = torch.randn(2, 3 * likelihood.values_per_element, 4, 5, generator=seeded(2)).double()
        found = likelihood.log_prob(params, holed(x, weight), weight)
        pixels = (t.movedim(1, 3).flatten(0, 2)[weight.flatten() == 1] for t in (params, x))
        each_pixel = likelihood.log_prob(*(t[..., None] for t in pixels))
        torch.testing.assert_close(found.sum(), each_pixel.sum(), rtol=1e-12, atol=0)


def test_unfit_weights_are_refused() -> None:
    x, params = data(Gaussian(), 5), torch.zeros(5, PIXELS, dtype=torch.float64)
    for weight, message in (
        (torch.ones(PIXELS), r"Gaussian: weight: expected the shape of x, \[5, 6\], or sizes of 1"),
        (torch.ones(5, 3), r"got \[5, 3\]"),
        (torch.ones(5, PIXELS, requires_grad=True), "a weight has no gradient"),
        (torch.ones(5, PIXELS, device="meta"), "expected cpu as x, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            Gaussian().log_prob(params, x, weight)
    for weight, message in ((1.0, "expected a tensor, got float"), (torch.ones(5, PIXELS) * 1j, "complex")):
        with pytest.raises(TypeError, match=message):
            Gaussian().log_prob(params, x, weight)  # type: ignore[arg-type]


class Residual(nn.Module):
    """No chain of layers: swept, with kernels and without weights as well."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(2, 7), nn.LayerNorm(7), nn.Linear(7, outputs)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.inp(z))
        return self.out(self.norm(h + torch.sin(h)))


class Unreadable(Residual):
    """Goes through autograd."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * (1.0 if float(z.detach().sum()) < 1e9 else 2.0)


def decoder(kind: str, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    if kind == "chain":
        return nn.Sequential(nn.Linear(2, 7), nn.Softplus(), nn.Linear(7, outputs)).double()
    return (Residual if kind == "graph" else Unreadable)(outputs).double()


def outputs_and_gradients(
    function: Any,
    network: nn.Module,
    x: Tensor,
    weight: Tensor,
    likelihood: Likelihood,
    of_x: bool,
    seed: int,
) -> list[Tensor]:
    z, rho = torch.randn(2, len(x), 2, generator=seeded(seed), dtype=torch.float64).unbind(0)
    start = [z.requires_grad_(), rho.requires_grad_()]
    eps = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([0.9, 0.8, 0.95], dtype=torch.float64, requires_grad=True)
    x = x.clone().requires_grad_(of_x)
    found = function(
        network, *start, x, eps, alpha, likelihood, **({} if weight is None else {"weight": weight})
    )
    leaves = [*start, eps, alpha, *network.parameters(), *([x] if of_x else [])]
    cotangents = [torch.randn(y.shape, generator=seeded(9), dtype=torch.float64) for y in found]
    return [*found, *torch.autograd.grad(found, leaves, cotangents)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in LIKELIHOODS for kind in ("chain", "graph")]
    + [(name, "autograd") for name in ("Bernoulli", "Laplace", "zero-inflated")],
)
@pytest.mark.filterwarnings("ignore:fastvae.ops")
def test_flow_and_its_gradient(name: str, kind: str) -> None:
    likelihood = LIKELIHOODS[name]
    network = decoder(kind, PIXELS * likelihood.values_per_element)
    of_x = name in ("Bernoulli", "Gaussian", "Student t") and kind != "autograd"
    # Code that was written down at first must not hold the data of that call.
    for seed in range(1 if kind == "autograd" else 5):
        weight = weights(4, seed)
        x = holed(data(likelihood, 4, seed), weight)
        mine = outputs_and_gradients(
            ops.hamiltonian_flow, network, x, weight, likelihood, of_x and seed > 3, seed
        )
        theirs = outputs_and_gradients(
            reference.hamiltonian_flow,
            network,
            x,
            None,
            SumOfElements(likelihood, weight, is_exact=True),
            of_x and seed > 3,
            seed,
        )
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b.nan_to_num(), rtol=EXACT, atol=EXACT)


@each
def test_force_and_evidence(name: str) -> None:
    likelihood, weight = LIKELIHOODS[name], weights(4)
    network = decoder("chain", PIXELS * likelihood.values_per_element)
    x, oracle = holed(data(likelihood, 4), weight), SumOfElements(likelihood, weight)
    z = torch.randn(4, 2, generator=seeded(), dtype=torch.float64)
    wanted = reference.log_px_and_force(network, z, x, oracle)
    for found in (
        ops.log_px_and_force(network, z, x, likelihood, weight=weight),
        reference.log_px_and_force(network, z, x, likelihood, weight=weight),
    ):
        torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)
    net = Network(network, likelihood, z=z)
    torch.testing.assert_close(net.force(z, x, weight=weight), wanted, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(net.log_px(z, x, weight=weight), wanted[0], rtol=EXACT, atol=EXACT)
    codes = torch.stack([z, z + 1])
    found = ops.log_px(network, codes, x, likelihood, weight=weight)
    torch.testing.assert_close(found[0], wanted[0].detach(), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found[1], oracle.log_prob(network(z + 1), x).detach(), rtol=EXACT, atol=EXACT)
    # One for all samples.
    first = ops.log_px(network, codes, x, likelihood, weight=weight[:1])
    torch.testing.assert_close(first[:, :1], found[:, :1], rtol=EXACT, atol=EXACT)


def test_in_inference_mode() -> None:
    network = decoder("graph", PIXELS)
    for likelihood in (Bernoulli(), Poisson()):
        weight = weights(4)
        x, z = data(likelihood, 4), torch.zeros(4, 2, dtype=torch.float64)
        wanted = ops.log_px_and_force(network, z, x, likelihood, weight=weight)
        with torch.inference_mode():
            found = ops.log_px_and_force(network, z, x.clone(), likelihood, weight=weight.clone())
        torch.testing.assert_close(found, tuple(each.detach() for each in wanted))


@pytest.mark.parametrize("likelihood", [Gaussian("learned", shape=(PIXELS,)), NegativeBinomial("learned")])
def test_learned_parameters(likelihood: Any) -> None:
    """Of an element that nobody observed there is no gradient to its scale."""
    network, weight = decoder("chain", PIXELS), weights(4)
    weight[:, 2] = 0
    likelihood.double()
    x = holed(data(likelihood.head, 4), weight)
    z = torch.randn(4, 2, generator=seeded(), dtype=torch.float64)
    log_px, _ = ops.log_px_and_force(network, z, x, likelihood, weight=weight)
    assert likelihood.logarithm is not None
    scale = likelihood.logarithm.expand(PIXELS)
    params = torch.cat((network(z), scale.expand(4, -1)), 1)
    wanted = SumOfElements(likelihood.head, weight).log_prob(params, x)
    torch.testing.assert_close(log_px, wanted, rtol=EXACT, atol=EXACT)
    mine, theirs = (torch.autograd.grad(y.sum(), likelihood.logarithm)[0] for y in (log_px, wanted))
    torch.testing.assert_close(mine, theirs, rtol=EXACT, atol=EXACT)
    if mine.dim():
        assert mine[2] == 0 and bool((mine[:2] != 0).all())


class LogNormal(Likelihood):
    """Without weights."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return (-0.5 * (x.log() - params).square() - x.log() - 0.5 * math.log(2 * math.pi)).sum(1)


class WeightedLogNormal(Likelihood):
    """With weights."""

    def log_prob(self, params: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = torch.ones_like(x) if weight is None else weight
        log_x = x.masked_fill(weight == 0, 1).log()
        return (weight * (-0.5 * (log_x - params).square() - log_x - 0.5 * math.log(2 * math.pi))).sum(1)


@pytest.mark.filterwarnings("ignore:fastvae.ops")
def test_densities_of_a_users_own() -> None:
    network, weight = decoder("chain", PIXELS), weights(4)
    x, z = holed(data(Gaussian(), 4) + 0.1, weight), torch.zeros(4, 2, dtype=torch.float64)
    found = ops.log_px_and_force(network, z, x, WeightedLogNormal(), weight=weight)
    wanted = reference.log_px_and_force(network, z, x, SumOfElements(LogNormal(), weight))
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)
    with pytest.raises(TypeError, match=r"LogNormal: weight: expected log_prob\(params, x, weight=None\)"):
        ops.log_px_and_force(network, z, x, LogNormal(), weight=weight)
