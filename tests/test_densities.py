"""The likelihoods besides Bernoulli, Gaussian and Categorical: densities, limits, derivatives, samples, flows."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_problems import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from weight_problems import LIKELIHOODS, PIXELS, is_of_counts, scipy_log_prob

from fastvae import HVAE, IWAE, VAE, fit, ood, ops, reference
from fastvae.influence import TracIn
from fastvae.likelihoods import (
    ContinuousBernoulli,
    DiscretizedLogistic,
    GaussianHead,
    Laplace,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
    ZeroInflatedNegativeBinomial,
)

# Bernoulli, Gaussian and categorical have files of their own.
ALL = {
    name: like for name, like in LIKELIHOODS.items() if name not in ("Bernoulli", "Gaussian", "categorical")
}
each = pytest.mark.parametrize("name", ALL)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, outputs))


def problem(
    likelihood: Likelihood, rows: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """params and x."""
    params = 0.8 * torch.randn(rows, PIXELS * likelihood.values_per_element, generator=seeded(), dtype=dtype)
    return params, data(likelihood, rows, dtype)


def data(likelihood: Likelihood, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.rand(rows, PIXELS, generator=seeded(1), dtype=torch.float64)
    if is_of_counts(likelihood):
        return torch.poisson(3 * x, generator=seeded(2)).to(dtype)
    return x.to(dtype)


def elements(likelihood: Likelihood, params: Tensor, x: Tensor) -> Tensor:
    """log p of each element: of a sample each."""
    parts = params.reshape(len(params), likelihood.values_per_element, -1).transpose(1, 2)
    found = likelihood.log_prob(parts.reshape(-1, likelihood.values_per_element), x.reshape(-1, 1))
    return found.reshape(x.shape)


@each
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_agrees_with_scipy(name: str) -> None:
    likelihood = ALL[name]
    params, x = problem(likelihood, 200)
    found = likelihood.log_prob(params, x)
    expected = torch.as_tensor(scipy_log_prob(likelihood, params, x))
    torch.testing.assert_close(found, expected.sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(elements(likelihood, params, x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        likelihood.log_prob(params.float(), x.float()), found.float(), rtol=2e-6, atol=2e-5
    )


@each
def test_two_derivatives(name: str) -> None:
    likelihood = ALL[name]
    params, x = problem(likelihood, 2)
    assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(p, x), (params.requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda p: likelihood.log_prob(p, x), (params,))


@each
def test_mean_is_the_expectation_of_samples(name: str) -> None:
    likelihood = ALL[name]
    if isinstance(likelihood, DiscretizedLogistic):
        pytest.skip("its mean is that of the logistic variable")
    params, _ = problem(likelihood, 3, torch.float32)
    params = params.repeat_interleave(20_000, 0)
    draws = likelihood.sample(params, generator=seeded(3, params.device)).reshape(3, 20_000, PIXELS)
    mean = likelihood.mean(params).reshape(3, 20_000, PIXELS)[:, 0]
    errors = draws.std(1) / math.sqrt(20_000)
    # 18 means; a t of three degrees of freedom has a variance, whose estimate is rough.
    assert ((draws.mean(1) - mean) / errors).abs().max() < 4.5
    assert torch.equal(
        draws, likelihood.sample(params, generator=seeded(3, params.device)).reshape(draws.shape)
    )
    if is_of_counts(likelihood) or isinstance(likelihood, ContinuousBernoulli):
        likelihood.check(draws)


def test_samples_have_the_densities() -> None:
    """Moments of what is sampled by formulas of our own: histograms against probabilities, quantiles against scipy."""
    stats = pytest.importorskip("scipy.stats")
    size = 40_000
    for likelihood, distribution in (
        (Laplace(0.3), stats.laplace(0.2, 0.3)),
        (StudentT(3, 0.4), stats.t(3, 0.2, 0.4)),
        (GaussianHead(), stats.norm(0.2, math.exp(0.1))),
    ):
        params = torch.tensor([[0.2, 0.1][: likelihood.values_per_element]]).expand(size, -1)
        drawn = likelihood.sample(params.contiguous(), generator=seeded(4, params.device))
        assert stats.kstest(drawn.flatten().cpu().numpy(), distribution.cdf).pvalue > 1e-3
    for a in (-30.0, -2.0, 0.0, 1e-4, 5.0, 60.0):
        params = torch.full((size, 1), a, dtype=torch.float64)
        drawn = ContinuousBernoulli().sample(params, generator=seeded(5, params.device))
        cdf = torch.expm1(a * drawn) / math.expm1(a) if a else drawn
        assert stats.kstest(cdf.flatten().cpu().numpy(), "uniform").pvalue > 1e-3, a
    for likelihood in (DiscretizedLogistic(5), NegativeBinomial(0.8), ZeroInflatedNegativeBinomial(3.0)):
        params = torch.tensor([[0.4, -1.0][: likelihood.values_per_element]]).expand(size, -1).contiguous()
        scale = likelihood.num_classes - 1 if isinstance(likelihood, DiscretizedLogistic) else 1
        drawn = (likelihood.sample(params, generator=seeded(6, params.device)) * scale).long().flatten()
        values = torch.arange(5)
        p = likelihood.log_prob(params[:5].double(), values[:, None] / scale).exp()
        observed = torch.bincount(drawn)[:5] / size
        assert ((observed - p).abs() < 4.5 * (p * (1 - p) / size).sqrt()).all()


def test_densities_sum_to_one() -> None:
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None]
    for a in (-700.0, -3.0, -1e-3, 0.0, 1.0, 40.0):
        p = ContinuousBernoulli().log_prob(torch.full_like(grid, a), grid).exp()
        assert float(torch.trapezoid(p, grid[:, 0])) == pytest.approx(1, rel=2e-4 if abs(a) > 100 else 1e-6)
    counts = torch.arange(400.0, dtype=torch.float64)[:, None]
    for likelihood in (
        Poisson(),
        NegativeBinomial(0.5),
        NegativeBinomial(200.0),
        ZeroInflatedNegativeBinomial(1.0),
    ):
        params = torch.tensor([[1.2, -0.3][: likelihood.values_per_element]], dtype=torch.float64).expand(
            400, -1
        )
        assert float(likelihood.log_prob(params, counts).exp().sum()) == pytest.approx(1, rel=1e-9)
    for mean, log_scale in ((0.3, -1.0), (0.5, -9.0), (2.0, 0.5), (-1.0, -3.0)):
        params = torch.tensor([[mean, log_scale]], dtype=torch.float64).expand(7, -1)
        p = DiscretizedLogistic(7).log_prob(params, torch.arange(7)[:, None]).exp()
        assert float(p.sum()) == pytest.approx(1, rel=1e-12)


def value_and_slopes(likelihood: Likelihood, params: list[float], x: float) -> tuple[float, Tensor, Tensor]:
    at = torch.tensor([params], dtype=torch.float64, requires_grad=True)
    value = likelihood.log_prob(at, torch.tensor([[x]], dtype=torch.float64)).sum()
    (slope,) = torch.autograd.grad(value, at, create_graph=True)
    curves = torch.autograd.grad(slope.sum(), at)[0] if slope.requires_grad else torch.zeros_like(at)
    return float(value.detach()), slope.detach(), curves


@pytest.mark.parametrize(
    ("likelihood", "params", "x"),
    [
        (ContinuousBernoulli(), [1e4], 0.7),
        (ContinuousBernoulli(), [-1e4], 0.0),
        (ContinuousBernoulli(), [0.0], 1.0),
        (DiscretizedLogistic(), [0.5, -30.0], 0.0),
        (DiscretizedLogistic(), [1e3, 2.0], 0.5),
        (GaussianHead(), [0.3, math.log(1e-6)], 0.3),
        (GaussianHead(), [0.0, 30.0], 0.5),
        (GaussianHead(), [0.0, -100.0], 1e-6),
        (Laplace(1e-6), [0.0], 1.0),
        (StudentT(1e8, 1e-6), [0.0], 1.0),
        (StudentT(1e-3), [0.0], 1e6),
        (Poisson(), [math.log(9e5)], 1e6),
        (Poisson(), [-700.0], 0.0),
        (NegativeBinomial(3.0), [math.log(9e5)], 1e6),
        (NegativeBinomial(1e12), [math.log(9e5)], 1e6),
        (NegativeBinomial(1e-4), [20.0], 0.0),
        (ZeroInflatedNegativeBinomial(2.0), [1.0, 1e4], 0.0),
        (ZeroInflatedNegativeBinomial(2.0), [1.0, -1e4], 3.0),
        (ZeroInflatedNegativeBinomial(2.0), [-50.0, -1e4], 0.0),
    ],
)
def test_extremes_are_finite(likelihood: Likelihood, params: list[float], x: float) -> None:
    value, slope, curve = value_and_slopes(likelihood, params, x)
    assert math.isfinite(value) and slope.isfinite().all() and curve.isfinite().all()


def test_limits() -> None:
    a = torch.tensor([[0.3], [2.0], [math.log(9e5)]], dtype=torch.float64)
    x = torch.tensor([[0.0], [7.0], [1e6]], dtype=torch.float64)
    poisson = Poisson().log_prob(a, x)
    for dispersion in (1e8, 1e12, 1e16):
        # To first order; a count of 1e6 varies as dispersion does.
        rest = ((x - a.exp()).square() - x) / (2 * dispersion)
        rows = slice(0, 3 if dispersion > 1e13 else 2)
        found = (NegativeBinomial(dispersion).log_prob(a, x) - poisson)[rows]
        torch.testing.assert_close(found, rest.sum(1)[rows], rtol=1e-6, atol=4e-9)
    normal = GaussianHead().log_prob(torch.stack((a[:2, 0], torch.zeros(2)), 1), x[:2])
    torch.testing.assert_close(StudentT(1e12).log_prob(a[:2], x[:2]), normal, rtol=1e-10, atol=0)
    # Both formulas of the continuous Bernoulli where they meet, with two derivatives.
    sides = [
        value_and_slopes(ContinuousBernoulli(), [s * (1 + d)], 0.3)
        for s in (1.0, -1.0)
        for d in (-1e-9, 1e-9)
    ]
    for one, other in (sides[:2], sides[2:]):
        assert one[0] == pytest.approx(other[0], rel=1e-8)
        for a_part, b_part in zip(one[1:], other[1:], strict=True):
            torch.testing.assert_close(a_part, b_part, rtol=1e-7, atol=1e-7)
    # Near 1/2 to all digits: log((e^a - 1) / a) = a / 2 + a^2 / 24 - ...
    value, slope, curve = value_and_slopes(ContinuousBernoulli(), [1e-5], 0.3)
    assert value == pytest.approx(0.3e-5 - 0.5e-5 - 1e-10 / 24, rel=1e-12)
    assert float(slope) == pytest.approx(0.3 - 0.5 - 1e-5 / 12, rel=1e-12)
    assert float(curve) == pytest.approx(-1 / 12, rel=1e-9)
    means = ContinuousBernoulli().mean(
        torch.tensor([[-1e4, 0.0, 1e-3, 0.999, 1.001, 1e4]], dtype=torch.float64)
    )
    slopes = [0.0, 0.5, 0.5 + 1e-3 / 12]
    assert means[0, 1:3].tolist() == pytest.approx(slopes[1:], rel=1e-9)
    assert float(means[0, 0]) == pytest.approx(1e-4) and float(means[0, 5]) == pytest.approx(1 - 1e-4)
    assert 0 < float(means[0, 4] - means[0, 3]) < 2e-4


@pytest.mark.parametrize("x", [0, 1, 5, 63, 64, 65, 1000, 10**6])
def test_negative_binomials_of_all_sizes(x: int) -> None:
    mp = pytest.importorskip("mpmath").mp
    with mp.workdps(60):
        for r in (1e-3, 0.5, 3.0, 63.9, 64.0, 1e3, 1e8, 1e14):
            for a in (-20.0, 0.0, 3.0, math.log(9e5), math.log(1e6), 20.0):
                n, m = mp.mpf(x) + mp.mpf(r), mp.exp(a)
                exact = mp.loggamma(n) - mp.loggamma(r) - mp.loggamma(x + 1)
                exact += r * mp.log(r / (r + m)) + x * mp.log(m / (r + m))
                value, slope, curve = value_and_slopes(NegativeBinomial(r), [a], x)
                assert value == pytest.approx(float(exact), rel=1e-12, abs=1e-22)
                share = m / (r + m)
                assert float(slope) == pytest.approx(float(x - n * share), rel=1e-9, abs=1e-9)
                assert float(curve) == pytest.approx(float(-n * share * (1 - share)), rel=1e-9, abs=1e-9)


class Shifted(NegativeBinomial):
    """A density of one's own, which its learned form must be of, too."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return super().log_prob(params, x) - 1


def test_what_kernels_leave_out_is_the_density_at_its_own_mean() -> None:
    x = torch.tensor([[0.0, 1.0, 5.0, 63.0, 64.0, 65.0, 1e3, 1e6]], dtype=torch.float64)
    for likelihood in (Poisson(), *(NegativeBinomial(r) for r in (1e-3, 0.5, 63.9, 64.0, 1e3, 1e8, 1e14))):
        # Of a count of 0 any small mean will do.
        expected = likelihood.log_prob(x.clamp(min=1e-40).log(), x)
        found = likelihood.base_measure(x, torch.float64)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    learned = Shifted("learned")
    assert type(learned.head) is Shifted  # type: ignore[attr-defined]


@each
def test_flow_and_force_are_those_of_autograd(name: str) -> None:
    likelihood = ALL[name]
    torch.manual_seed(0)
    decoder = mlp(3, 8, PIXELS * likelihood.values_per_element).double()
    x = data(likelihood, 4)
    z, rho = (0.5 * torch.randn(4, 3, generator=seeded(i), dtype=torch.float64) for i in (7, 8))
    eps = torch.full((2, 3), 0.01, dtype=torch.float64).requires_grad_()
    alpha = torch.tensor([0.9, 1.0], dtype=torch.float64).requires_grad_()

    def gradients(run: Callable[..., Any]) -> list[Tensor]:
        leaves = [z.clone().requires_grad_(), rho.clone().requires_grad_()]
        found = run(decoder, *leaves, x, eps, alpha, likelihood)
        total = sum((part * (i + 1)).square().sum() for i, part in enumerate(found))
        return [*found, *torch.autograd.grad(total, [*leaves, eps, alpha, *decoder.parameters()])]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = [gradients(ops.hamiltonian_flow) for _ in range(4)]  # by the rules, and as straight code
    expected = gradients(reference.hamiltonian_flow)
    for found in runs:
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))
    mine = ops.log_px_and_force(decoder, z, x, likelihood)
    theirs = reference.log_px_and_force(decoder, z, x, likelihood)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_float32_flows_are_as_exact_as_eager(name: str) -> None:
    """Within twice eager's own error against float64, and 16 roundings of the largest number, which kernels need for
    the rest of Stirling's formula (gamma.h).
    """
    likelihood = LIKELIHOODS[name]
    torch.manual_seed(0)
    decoder = mlp(3, 8, PIXELS * likelihood.values_per_element)
    x = data(likelihood, 16, torch.float32)
    z, rho = (torch.randn(16, 3, generator=seeded(i)) for i in (7, 8))

    def gradients(run: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        own = copy.deepcopy(decoder).to(dtype)
        leaves = [part.to(dtype).requires_grad_() for part in (z, rho)]
        alpha = torch.full((3,), 0.9, dtype=dtype)
        found = run(own, *leaves, x.to(dtype), 0.05, alpha, likelihood)
        total = sum((part * (i + 1)).square().sum() for i, part in enumerate(found))
        grads = torch.autograd.grad(total, [*leaves, *own.parameters()])
        return [part.detach().double() for part in (*found, *grads)]

    exact = gradients(reference.hamiltonian_flow, torch.float64)
    eager, ours = (gradients(op, torch.float32) for op in (reference.hamiltonian_flow, ops.hamiltonian_flow))
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        allowed = 2 * (theirs - right).abs().max() + 16 * 2.0**-23 * right.abs().max()
        assert (mine - right).abs().max() <= allowed


@each
def test_empty_batches(name: str) -> None:
    likelihood = ALL[name]
    model = HVAE(
        mlp(PIXELS, 8, 4), mlp(2, 8, PIXELS * likelihood.values_per_element), likelihood, num_steps=2
    )
    x = torch.zeros(0, PIXELS)
    assert model(x).shape == (0,) and model.log_likelihood(x, 3).shape == (0,)
    assert ops.log_px(model.decoder, torch.zeros(2, 0, 2), x, likelihood).shape == (2, 0)


@each
@pytest.mark.filterwarnings("ignore:.*copies are trained")
def test_in_models_and_scores(name: str, tmp_path: Any) -> None:
    likelihood = ALL[name]
    outputs = PIXELS * likelihood.values_per_element
    x = data(likelihood, 24, torch.float32)
    for kind in (VAE, IWAE, HVAE):
        torch.manual_seed(0)
        options = {"num_steps": 2, "step_size": 0.01} if kind is HVAE else {}
        model = kind(mlp(PIXELS, 8, 4), mlp(2, 8, outputs), likelihood, **options)
        history = fit(model, DataLoader(TensorDataset(x), 8), epochs=3, progress=False)
        assert history.train_loss[-1] < history.train_loss[0]
        assert model.sample(3).shape == (3, PIXELS) and model.reconstruct(x).shape == x.shape
        assert model.log_likelihood(x[:4], 5).isfinite().all()
    model = VAE(mlp(PIXELS, 8, 4), mlp(2, 8, outputs), likelihood)
    assert TracIn(model, x, None, num_samples=2).influence(x[:2]).isfinite().all()
    found = ood.LikelihoodRegret(model, num_steps=3, num_samples=2).refit(x[:3])
    assert found.losses.isfinite().all()
    again = pickle.loads(pickle.dumps(likelihood))
    assert again == likelihood == copy.deepcopy(likelihood) and hash(again) == hash(likelihood)


def test_refusals() -> None:
    x = torch.rand(2, 3)
    params = torch.zeros(2, 3)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Laplace(0.0), "Laplace: scale: expected a finite number above 0, got 0.0"),
        (lambda: StudentT(df=-1.0), "StudentT: df: expected a finite number above 0, got -1.0"),
        (
            lambda: NegativeBinomial("gene"),
            "dispersion: expected a number, 'decoder' or 'learned', got 'gene'",
        ),
        (
            lambda: ZeroInflatedNegativeBinomial(math.inf),
            "dispersion: expected a finite number above 0, got inf",
        ),
        (lambda: DiscretizedLogistic(1), "num_classes: expected an integer above 1, got 1"),
        (lambda: GaussianHead(0), "min_scale: expected a finite number above 0, got 0"),
        (lambda: Poisson().check(x), r"Poisson: x: expected whole numbers, got .* \(and 5 more of 6\)"),
        (lambda: Poisson().check(-torch.ones(2, 3)), "Poisson: x: expected counts of at least 0, got -1"),
        (lambda: NegativeBinomial().check(torch.tensor([[-2]])), "expected counts of at least 0, got -2"),
        (lambda: Poisson().check(torch.tensor([[math.nan]])), "1 NaN or infinite value"),
        (lambda: ContinuousBernoulli().check(2 * x + 1), r"expected values in \[0, 1\]"),
        (
            lambda: DiscretizedLogistic(4).check(torch.tensor([[4]])),
            "expected classes below num_classes = 4, got 4",
        ),
        (lambda: GaussianHead().log_prob(params, x), "3 elements a sample need 6 decoder outputs"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
    for kind in (Laplace, StudentT):
        with pytest.raises(TypeError, match=f"{kind.__name__}: scale: expected a number, got Parameter"):
            kind(scale=torch.nn.Parameter(torch.ones(())))  # type: ignore[arg-type]


def test_counts_of_any_dtype_are_the_counts() -> None:
    params = torch.randn(2, 3, generator=seeded())
    x = torch.tensor([[0, 3, 200], [1, 7, 255]])
    wanted = Poisson().log_prob(params, x.float())
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float64):
        Poisson().check(x.to(dtype))
        torch.testing.assert_close(Poisson().log_prob(params, x.to(dtype)), wanted)
        assert torch.equal(Poisson().as_float(x.to(dtype), torch.float32), x.float())
    model = VAE(mlp(3, 4, 4), mlp(2, 4, 3), NegativeBinomial())
    torch.testing.assert_close(
        model(x, noise=torch.ones(1, 2, 2)), model(x.to(torch.uint8), noise=torch.ones(1, 2, 2))
    )
