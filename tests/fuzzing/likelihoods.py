"""Decoders that end in logits or probabilities, under every likelihood, with data as people bring them.

The truth is the likelihood's own ``log_prob`` of the logits, in float64. A decoder that contradicts its likelihood
must be refused, data that are no data must be refused or show in their own sample alone, and what is accepted must
have the true value and the true first and second derivative, however large its logits are.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvae import VAE, ops, reference
from fastvae.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

CASES = 12

DIM, PIXELS, BATCH = 2, 12, 3


class Own(Likelihood):
    """A density that the package does not know."""

    def __init__(self, inner: Likelihood) -> None:
        self.inner = inner

    @property
    def values_per_element(self) -> int:
        return self.inner.values_per_element

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return self.inner.log_prob(params, x)

    def as_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.inner.as_float(x, dtype)

    def check(self, x: Tensor) -> None:
        self.inner.check(x)


class Ending(nn.Module):
    """Logits, and what is done to them by functions."""

    def __init__(self, logits: nn.Module, end: Callable[[Tensor], Tensor], traced: bool) -> None:
        super().__init__()
        self.logits, self.end, self.traced = logits, end, traced

    def forward(self, z: Tensor) -> Tensor:
        h = self.logits(z)
        if not self.traced and bool(h.isnan().all()):  # a branch on values, which torch.fx does not follow
            return h
        return self.end(h)


def _logits(draw: random.Random, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(DIM, 8), draw.choice([nn.Tanh(), nn.GELU(), nn.Softplus()])]
    if draw.random() < 0.6:
        layers.insert(1, nn.LayerNorm(8))  # cannot be lowered
    last = nn.Linear(8, outputs)
    with torch.no_grad():
        last.weight.mul_(draw.choice([1.0, 1.0, 10.0, 60.0]))
    return nn.Sequential(*layers, last)


def _decoder(draw: random.Random, logits: nn.Sequential, sigmoid: bool) -> nn.Module:
    if draw.random() < 0.5:
        return nn.Sequential(*logits, *([nn.Sigmoid()] if sigmoid else []), nn.Flatten())
    ends: list[Callable[[Tensor], Tensor]] = [lambda h: h.flatten(1), lambda h: h.view(len(h), -1)]
    if sigmoid:
        ends = [
            torch.sigmoid,
            lambda h: h.sigmoid().reshape(len(h), -1),
            lambda h: torch.special.expit(h).unsqueeze(1).flatten(1),
            lambda h: nn.functional.sigmoid(h)[:],
        ]
    return Ending(logits, draw.choice(ends), traced=draw.random() < 0.5)


def _data(draw: random.Random, likelihood: Likelihood, dtype: torch.dtype) -> tuple[Tensor, str]:
    """x and what is wrong with it: "" for nothing, "shown" for NaN, "refused" for what only ``check`` finds."""
    x = torch.rand(BATCH, PIXELS, dtype=dtype)
    kind = draw.choice(["plain", "plain", "binary", "bool", "uint8", "int64", "rounded", "nan", "outside"])
    classes = likelihood.num_classes if isinstance(likelihood, Categorical) else 256
    if kind == "binary":
        return x.round(), ""
    if kind == "bool":
        return x > 0.5, ""
    if kind == "uint8":
        return torch.randint(min(classes, 256), x.shape, dtype=torch.uint8), ""
    if kind == "int64" and isinstance(likelihood, Categorical):
        return torch.randint(classes, x.shape), ""
    if kind == "rounded":
        return x.round() * (1 + torch.finfo(torch.float32).eps), ""
    if kind == "nan":
        x[1, draw.randrange(PIXELS)] = math.nan
        return x, "shown"
    if kind == "outside" and not isinstance(likelihood, Gaussian):
        x[1, draw.randrange(PIXELS)] = draw.choice([300.0, -0.5, 1.01])
        return x, "refused"
    return x, ""


def _twice(log_px: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = log_px(z)
    (first,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    return value.detach(), first.detach(), second


def _compare(found: Tensor, exact: Tensor, share: float, what: str) -> None:
    scale = 1 + exact.abs().max().item()
    error = (found.double() - exact).abs().max().item()
    assert error <= share * scale, f"{what}: off by {error} where values are up to {scale}:\n{found}\n{exact}"


def run_case(seed: int) -> str:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.float64])
    stock = draw.choice(
        [Bernoulli(), Bernoulli(probs=True), Gaussian(draw.choice([0.1, 1.0])), Categorical(5)]
    )
    wants_sigmoid = isinstance(stock, Bernoulli) and stock.probs
    sigmoid = wants_sigmoid if draw.random() < 0.75 else not wants_sigmoid
    own = draw.random() < 0.3 and not wants_sigmoid
    likelihood = Own(stock) if own else stock
    logits = _logits(draw, PIXELS * stock.values_per_element).to(dtype)
    decoder = _decoder(draw, logits, sigmoid).to(dtype)
    encoder = nn.Linear(PIXELS, 2 * DIM, dtype=dtype)
    x, wrong = _data(draw, stock, dtype)
    z = torch.randn(BATCH, DIM, dtype=dtype)

    if not own and isinstance(stock, Bernoulli) and sigmoid != stock.probs:
        try:
            model = VAE(encoder, decoder, likelihood, check_finite=False)
            model.log_px(z, x)
        except ValueError as error:
            assert "likelihood: Bernoulli" in str(error), error
            return "contradiction refused"
        p = decoder(z)
        assert stock.probs and bool(((p >= 0) & (p <= 1)).all()), "a contradiction was not noticed"
        return "values that may be probabilities"

    model = VAE(encoder, decoder, likelihood)
    if wrong:
        try:
            model(x)
        except ValueError as error:
            assert "x" in str(error), error
        else:
            raise AssertionError("wrong data were not noticed")
        model.check_finite = False
        for found in (model.log_px(z, x), ops.log_px(decoder, z[None], x, likelihood)[0]):
            assert torch.isnan(found).tolist() == [False, wrong == "shown", False], found
        return f"wrong data {wrong}"

    assert bool(torch.isfinite(model(x)).all())
    wide = copy.deepcopy(logits).double()
    head = Bernoulli() if wants_sigmoid else stock
    # Gaussian and Bernoulli parameters are what the decoder returns; a Gaussian may end in a sigmoid.
    end = torch.sigmoid if sigmoid and not wants_sigmoid else lambda h: h

    def truth(z: Tensor) -> Tensor:
        return head.log_prob(end(wide(z)), x)

    value, first, second = _twice(truth, z.double())
    share = 1e-9 if dtype == torch.float64 else 2e-4
    for name, found, exact in zip(
        ("log_px", "its gradient", "its second derivative"),
        _twice(lambda z: model.log_px(z, x), z),
        (value, first, second),
        strict=True,
    ):
        _compare(found, exact, share, f"model: {name}")
    _compare(ops.log_px(decoder, z[None], x, likelihood)[0], value, share, "ops.log_px")
    _compare(reference.log_px(decoder, z[None], x, likelihood)[0], value, share, "reference.log_px")
    rho, alpha = torch.zeros_like(z), torch.ones(1, dtype=dtype)
    step = 1e-3
    flowed = ops.hamiltonian_flow(decoder, z, rho, x, step, alpha, likelihood)
    exactly = reference.hamiltonian_flow(
        lambda z: end(wide(z)), z.double(), rho.double(), x, step, alpha.double(), head
    )
    # A step moves z by its gradient, so that errors of the gradient come back in the value.
    for name, found, exact in zip(("z", "rho", "log_px"), flowed, exactly, strict=True):
        _compare(
            found.detach(), exact.detach(), share * (1 + first.abs().max().item() * step), f"flow: {name}"
        )
    return "agreed on an own likelihood" if own else "agreed"
