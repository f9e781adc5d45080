"""VAE and HVAE: the model contract."""

from __future__ import annotations

import pytest
import torch
from model_problems import DIM, MODELS, PIXELS, Skip, data, make, mlp, seeded
from torch import Tensor, nn

from fastvae.likelihoods import Bernoulli
from fastvae.lowering import CoupledSamples
from fastvae.models import HVAE, VAE, BaseVAE


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


@pytest.mark.parametrize("kind", MODELS)
def test_pair_encoder_and_images(kind: type[BaseVAE]) -> None:
    decoder = nn.Sequential(nn.Linear(DIM, PIXELS), nn.Unflatten(1, (1, 2, 3)))
    model = kind(PairEncoder(), decoder)
    x = data().reshape(5, 1, 2, 3)
    assert model(x).shape == (5,)
    assert model.reconstruct(x).shape == x.shape and model.sample(2).shape == (2, 1, 2, 3)
    assert torch.equal(model.elbo(x.flatten(1), generator=seeded()), model.elbo(x, generator=seeded()))


@pytest.mark.parametrize("kind", MODELS)
def test_inference_mode_and_no_grad(kind: type[BaseVAE]) -> None:
    model = make(kind)
    x = data()
    expected = model(x, generator=seeded())
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(model(x, generator=seeded()), expected)
            assert model.log_likelihood(x, 5).shape == (5,)


@pytest.mark.parametrize("kind", MODELS)
def test_batch_norm_in_the_decoder(kind: type[BaseVAE]) -> None:
    decoder = nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, PIXELS))
    model = kind(mlp(PIXELS, 2 * DIM), decoder)
    assert model.latent_dim == DIM and decoder.training
    x = data()
    if kind is HVAE:
        with pytest.raises(CoupledSamples):
            model(x)
    else:
        model(x).mean().backward()
    model.eval()
    assert torch.isfinite(model(x)).all() and torch.isfinite(model.log_likelihood(x, 5)).all()


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
    with pytest.raises(TypeError, match="decoder: expected a torch module, got function"):
        kind(mlp(PIXELS, 4), lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="likelihood: expected one of"):
        make(kind, "laplace")


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
