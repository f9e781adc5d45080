"""Random graphs of layers as encoders in likelihood regret, against Adam by hand, one image after the other.

Skips, joins, gates, norms, shared and computed weights, buffers, tables, sequences, convolutions in one to three
dimensions; conditions, missing values, images in any order of memory, any settings of Adam.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.likelihoods.weights import filled
from fastvae.lowering import CoupledSamples
from fastvae.models import HVAE, IWAE, VAE
from fastvae.models.base import BaseVAE
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.sequential import refit_one

from .facts import facts_of
from .graph_layers import CONVOLUTIONS, Held, Kind, Shape, Step, drawn_graph

CASES = 12

_LATENT = 3


class Fixed(nn.Module):
    """A buffer."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("tensor", torch.randn(shape))


def table(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    """Rows of a table by rounded values."""
    padding = rng.choice([None, 1])
    new = (shapes[at][0], *shapes[at][1:], 2)
    if len(new) > 4:
        return None
    module = nn.Embedding(4, 2, padding_idx=padding)

    def function(m: nn.Module, h: Tensor) -> Tensor:
        return m((h.nan_to_num().sigmoid() * 3).round().long())

    return function, [at], module, new


def unit(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    dim, p = rng.choice([1, -1]), rng.choice([1.0, 2.0])
    return (lambda _, h: F.normalize(h + 0.1, p, dim)), [at], None, shapes[at]


def fixed(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    """With a buffer, or a weight that is one."""
    shape = shapes[at]
    if len(shape) == 1 and rng.random() < 0.5:
        size = rng.randint(1, 5)
        module = Fixed(size, shape[0])
        return (lambda m, h: F.linear(h, m.tensor)), [at], module, (size,)
    return (lambda m, h: h * m.tensor + 1), [at], Fixed(*shape), shape


def computed(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    """A weight that is made of parameters."""
    shape = shapes[at]
    if len(shape) == 1:
        size = rng.randint(1, 5)
        kind = rng.randrange(6)
        if kind == 0:
            return (lambda m, h: F.linear(h, m.tensor.softmax(0))), [at], Held(size, shape[0]), (size,)
        if kind == 1:
            return (lambda m, h: h @ m.tensor), [at], Held(shape[0], size), (size,)
        if kind == 2:
            return (lambda m, h: torch.einsum("bi,io->bo", h, m.tensor)), [at], Held(shape[0], size), (size,)
        if kind == 3:
            module: nn.Module = nn.utils.parametrizations.spectral_norm(nn.Linear(shape[0], size))
            return (lambda m, h: m(h)), [at], module, (size,)
        if kind == 4:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = nn.utils.weight_norm(nn.Linear(shape[0], size))
            return (lambda m, h: m(h)), [at], module, (size,)
        module = nn.Bilinear(shape[0], shape[0], size)
        return (lambda m, h: m(h, h.tanh())), [at], module, (size,)
    c, *sizes = shape
    plain, _ = CONVOLUTIONS[len(shape)]
    mode = rng.choice(["zeros", "zeros", "reflect", "circular", "replicate"])
    size = rng.choice([1, 2, 3, 4])
    if min(sizes) < max(2, size - 1):
        return None
    module = plain(c, rng.randint(1, 3), size, padding="same", dilation=1, padding_mode=mode)
    if rng.random() < 0.3:
        module = nn.utils.parametrizations.weight_norm(module)
    return (lambda m, h: m(h)), [at], module, (module.out_channels, *sizes)


def folded(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    """Rows of a sample in the place of samples, or before them."""
    shape = shapes[at]
    if len(shape) < 2:
        return None
    rows, size = math.prod(shape[:-1]), shape[-1]
    module, kind = nn.Linear(size, size), rng.randrange(3)

    def function(m: nn.Module, h: Tensor) -> Tensor:
        if kind == 0:
            return m(h.reshape(-1, size)).view(h.shape)
        if kind == 1:
            return m(h.reshape(-1, rows, size).transpose(0, 1)).transpose(0, 1).reshape(h.shape)
        return m(h.movedim(0, -2)).tanh().movedim(-2, 0)

    return function, [at], module, shape


def sequence(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    shape = shapes[at]
    if len(shape) != 2 or shape[1] % 2:
        return None
    kind = rng.randrange(4)
    if kind == 0:
        module: nn.Module = nn.MultiheadAttention(shape[1], 2, batch_first=True)
        return (lambda m, h: m(h, h, h, need_weights=False)[0]), [at], module, shape
    make = rng.choice([nn.LSTM, nn.GRU, nn.RNN])
    module = make(shape[1], shape[1], batch_first=True)
    return (lambda m, h: m(h)[0]), [at], module, shape


def pooled(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    shape = shapes[at]
    if len(shape) < 2 or min(shape[1:]) < 2:
        return None
    dims = len(shape) - 1
    kind = rng.randrange(3)
    if kind == 0:
        pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]
        return (lambda _, h: pool(h, 2)), [at], None, (shape[0], *(n // 2 for n in shape[1:]))
    adaptive = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[dims]
    if kind == 1:
        return (lambda _, h: adaptive(h, 1)), [at], None, (shape[0], *[1] * dims)
    return (lambda _, h: h.amax(-1)), [at], None, shape[:-1]


def unbound(rng: random.Random, at: int, shapes: list[Shape]) -> Step | None:
    shape = shapes[at]
    if len(shape) < 2 or shape[0] > 4:
        return None
    order = rng.sample(range(shape[0]), shape[0])

    def function(_: nn.Module, h: Tensor) -> Tensor:
        parts = h.unbind(1)
        return torch.stack([parts[place] for place in order], 1)

    return function, [at], None, shape


def multiplied(rng: random.Random, at: int, shapes: list[Shape]) -> Step:
    """With something that comes from parameters alone, or from data's form."""
    shape = shapes[at]
    kind = rng.randrange(4)
    functions: list[Callable[..., Tensor]] = [
        lambda m, h: h * m.tensor.norm() / 2,
        lambda m, h: h + m.tensor.expand(h.shape[0], *m.tensor.shape) * 0.5,
        lambda m, h: torch.addcmul(h, h, m.tensor.exp().clamp(max=2)),
        lambda m, h: torch.maximum(h, m.tensor.unsqueeze(0)),
    ]
    return functions[kind], [at], Held(*shape), shape


MORE: list[Kind] = [table, unit, fixed, computed, folded, sequence, pooled, unbound, multiplied]


class Encoder(nn.Module):
    """Such a graph, and the mean and log variance from it."""

    def __init__(self, graph: nn.Module, width: int, kind: str, condition: int) -> None:
        super().__init__()
        self.graph, self.kind = graph, kind
        self.last = nn.Linear(width, 2 * _LATENT)
        if kind == "heads":
            self.last, self.other = nn.Linear(width, _LATENT), nn.Linear(width, _LATENT)
        if condition:
            self.of_condition = nn.Linear(condition, width)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Any:
        h = self.graph(x).tanh()
        if condition is not None:
            h = h * self.of_condition(condition)
        if self.kind == "heads":
            return self.last(h), self.other(h)
        if self.kind == "chunk":
            return tuple(self.last(h).chunk(2, 1))
        if self.kind == "interleaved":
            return tuple(self.last(h).unflatten(1, (_LATENT, 2)).unbind(2))
        return self.last(h)


class Unconditional(Encoder):
    """The same without a second argument."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x)


class Decoder(nn.Module):
    def __init__(self, shape: Shape, condition: int) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.Sequential(
            nn.Linear(_LATENT + condition, 5), nn.Tanh(), nn.Linear(5, math.prod(shape))
        )

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        given = z if condition is None else torch.cat([z, condition.to(z)], 1)
        return self.layers(given).unflatten(1, self.shape)


def drawn_model(rng: random.Random, conditions: float = 0.15) -> tuple[BaseVAE, Shape, int]:
    """A model around such an encoder, the shape of its images, and the size of its condition, 0 for none.

    Args:
        conditions: how often there is one.
    """
    shape = rng.choice([(4,), (6,), (2, 6), (3, 4), (1, 4, 4), (2, 3, 5), (1, 2, 3, 4)])
    condition = 2 if rng.random() < conditions else 0
    graph = drawn_graph(rng, shape, MORE).eval()
    width = graph(torch.rand(2, *shape)).shape[1]
    kind = rng.choice(["heads", "heads", "chunk", "interleaved", "one"])
    encoder = (Encoder if condition else Unconditional)(graph, width, kind, condition)
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_()
    for parameter in encoder.parameters():
        # As after training; see graphs.py.
        parameter.add_(0.1 * torch.randn_like(parameter))
        if rng.random() < 0.1:
            parameter.requires_grad_(False)
    options: dict[str, Any] = {"latent_dim": _LATENT}
    if rng.random() < 0.1:
        options["max_logvar"] = 1.5
    decoder = Decoder(shape, condition)
    way = rng.random()
    if condition or way < 0.8:
        return VAE(encoder, decoder, "gaussian", **options), shape, condition
    if way < 0.9:
        return IWAE(encoder, decoder, "gaussian", num_samples=2, **options), shape, condition
    return HVAE(encoder, decoder, "gaussian", num_steps=2, **options), shape, condition


def drawn_images(rng: random.Random, count: int, shape: Shape) -> Tensor:
    """In some order of memory."""
    kind = rng.randrange(4)
    if kind == 0:
        order = list(range(len(shape) + 1))
        rng.shuffle(order)
        sizes = (count, *shape)
        return torch.rand([sizes[dim] for dim in order]).permute([order.index(d) for d in range(len(order))])
    if kind == 1:
        return torch.rand(2 * count, *shape)[::2]
    if kind == 2:
        return torch.rand(1, *shape).expand(count, *shape)
    return torch.rand(count, *shape)


def run_case(seed: int) -> str:
    """Both on the same images and noise, twice: the second time with what is known from the first."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        model, shape, condition_size = drawn_model(rng)
    model = model.double()
    model.train(rng.random() < 0.5)
    settings: dict[str, Any] = {
        "num_steps": rng.randint(1, 6),
        "lr": rng.choice([1e-3, 1e-2]),
        "weight_decay": rng.choice([0.0, 5e-5, 1e-2]),
        "betas": rng.choice([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0), (0.8, 0.99)]),
    }
    budget = rng.choice([1, 2**28, 2**28])
    detector = LikelihoodRegret(model, num_samples=2, seed=seed, memory_budget=budget, **settings)
    ways = []
    for round_ in range(2):
        count = rng.choice([1, 1, 2, 3, 5])
        x = drawn_images(rng, count, shape)
        condition = torch.randn(count, condition_size, dtype=torch.float64) if condition_size else None
        weight = (torch.rand(count, *shape) > 0.3).float() if rng.random() < 0.2 else None
        if weight is not None and rng.random() < 0.5:
            x = torch.where(weight > 0, x, torch.nan)
        ways.append(compare(detector, x, condition, weight, settings))
        if round_ == 0 and rng.random() < 0.3:
            detector = rng.choice([copy.deepcopy, lambda own: own])(detector)
            with torch.no_grad():
                for parameter in detector.model.parameters():
                    parameter.mul_(1.05)
    return ways[-1]


def compare(
    detector: LikelihoodRegret,
    x: Tensor,
    condition: Tensor | None,
    weight: Tensor | None,
    settings: dict[str, Any],
) -> str:
    """The word says which way the encoder was trained."""
    model = detector.model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    facts, generator = facts_of(model), torch.get_rng_state()
    given = {"condition": condition, "weight": weight}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            refit = detector.refit(x, parameters=True, **given)
        except CoupledSamples:
            return "coupled"
        finally:
            assert facts_of(model) == facts
            assert torch.equal(torch.get_rng_state(), generator)
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    said = [str(each.message) for each in said if "LikelihoodRegret" in str(each.message)]
    own = copy.deepcopy(model).eval()
    seen = x if weight is None else filled(x, weight)
    for index, image in enumerate(seen.split(1)):
        besides = {key: None if each is None else each[index : index + 1] for key, each in given.items()}
        missing = (
            torch.zeros_like(image, dtype=torch.bool) if weight is None else weight[index : index + 1] == 0
        )
        noise = SampleNoise(keys_of(image.masked_fill(missing, 0)), detector.seed, model.noise_draws)
        private, losses = refit_one(own, image.contiguous(), noise, **settings, **besides)
        _agree("losses", refit.losses[index], losses, 1e-8)
        expected = dict(private.encoder.named_parameters())
        assert refit.parameters.keys() == expected.keys(), (list(refit.parameters), list(expected))
        for name, parameter in expected.items():
            _agree_moved(name, refit.parameters[name][index], parameter, state[f"encoder.{name}"], settings)
        with torch.no_grad():
            mu, logvar = private.encode(
                image.contiguous(), **{k: v for k, v in besides.items() if v is not None}
            )
        _agree("mu", refit.mu[index], mu[0], 1e-8)
        _agree("logvar", refit.logvar[index], logvar[0], 1e-8)
    return said[0].split(",")[0].split(":")[-1].strip()[:60] if said else "by rules or kernels"


def _agree(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found - expected).detach().abs().max()) if found.numel() else 0.0
    scale = max(1.0, float(expected.detach().abs().max())) if found.numel() else 1.0
    assert found.shape == expected.shape and error <= tolerance * scale, f"{what}: off by {error:.2e}"


def _agree_moved(name: str, found: Tensor, expected: Tensor, start: Tensor, settings: dict[str, Any]) -> None:
    """Adam divides by the gradient's size: of one that is zero but for rounding it makes steps of rounding.

    Those are far below lr, and each number is judged for itself.
    """
    moved = (expected - start).detach().abs()
    lr, steps = settings["lr"], settings["num_steps"]
    share = torch.where(moved > 1e-2 * lr, 1e-6, 1e-2)
    error = (found - expected).detach().abs()
    over = error - share * lr * steps - 1e-8 * expected.detach().abs().clamp(min=1)
    assert found.shape == expected.shape
    assert not over.numel() or float(over.max()) <= 0, f"{name}: off by {float(error.max()):.2e}"
