"""What holds of every density: it integrates to one; derivatives and samples are those of what it integrates to.

Over all of x, by enumeration or quadrature: sum p = 1, E[x] is the mean, E[r] = 0 and E[r r^T] = -E[S] (Bartlett) of
residual r and curvature S, which are the kernels' where there are some.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_problems import seeded
from torch import Tensor

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

numpy = pytest.importorskip("numpy")
pytestmark = pytest.mark.usefixtures("one_thread")

number = st.floats(-1.5, 1.5)
scale = st.floats(0.02, 20.0)
LIKELIHOODS: dict[str, st.SearchStrategy[Likelihood]] = {
    "Bernoulli": st.just(Bernoulli()),
    "continuous Bernoulli": st.just(ContinuousBernoulli()),
    "Gaussian": st.builds(Gaussian, scale),
    "Gaussian head": st.just(GaussianHead()),
    "Laplace": st.builds(Laplace, scale),
    "Student t": st.builds(StudentT, st.floats(5.0, 50.0), scale),
    "categorical": st.builds(Categorical, st.integers(2, 9)),
    "discretized logistic": st.builds(DiscretizedLogistic, st.integers(2, 40)),
    "Poisson": st.just(Poisson()),
    "negative binomial": st.builds(NegativeBinomial, st.floats(0.3, 1e6)),
    "negative binomial, the decoder's dispersion": st.just(NegativeBinomial("decoder")),
    "zero-inflated": st.builds(ZeroInflatedNegativeBinomial, st.floats(0.3, 1e6)),
    "zero-inflated, the decoder's dispersion": st.just(ZeroInflatedNegativeBinomial("decoder")),
}
each = pytest.mark.parametrize("name", LIKELIHOODS)


def drawn(name: str) -> st.SearchStrategy[tuple[Likelihood, list[float]]]:
    """A likelihood, and the outputs of one element."""

    def with_outputs(likelihood: Likelihood) -> st.SearchStrategy[tuple[Likelihood, list[float]]]:
        values = likelihood.values_per_element
        return st.tuples(st.just(likelihood), st.lists(number, min_size=values, max_size=values))

    return LIKELIHOODS[name].flatmap(with_outputs)


def legendre(low: float, high: float, nodes: int = 200) -> tuple[Tensor, Tensor]:
    at, share = (torch.as_tensor(part) for part in numpy.polynomial.legendre.leggauss(nodes))
    return (low + high) / 2 + (high - low) / 2 * at, (high - low) / 2 * share


def support(likelihood: Likelihood, y: list[float]) -> tuple[Tensor, Tensor]:
    """All x, [N], and what p(x) is times in a sum over them."""
    if isinstance(likelihood, (Categorical, DiscretizedLogistic, Bernoulli)):
        classes = 2 if isinstance(likelihood, Bernoulli) else likelihood.num_classes
        return torch.linspace(0, 1, classes, dtype=torch.float64), torch.ones(classes, dtype=torch.float64)
    if isinstance(likelihood, (Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial)):
        return torch.arange(1500, dtype=torch.float64), torch.ones(1500, dtype=torch.float64)
    if isinstance(likelihood, ContinuousBernoulli):
        return legendre(0, 1)
    if isinstance(likelihood, StudentT):
        angle, share = legendre(-math.pi / 2, math.pi / 2)
        stretch = likelihood.scale * math.sqrt(likelihood.df)
        return y[0] + stretch * angle.tan(), share * stretch / angle.cos().square()
    if isinstance(likelihood, Laplace):  # whose density has a corner
        halves = [legendre(y[0], y[0] + side * 45 * likelihood.scale) for side in (-1, 1)]
        return torch.cat([at for at, _ in halves]), torch.cat([share.abs() for _, share in halves])
    assert isinstance(likelihood, (Gaussian, GaussianHead))
    reach = 12 * (math.exp(y[1]) if isinstance(likelihood, GaussianHead) else likelihood.scale)
    return legendre(y[0] - reach, y[0] + reach)


def derivatives(likelihood: Likelihood, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """r [N, n] and S [N, n, n]."""
    columns = torch.eye(params.shape[1], dtype=params.dtype).expand(len(params), -1, -1)
    if likelihood.has_element_kernel:
        data, text = likelihood._element_data(x, params.dtype), likelihood.element_spec
        internal = torch.ops.fastvae_internal
        _, r = internal.element_head(params, data, None, text, True)
        along = [
            internal.element_head_adjoint(params, data, None, v.contiguous(), None, None, text)
            for v in columns.unbind(2)
        ]
        return r, torch.stack(along, 2)
    leaf = params.clone().requires_grad_()
    (r,) = torch.autograd.grad(likelihood.log_prob(leaf, x).sum(), leaf, create_graph=True)
    along = [torch.autograd.grad(r[:, i].sum(), leaf, retain_graph=True)[0] for i in range(params.shape[1])]
    return r.detach(), torch.stack(along, 2)


def close(found: Tensor, wanted: Any, size: Tensor) -> None:
    """To 1e-9 of what is added up."""
    assert bool(((found - wanted).abs() <= 1e-9 * (1 + size)).all()), (found, wanted)


@each
def test_density_mean_and_derivatives_belong_together(name: str) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(drawn(name))
    def check(case: tuple[Likelihood, list[float]]) -> None:
        likelihood, y = case
        x, share = support(likelihood, y)
        params = torch.tensor([y], dtype=torch.float64).expand(len(x), -1).contiguous()
        p = share * likelihood.log_prob(params, x[:, None]).exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-9)
        if not isinstance(likelihood, DiscretizedLogistic):  # whose mean is the logistic variable's
            mean = likelihood.mean(params[:1]).flatten()
            close((p * x).sum(), mean, (p * x.abs()).sum())
        r, curvature = derivatives(likelihood, params, x[:, None])
        close(p @ r, 0, p @ r.abs())
        if not isinstance(likelihood, Laplace):  # the corner has all of its curvature
            products = r[:, :, None] * r[:, None, :]
            sums = [torch.einsum("x,xij->ij", p, part) for part in (products, curvature, products.abs())]
            close(sums[0], -sums[1], sums[2])

    check()


EXAMPLES: dict[str, tuple[Likelihood, list[float]]] = {
    "Bernoulli": (Bernoulli(), [0.7]),
    "continuous Bernoulli": (ContinuousBernoulli(), [-4.0]),
    "Gaussian": (Gaussian(0.3), [1.0]),
    "Gaussian head": (GaussianHead(), [1.0, -0.5]),
    "Laplace": (Laplace(0.3), [1.0]),
    "Student t": (StudentT(9.0, 0.3), [1.0]),
    "categorical": (Categorical(4), [0.3, -1.0, 1.2, 0.0]),
    "discretized logistic": (DiscretizedLogistic(16), [0.4, -1.5]),
    "Poisson": (Poisson(), [1.2]),
    "negative binomial": (NegativeBinomial(0.8), [1.2]),
    "negative binomial, the decoder's dispersion": (NegativeBinomial("decoder"), [1.2, 0.5]),
    "zero-inflated": (ZeroInflatedNegativeBinomial(2.0), [1.2, -0.5]),
    "zero-inflated, the decoder's dispersion": (ZeroInflatedNegativeBinomial("decoder"), [1.2, -0.5, 0.5]),
}


@each
def test_samples_have_mean_and_variance_of_the_density(name: str) -> None:
    likelihood, y = EXAMPLES[name]
    x, share = support(likelihood, y)
    p = (
        share
        * likelihood.log_prob(torch.tensor([y], dtype=torch.float64).expand(len(x), -1), x[:, None]).exp()
    )
    mean = (p * x).sum()
    variance, fourth = ((p * (x - mean) ** power).sum() for power in (2, 4))
    count = 100_000
    params = torch.tensor([y]).expand(count, -1).contiguous()
    found = likelihood.sample(params, generator=seeded(5, params.device)).double().flatten().cpu()
    assert len(found) == count
    # Five standard errors.
    assert abs(found.mean() - mean) < 5 * (variance / count).sqrt()
    assert abs((found - mean).square().mean() - variance) < 5 * ((fourth - variance**2) / count).sqrt()


def transformed(
    name: str, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    likelihood, y = EXAMPLES[name]
    params = torch.tensor([y], dtype=torch.float64).repeat(6, 1)
    x = torch.linspace(-2, 3, 6, dtype=torch.float64)[:, None]
    return likelihood.log_prob(params, x), likelihood.log_prob(*change(params, x))


@pytest.mark.parametrize("name", ["Gaussian", "Laplace", "Student t"])
def test_locations_move_with_x(name: str) -> None:
    here, there = transformed(name, lambda params, x: (params + 1.5, x + 1.5))
    torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)
    here, mirrored = transformed(name, lambda params, x: (-params, -x))
    torch.testing.assert_close(here, mirrored, rtol=0, atol=0)
