"""VAE and HVAE: exact evidence, identities between them, the model contract, and divergence."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood
from fastvae.models import HVAE, VAE, BaseVAE, DivergenceError, Penalty, TrainingStep
from fastvae.models.tempering import KINDS, fixed_alpha, fixed_temperature_alpha

DIM, PIXELS = 2, 6


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Softplus(), nn.Linear(16, outputs))


def make(kind: type[BaseVAE], likelihood: str | Likelihood = "bernoulli", **options: Any) -> BaseVAE:
    torch.manual_seed(0)
    values = 256 if likelihood == "categorical" else 1
    if kind is HVAE:
        options = {"num_steps": 3, **options}
    return kind(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS * values), likelihood, **options)


def data(batch: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, PIXELS, generator=torch.Generator().manual_seed(1), dtype=dtype)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MODELS = [VAE, HVAE]


# --- exact evidence ----------------------------------------------------------------------------


def linear_gaussian(
    kind: type[BaseVAE], scale: float = 0.6, **options: Any
) -> tuple[BaseVAE, Tensor, Tensor]:
    """A model with x ~ N(b, W W^T + scale^2 I), data and their exact log evidence."""
    torch.manual_seed(4)
    encoder, decoder = nn.Linear(PIXELS, 2 * DIM), nn.Linear(DIM, PIXELS)
    model = kind(encoder, decoder, Gaussian(scale), **options).double()
    x = data(3, torch.float64)
    weight, bias = decoder.weight.detach(), decoder.bias.detach()
    covariance = weight @ weight.T + scale**2 * torch.eye(PIXELS, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x)
    return model, x, exact


def weights_of(model: BaseVAE, x: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        mu, logvar = model.encode(x)
        noise = torch.stack([model.draw_noise(mu, g) for g in [seeded()] for _ in range(count)], 1)
        flat = noise.reshape(model.noise_draws, -1, DIM)
        logs = model.log_weight(x.repeat(count, 1), mu.repeat(count, 1), logvar.repeat(count, 1), flat)
        return logs.reshape(count, len(x))


@pytest.mark.parametrize("tempering", [None, *KINDS])
def test_importance_weights_estimate_the_exact_evidence(tempering: str | None) -> None:
    if tempering is None:
        model, x, exact = linear_gaussian(VAE)
    else:
        model, x, exact = linear_gaussian(HVAE, tempering=tempering, num_steps=4, step_size=0.3, beta_0=0.4)
    count = 20_000
    ratio = (weights_of(model, x, count) - exact).exp()
    error = ratio.std(0) / math.sqrt(count)
    # A good enough proposal, or the standard error means nothing.
    assert (error < 0.03).all()
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()
    estimate = model.log_likelihood(x, count, generator=seeded())
    torch.testing.assert_close(estimate, exact + ratio.mean(0).log(), rtol=0, atol=1e-9)
    # The ELBO lies below the evidence, by Jensen; its mean over draws with 4 standard errors of room.
    logs = weights_of(model, x, count)
    assert (logs.mean(0) < exact + 4 * logs.std(0) / math.sqrt(count)).all()


def test_flow_brings_the_elbo_closer_to_the_evidence() -> None:
    vae, x, exact = linear_gaussian(VAE)
    hvae, _, _ = linear_gaussian(HVAE, tempering="none", num_steps=5, step_size=0.3)
    gap_vae = exact - weights_of(vae, x, 4000).mean(0)
    gap_hvae = exact - weights_of(hvae, x, 4000).mean(0)
    assert (gap_hvae < gap_vae).all() and (gap_vae > 0).all()


# --- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "categorical"])
def test_hvae_without_motion_is_the_vae(likelihood: str) -> None:
    hvae = make(HVAE, likelihood, tempering="none", step_size=1e-9).double()
    vae = VAE(hvae.encoder, hvae.decoder, likelihood)
    x = data(dtype=torch.float64)
    mu, logvar = vae.encode(x)
    noise = hvae.draw_noise(mu, seeded())
    expected = vae.log_weight(x, mu, logvar, noise[:1])
    # Step 1e-9 moves z by 1e-9 times momentum and force.
    torch.testing.assert_close(-hvae(x, noise=noise), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hvae.elbo(x, generator=seeded()), expected, rtol=1e-6, atol=1e-6)


def test_elbo_of_the_vae_is_the_mean_of_its_sample_elbos() -> None:
    model = make(VAE)
    x = data(2)
    closed = torch.stack([model.elbo(x, generator=g) for g in [seeded()] for _ in range(4000)])
    sampled = weights_of(model, x, 4000)
    error = (closed.std(0) + sampled.std(0)) / math.sqrt(4000)
    assert ((closed.mean(0) - sampled.mean(0)).abs() < 4 * error).all()


@pytest.mark.parametrize("kind", MODELS)
def test_beta_weights_the_training_loss_alone(kind: type[BaseVAE]) -> None:
    x = data()
    losses = {beta: make(kind, beta=beta)(x, generator=seeded()) for beta in (0.0, 1.0, 4.0)}
    torch.testing.assert_close(
        losses[4.0] - losses[0.0], 4 * (losses[1.0] - losses[0.0]), rtol=1e-4, atol=1e-5
    )
    step = make(kind).objective(x, generator=seeded())
    torch.testing.assert_close(losses[0.0], -step.log_px)
    torch.testing.assert_close(make(kind, beta=4.0).elbo(x, generator=seeded()), -losses[1.0])
    torch.testing.assert_close(make(kind, beta=4.0).loss(x, generator=seeded()), losses[4.0].mean())


@pytest.mark.parametrize("schedule", [fixed_alpha, fixed_temperature_alpha])
def test_schedules_end_at_temperature_one(schedule) -> None:  # type: ignore[no-untyped-def]
    beta_0 = torch.tensor(0.2, dtype=torch.float64)
    alpha = schedule(beta_0, 7)
    assert alpha.shape == (7,) and (alpha < 1).all()
    torch.testing.assert_close(alpha.prod(), beta_0.sqrt(), rtol=1e-12, atol=0)
    assert torch.equal(schedule(torch.tensor(1.0), 3), torch.ones(3))
    # The first steps as the formulas give them by hand, for K = 2 and beta_0 = 1/4.
    by_hand = {
        fixed_alpha: [1.75 / 2, 1 / 1.75],
        fixed_temperature_alpha: [math.sqrt(3.25 / 4), math.sqrt(1 / 3.25)],
    }
    got = schedule(torch.tensor(0.25, dtype=torch.float64), 2)
    assert got.tolist() == pytest.approx(by_hand[schedule], rel=1e-12)


@pytest.mark.parametrize("tempering", KINDS)
def test_tempering_starts_as_asked_and_is_learnt(tempering: str) -> None:
    model = make(HVAE, tempering=tempering, beta_0=0.4)
    assert isinstance(model, HVAE)
    assert model.beta_0.item() == pytest.approx(1.0 if tempering == "none" else 0.4, rel=1e-5)
    torch.testing.assert_close(model.alpha.prod().square(), model.beta_0)
    model.loss(data(), generator=seeded()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    fixed = make(HVAE, tempering=tempering, learn_tempering=False, learn_step_size=False)
    fixed.loss(data(), generator=seeded()).backward()
    flow = [p for name, p in fixed.named_parameters() if "logit" in name]
    assert len(flow) == (1 if tempering == "none" else 2) and not any(p.requires_grad for p in flow)


@pytest.mark.parametrize("tempering", KINDS)
def test_gradient_of_the_loss(tempering: str) -> None:
    """Against central differences of the loss in a random direction of all parameters."""
    model = make(HVAE, tempering=tempering, step_size=[[0.1, 0.2], [0.3, 0.1], [0.2, 0.2]]).double()
    x = data(dtype=torch.float64)
    noise = model.draw_noise(model.encode(x)[0], seeded())
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(model(x, noise=noise).mean(), parameters)
    g = seeded()
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
    slope = sum(float((a * b).sum()) for a, b in zip(gradient, direction, strict=True))
    h = 1e-5
    with torch.no_grad():
        values = []
        for move in (h, -2 * h):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=move)
            values.append(float(model(x, noise=noise).mean()))
    # Truncation is of order h^2 and rounding of order 1e-16 / h.
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


# --- step size ---------------------------------------------------------------------------------


def test_step_size_shapes() -> None:
    cases: list[tuple[object, tuple[int, ...]]] = [
        (0.2, ()),
        (torch.tensor(0.2), ()),
        ([0.1, 0.2], (2,)),
        ([0.1, 0.2, 0.3], (3, 1)),
        ([[0.1], [0.2], [0.3]], (3, 1)),
        (torch.full((3, 2), 0.25), (3, 2)),
        ([[0.1, 0.2]], (2,)),
    ]
    for value, shape in cases:
        model = make(HVAE, step_size=value)
        assert isinstance(model, HVAE)
        assert model.step_size.shape == shape
        expected = torch.as_tensor(value, dtype=torch.float32).reshape(shape)
        torch.testing.assert_close(model.step_size, expected, rtol=1e-5, atol=0)
        assert torch.isfinite(model(data())).all()


def test_step_size_errors() -> None:
    for value in (0.5, 0.0, -0.1, float("nan"), [0.1, 0.7]):
        with pytest.raises(ValueError, match=r"step_size: expected values in \(0, max_step_size = 0.5\)"):
            make(HVAE, step_size=value)
    with pytest.raises(ValueError, match=r"step_size: expected a number.*K = 3 and d = 2, got \[5\]"):
        make(HVAE, step_size=[0.1] * 5)
    with pytest.raises(
        ValueError, match=r"2 values may be one a step or one a dimension.*\[K, 1\] or \[1, d\]"
    ):
        make(HVAE, step_size=[0.1, 0.2], num_steps=2)
    with pytest.raises(ValueError, match="max_step_size: expected a finite number above 0"):
        make(HVAE, max_step_size=0.0)
    assert make(HVAE, step_size=0.7, max_step_size=1.0).step_size.item() == pytest.approx(0.7)  # type: ignore[operator]


# --- the contract ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "categorical"])
def test_shapes(kind: type[BaseVAE], likelihood: str) -> None:
    model = make(kind, likelihood)
    x = data()
    assert model.latent_dim == DIM
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (5, DIM)
    assert model(x).shape == model.elbo(x).shape == (5,)
    assert model.loss(x).shape == ()
    estimate = model.log_likelihood(x, 10)
    assert estimate.shape == (5,) and not estimate.requires_grad
    assert model.sample(4).shape == (4, PIXELS)
    assert model.reconstruct(x).shape == x.shape and not model.reconstruct(x).requires_grad
    assert model.sample_posterior(x).shape == (5, DIM)
    assert model.decode(mu).shape == (5, PIXELS * (256 if likelihood == "categorical" else 1))


@pytest.mark.parametrize("kind", MODELS)
def test_generator_decides_all_randomness(kind: type[BaseVAE]) -> None:
    model = make(kind)
    x = data()
    calls = [
        lambda g: model(x, generator=g),
        lambda g: model.loss(x, generator=g),
        lambda g: model.elbo(x, generator=g),
        lambda g: model.log_likelihood(x, 20, generator=g),
        lambda g: model.sample(3, generator=g),
        lambda g: model.reconstruct(x, generator=g),
        lambda g: model.sample_posterior(x, generator=g),
    ]
    for call in calls:
        first = call(seeded())
        torch.manual_seed(99)
        assert torch.equal(call(seeded()), first)
        assert not torch.equal(call(seeded(8)), first)


@pytest.mark.parametrize("kind", MODELS)
def test_log_likelihood_does_not_depend_on_chunks(kind: type[BaseVAE]) -> None:
    model = make(kind)
    x = data(5)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.encoder.register_forward_hook(count)
    whole = model.log_likelihood(x, 50, generator=seeded())
    assert calls == 1
    for chunk_size in (1, 2, 5, 7, 64, 10_000):
        part = model.log_likelihood(x, 50, chunk_size=chunk_size, generator=seeded())
        # Sums in another order, float32.
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)
    assert model.log_likelihood(x[:0], 5).shape == (0,)
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        model.log_likelihood(x, 0)
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        model.log_likelihood(x, 5, chunk_size=0)


def test_log_likelihood_grows_with_samples_and_bounds_the_elbo() -> None:
    model = make(VAE)
    x = data()
    few = torch.stack([model.log_likelihood(x, 1, generator=g) for g in [seeded()] for _ in range(500)]).mean(
        0
    )
    assert (model.log_likelihood(x, 5000, generator=seeded()) > few).all()


class PairEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.logvar = nn.Linear(PIXELS, DIM), nn.Linear(PIXELS, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        return self.mu(x), self.logvar(x)


class Returns(nn.Module):
    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output


class Skip(nn.Module):
    """A decoder that has no list of layers: autograd has to do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        return self.second(z + torch.tanh(self.first(z)))


@pytest.mark.parametrize("kind", MODELS)
def test_pair_encoder_and_images(kind: type[BaseVAE]) -> None:
    decoder = nn.Sequential(nn.Linear(DIM, PIXELS), nn.Unflatten(1, (1, 2, 3)))
    model = kind(PairEncoder(), decoder)
    x = data().reshape(5, 1, 2, 3)
    assert model(x).shape == (5,)
    assert model.reconstruct(x).shape == x.shape and model.sample(2).shape == (2, 1, 2, 3)
    assert torch.equal(model.elbo(x.flatten(1), generator=seeded()), model.elbo(x, generator=seeded()))


@pytest.mark.parametrize("kind", MODELS)
def test_integer_images_are_scaled(kind: type[BaseVAE]) -> None:
    byte = torch.randint(0, 256, (5, PIXELS), dtype=torch.uint8, generator=seeded())
    for likelihood in ("bernoulli", "gaussian", "categorical"):
        model = make(kind, likelihood)
        as_float = model(byte.float() / 255, generator=seeded())
        torch.testing.assert_close(model(byte, generator=seeded()), as_float, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(
            model(byte.double() / 255, generator=seeded()), as_float, rtol=1e-6, atol=1e-5
        )
    assert make(kind)(byte > 128).shape == (5,)


def test_latent_dim_is_learnt_from_the_encoder_where_the_decoder_hides_it() -> None:
    model = VAE(mlp(PIXELS, 2 * DIM), Skip())
    assert model.latent_dim is None
    with pytest.raises(ValueError, match="sample: latent_dim is not known yet"):
        model.sample(2)
    model(data())
    assert model.latent_dim == DIM and model.sample(2).shape == (2, PIXELS)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(5, 3), r"got a tensor \[5, 3\]"),
        (torch.zeros(4, 4), r"got a tensor \[4, 4\]"),
        (torch.zeros(5, 4, 1), r"got a tensor \[5, 4, 1\]"),
        ((torch.zeros(5, 2), torch.zeros(5, 3)), r"got \(\[5, 2\], \[5, 3\]\)"),
        ((torch.zeros(5, 2),), "got tuple"),
        ({"mu": 1}, "got dict"),
        (torch.zeros(5, 6), "latent_dim = 2, got 3 each"),
    ],
)
def test_encoder_errors(output: object, message: str) -> None:
    model = VAE(Returns(output), mlp(DIM, PIXELS))
    with pytest.raises(ValueError, match="VAE: encoder: expected .*" + message):
        model(data())


@pytest.mark.parametrize("kind", MODELS)
def test_input_errors(kind: type[BaseVAE]) -> None:
    model = make(kind)
    x = data()
    for value in (float("nan"), float("inf")):
        broken = x.clone()
        broken[2, 3] = value
        for call in (model, model.elbo, model.encode, model.log_likelihood, model.reconstruct):
            with pytest.raises(ValueError, match="x holds 1 NaN or infinite value"):
                call(broken)
    with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\].*got \[-"):
        model(x * 4 - 2)
    unchecked = make(kind, check_finite=False)
    assert torch.isfinite(unchecked(x * 4 - 2)).all()
    with pytest.raises(ValueError, match=r"expected uint8, bool or a floating dtype, got torch\.int64"):
        model(x.long())
    wrong = kind(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2 * DIM)), mlp(DIM, PIXELS + 1))
    with pytest.raises(ValueError, match="x"):
        wrong(x)
    with pytest.raises(ValueError, match=r"noise: expected \[\d, 5, 2\], got \[5, 2\]"):
        model(x, noise=torch.zeros(5, 2))


@pytest.mark.parametrize("kind", MODELS)
def test_argument_errors(kind: type[BaseVAE]) -> None:
    with pytest.raises(ValueError, match="beta: expected a finite number of at least 0, got -1"):
        make(kind, beta=-1)
    with pytest.raises(ValueError, match="latent_dim: expected at least 1, got 0"):
        make(kind, latent_dim=0)
    with pytest.raises(TypeError, match="penalties: expected torch modules, got function"):
        make(kind, penalties=[lambda step: step.loss])
    with pytest.raises(ValueError, match="ends in a Sigmoid"):
        kind(mlp(PIXELS, 4), nn.Sequential(mlp(DIM, PIXELS), nn.Sigmoid()))
    with pytest.raises(ValueError, match="likelihood: expected one of"):
        make(kind, "laplace")


def test_hvae_argument_errors() -> None:
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        make(HVAE, num_steps=0)
    with pytest.raises(
        ValueError, match="tempering: expected one of free, fixed, fixed-temperature, none, got 'no'"
    ):
        make(HVAE, tempering="no")
    with pytest.raises(ValueError, match=r"beta_0: expected a number in \(0, 1\), got 1"):
        make(HVAE, beta_0=1.0)
    with pytest.raises(ValueError, match="on_divergence: expected one of"):
        make(HVAE, on_divergence="skip")


@pytest.mark.parametrize("kind", MODELS)
def test_sigmoid_decoder_equals_its_logits(kind: type[BaseVAE]) -> None:
    encoder, logits = mlp(PIXELS, 2 * DIM).double(), mlp(DIM, PIXELS).double()
    plain = kind(encoder, logits)
    ending = kind(encoder, nn.Sequential(logits, nn.Sigmoid()), Bernoulli(probs=True))
    if isinstance(plain, HVAE):
        plain, ending = plain.double(), ending.double()
    x = data(dtype=torch.float64)
    for call in ("forward", "elbo", "log_likelihood"):
        expected = getattr(plain, call)(x, generator=seeded())
        torch.testing.assert_close(getattr(ending, call)(x, generator=seeded()), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ending.sample(3, generator=seeded()), plain.sample(3, generator=seeded()))


# --- penalties ---------------------------------------------------------------------------------


class CodeSize(Penalty):
    """A penalty with state, that also looks at another view of the data."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, step: TrainingStep) -> Tensor:
        other = step.model.objective(1 - step.x, generator=step.generator)
        return self.count * (step.z.square().sum(1) + (other.mu - step.mu).square().sum(1))

    def step(self) -> None:
        self.count += 1


class Wrong(nn.Module):
    def forward(self, step: TrainingStep) -> Tensor:
        return step.loss.mean()


@pytest.mark.parametrize("kind", MODELS)
def test_penalties(kind: type[BaseVAE]) -> None:
    penalty = CodeSize()
    model = make(kind, penalties=[penalty])
    x = data()
    base = make(kind)(x, generator=seeded())
    torch.testing.assert_close(model(x, generator=seeded()), base)
    penalty.step()
    step = model.objective(x, generator=seeded())
    other = model.encode(1 - x)[0]
    expected = base + step.z.square().sum(1) + (other - step.mu).square().sum(1)
    torch.testing.assert_close(model(x, generator=seeded()), expected)
    torch.testing.assert_close(model.elbo(x, generator=seeded()), -base)
    assert model.state_dict()["penalties.0.count"] == 1
    with pytest.raises(ValueError, match=r"Wrong: expected one value a sample, \[5\], got \[\]"):
        make(kind, penalties=[Wrong()])(x)


# --- saving, moving, training ------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_saving_pickling_copying(kind: type[BaseVAE]) -> None:
    options: dict[str, Any] = {"step_size": [0.1, 0.3]} if kind is HVAE else {}
    model = make(kind, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    x = data()
    expected = model(x, generator=seeded())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = make(kind, **options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x, generator=seeded()), expected)


@pytest.mark.parametrize("tempering", KINDS)
def test_moving(tempering: str) -> None:
    model = make(HVAE, tempering=tempering).double()
    assert isinstance(model, HVAE)
    assert {model.step_size.dtype, model.alpha.dtype, model.beta_0.dtype} == {torch.float64}
    assert model(data()).dtype == torch.float64
    model = model.to("meta")
    assert {model.step_size.device.type, model.alpha.device.type, model.beta_0.device.type} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", MODELS)
def test_on_a_gpu(kind: type[BaseVAE]) -> None:
    model = make(kind)
    x = data()
    expected = model(x, generator=seeded())
    moved = model.cuda()
    # The CPU generator gives the same noise; float32 sums differ in order.
    torch.testing.assert_close(moved(x.cuda(), generator=seeded()).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert moved.sample(3, generator=torch.Generator("cuda").manual_seed(0)).is_cuda
    assert moved.log_likelihood(x.cuda(), 10).is_cuda


@pytest.mark.parametrize("kind", MODELS)
def test_autocast_keeps_the_loss_in_float32(kind: type[BaseVAE]) -> None:
    model = make(kind)
    x = data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, generator=seeded())
    assert loss.dtype == torch.float32
    # bfloat16 has 8 bits of precision.
    torch.testing.assert_close(loss, model(x, generator=seeded()), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("kind", MODELS)
def test_data_parallel_process_group_of_one(kind: type[BaseVAE], tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make(kind)
        x = data()
        model.loss(x, generator=seeded()).backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            parallel(x, generator=seeded()).mean().backward()
        got = [p.grad for p in model.parameters()]
        torch.testing.assert_close(got, expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", MODELS)
def test_training_on_digits(kind: type[BaseVAE]) -> None:
    """Training takes the model well below the entropy of the mean image."""
    datasets = pytest.importorskip("sklearn.datasets")
    images = torch.tensor(datasets.load_digits().images / 16, dtype=torch.float32).flatten(1)
    torch.manual_seed(0)
    model = kind(
        nn.Sequential(nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 16)),
        nn.Sequential(nn.Linear(8, 64), nn.Softplus(), nn.Linear(64, 64)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    g = seeded()
    mean = images.mean(0).clamp(1e-3, 1 - 1e-3)
    baseline = -Bernoulli().log_prob(torch.logit(mean).expand_as(images), images).mean().item()
    for _ in range(250):
        batch = images[torch.randint(0, len(images), (128,), generator=g)]
        optimizer.zero_grad()
        model.loss(batch, generator=g).backward()
        optimizer.step()
    elbo = model.elbo(images, generator=g).mean().item()
    likelihood = model.log_likelihood(images[:100], 100, generator=g).mean().item()
    assert -elbo < baseline - 1, (elbo, baseline)
    assert likelihood > model.elbo(images[:100], generator=g).mean().item()


# --- divergence --------------------------------------------------------------------------------


def unstable(**options: Any) -> tuple[HVAE, Tensor, Tensor]:
    """Samples 0 and 2 sit still at the mode of p(z | x); the others meet a far too large step and explode."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(PIXELS, 2 * DIM), nn.Linear(DIM, PIXELS)
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.bias.zero_()
        decoder.bias.copy_(torch.linspace(0.1, 0.6, PIXELS))
    model = HVAE(encoder, decoder, Gaussian(1e-3), num_steps=12, tempering="free", step_size=0.4, **options)
    x = data(4)
    x[[0, 2]] = decoder.bias.detach()
    noise = torch.randn(2, 4, DIM, generator=seeded())
    noise[:, [0, 2]] = 0
    return model, x, noise


def test_divergence_is_reported() -> None:
    model, x, noise = unstable()
    with pytest.raises(
        DivergenceError, match=r"2 of 4 trajectories left the finite range, .* leapfrog step"
    ) as caught:
        model(x, noise=noise)
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert error.num_samples == 2 and error.step is not None and 1 <= error.step <= 12
    assert error.energy_error > 1e6
    assert error.step_size == pytest.approx((0.4, 0.4))
    assert "step size 0.4 to 0.4" in str(error) and "on_divergence='drop'" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.step == error.step and again.num_samples == 2
    with pytest.raises(DivergenceError):
        model.log_likelihood(x, 3, generator=seeded())


def test_divergence_can_be_survived() -> None:
    model, x, noise = unstable(on_divergence="drop")
    loss = model(x, noise=noise)
    assert torch.isfinite(loss).all() and model.divergences == 2
    mu, logvar = model.encode(x)
    vae = VAE(model.encoder, model.decoder, model.likelihood)
    plain = -vae.log_weight(x, mu, logvar, noise[:1])
    torch.testing.assert_close(loss[[1, 3]], plain[[1, 3]])
    alone = model(x[[0, 2]], noise=noise[:, [0, 2]])
    torch.testing.assert_close(loss[[0, 2]], alone)
    assert model.divergences == 2
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    step = model.objective(x, noise=noise)
    assert torch.equal(step.z[[1, 3]], step.z_0[[1, 3]])
    assert model.divergences == 4
    weights = model.log_weight(x, mu, logvar, noise)
    assert torch.equal(weights[[1, 3]], torch.full((2,), -math.inf))
    assert torch.isfinite(weights[[0, 2]]).all()


def test_divergence_of_a_whole_batch_is_survived() -> None:
    model, x, noise = unstable(on_divergence="drop")
    loss = model(x[[1, 3]], noise=noise[:, [1, 3]])
    assert torch.isfinite(loss).all() and model.divergences == 2


def test_divergence_can_be_ignored() -> None:
    model, x, noise = unstable(on_divergence="ignore")
    finite = torch.isfinite(model(x, noise=noise))
    assert finite.tolist() == [True, False, True, False] and model.divergences == 0


@pytest.mark.parametrize("on_divergence", ["raise", "drop"])
def test_broken_encoder_is_not_blamed_on_the_step_size(on_divergence: str) -> None:
    model, x, noise = unstable(on_divergence=on_divergence)
    with torch.no_grad():
        model.encoder.bias[0] = float("nan")  # type: ignore[operator]
    with pytest.raises(
        DivergenceError, match=r"4 of 4 samples have no finite .* before the first leapfrog step"
    ) as caught:
        model(x, noise=noise)
    assert caught.value.step == 0


def test_healthy_batches_run_the_flow_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvae.models import hvae

    calls = []
    original = hvae.hamiltonian_flow

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(kwargs)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(hvae, "hamiltonian_flow", counted)
    make(HVAE)(data())
    assert calls == [{}]


def test_repr_names_the_model() -> None:
    text = repr(make(HVAE, "gaussian"))
    assert "Gaussian(scale=1.0)" in text and "num_steps=3" in text and "kind='free'" in text
