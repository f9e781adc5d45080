"""Annealed importance sampling: against exact evidence, quadrature, importance sampling and a plain PyTorch run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_problems import DIM, PIXELS, Skip, data, linear_gaussian, make, mlp, seeded
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastvae.likelihoods import Gaussian, Likelihood, Poisson
from fastvae.metrics import AISEstimate, ais, bidirectional_ais, negative_log_likelihood
from fastvae.metrics.annealing import temperatures
from fastvae.models import HVAE, IWAE, VAE, BaseVAE
from fastvae.noise import Stream, draws_of, keys_of
from fastvae.penalties import ConsistencyVAE, JacobianL1VAE

double = torch.float64


class Labelled(nn.Module):
    """Affine in a code and a label's embedding."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer, self.labels = nn.Linear(inputs, outputs), nn.Embedding(3, outputs)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.layer(z) + self.labels(label)


class Unreadable(nn.Module):
    """A decoder that looks at numbers, so that autograd has to do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(DIM, PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        outputs: Tensor = self.layers(z)
        return outputs if float(z.detach().abs().sum()) >= 0 else outputs * 2


class Cauchy(Likelihood):
    """A likelihood of one's own."""

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -torch.log1p((x.to(params).flatten(1) - params.flatten(1)).square() * 9).sum(1)


unread = pytest.mark.filterwarnings("ignore:fastvae.ops.log_px")


def linear(dim: int, pixels: int, scale: float, conditional: bool) -> VAE:
    torch.manual_seed(dim)
    kind = Labelled if conditional else nn.Linear
    return VAE(kind(pixels, 2 * dim), kind(dim, pixels), Gaussian(scale), latent_dim=dim).double()


def exact_of(model: VAE, x: Tensor, label: Tensor | None) -> Tensor:
    decoder: Any = model.decoder
    layer = decoder if label is None else decoder.layer
    weight, mean = layer.weight.detach(), layer.bias.detach()
    if label is not None:
        mean = mean + decoder.labels(label).detach()
    scale: Any = model.likelihood
    # On the CPU, as estimates are.
    return (
        MultivariateNormal(mean, weight @ weight.T + scale.scale**2 * torch.eye(len(weight), dtype=double))
        .log_prob(x.to(weight.device))
        .cpu()
    )


@pytest.mark.parametrize(
    ("dim", "pixels", "scale", "conditional", "initial"),
    [
        (1, 3, 0.6, False, "prior"),
        (1, 3, 0.6, True, "posterior"),
        (4, 12, 0.3, True, "prior"),
        (4, 12, 0.3, False, "posterior"),
        (10, 40, 0.4, False, "prior"),
        (10, 40, 0.4, True, "posterior"),
    ],
)
def test_bounds_hold_the_exact_evidence(
    dim: int, pixels: int, scale: float, conditional: bool, initial: str
) -> None:
    """The Gaussian evidence between both bounds, but for noise: on average to within 3 standard errors.

    Of an image, each side is wrong by 3 nats with a probability below exp(-3) whatever the chains do (Markov).
    """
    model = linear(dim, pixels, scale, conditional)
    label = torch.arange(24) % 3 if conditional else None
    bounds = bidirectional_ais(model, 24, 200, 8, initial=initial, condition=label)
    exact = exact_of(model, bounds.x, label)
    lower, upper = bounds.lower, bounds.upper
    for excess in (lower.log_px - exact, exact - upper.log_px):
        assert float(excess.mean()) < 3 * float(excess.std()) / math.sqrt(24)
        assert float(excess.mean()) > -1 and float(excess.max()) < 3
    gap = bounds.gap()
    assert gap.mean < 0.6
    assert gap.mean == pytest.approx(float((upper.log_px - lower.log_px).mean()))
    assert gap.standard_error == pytest.approx(float((upper.log_px - lower.log_px).std()) / math.sqrt(24))
    assert bool((lower.acceptance > 0.5).all()) and bool((upper.acceptance > 0.5).all())


@pytest.mark.parametrize("dim", [1, 2])
def test_a_bernoulli_decoder_by_quadrature(dim: int) -> None:
    torch.manual_seed(dim)
    decoder = nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    with torch.no_grad():
        decoder[2].weight *= 6
    model = VAE(nn.Linear(10, 2 * dim), decoder).double()
    bounds = bidirectional_ais(model, 10, 200, 32)
    line = torch.linspace(-8, 8, 801, dtype=double)
    grid = torch.stack(torch.meshgrid(*[line] * dim, indexing="ij"), -1).reshape(-1, dim)
    cell = dim * math.log(float(line[1] - line[0]))
    with torch.no_grad():
        logits = decoder(grid)
        log_prior = Normal(0.0, 1.0).log_prob(grid).sum(1)
        exact = torch.stack([
            (log_prior + (logits * image - F.softplus(logits)).sum(1)).logsumexp(0) + cell
            for image in bounds.x.to(logits.device)
        ]).cpu()  # fmt: skip
    assert float((bounds.lower.log_px - exact).mean()) < 0.01
    assert float((bounds.upper.log_px - exact).mean()) > -0.01
    for found in bounds[1:]:
        assert isinstance(found, AISEstimate)
        assert bool(((found.log_px - exact).abs() < 5 * found.standard_error + 1e-9).all())
        assert float(found.standard_error.max()) < 0.1


def test_weights_are_unbiased_where_chains_are_far_from_equilibrium() -> None:
    """E[w] = p(x), and 1 / p(x) back, although 4 temperatures and large steps leave the chains well behind."""
    model = linear(1, 3, 0.5, False)
    bounds = bidirectional_ais(model, 20_000, 4, 1, num_leapfrog_steps=2, step_size=0.9)
    exact = exact_of(model, bounds.x, None)
    assert bounds.gap().mean > 0.05 and float(bounds.lower.acceptance.mean()) < 0.95
    for log_weights in (bounds.lower.log_weights[:, 0] - exact, bounds.upper.log_weights[:, 0] + exact):
        weights = log_weights.exp()
        assert float(weights.std()) > 0.2
        assert abs(float(weights.mean()) - 1) < 4 * float(weights.std()) / math.sqrt(len(weights))


def plain(
    model: BaseVAE, x: Tensor, start: Tensor | None, q: Normal | None, key: int, step: Tensor, steps: int
) -> Tensor:
    """One chain as textbooks have it: all densities and forces anew by autograd, in coordinates of the initial q."""
    ladder = torch.sigmoid(torch.linspace(-4, 4, len(step) + 2, dtype=double))
    ladder = (ladder - ladder[0]) / (ladder[-1] - ladder[0])
    q = Normal(torch.zeros(1, DIM, dtype=double), torch.ones(1, DIM, dtype=double)) if q is None else q
    stream = Stream(torch.tensor([key]))
    u = stream.normal((DIM,)) if start is None else (start - q.loc) / q.scale
    if start is not None:
        ladder, step = ladder.flip(0), step.flip(0)

    def log_density(u: Tensor, b: Tensor) -> Tensor:
        z = q.loc + q.scale * u
        joint = model.log_px(z, x) + Normal(0.0, 1.0).log_prob(z).sum(1)
        return (1 - b) * q.log_prob(z).sum(1) + b * joint

    def force(u: Tensor, b: Tensor) -> Tensor:
        u = u.detach().requires_grad_(True)
        return torch.autograd.grad(log_density(u, b).sum(), u)[0]

    log_weight = torch.zeros(1, dtype=double)
    for t in range(1, len(ladder)):
        with torch.no_grad():
            log_weight = log_weight + log_density(u, ladder[t]) - log_density(u, ladder[t - 1])
        if t == len(ladder) - 1:
            break
        rho, b = stream.normal((DIM,)), ladder[t]
        of_step, of_acceptance = stream.uniform((2,))[0]
        eps = step[t - 1] * (0.8 + 0.4 * of_step)
        end, momentum = u, rho
        for _ in range(steps):
            momentum = momentum + eps / 2 * force(end, b)
            end = end + eps * momentum
            momentum = momentum + eps / 2 * force(end, b)
        with torch.no_grad():
            energies = [
                (log_density(a, b) - r.square().sum(1) / 2).item() for a, r in ((u, rho), (end, momentum))
            ]
        if math.log(of_acceptance) < energies[1] - energies[0]:
            u = end
    return log_weight


@pytest.mark.parametrize("initial", ["prior", "posterior"])
def test_every_weight_is_that_of_plain_pytorch(initial: str) -> None:
    """With the same noise, to 1e-10: rounding differs, and a few hundred steps of small networks hardly amplify it."""
    model = make(VAE).double()
    with torch.no_grad():
        model.decoder[2].weight.mul_(8)  # type: ignore[index, operator]
    steps = 0.2 + torch.rand(18, 3, generator=seeded(), dtype=double)
    options: Any = {"num_leapfrog_steps": 3, "step_size": steps, "initial": initial, "seed": 5}
    bounds = bidirectional_ais(model, 3, 20, 2, **options)
    # On the model's device, where images are drawn, too.
    place = model.decoder[0].weight.device  # type: ignore[index]
    z = torch.randn(3, DIM, generator=seeded(5, place), dtype=double, device=place)
    for found, start, first in ((bounds.lower, None, 4), (bounds.upper, z, 2**32)):
        keys = draws_of(keys_of(bounds.x), 5, 2, first).view(3, 2)
        for image in range(3):
            q = None
            x = bounds.x[image : image + 1].to(place)
            if initial == "posterior":
                mu, logvar = model.encode(x)
                q = Normal(mu.detach(), (logvar / 2).exp().detach())
            at = None if start is None else start[image : image + 1]
            for chain in range(2):
                key = int(keys[image, chain])
                expected = plain(model, x, at, q, key, steps[:, image], 3)
                assert float(found.log_weights[image, chain]) == pytest.approx(float(expected), abs=1e-10)
        mean = found.log_weights.exp().mean(1).log()
        torch.testing.assert_close(found.log_px, mean if start is None else -mean)
        weights = found.log_weights.exp()
        torch.testing.assert_close(found.standard_error, weights.std(1) / weights.mean(1) / math.sqrt(2))
        assert 0.2 < float(found.acceptance.mean()) < 0.98


def test_two_temperatures_are_importance_sampling() -> None:
    model, x = make(VAE).double(), data(4, double)

    def noise(first: int, count: int, mu: Tensor) -> Tensor:
        keys = draws_of(keys_of(x), 3, 50, 4)
        return Stream(keys).normal((DIM,)).view(4, 50, DIM).transpose(0, 1)[None, first : first + count]

    found = ais(model, x, 2, 50, initial="posterior", seed=3)
    expected = model.log_likelihood(x, 50, noise=noise).cpu()
    torch.testing.assert_close(found.log_px, expected, rtol=1e-12, atol=1e-12)
    assert found.step_size.shape == (0, 4) and not bool(found.acceptance.any())


def test_it_agrees_with_importance_sampling_where_that_is_accurate() -> None:
    model, x = make(VAE), data(6)
    sampled = negative_log_likelihood(model, x, 20_000)
    for initial in ("prior", "posterior"):
        found = ais(model, x, 50, 16, initial=initial)
        assert found.negative_log_likelihood().mean == pytest.approx(sampled.mean, abs=0.02)
        error = found.negative_log_likelihood().standard_error
        assert error == pytest.approx(sampled.standard_error, rel=0.2)


def test_from_a_posterior_the_weights_spread_less() -> None:
    """An encoder that is right: the initial density is the posterior, and every weight is p(x)."""
    model = linear(2, 6, 0.4, False)
    weight = model.decoder.weight.detach()
    precision = torch.eye(2, dtype=double) + weight.T @ weight / 0.4**2
    with torch.no_grad():
        # A posterior has correlations that q lacks: orthogonal columns have none.
        model.decoder.weight.copy_(torch.linalg.qr(weight).Q)  # type: ignore[operator]
        weight = model.decoder.weight.detach()
        precision = torch.eye(2, dtype=double) + weight.T @ weight / 0.4**2
        gain = torch.linalg.solve(precision, weight.T) / 0.4**2
        bias = model.decoder.bias.detach()
        model.encoder.weight.copy_(torch.cat((gain, torch.zeros_like(gain))))  # type: ignore[operator]
        spread = precision.diagonal().reciprocal().log()
        model.encoder.bias.copy_(torch.cat((-gain @ bias, spread)))  # type: ignore[operator, arg-type]
    bounds = bidirectional_ais(model, 4, 10, 3, initial="posterior")
    exact = exact_of(model, bounds.x, None)
    for found in (bounds.lower, bounds.upper):
        torch.testing.assert_close(found.log_px, exact, rtol=1e-10, atol=1e-10)
    assert bidirectional_ais(model, 4, 10, 3).gap().mean > 0.01


def test_step_sizes_are_adapted_by_image_and_temperature() -> None:
    model = linear(6, 40, 0.05, False)
    x = bidirectional_ais(model, 3, 2, 1).x
    sizes = {
        target: ais(model, x, 400, 4, target_acceptance=target, num_leapfrog_steps=4)
        for target in (0.5, 0.65, 0.9)
    }
    for target, found in sizes.items():
        assert float(found.acceptance.mean()) == pytest.approx(target, abs=0.12)
        assert found.step_size.shape == (398, 3)
        # The posterior is narrower than the prior, so steps shrink on the way.
        assert bool((found.step_size[-50:].mean(0) < 0.5 * found.step_size[:50].mean(0)).all())
    again = ais(model, x, 400, 4, step_size=sizes[0.65].step_size, num_leapfrog_steps=4)
    assert all(map(torch.equal, again, sizes[0.65]))


def test_an_image_does_not_depend_on_its_batch_or_the_tiles() -> None:
    model, x = make(VAE).double(), data(5, double)
    options: Any = {"num_temperatures": 30, "num_chains": 3}
    whole = ais(model, x, **options)
    for found, rows in (
        (ais(model, x[3:4], **options), slice(3, 4)),
        (ais(model, x, **options, chunk_size=1), slice(None)),
        (ais(model, x, **options, chunk_size=7), slice(None)),
        (ais(model, DataLoader(TensorDataset(x), batch_size=2), **options), slice(None)),
    ):
        torch.testing.assert_close(found.log_weights, whole.log_weights[rows], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.acceptance, whole.acceptance[rows])
    assert not torch.equal(ais(model, x, **options, seed=1).log_px, whole.log_px)
    more = ais(model, x, 30, 5).log_weights[:, :3]
    torch.testing.assert_close(more, whole.log_weights, rtol=1e-10, atol=1e-10)


MODELS: dict[str, Callable[[], BaseVAE]] = {
    "VAE": lambda: make(VAE),
    "HVAE": lambda: make(HVAE),
    "IWAE": lambda: make(IWAE),
    "JacobianL1VAE": lambda: make(JacobianL1VAE),
    "ConsistencyVAE": lambda: make(ConsistencyVAE, augment=lambda x: x.flip(1)),
    "learned scale": lambda: make(VAE, Gaussian("learned", initial=0.5)),
    "categorical": lambda: make(VAE, "categorical"),
    "Poisson": lambda: make(VAE, Poisson()),
    "own likelihood": lambda: make(VAE, Cauchy()),
    "skip connection": lambda: VAE(mlp(PIXELS, 2 * DIM), Skip()),
    "unreadable": lambda: VAE(mlp(PIXELS, 2 * DIM), Unreadable()),
    "batch norm": lambda: VAE(mlp(PIXELS, 2 * DIM), nn.Sequential(nn.BatchNorm1d(DIM), mlp(DIM, PIXELS))),
    "half": lambda: make(VAE).to(torch.bfloat16),
}


@unread
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_scored_and_left_as_it_was(name: str) -> None:
    """Against importance sampling in float64 (mean over 2 images, 0.1 nats: 4 standard errors of either)."""
    torch.manual_seed(0)
    model = MODELS[name]()
    x = torch.arange(2 * PIXELS).view(2, PIXELS) % 3 if name == "Poisson" else data(2)
    x = x.float() if name != "categorical" else (x * 255).to(torch.uint8)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, grads = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    ais(model, x, 5, 2, initial="posterior", step_size=0.1)
    found = ais(model, x, 60, 16)
    assert model.training and model.decoder.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert found.log_px.dtype == double and found.log_px.shape == (2,) and found.log_weights.shape == (2, 16)
    exact = VAE(model.encoder, model.decoder, model.likelihood).eval().double()
    sampled = exact.log_likelihood(x if x.dtype == torch.uint8 else x.double(), 5000, generator=seeded())
    assert float((found.log_px - sampled.cpu()).mean()) == pytest.approx(0, abs=0.1)


def test_conditions_are_those_of_their_images() -> None:
    model = linear(2, 6, 0.4, True)
    x, labels = data(5, double), torch.tensor([0, 2, 1, 1, 0])
    exact, others = exact_of(model, x, labels), (labels + 1) % 3
    assert float((exact_of(model, x, others) - exact).abs().min()) > 0.5
    for initial in ("prior", "posterior"):
        found = ais(model, x, 60, 64, condition=labels, initial=initial, chunk_size=100)
        torch.testing.assert_close(found.log_px, exact, rtol=0, atol=0.2)
    found = ais(model, x, 60, 64, condition=others)
    torch.testing.assert_close(found.log_px, exact_of(model, x, others), rtol=0, atol=0.2)


def test_missing_elements_are_integrated_out() -> None:
    """Against the Gaussian evidence of what was observed; conditions and weights come from batches as well."""
    model = linear(2, 6, 0.4, True)
    x, labels = data(4, double), torch.tensor([0, 2, 1, 1])
    weight = torch.ones(4, 6)
    weight[0, :3] = weight[2, 4] = 0
    x[weight == 0] = math.nan
    decoder: Any = model.decoder
    mean, columns = (decoder.layer.bias + decoder.labels(labels)).detach(), decoder.layer.weight.detach()
    covariance = columns @ columns.T + 0.4**2 * torch.eye(6, dtype=double)
    exact = torch.stack([
        MultivariateNormal(m[seen], covariance[seen][:, seen]).log_prob(image[seen])
        for m, seen, image in zip(mean, weight.bool(), x, strict=True)
    ]).cpu()  # fmt: skip
    for initial in ("prior", "posterior"):
        found = ais(model, x, 60, 64, condition=labels, weight=weight, initial=initial)
        torch.testing.assert_close(found.log_px, exact, rtol=0, atol=0.2)
    loader = DataLoader(TensorDataset(x, weight, labels), batch_size=3)
    batches = ais(model, loader, 60, 64, condition=2, weight=1, initial="posterior")
    torch.testing.assert_close(batches.log_weights, found.log_weights, rtol=1e-10, atol=1e-10)


def test_a_chain_that_diverges_is_refused_and_nothing_else() -> None:
    model, x = make(VAE, Gaussian(1e-3)), data(2)
    found = ais(model, x, 10, 2, step_size=1e6)
    assert not bool(found.acceptance.any()) and bool(found.log_px.isfinite().all())
    with torch.no_grad():
        model.decoder[0].bias[0] = math.nan  # type: ignore[index]
    with pytest.warns(RuntimeWarning, match="VAE: ais: NaN for 2 of 2 samples"):
        assert bool(ais(model, x, 5, 2).log_px.isnan().all())


def test_schedules() -> None:
    for schedule in ("sigmoid", "linear"):
        ladder = temperatures(11, schedule)
        assert ladder[0] == 0 and ladder[-1] == 1 and bool((ladder.diff() > 0).all())
        torch.testing.assert_close(ladder + ladder.flip(0), torch.ones_like(ladder))
    assert float(temperatures(1001, "sigmoid")[1]) < 0.2 * float(temperatures(1001, "linear")[1])
    model, x, exact = linear_gaussian(VAE)
    found = ais(model, x, 100, 16, schedule="linear")
    torch.testing.assert_close(found.log_px, exact.cpu(), rtol=0, atol=0.2)


def test_a_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = make(VAE), data(2)
    ais(model, x, 5, 2)
    assert not any(capsys.readouterr())
    ais(model, x, 5, 2, show_progress=True, chunk_size=2)
    assert "200/200" not in (text := capsys.readouterr().err) and "202/202" in text and "ais" in text
    bidirectional_ais(model, 2, 5, 2, show_progress=True, step_size=0.1)
    assert "6/6" in capsys.readouterr().err


def test_refusals() -> None:
    model, x = make(VAE), data()
    unknown = VAE(mlp(PIXELS, 2 * DIM), Unreadable())
    for call, message in (
        (lambda: ais(model, x[:0]), "ais: x: expected some images, got none"),
        (lambda: ais(model, []), "ais: x: expected some images, got none"),
        (lambda: ais(model, x * math.nan), "x holds 30 NaN"),
        (lambda: ais(model, x + 3), r"expected values in \[0, 1\]"),
        (lambda: ais(model, x, 1), "ais: num_temperatures: expected at least 2, got 1"),
        (lambda: ais(model, x, 5, 0), "num_chains: expected at least 1, got 0"),
        (lambda: ais(model, x, num_leapfrog_steps=0), "num_leapfrog_steps: expected at least 1, got 0"),
        (lambda: ais(model, x, chunk_size=0), "chunk_size: expected at least 1, got 0"),
        (lambda: ais(model, x, schedule="cosine"), "schedule: expected one of .* got 'cosine'"),
        (lambda: ais(model, x, initial="q"), "initial: expected one of .* got 'q'"),
        (
            lambda: ais(model, x, target_acceptance=1),
            r"target_acceptance: expected a number in \(0, 1\), got 1",
        ),
        (lambda: ais(model, x, 5, step_size=0), "step_size: expected finite numbers above 0"),
        (lambda: ais(model, x, 5, step_size=torch.ones(3)), r"expected a number or \[3, 5\], got \[3\]"),
        (lambda: ais(model, x, 5, condition=torch.ones(5)), "condition: expected a decoder that takes one"),
        (lambda: ais(linear(2, PIXELS, 1.0, True), x), "takes a condition, and none was given"),
        (lambda: bidirectional_ais(model, 0), "bidirectional_ais: num_images: expected at least 1, got 0"),
        (lambda: bidirectional_ais(unknown), "bidirectional_ais: latent_dim is not known yet"),
        (lambda: ais(model, x[:1], 2, 2).negative_log_likelihood(), "expected at least 2, got 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=message), warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
    for broken, message in (
        (lambda: ais(model.decoder, x), "ais: model: expected a fastvae model, got Sequential"),  # type: ignore[arg-type]
        (lambda: ais(model, x, torch.tensor(5)), "num_temperatures: expected a number, got Tensor"),  # type: ignore[arg-type]
        (lambda: ais(model, x, 5, condition=[1]), "condition: expected a tensor"),  # type: ignore[arg-type]
        (lambda: bidirectional_ais(make(VAE, Cauchy()), 3), "sample: this likelihood defines none"),
    ):
        with pytest.raises((TypeError, NotImplementedError), match=message):
            broken()
