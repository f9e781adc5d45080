"""Random encoders in likelihood regret, against the published procedure: one deep copy and torch.optim.Adam an image.

In float64 parameters, losses and posteriors agree to about 1e-8 after a few steps.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvae.likelihoods import Categorical
from fastvae.lowering import CoupledSamples, UnsupportedLayer
from fastvae.models import HVAE, IWAE, VAE
from fastvae.models.base import BaseVAE
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.copies import lower_encoder
from fastvae.ood.sequential import refit_one

CASES = 40

_LATENT = 3
_ACTIVATIONS: list[Callable[[random.Random], nn.Module]] = [
    lambda draw: nn.Tanh(),
    lambda draw: nn.Sigmoid(),
    lambda draw: nn.SiLU(),
    lambda draw: nn.GELU(draw.choice(["none", "tanh"])),
    lambda draw: nn.Softplus(draw.choice([1.0, 2.0])),
    lambda draw: nn.ELU(draw.choice([1.0, 0.5])),
    lambda draw: nn.ReLU(inplace=draw.random() < 0.3),
    lambda draw: nn.LeakyReLU(draw.choice([0.01, 0.2])),
    lambda draw: draw.choice([nn.PReLU, nn.Mish, nn.Identity])(),
    lambda draw: nn.Dropout(0.3),
]


class Heads(nn.Module):
    """A trunk with a head for the mean and one for the log variance, or the trunk's output in two halves."""

    def __init__(self, trunk: nn.Module, width: int, draw: random.Random) -> None:
        super().__init__()
        self.trunk = trunk
        self.mu, self.logvar = nn.Linear(width, _LATENT), nn.Linear(width, _LATENT, bias=draw.random() < 0.5)
        self.skip = draw.random() < 0.3
        if draw.random() < 0.3:
            self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        h = h + torch.tanh(h) if self.skip else h
        return self.mu(h), self.logvar(h)


class Traced(nn.Module):
    """The same layers, called in a forward of the user's own."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Rows(nn.Module):
    """A recurrent layer over the rows of a flat input."""

    def __init__(self, width: int, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rows, self.width = kind(1, 3, batch_first=True), width

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x[:, :, None])[0][:, -1]


def _batch_norm(kind: type[nn.modules.batchnorm._BatchNorm], size: int, draw: random.Random) -> nn.Module:
    norm = kind(size, eps=draw.choice([1e-5, 1e-2]), affine=draw.random() < 0.8)
    if norm.affine and draw.random() < 0.4:
        norm.register_parameter(draw.choice(["weight", "bias"]), None)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 1.5)
    return norm


def _convolutional(draw: random.Random) -> tuple[list[nn.Module], int, tuple[int, ...]]:
    """Layers from images, the width that they end in, and the shape of an image."""
    channels, height, width = draw.choice([1, 2, 3]), draw.randint(4, 8), draw.randint(4, 8)
    shape = channels, height, width
    layers: list[nn.Module] = []
    for _ in range(draw.randint(1, 3)):
        kernel = draw.randint(1, min(4, height)), draw.randint(1, min(4, width))
        stride, padding = (
            (draw.choice([1, 1, 2]), draw.choice([1, 2])),
            (draw.randint(0, 1), draw.randint(0, 1)),
        )
        dilation = draw.choice([1, 1, 2]), draw.choice([1, 1, 2])
        groups = channels if draw.random() < 0.1 else 1
        out = groups * draw.randint(1, 4)
        after = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
        ]
        if min(after) < 1:
            continue
        mode = draw.choice(["zeros"] * 8 + ["replicate"])
        layers.append(
            nn.Conv2d(
                channels,
                out,
                kernel,
                stride,
                padding,
                dilation,
                groups,
                draw.random() < 0.7,
                padding_mode=mode,
            )
        )
        channels, (height, width) = out, after
        if draw.random() < 0.4:
            layers.append(_batch_norm(nn.BatchNorm2d, channels, draw))
        elif draw.random() < 0.1:
            layers.append(nn.GroupNorm(1, channels))
        layers.append(draw.choice(_ACTIVATIONS)(draw))
        if draw.random() < 0.1 and min(height, width) >= 2:
            layers.append(nn.AvgPool2d(2, 1))
            height, width = height - 1, width - 1
    return [*layers, nn.Flatten()], channels * height * width, shape


def _dense(draw: random.Random, width: int) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = []
    for _ in range(draw.randint(0, 2)):
        after = draw.randint(2, 10)
        layer: nn.Module = nn.Linear(width, after, bias=draw.random() < 0.8)
        if draw.random() < 0.05:
            layer = nn.utils.parametrizations.weight_norm(layer)
        layers.append(layer)
        width = after
        kind = draw.random()
        if kind < 0.3:
            layers.append(_batch_norm(nn.BatchNorm1d, width, draw))
        elif kind < 0.37:
            layers.append(nn.LayerNorm(width))
        layers.append(draw.choice(_ACTIVATIONS)(draw))
        if draw.random() < 0.06:
            shared = nn.Linear(width, width)
            layers += [shared, nn.Tanh(), shared]
    return layers, width


def _encoder(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    shape: tuple[int, ...]
    if draw.random() < 0.5:
        layers, width, shape = _convolutional(draw)
    else:
        shape = draw.choice([(draw.randint(3, 12),), (2, draw.randint(2, 5))])
        width = math.prod(shape)
        layers = [nn.Flatten()] if len(shape) > 1 or draw.random() < 0.3 else []
        if draw.random() < 0.15:
            layers.append(_batch_norm(nn.BatchNorm1d, width, draw))
        if draw.random() < 0.05:
            layers.append(Rows(width, draw.choice([nn.LSTM, nn.GRU])))
            width = 3
    more, width = _dense(draw, width)
    trunk = nn.Sequential(*layers, *more)
    kind = draw.random()
    if kind < 0.15:
        return Heads(trunk, width, draw), shape
    whole = nn.Sequential(*trunk, nn.Linear(width, 2 * _LATENT, bias=draw.random() < 0.8))
    if draw.random() < 0.1:
        whole.append(_batch_norm(nn.BatchNorm1d, 2 * _LATENT, draw))
    return (Traced(whole) if kind < 0.3 else whole), shape


def random_model(draw: random.Random) -> tuple[BaseVAE, tuple[int, ...]]:
    """A model with such an encoder, and the shape of its images."""
    encoder, shape = _encoder(draw)
    likelihood = draw.choice(["bernoulli", "bernoulli", "gaussian", Categorical(3)])
    outputs = math.prod(shape) * (3 if isinstance(likelihood, Categorical) else 1)
    decoder = nn.Sequential(nn.Linear(_LATENT, 6), nn.Tanh(), nn.Linear(6, outputs))
    if isinstance(likelihood, Categorical):
        decoder.append(
            nn.Unflatten(1, (3, math.prod(shape)) if len(shape) == 1 else (3 * shape[0], *shape[1:]))
        )
    kind = draw.random()
    options = {"latent_dim": _LATENT} if draw.random() < 0.5 else {}
    if kind < 0.15:
        return HVAE(encoder, decoder, likelihood, num_steps=2, **options), shape
    if kind < 0.3:
        return IWAE(encoder, decoder, likelihood, num_samples=2, **options), shape
    return VAE(encoder, decoder, likelihood, **options), shape


def run_case(seed: int) -> str:
    """Both procedures on the same images and noise; the word says which way the encoder was trained."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        model, shape = random_model(draw)
    model = model.double().eval() if draw.random() < 0.5 else model.double()
    x = torch.rand(draw.randint(1, 3), *shape).float()
    if isinstance(model.likelihood, Categorical):
        x = (x * 2).round() / 2
    steps, lr, decay = draw.randint(1, 6), draw.choice([1e-3, 1e-2]), draw.choice([0.0, 5e-5, 1e-2])
    settings = {"num_steps": steps, "lr": lr, "weight_decay": decay}
    detector = LikelihoodRegret(
        model, num_samples=2, seed=seed, memory_budget=draw.choice([1, 2**28]), **settings
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    try:
        refit = detector.refit(x, parameters=True)
    except CoupledSamples:
        return "coupled"
    except ValueError as error:
        if not (_normalises_one_value(error) and _normalises_one_value(_error_of(model, x[:1]))):
            raise
        return "both refused"
    finally:
        assert modes == [module.training for module in model.modules()]
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    for index, image in enumerate(x.split(1)):
        noise = SampleNoise(keys_of(image), seed, model.noise_draws)
        private, losses = refit_one(model, image, noise, **settings)
        _agree("losses", refit.losses[index], losses, 1e-8)
        expected = dict(private.encoder.named_parameters())
        assert refit.parameters.keys() == expected.keys(), (list(refit.parameters), list(expected))
        for name, parameter in expected.items():
            # Adam divides by the gradient's size: of one that is zero but for rounding (a bias that a norm takes away)
            # it makes steps of rounding, far below lr.
            moved = (
                float((parameter - state[f"encoder.{name}"]).detach().abs().max())
                if parameter.numel()
                else 0.0
            )
            share = 1e-6 if moved > 1e-3 * lr else 1e-3
            _agree(name, refit.parameters[name][index], parameter, 1e-8 + share * lr * steps)
        with torch.no_grad():
            mu, logvar = private.encode(image)
        _agree("mu", refit.mu[index], mu[0], 1e-8)
        _agree("logvar", refit.logvar[index], logvar[0], 1e-8)
    return _way(model, x)


def _normalises_one_value(error: Exception | None) -> bool:
    """Whether it is PyTorch's refusal of a GroupNorm or InstanceNorm whose mean is of a single value."""
    own = error.__cause__ or error if error is not None else None
    return isinstance(own, ValueError) and "Expected more than 1 " in str(own)


def _error_of(model: BaseVAE, image: Tensor) -> Exception | None:
    """What the encoder itself raises for this image."""
    try:
        copy.deepcopy(model.encoder).eval()(image.double())
    except ValueError as error:
        return error
    return None


def _way(model: BaseVAE, x: Tensor) -> str:
    try:
        lower_encoder(model.encoder, tuple(x.shape[1:]))
    except UnsupportedLayer:
        return "by autograd"
    return "by kernels"


def _agree(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found - expected).detach().abs().max()) if found.numel() else 0.0
    scale = max(1.0, float(expected.detach().abs().max())) if found.numel() else 1.0
    assert found.shape == expected.shape and error <= tolerance * scale, f"{what}: off by {error:.2e}"
