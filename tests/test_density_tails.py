"""Densities where numbers are large or small, to 12 digits: PyTorch's forms and the kernels', against mpmath."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvae import ops
from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    GaussianHead,
    Laplace,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
    ZeroInflatedNegativeBinomial,
)
from fastvae.likelihoods.fused import fused_log_prob

mp = pytest.importorskip("mpmath").mp

LOGITS = (-1e4, -100.0, -20.0, -1.0, -1e-3, 0.0, 1e-8, 0.3, 0.999, 1.0, 5.0, 37.0, 100.0, 700.0, 1e4)
COUNTS = (0, 1, 2, 5, 63, 64, 65, 1000, 10**6)
LOG_MEANS = (-50.0, -20.0, -1.0, 0.0, 3.0, 6.9, math.log(9e5), math.log(1e6), 14.0, 20.0)
LOG_DISPERSIONS = (-7.0, -0.7, 1.1, 4.15, 4.2, 7.0, 18.0, 32.0)
REAL = ((0.3,), (-2.0,), (1e6,), (0.3 + 1e-6,))
LOCATIONS = ((0.0,), (0.3,), (1e4,))


def log_sigmoid(a: Any) -> Any:
    return -mp.log1p(mp.exp(-a)) if a > 0 else a - mp.log1p(mp.exp(a))


def negative_binomial(a: Any, r: Any, x: Any) -> Any:
    rising = mp.loggamma(x + r) - mp.loggamma(r) - mp.loggamma(x + 1)
    return rising - r * mp.log1p(mp.exp(a) / r) - x * mp.log1p(r / mp.exp(a))


def exact(likelihood: Likelihood, y: Any, x: Any) -> Any:
    """log p of one element in 80 digits."""
    a = y[0]
    if isinstance(likelihood, Bernoulli):
        return x * log_sigmoid(a) + (1 - x) * log_sigmoid(-a)
    if isinstance(likelihood, ContinuousBernoulli):
        return x * a - (mp.log(mp.expm1(a) / a) if a else 0)
    if isinstance(likelihood, (Gaussian, GaussianHead)):
        floored = isinstance(likelihood, GaussianHead)
        log_scale = (
            max(y[1], mp.log(mp.mpf(likelihood.min_scale))) if floored else mp.log(mp.mpf(likelihood.scale))
        )
        return -(((x - a) / mp.exp(log_scale)) ** 2) / 2 - log_scale - mp.log(2 * mp.pi) / 2
    if isinstance(likelihood, Laplace):
        return -abs(x - a) / mp.mpf(likelihood.scale) - mp.log(2 * mp.mpf(likelihood.scale))
    if isinstance(likelihood, StudentT):
        d, s = mp.mpf(likelihood.df), mp.mpf(likelihood.scale)
        constant = mp.loggamma((d + 1) / 2) - mp.loggamma(d / 2) - mp.log(mp.pi * d) / 2 - mp.log(s)
        return constant - (d + 1) / 2 * mp.log1p(((x - a) / s) ** 2 / d)
    if isinstance(likelihood, Poisson):
        return x * a - mp.exp(a) - mp.loggamma(x + 1)
    if isinstance(likelihood, DiscretizedLogistic):
        last = likelihood.num_classes - 1
        scale = max(mp.exp(y[1]), mp.mpf(likelihood.min_scale))
        upper, lower = ((mp.nint(x * last) + side / mp.mpf(2)) / last for side in (1, -1))
        if mp.nint(x * last) == 0:
            return log_sigmoid((upper - a) / scale)
        if mp.nint(x * last) == last:
            return log_sigmoid((a - lower) / scale)
        width = mp.log(-mp.expm1(-(upper - lower) / scale))
        return log_sigmoid((upper - a) / scale) + log_sigmoid((a - lower) / scale) + width
    assert isinstance(likelihood, (NegativeBinomial, ZeroInflatedNegativeBinomial))
    dispersion = likelihood.dispersion
    counted = negative_binomial(a, mp.exp(y[-1]) if dispersion == "decoder" else mp.mpf(dispersion), x)
    if isinstance(likelihood, NegativeBinomial):
        return counted
    if x > 0:
        return log_sigmoid(-y[1]) + counted
    return mp.log1p(mp.exp(log_sigmoid(-y[1])) * mp.expm1(counted))


def at(*grids: tuple[float, ...]) -> list[tuple[float, ...]]:
    return list(product(*grids))


CASES: list[tuple[str, Likelihood, list[tuple[float, ...]], tuple[Any, ...]]] = [
    ("Bernoulli", Bernoulli(), at(LOGITS), (0.0, 0.3, 1.0)),
    ("continuous Bernoulli", ContinuousBernoulli(), at(LOGITS), (0.0, 0.3, 0.5, 1.0)),
    *((f"Gaussian {s}", Gaussian(s), list(LOCATIONS), REAL) for s in (1e-6, 0.1, 1e6)),
    *((f"Laplace {s}", Laplace(s), list(LOCATIONS), REAL) for s in (1e-6, 0.1, 1e6)),
    *(
        (f"Student t {d} {s}", StudentT(d, s), list(LOCATIONS), REAL)
        for d, s in product((1e-3, 0.5, 3, 99, 101, 9999, 2e4, 1e8, 1e15), (1e-6, 1.0))
    ),
    ("Gaussian head", GaussianHead(), at((0.0, 0.3, 1e4), (-100.0, math.log(1e-6), -5.0, 0.0, 30.0)), REAL),
    ("Poisson", Poisson(), at(LOG_MEANS), COUNTS),
    *(
        (f"negative binomial {r}", NegativeBinomial(r), at(LOG_MEANS), COUNTS)
        for r in (1e-3, 0.5, 3.0, 63.9, 64.0, 1e3, 1e8, 1e14)
    ),
    ("dispersed", NegativeBinomial("decoder"), at(LOG_MEANS, LOG_DISPERSIONS), COUNTS),
    *(
        (f"zero-inflated {r}", ZeroInflatedNegativeBinomial(r), at(LOG_MEANS, LOGITS), (0, 1, 10**6))
        for r in (1e-3, 3.0, 1e8)
    ),
    (
        "zero-inflated, dispersed",
        ZeroInflatedNegativeBinomial("decoder"),
        at(LOG_MEANS, (-1e4, -1.0, 0.0, 1e4), (-7.0, 1.1, 18.0)),
        (0, 1, 64, 10**6),
    ),
    *(
        (
            f"discretized logistic {n}",
            DiscretizedLogistic(n),
            at((-1e3, -0.1, 0.0, 0.3, 0.5, 1e3), (-30.0, -9.0, -3.0, 0.0, 3.0, 30.0)),
            (0.0, 1.0, round(0.3 * (n - 1)) / (n - 1)),
        )
        for n in (2, 16, 256)
    ),
]
each = pytest.mark.parametrize(
    ("likelihood", "outputs", "data"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)


def points(
    likelihood: Likelihood, outputs: list[tuple[float, ...]], data: tuple[Any, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Any]]:
    """An element a sample, and its log p."""
    pairs = [(y, x[0] if isinstance(x, tuple) else x) for y, x in product(outputs, data)]
    params = torch.tensor([y for y, _ in pairs], dtype=dtype)
    x = torch.tensor([[x] for _, x in pairs], dtype=dtype)
    with mp.workdps(80):
        numbers = zip(params.tolist(), x.flatten().tolist(), strict=True)
        return params, x, [exact(likelihood, [mp.mpf(v) for v in y], mp.mpf(x)) for y, x in numbers]


def both(likelihood: Likelihood, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    fused = fused_log_prob(likelihood, params, x)
    assert fused is not None
    return likelihood.log_prob(params, x), fused


@each
def test_twelve_digits(
    likelihood: Likelihood, outputs: list[tuple[float, ...]], data: tuple[Any, ...]
) -> None:
    params, x, wanted = points(likelihood, outputs, data, torch.float64)
    # Kernels add to a sum over elements, of which less than a rounding of 1 is nothing.
    for found, slack in zip(both(likelihood, params, x), (1e-300, 1e-15), strict=True):
        for i, (value, right) in enumerate(zip(found.tolist(), wanted, strict=True)):
            assert abs(value - right) <= 1e-12 * abs(right) + slack, (params[i], x[i], value, float(right))


@each
def test_float32_is_as_exact_as_pytorch(
    likelihood: Likelihood, outputs: list[tuple[float, ...]], data: tuple[Any, ...]
) -> None:
    params, x, wanted = points(likelihood, outputs, data, torch.float32)
    plain, fused = (found.tolist() for found in both(likelihood, params, x))
    for i, (theirs, ours, right) in enumerate(zip(plain, fused, wanted, strict=True)):
        # Or within 16 roundings of what is added: the rest of Stirling's formula is good to some of log Gamma(8).
        allowed = 2 * abs(theirs - right) + 16 * 2.0**-23 * max(1, abs(right))
        assert abs(ours - right) <= allowed, (params[i], x[i], ours, theirs, float(right))


@pytest.mark.parametrize("classes", [2, 5, 1000])
def test_classes_of_large_logits(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(30, classes, generator=generator, dtype=torch.float64)
    logits *= torch.tensor([1e-8, 1.0, 30.0, 1e3, 1e4, 1e6], dtype=torch.float64).repeat(5)[:, None]
    x = torch.randint(classes, (30, 1), generator=generator)
    x[::2, 0] = logits[::2].argmax(1)
    decoder = nn.Linear(30, classes, bias=False).double()
    with torch.no_grad():
        decoder.weight.copy_(logits.T)
    by_kernel = ops.log_px(decoder, torch.eye(30, dtype=torch.float64)[None], x, Categorical(classes))[0]
    plain = Categorical(classes).log_prob(logits, x)
    with mp.workdps(60):
        for row, at, *found in zip(
            logits.tolist(), x.flatten().tolist(), by_kernel.tolist(), plain.tolist(), strict=True
        ):
            largest = max(row)
            total = mp.fsum(mp.exp(mp.mpf(a) - largest) for a in row)
            right = mp.mpf(row[at]) - largest - mp.log(total)
            # What rounds to 0 beside the logits is 0.
            assert all(abs(value - right) <= 1e-12 * abs(right) + 1e-15 for value in found)
