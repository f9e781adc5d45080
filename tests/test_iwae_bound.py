"""fastvae.ops.iwae_bound: value and gradients against all draws at once, and flat memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import likelihoods, reference
from fastvae.ops import iwae_bound
from fastvae.ops import iwae_bound as public

bound_module = __import__("fastvae.ops.iwae_bound", fromlist=["_tiles"])

D, B, K = 3, 4, 7
ESTIMATORS = ("standard", "stl", "dreg")


def encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2 * D)).double()


def decoder() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6), nn.SiLU(), nn.Linear(6, 12)).double()


class Residual(nn.Module):
    """Nothing that kernels take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 12)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.last(z + torch.tanh(self.first(z)))
        return out


class Conditional(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs + 2, outputs)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.cat([x.flatten(1), c], 1))
        return out


def problem(kind: str) -> tuple[nn.Module, nn.Module, Tensor, Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    x, given = torch.rand(B, 3, 2, 2, dtype=torch.float64), {}
    likelihood: Any = "bernoulli"
    enc, dec = encoder(), decoder()
    if kind == "counts":
        x, likelihood = torch.randint(0, 5, x.shape).double(), likelihoods.Poisson()
    elif kind == "read":
        dec = Residual().double()
    elif kind == "learned":
        likelihood = likelihoods.Gaussian("learned").double()
    elif kind == "condition":
        enc, dec = Conditional(12, 2 * D).double(), Conditional(D, 12).double()
        given = {"condition": torch.randn(B, 2, dtype=torch.float64).requires_grad_()}
    elif kind == "weight":
        given = {"weight": torch.rand(B, 3, 2, 2, dtype=torch.float64).round()}
    return enc, dec, x, likelihood, given


def leaves(enc: nn.Module, dec: nn.Module, likelihood: Any, given: dict[str, Tensor]) -> list[Tensor]:
    own = [*likelihood.parameters()] if isinstance(likelihood, nn.Module) else []
    return [*enc.parameters(), *dec.parameters(), *own, *(t for t in given.values() if t.requires_grad)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["kernels", "counts", "read", "learned", "condition", "weight"])
def test_value_and_gradients(kind: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enc, dec, x, likelihood, given = problem(kind)
    # Two draws a tile, and a last one.
    monkeypatch.setattr(bound_module, "_CODES_AT_ONCE", 2 * B)
    noise = torch.randn(K, B, D, dtype=torch.float64)
    options = {"estimator": estimator, "beta": 0.7, **given}
    found = iwae_bound(enc, dec, x, likelihood, num_samples=K, noise=noise, **options)
    wanted = reference.iwae_bound(enc, dec, x, noise, likelihood, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 2, B, dtype=torch.float64)
    parameters = leaves(enc, dec, likelihood, given)
    for mine, theirs in zip(
        *(torch.autograd.grad(y @ weight, parameters) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_it_is_the_models_bound(estimator: str) -> None:
    enc, dec, x, _, _ = problem("kernels")
    model = fastvae.IWAE(enc, dec, num_samples=K, estimator=estimator, beta=0.5)
    noise = torch.randn(K, B, D, dtype=torch.float64)
    found = -iwae_bound(enc, dec, x, num_samples=K, noise=noise, beta=0.5, estimator=estimator)
    wanted = model(x, noise=noise)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    parameters = list(model.parameters())
    for mine, theirs in zip(
        *(torch.autograd.grad(y.sum(), parameters) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_draws_are_standard_normal_and_of_the_generator() -> None:
    enc, dec, x, _, _ = problem("kernels")

    def draw(seed: int, samples: int = 5) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return iwae_bound(enc, dec, x, num_samples=samples, generator=generator)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    noise = bound_module._drawn(torch.zeros(3, 2, dtype=torch.float64), torch.Generator().manual_seed(0))
    drawn = noise(0, 20000)
    assert torch.equal(drawn[100:150], noise(100, 50))
    # Means within five standard errors.
    assert float(drawn.mean((0,)).abs().max()) < 5 / 20000**0.5
    assert float((drawn.var((0,)) - 1).abs().max()) < 5 * (2 / 20000) ** 0.5
    assert float(torch.corrcoef(drawn.flatten(1).T).fill_diagonal_(0).abs().max()) < 5 / 20000**0.5


def test_the_bound_rises_to_the_evidence() -> None:
    """Of a linear Gaussian model, exactly known."""
    torch.manual_seed(0)
    dec, enc = nn.Linear(2, 5).double(), nn.Linear(5, 4).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    covariance = dec.weight @ dec.weight.T + torch.eye(5, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(dec.bias, covariance).log_prob(x)
    with torch.no_grad():
        found = iwae_bound(
            enc, dec, x, "gaussian", num_samples=200_000, generator=torch.Generator().manual_seed(0)
        )
    # Log weights spread by about one nat here: 1 / sqrt(K), a few times over.
    torch.testing.assert_close(found, exact.detach(), rtol=0, atol=0.03)


def test_coupled_decoders_and_autocast_run_at_once() -> None:
    enc, dec, x, _, _ = problem("kernels")
    dec = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Linear(6, 12)).double()
    noise = torch.randn(K, B, D, dtype=torch.float64)
    torch.testing.assert_close(
        iwae_bound(enc, dec, x, num_samples=K, noise=noise), reference.iwae_bound(enc, dec, x, noise)
    )


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_samples": 0}, ValueError, "num_samples: expected an int of at least 1, got 0"),
        ({"num_samples": 2, "estimator": "best"}, ValueError, "estimator: expected one of"),
        (
            {"num_samples": 2, "noise": torch.zeros(3, B, D).double()},
            ValueError,
            r"noise: expected \[2, 4, 3\]",
        ),
        ({"num_samples": 2, "beta": float("nan")}, ValueError, "beta: expected a finite number, got nan"),
        ({"num_samples": 2, "condition": torch.zeros(3, 1)}, ValueError, "condition: expected 4 samples"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], error: type[Exception], text: str) -> None:
    enc, dec, x, _, _ = problem("kernels")
    with pytest.raises(error, match=text):
        public(enc, dec, x, **options)


def test_a_second_derivative_is_refused() -> None:
    enc, dec, x, _, _ = problem("kernels")
    found = iwae_bound(enc, dec, x, num_samples=3).sum()
    with pytest.raises(NotImplementedError, match=r"fastvae\.reference\.iwae_bound"):
        torch.autograd.grad(found, dec[0].weight, create_graph=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_of_many_draws_goes_in_tiles(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enc, dec, x, _, _ = problem("kernels")
    model = fastvae.IWAE(enc, dec, num_samples=K, estimator=estimator)
    noise = torch.randn(K, B, D, dtype=torch.float64)
    steps = [model.objective(x, noise=noise)]
    monkeypatch.setattr(fastvae.models.iwae, "_OUTPUTS_AT_ONCE", 0)
    steps.append(model.objective(x, noise=noise))
    for name in ("mu", "logvar", "z_0", "z", "log_px", "loss"):
        torch.testing.assert_close(*(getattr(step, name) for step in steps), rtol=1e-12, atol=1e-12)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(step.loss.sum(), parameters) for step in steps), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    drawn = [model(x, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("kind", ["kernels", "read"])
def test_memory_does_not_grow_with_draws(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that the graph holds: beside the weights [K, B] the same for every K."""
    enc, dec, x, likelihood, _ = problem(kind)
    monkeypatch.setattr(bound_module, "_CODES_AT_ONCE", 2 * B)

    def held(draws: int) -> int:
        numbers = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            iwae_bound(enc, dec, x, likelihood, num_samples=draws)
        return numbers - draws * B

    assert held(40) <= held(4)
