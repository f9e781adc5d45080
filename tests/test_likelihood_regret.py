"""Likelihood regret against the published procedure in float64: one image, one deep copy, torch.optim.Adam."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from influence_problems import images, mlp, randomised
from torch import Tensor, nn

from fastvae.likelihoods import Categorical
from fastvae.lowering import CoupledSamples
from fastvae.models import HVAE, VAE
from fastvae.models.base import BaseVAE
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.copies import Adam, LoweredCopies
from fastvae.ood.differentiated import VmappedCopies
from fastvae.ood.likelihood_regret import _FIRST_SAMPLE
from fastvae.ood.sequential import refit_one

# Of a decoder without kernels, of which the likelihood's operator warns once.
pytestmark = pytest.mark.filterwarnings("ignore:fastvae.ops.log_px. this decoder")


class Pair(nn.Module):
    """Two heads on one trunk, and a skip connection: nothing that can be lowered."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(20, 12), nn.Tanh())
        self.skip = nn.Linear(12, 12)
        self.mu, self.logvar = nn.Linear(12, 4), nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        h = h + self.skip(h)
        return self.mu(h), self.logvar(h)


def dense() -> BaseVAE:
    return VAE(mlp(20, 12, 9, 8), mlp(4, 12, 20), beta=4.0)


def dcgan() -> BaseVAE:
    """The networks of the paper in small: 4x4 convolutions of stride 2, batch norm, ReLU, 5 values a sub-pixel."""
    encoder = nn.Sequential(
        nn.Conv2d(2, 3, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 5, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 8, 2),
        nn.Flatten(),
    )
    decoder = nn.Sequential(
        nn.Unflatten(1, (4, 1, 1)),
        nn.ConvTranspose2d(4, 5, 2, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.ConvTranspose2d(5, 3, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 10, 4, stride=2, padding=1),
    )
    return VAE(encoder, decoder, Categorical(5))


def mixed() -> BaseVAE:
    """Biases, dilation, uneven windows, smooth activations, norms before and behind, a permuted flattening."""
    encoder = nn.Sequential(
        nn.BatchNorm2d(2, affine=False),
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.SiLU(),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(160, 10),
        nn.BatchNorm1d(10),
        nn.Softplus(),
        nn.Linear(10, 8, bias=False),
        nn.Tanh(),
    )
    return VAE(encoder, nn.Sequential(mlp(4, 12, 128), nn.Unflatten(1, (2, 8, 8))), "gaussian")


def hamiltonian() -> BaseVAE:
    return HVAE(mlp(20, 12, 8), mlp(4, 12, 20), num_steps=2)


def unlowered() -> BaseVAE:
    return VAE(Pair(), mlp(4, 12, 20))


def recurrent() -> BaseVAE:
    """By autograd one image after the other, and a decoder that is read as a graph."""
    return VAE(
        Recurrent(nn.LSTM), nn.Sequential(mlp(4, 12, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 20))
    )


SHAPES: dict[Callable[[], BaseVAE], tuple[int, ...]] = {
    dense: (20,),
    dcgan: (2, 8, 8),
    mixed: (2, 8, 8),
    hamiltonian: (20,),
    unlowered: (20,),
}
each_model = pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
Make = Callable[[], BaseVAE]


def build(make: Make) -> BaseVAE:
    torch.manual_seed(0)
    model = randomised(make())
    assert isinstance(model, BaseVAE)
    return model


def data(make: Make, count: int = 4) -> Tensor:
    """float32 under models of both precisions, because noise is keyed by the bytes; a third of it zero."""
    x = images(count, *SHAPES[make]).float()
    return torch.where(x < 0.3, torch.zeros(()), x)


def regret(model: BaseVAE, **options: object) -> LikelihoodRegret:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LikelihoodRegret(model, **{"num_steps": 40, "num_samples": 8, "lr": 1e-2, **options})  # type: ignore[arg-type]


def quiet(call: Callable[..., object], *args: object, **options: object) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@each_model
@pytest.mark.parametrize("settings", [{"num_steps": 100, "lr": 2e-4}, {"num_steps": 40, "lr": 2e-2}], ids=str)
def test_equals_the_sequential_procedure(make: Make, settings: dict[str, float]) -> None:
    model, x = build(make).eval(), data(make, 3)
    detector = regret(model, **settings)
    refit = quiet(detector.refit, x, parameters=True)
    scores = quiet(detector.predict, x)
    single = quiet(regret(copy.deepcopy(model).float(), **settings).predict, x)
    for index, image in enumerate(x.split(1)):
        keys = keys_of(image)
        noise = SampleNoise(keys, 0, model.noise_draws)
        private, losses = refit_one(model, image, noise, **settings)  # type: ignore[arg-type]
        assert off(refit.losses[index], losses) < 1e-8  # type: ignore[attr-defined]
        expected = dict(private.encoder.named_parameters())
        assert refit.parameters.keys() == expected.keys()  # type: ignore[attr-defined]
        for name, parameter in expected.items():
            assert off(refit.parameters[name][index], parameter) < 1e-8, name  # type: ignore[attr-defined]
        samples = SampleNoise(keys, 0, model.noise_draws, start=_FIRST_SAMPLE)
        before, after = (m.log_likelihood(image, 8, noise=samples) for m in (model, private))
        assert off(scores[index], after - before) < 1e-8  # type: ignore[index]
        # float32 against float64.
        assert off(single[index].double(), after - before) < 0.05  # type: ignore[index]


@each_model
def test_weight_decay_covers_every_parameter(make: Make) -> None:
    """Biases and norms too, as of ``torch.optim.Adam(encoder.parameters(), weight_decay=...)``."""
    model, x = build(make).eval(), data(make, 1)
    options = {"num_steps": 10, "lr": 1e-2, "weight_decay": 2.0}
    found = quiet(regret(model, **options).refit, x, parameters=True).parameters  # type: ignore[attr-defined]
    without = quiet(regret(model, **options | {"weight_decay": 0.0}).refit, x, parameters=True)
    private, _ = refit_one(model, x, SampleNoise(keys_of(x), 0, model.noise_draws), **options)  # type: ignore[arg-type]
    for name, expected in private.encoder.named_parameters():
        assert off(found[name][0], expected) < 1e-8, name
        assert off(without.parameters[name][0], expected) > 1e-3, name  # type: ignore[attr-defined]


@each_model
def test_images_do_not_influence_each_other(make: Make) -> None:
    detector, x = regret(build(make)), data(make, 5)
    whole = quiet(detector.predict, x)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert off(quiet(detector.predict, x[order]), whole[order]) < 1e-9  # type: ignore[arg-type,index]
    parts = torch.cat([quiet(detector.predict, part) for part in x.split(2)])  # type: ignore[misc]
    assert off(parts, whole) < 1e-9  # type: ignore[arg-type]
    one_by_one = regret(detector.model, memory_budget=1)
    assert off(quiet(one_by_one.predict, x), whole) < 1e-9  # type: ignore[arg-type]
    twice = quiet(detector.predict, torch.cat((x[:1], x[:1])))
    assert off(twice[0], twice[1]) < 1e-12  # type: ignore[index]
    assert off(quiet(regret(detector.model, seed=1).predict, x), whole) > 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [dense, dcgan, mixed], ids=lambda make: make.__name__)
def test_both_routes_train_the_same_copies(make: Make) -> None:
    model, x = build(make).eval(), data(make)
    adam = Adam(1e-2, (0.8, 0.99), 1e-2)
    fast, slow = LoweredCopies(model, x, adam, 20), VmappedCopies(model, x, adam)
    for step in range(20):
        found = fast.forward()
        assert off(found, slow.forward()) < 1e-10
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(step), dtype=found.dtype)
        fast.update(grad)
        slow.update(grad)
        if step == 10:  # asking in between changes nothing
            fast.parameters()
    for name, parameter in slow.parameters().items():
        assert off(fast.parameters()[name], parameter) < 1e-10
    with pytest.raises(ValueError, match="update: expected at most 20 steps, got 21"):
        fast.update(grad)


def test_an_encoder_that_cannot_be_lowered_warns_once() -> None:
    model = Rescaled(mlp(20, 12, 8), mlp(4, 12, 20)).double().eval()
    detector = LikelihoodRegret(model, num_steps=2, num_samples=2)
    with pytest.warns(UserWarning, match=r"by torch\.vmap and autograd, which is slower: lower:"):
        detector.predict(data(unlowered))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.predict(data(unlowered))


def tied() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(20, 8), layer, nn.Tanh(), layer)


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(20, 8)))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 10, 1)), nn.Conv2d(2, 4, (10, 1), groups=2), nn.Flatten(), nn.Linear(4, 8)
    )


class Rescaled(VAE):
    """Its posterior is not what the encoder returns."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = super().encode(x)
        return 2 * mu, logvar.clamp(-1, 1)


class Cached(nn.Module):
    """Reads its weights from a list of its own, too, past what torch.func.functional_call exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 8)
        self.own = [self.layer.weight, self.layer.bias]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(x) + nn.functional.linear(x, *self.own).tanh()).chunk(2, 1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rows, self.last = kind(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rows(x.reshape(len(x), 5, 4))[0][:, -1])


class Attention(nn.Module):
    """Attention as a user writes it, and a transformer's layer, which in eval mode has a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.layer = nn.Linear(4, 12), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.last = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(len(x), 5, 4)).chunk(3, -1)
        h = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.last(self.layer(h).flatten(1))


class Unmapped(nn.Module):
    """Asks for a number, which torch.vmap has no way to give."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)


def one_norm(which: str) -> nn.Module:
    """BatchNorm without its bias, as of ``nn.BatchNorm1d(8, bias=False)``, or without its weight."""
    norm = nn.BatchNorm1d(8)
    norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    norm.register_parameter(which, None)
    return nn.Sequential(nn.Linear(20, 8), norm, nn.Tanh(), nn.Linear(8, 8))


@pytest.mark.parametrize("which", ["bias", "weight"])
def test_a_batch_norm_that_lacks_a_parameter_trains_none(which: str) -> None:
    torch.manual_seed(0)
    model = VAE(one_norm(which), mlp(4, 12, 20)).double().eval()
    x = data(dense, 3)
    refit = quiet(regret(model, num_steps=20, lr=0.1).refit, x, parameters=True)
    for index in range(3):
        image = x[index : index + 1]
        private, losses = refit_one(model, image, SampleNoise(keys_of(image), 0), num_steps=20, lr=0.1)
        assert off(refit.losses[index], losses) < 1e-9  # type: ignore[attr-defined]
        expected = dict(private.encoder.named_parameters())
        assert refit.parameters.keys() == expected.keys()  # type: ignore[attr-defined]
        for name, parameter in expected.items():
            assert off(refit.parameters[name][index], parameter) < 1e-8, name  # type: ignore[attr-defined]


def frozen_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8, affine=False), nn.Tanh(), nn.Linear(8, 8))


UNUSUAL: dict[str, tuple[Callable[[], BaseVAE], str]] = {
    "encode": (lambda: Rescaled(mlp(20, 12, 8), mlp(4, 12, 20)), r"torch\.vmap"),
    "cached": (lambda: VAE(Cached(), mlp(4, 12, 20)), ""),
    "cached, encode": (
        lambda: Rescaled(Cached(), mlp(4, 12, 20)),
        "one image after the other.*torch.vmap computes other gradients",
    ),
    "lstm": (lambda: VAE(Recurrent(nn.LSTM), mlp(4, 12, 20)), ""),
    "lstm, encode": (lambda: Rescaled(Recurrent(nn.LSTM), mlp(4, 12, 20)), r"torch\.vmap and autograd"),
    "gru": (lambda: HVAE(Recurrent(nn.GRU), mlp(4, 12, 20), num_steps=2), ""),
    "attention": (lambda: VAE(Attention(), mlp(4, 12, 20)), ""),
    "attention, encode": (lambda: Rescaled(Attention(), mlp(4, 12, 20)), r"torch\.vmap and autograd"),
    "number": (lambda: VAE(Unmapped(), mlp(4, 12, 20)), "one image after the other"),
    "norm": (lambda: VAE(frozen_norm(), mlp(4, 12, 20)), ""),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_encoders_are_trained_as_published(name: str) -> None:
    torch.manual_seed(0)
    make, message = UNUSUAL[name]
    model, x = make().double().eval(), data(dense, 3)
    detector = regret(model, num_steps=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refit = detector.refit(x, parameters=True)
    ours = [str(w.message) for w in caught if str(w.message).startswith("LikelihoodRegret")]
    assert len(ours) == (message != "") and all(re.search(message, text) for text in ours), ours
    scores = quiet(detector.predict, x)
    for index, image in enumerate(x.split(1)):
        keys = keys_of(image)
        noise = SampleNoise(keys, 0, model.noise_draws)
        private, losses = refit_one(model, image, noise, num_steps=8, lr=1e-2)
        assert off(refit.losses[index], losses) < 1e-8
        for key, parameter in private.encoder.named_parameters():
            error = (refit.parameters[key][index] - parameter).detach().abs()
            if key.endswith(("in_proj_bias", "qkv.bias")):
                # The gradient to the keys' bias is zero, which leaves Adam steps of round-off over eps.
                error[len(error) // 3 : 2 * len(error) // 3] = 0
            assert float(error.max()) < 1e-8, key
        samples = SampleNoise(keys, 0, model.noise_draws, start=_FIRST_SAMPLE)
        before, after = (m.log_likelihood(image, 8, noise=samples) for m in (model, private))
        assert off(scores[index], after - before) < 1e-8  # type: ignore[index]


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_recurrent_and_attending_decoders(decoder: str) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 20)
            self.rows = nn.LSTM(4, 4, batch_first=True) if decoder == "lstm" else None

        def forward(self, z: Tensor) -> Tensor:
            h = self.first(z).reshape(-1, 5, 4)
            if self.rows is not None:
                return self.rows(h)[0].flatten(1)
            return nn.functional.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None]).flatten(1)

    torch.manual_seed(0)
    model, x = VAE(mlp(20, 12, 8), Decoder(), latent_dim=4).double().eval(), data(dense, 2)
    refit = quiet(regret(model, num_steps=5).refit, x)
    for index, image in enumerate(x.split(1)):
        _, losses = refit_one(model, image, SampleNoise(keys_of(image), 0), num_steps=5, lr=1e-2)
        assert off(refit.losses[index], losses) < 1e-8  # type: ignore[attr-defined]


def test_encoders_that_cannot_be_trained_for_each_image() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + torch.randn_like(x))

    class Undifferentiable(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).detach()

    x, state = data(dense), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"LikelihoodRegret: encoder: .*draws random numbers in eval mode"):
        regret(VAE(Noisy(), mlp(4, 12, 20)).double()).predict(x)
    with pytest.raises(
        ValueError, match=r"LikelihoodRegret: encoder: expected one whose output .* \(RuntimeError"
    ):
        quiet(regret(VAE(Undifferentiable(), mlp(4, 12, 20)).double()).predict, x)
    without = VAE(nn.Flatten(), mlp(10, 12, 20)).double()
    with pytest.raises(ValueError, match="LikelihoodRegret: encoder: expected parameters to optimise"):
        regret(without).predict(x)
    assert torch.isfinite(regret(without, target="posterior", num_steps=2).predict(x)).all()
    torch.set_rng_state(state)


@pytest.mark.parametrize("encoder", [tied, parametrised, grouped])
def test_encoders_whose_parameters_are_not_a_layers_own(encoder: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = VAE(encoder(), mlp(4, 12, 20)).double().eval()
    x = data(dense, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refit = regret(model).refit(x, parameters=True)
    assert not caught
    private, _ = refit_one(model, x[:1], SampleNoise(keys_of(x[:1]), 0), num_steps=40, lr=1e-2)
    for name, parameter in private.encoder.named_parameters():
        assert off(refit.parameters[name][0], parameter) < 1e-8


def test_posterior_target() -> None:
    model, x = build(dense).eval(), data(dense, 3)
    detector = regret(model, target="posterior", num_steps=30, lr=None)
    refit = detector.refit(x, parameters=True)
    assert refit.parameters == {} and detector.adam.lr == 0.05
    mu, logvar = (part.detach() for part in model.encode(x))
    noise = SampleNoise(keys_of(x), 0)
    leaf = torch.cat((mu, logvar), 1).requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.05)
    for step in range(30):
        optimizer.zero_grad()
        m, v = leaf.chunk(2, 1)
        z = m + torch.exp(v / 2) * noise(step, 1, mu)[0, 0]
        loss = 0.5 * (m.square() + v.exp() - 1 - v).sum(1) - model.log_px(z, x)
        assert off(refit.losses[:, step], loss) < 1e-9
        loss.sum().backward()
        optimizer.step()
    assert off(torch.cat((refit.mu, refit.logvar), 1), leaf) < 1e-9
    assert torch.isfinite(detector.predict(x)).all()


@each_model
@pytest.mark.parametrize("count", [1, 4])
def test_the_model_comes_back_untouched(make: Make, count: int) -> None:
    model, x = build(make), data(make, count)
    model.train()
    model.decoder.eval()
    first, second = list(model.parameters())[:2]
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    state = copy.deepcopy(model.state_dict())
    facts = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    scores = quiet(regret(model, num_steps=3).predict, x)
    assert scores.shape == (count,) and not scores.requires_grad  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(
        p.requires_grad == fact[0] and p.grad is fact[1]
        for p, fact in zip(model.parameters(), facts, strict=True)
    )
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert "encode" not in vars(model)


def test_modes_and_dtypes() -> None:
    model, x = build(dense).float(), data(dense)
    expected = regret(model).predict(x)
    with torch.inference_mode():
        assert torch.equal(regret(model).predict(x.clone()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(regret(model)(x), expected)
    assert torch.equal(regret(model).fit(None).to("cpu").predict(x), expected)
    assert not LikelihoodRegret.requires_fit and expected.dtype == torch.float32
    octets = (x * 255).round().to(torch.uint8)
    assert torch.isfinite(regret(model).predict(octets)).all()


def test_empty_batches() -> None:
    model = build(dcgan)
    x = data(dcgan)[:0]
    assert regret(model).predict(x).shape == (0,)
    refit = regret(model).refit(x, parameters=True)
    assert refit.mu.shape == (0, 4) and refit.losses.shape == (0, 40)
    assert refit.parameters["0.weight"].shape == (0, 3, 2, 4, 4)


def test_refusals() -> None:
    model, x = build(dcgan), data(dcgan)
    with pytest.raises(ValueError, match="x holds 1 NaN or infinite value"):
        regret(model).predict(torch.where(torch.arange(x.numel()).reshape(x.shape) == 7, torch.nan, x))
    with pytest.raises(ValueError, match=r"the model does not take images of shape \[3, 8, 8\]"):
        regret(model).predict(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected a batch of images \[B, ...\], got \[5\]"):
        regret(model).predict(torch.zeros(5))
    with pytest.raises(ValueError, match="expected parameters in float32 or float64, got"):
        regret(build(dcgan).bfloat16()).predict(x)
    with pytest.raises(TypeError, match="model: expected a fastvae model, got Linear"):
        LikelihoodRegret(nn.Linear(2, 2))  # type: ignore[arg-type]
    for options, message in (
        ({"target": "decoder"}, "target: expected one of"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"memory_budget": 0}, "memory_budget: expected at least 1, got 0"),
        ({"lr": -1.0}, "lr: expected a finite number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number"),
        ({"betas": (0.9, 1.0)}, "betas: expected two numbers in"),
    ):
        with pytest.raises(ValueError, match=message):
            LikelihoodRegret(model, **options)  # type: ignore[arg-type]
    coupled = VAE(
        nn.Sequential(nn.BatchNorm1d(20, track_running_stats=False), nn.Linear(20, 8)), mlp(4, 12, 20)
    )
    with pytest.raises(CoupledSamples):
        regret(coupled).predict(data(dense))


def test_scores_that_are_not_finite_are_named() -> None:
    model, x = build(dense), data(dense)
    with pytest.warns(RuntimeWarning, match="the scores of 4 image.s. are not finite, the first is number 0"):
        LikelihoodRegret(model, num_steps=5, num_samples=4, lr=1e200).predict(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("target", ["encoder", "posterior"])
@pytest.mark.parametrize("make", [*SHAPES, recurrent], ids=lambda make: make.__name__)
def test_regret_on_cuda(make: Make, target: str, cuda_graph: bool) -> None:
    model, x = build(make).eval(), images(2, *SHAPES.get(make, (20,))).float()
    on_cpu = regret(model, target=target, num_steps=20)
    on_gpu = regret(copy.deepcopy(model).cuda(), target=target, num_steps=20, cuda_graph=cuda_graph)
    expected = quiet(on_cpu.refit, x, parameters=True)
    found = quiet(on_gpu.refit, x, parameters=True)
    assert found.mu.is_cuda  # type: ignore[attr-defined]
    for name, parameter in expected.parameters.items():  # type: ignore[attr-defined]
        assert off(found.parameters[name].cpu(), parameter) < 1e-8  # type: ignore[attr-defined]
    assert off(found.losses.cpu(), expected.losses) < 1e-8  # type: ignore[attr-defined]
    assert off(quiet(on_gpu.predict, x).cpu(), quiet(on_cpu.predict, x)) < 1e-8  # type: ignore[attr-defined,arg-type]
