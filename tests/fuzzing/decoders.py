"""Random decoders: chains of layers that fit each other, and forwards written by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from layer_kinds import Call, draw_statistics
from torch import Tensor, nn

Shape = tuple[int, ...]

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU),
    *(lambda: nn.GELU(approximate="tanh"), lambda: nn.LeakyReLU(0.3), lambda: nn.Softplus(2.0, 5.0)),
    *(
        nn.Mish,
        nn.PReLU,
        nn.CELU,
        nn.Hardtanh,
        nn.Softsign,
        nn.LogSigmoid,
        nn.Identity,
        lambda: nn.Dropout(0.3),
    ),
]


def functional(size: int, out: int, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Layers called from a forward, activations as functions."""
    return Call(lambda h, first, second: second(function(first(h))), nn.Linear(size, 6), nn.Linear(6, out))


def residual(size: int, gate: bool) -> nn.Module:
    if gate:
        return Call(lambda h, inner: h * torch.sigmoid(inner(h)), nn.Linear(size, size))
    return Call(lambda h, inner: h + torch.tanh(inner(h)), nn.Linear(size, size))


def joined(size: int) -> nn.Module:
    return Call(lambda h, inner: torch.cat([torch.tanh(inner(h)), h], 1), nn.Linear(size, 2))


def row_norm(kind: type[nn.LayerNorm | nn.RMSNorm], size: int) -> nn.Module:
    """Of one number it is a constant, or its sign but for eps: derivatives are what is left of terms that cancel."""
    return kind(size, eps=0.1) if size == 1 else kind(size)


def sequence(rng: random.Random) -> nn.Module:
    """Rows of two through attention or a recurrent layer."""
    make = rng.choice([nn.LSTM, nn.GRU, nn.RNN, None])
    if make:
        return Call(lambda h, r: r(_rows(h))[0].flatten(1), make(2, 2, batch_first=True))
    return Call(lambda h: F.scaled_dot_product_attention(*[_rows(h)[:, None]] * 3).flatten(1))


def _rows(h: Tensor) -> Tensor:
    return h.unflatten(1, (-1, 2))


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    torch.tanh,
    F.silu,
    lambda h: F.leaky_relu(h, 0.1),
    lambda h: F.gelu(h, approximate="tanh"),
    lambda h: F.softmax(h, -1),
    lambda h: h.sin(),
    lambda h: F.layer_norm(h, (6,)),
]


def _of_vectors(rng: random.Random, size: int) -> tuple[nn.Module, Shape]:
    kind = rng.randrange(14)
    out = rng.randint(1, 9)
    if kind < 4:
        return nn.Linear(size, out, bias=rng.random() < 0.8), (out,)
    if kind < 7:
        return rng.choice(ACTIVATIONS)(), (size,)
    if kind == 7:
        norm = rng.choice([nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d])
        return norm(size) if norm is nn.BatchNorm1d else row_norm(norm, size), (size,)
    if kind == 8:
        return functional(size, out, rng.choice(FUNCTIONS)), (out,)
    if kind == 9:
        return residual(size, rng.random() < 0.5), (size,)
    if kind == 10:
        return joined(size), (size + 2,)
    if kind == 11 and size % 2 == 0:
        return (nn.GLU(), (size // 2,)) if rng.random() < 0.5 else (sequence(rng), (size,))
    if kind == 12:
        return nn.utils.parametrizations.weight_norm(nn.Linear(size, out)), (out,)
    c, h, w = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 4)
    return nn.Sequential(nn.Linear(size, c * h * w), nn.Unflatten(1, (c, h, w))), (c, h, w)


def _of_images(rng: random.Random, shape: Shape) -> tuple[nn.Module, Shape]:
    c, h, w = shape
    kind = rng.randrange(12)
    out, k, s = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 2)
    p = rng.randint(0, k // 2)
    groups = rng.choice([g for g in range(1, c + 1) if c % g == 0])
    if kind < 3 and min(h, w) + 2 * p >= k:
        mode = rng.choice(["zeros"] * 4 + (["replicate", "circular"] if p <= min(h, w) else []))
        layer = nn.Conv2d(c, out * groups, k, s, p, groups=groups, bias=rng.random() < 0.8, padding_mode=mode)
        return layer, (out * groups, (h + 2 * p - k) // s + 1, (w + 2 * p - k) // s + 1)
    if kind < 6:
        extra = rng.randint(0, s - 1)
        height, width = ((size - 1) * s - 2 * p + k + extra for size in (h, w))
        if min(height, width) > 0:
            return nn.ConvTranspose2d(c, out * groups, k, s, p, extra, groups), (out * groups, height, width)
    if kind == 6:
        return rng.choice([nn.BatchNorm2d(c), nn.GroupNorm(groups, c), nn.LayerNorm([c, h, w])]), shape
    if kind == 7 and h * w > 1:
        return nn.InstanceNorm2d(c, affine=rng.random() < 0.5), shape
    if kind == 8 and min(h, w) > 1:
        return rng.choice([nn.MaxPool2d, nn.AvgPool2d])(2), (c, h // 2, w // 2)
    if kind == 9 and h * w < 30:
        return nn.Upsample(scale_factor=2, mode=rng.choice(["nearest", "bilinear"])), (c, 2 * h, 2 * w)
    if kind == 10:
        return nn.Flatten(), (c * h * w,)
    return rng.choice(ACTIVATIONS)(), shape


def draw_module(rng: random.Random, latents: int) -> nn.Module:
    """A decoder of up to eight layers and 60 outputs."""
    shape: Shape = (latents,)
    layers: list[nn.Module] = []
    linear = None
    for _ in range(rng.randint(1, 8)):
        layer, new = _of_vectors(rng, *shape) if len(shape) == 1 else _of_images(rng, shape)
        if linear is not None and shape == (linear.in_features,) and rng.random() < 0.2:
            layer, new = linear, (linear.out_features,)
        if torch.Size(new).numel() > 60:
            break
        if isinstance(layer, nn.Linear) and type(layer) is nn.Linear and shape == new:
            linear = layer
        layers.append(layer)
        shape = new
    if len(shape) > 1 and rng.random() < 0.7:
        layers.append(nn.Flatten())
    if not layers:
        layers.append(nn.Linear(latents, 3))
    module: nn.Module = nn.Sequential(*layers)
    with torch.no_grad():
        draw_statistics(module)
    return module


class Habitual(nn.Module):
    """A decoder with a habit of people's forwards: it writes into its codes, or changes attributes of its own."""

    HABITS = ("writes", "keeps", "counts")

    def __init__(self, inner: nn.Module, habit: str) -> None:
        super().__init__()
        self.inner, self.habit, self.calls, self.in_place = inner, habit, 0, True

    def forward(self, z: Tensor) -> Tensor:
        if self.habit == "writes":
            z = z.mul_(1.5) if self.in_place else 1.5 * z
        elif self.habit == "keeps":
            self.kept = z.detach()
        else:
            self.calls += 1
        found: Tensor = self.inner(z)
        return found


def spoil(rng: random.Random, module: nn.Module, z: Tensor) -> Tensor:
    """Make one thing illegal; returns z, or another that does not fit."""
    kind = rng.randrange(6)
    layers = [inner for inner in module.modules() if isinstance(inner, (nn.Linear, nn.Conv2d))]
    if kind == 0:
        return torch.randn(len(z), z.shape[1] + 1, dtype=z.dtype)
    if kind == 1:
        return z.to(torch.float32 if z.dtype == torch.float64 else torch.float64)
    if kind == 2:
        return z[0] if len(z) else z
    if layers and not hasattr(rng.choice(layers), "parametrizations"):
        layer = rng.choice(layers)
        if hasattr(layer, "parametrizations"):
            return z
        if kind == 3:
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape[0], layer.weight.shape[1] + 1).to(z))
        elif kind == 4 and layer.bias is not None:
            layer.bias = nn.Parameter(torch.randn(layer.bias.shape[0] + 1).to(z))
        else:
            layer.weight = nn.Parameter(layer.weight.detach().half())
    return z
