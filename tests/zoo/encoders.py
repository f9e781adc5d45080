"""Other people's encoders: trunks with two heads and what else turns data into a mean and a log variance."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .entry import build as encoder_of
from .packages import build, version_of

__all__ = ["ENCODERS", "EncoderEntry", "encoder_of"]


@dataclass(frozen=True)
class EncoderEntry:
    """An encoder as its author wrote it.

    Attributes:
        name: of the entry, in words joined by hyphens.
        make: width -> the module; 1 for tests, 4 in benchmarks.
        shape: of a sample.
        latents: d.
        origin: "own", or "PyPI: package version".
        package: what must be installed to build it; empty for none.
        output: from what the module returns to a pair of tensors; None: it returns what a model takes.
        method: of the module that encodes.
    """

    name: str
    make: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    latents: int = 3
    origin: str = "own"
    package: str = ""
    output: Callable[[Any], Any] | None = None
    method: str = "forward"

    @property
    def is_installed(self) -> bool:
        """Whether what it is made of can be imported."""
        return not self.package or importlib.util.find_spec(self.package) is not None


class TwoHeads(nn.Module):
    """The most common of all: a trunk, and a layer for each of the two."""

    def __init__(self, trunk: nn.Module, features: int, latents: int = 3) -> None:
        super().__init__()
        self.trunk = trunk
        self.fc_mu, self.fc_var = nn.Linear(features, latents), nn.Linear(features, latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.flatten(self.trunk(x), start_dim=1)
        return self.fc_mu(h), self.fc_var(h)


def dense(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers)


def strided(width: int, channels: int = 1, norm: bool = False) -> nn.Sequential:
    """Two convolutions of stride 2, for 8x8 images: 8 width features on 2x2 places."""
    layers: list[nn.Module] = []
    for a, b in pairwise((channels, 4 * width, 8 * width)):
        layers += [nn.Conv2d(a, b, 4, 2, 1, bias=not norm), *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers)


class Split(nn.Module):
    """One layer for both, taken apart in the forward."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.body, self.last, self.way = dense(24, 16 * width), nn.Linear(16 * width, 6), way

    def forward(self, x: Tensor) -> Any:
        h = self.last(self.body(x))
        if self.way == "chunk":
            return h.chunk(2, dim=-1)
        if self.way == "split":
            return list(torch.split(h, 3, 1))
        if self.way == "unbind":
            return h.view(-1, 2, 3).unbind(1)
        return h[:, :3], h[:, 3:]


class Residual(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module], activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1, self.norm2, self.activation = norm(channels), norm(channels), activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return self.activation(x + h)


def resnet(width: int, norm: Callable[[int], nn.Module], activation: nn.Module) -> nn.Module:
    c = 8 * width
    trunk = nn.Sequential(
        nn.Conv2d(1, c, 3, padding=1),
        Residual(c, norm, activation),
        nn.AvgPool2d(2),
        Residual(c, norm, activation),
        nn.AdaptiveAvgPool2d(1),
    )
    return TwoHeads(trunk, c)


class ConvolutionalHeads(nn.Module):
    """Heads that are convolutions over the last places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = strided(width)
        self.mean, self.logvar = nn.Conv2d(8 * width, 3, 2), nn.Conv2d(8 * width, 3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.mean(h).flatten(1), self.logvar(h).squeeze(-1).squeeze(-1)


class ResidualMLP(nn.Module):
    """LayerNorm before, GELU between, a skip around."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 16 * width
        self.inp = nn.Linear(24, h)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(h), nn.Linear(h, h), nn.GELU(), nn.Linear(h, h)) for _ in range(2)
        )
        self.out = nn.Linear(h, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


class Clamped(nn.Module):
    """A log variance that is kept in bounds, as many do against divergence."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.net, self.way = TwoHeads(dense(24, 16 * width), 16 * width), way

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.net(x)
        if self.way == "clamp":
            return mean, raw.clamp(-6.0, 2.0)
        if self.way == "softplus":
            return mean, 2 * torch.log(F.softplus(raw) + 1e-4)
        return mean, 4 * torch.tanh(raw / 4)


class SingleCells(nn.Module):
    """Counts in logarithms, BatchNorm, and the logarithm of exp(...) + 1e-4 as the variance's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 16 * width
        self.net = nn.Sequential(
            nn.Linear(24, h), nn.BatchNorm1d(h, momentum=0.01, eps=1e-3), nn.ReLU(), nn.Dropout(0.1)
        )
        self.mean, self.var = nn.Linear(h, 3), nn.Linear(h, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.net(torch.log1p(x))
        return self.mean(q), (torch.exp(self.var(q)) + 1e-4).log()


class Rows(nn.Module):
    """An image's rows as a sequence for a recurrent layer."""

    def __init__(self, width: int, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        h = 6 * width
        self.rnn = kind(8, h, batch_first=True, **options)
        self.out = nn.Linear(h * (2 if options.get("bidirectional") else 1), 6)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(x.reshape(len(x), 8, 8))
        return self.out(h[:, -1])


class Tokens(nn.Module):
    """Of whole numbers below 16: an embedding, and their mean or a recurrent layer."""

    def __init__(self, width: int, recurrent: bool) -> None:
        super().__init__()
        h = 6 * width
        self.embedding, self.rnn = nn.Embedding(16, h), nn.GRU(h, h, batch_first=True) if recurrent else None
        self.heads = TwoHeads(nn.Identity(), h)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embedding((x * 15).round().long())
        return self.heads(h.mean(1) if self.rnn is None else self.rnn(h)[1][-1])


class Patches(nn.Module):
    """Patches, positions, a transformer's layer and the mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        d = 8 * width
        self.patch = nn.Conv2d(1, d, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 4, d))
        self.layer = nn.TransformerEncoderLayer(d, 2, 2 * d, dropout=0.1, batch_first=True)
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        return self.out(self.norm(self.layer(h)).mean(dim=1)).chunk(2, dim=1)


class SetOfPoints(nn.Module):
    """Eight points in space, each through the same layers, and their maximum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 12 * width
        self.point, self.heads = (
            nn.Sequential(nn.Linear(3, h), nn.ReLU(), nn.Linear(h, h)),
            TwoHeads(nn.Identity(), h),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.point(x.view(-1, 8, 3)).max(dim=1).values)


class AttentionPooling(nn.Module):
    """A softmax over places weighs their features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 6 * width
        self.features, self.score, self.heads = (
            nn.Conv2d(1, c, 3, 2, 1),
            nn.Conv2d(c, 1, 1),
            TwoHeads(nn.Identity(), c),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.silu(self.features(x))
        weight = torch.softmax(self.score(h).flatten(2), -1)
        return self.heads((h.flatten(2) * weight).sum(-1))


class SqueezeExcitation(nn.Module):
    """Channels gated by what all places say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        c = 8 * width
        self.conv, self.down, self.up = nn.Conv2d(1, c, 3, 2, 1), nn.Linear(c, c // 4), nn.Linear(c // 4, c)
        self.heads = TwoHeads(nn.Flatten(), 16 * c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.hardswish(self.conv(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(h.mean((2, 3))))))
        return self.heads(h * gate[:, :, None, None])


class Gated(nn.Module):
    """Gated linear units."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 12 * width
        self.a, self.b, self.out = nn.Linear(24, 2 * h), nn.Linear(h, 2 * h), nn.Linear(h, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.glu(self.b(F.glu(self.a(x), -1)), -1))


class Recycled(nn.Module):
    """One layer, used three times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 12 * width
        self.inp, self.again, self.heads = nn.Linear(24, h), nn.Linear(h, h), TwoHeads(nn.Identity(), h)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.inp(x))
        for _ in range(3):
            h = torch.tanh(self.again(h))
        return self.heads(h)


def normalised(width: int, how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    h = 12 * width
    return TwoHeads(
        nn.Sequential(nn.Flatten(), how(nn.Linear(24, h)), nn.Tanh(), how(nn.Linear(h, h)), nn.ELU()), h
    )


def vgg(width: int) -> nn.Module:
    c = 4 * width
    layers: list[nn.Module] = []
    for a, b in pairwise((1, c, 2 * c)):
        layers += [
            nn.Conv2d(a, b, 3, padding=1),
            nn.ReLU(True),
            nn.Conv2d(b, b, 3, padding=1),
            nn.ReLU(True),
            nn.MaxPool2d(2),
        ]
    return TwoHeads(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * c, 4 * c), nn.ReLU(True)), 4 * c)


def layers_1d(width: int) -> nn.Module:
    c = 6 * width
    return TwoHeads(
        nn.Sequential(
            nn.Conv1d(2, c, 5, 2, 2),
            nn.BatchNorm1d(c),
            nn.LeakyReLU(0.2),
            nn.Conv1d(c, c, 5, 2, 2),
            nn.GELU(),
        ),
        4 * c,
    )


def layers_3d(width: int) -> nn.Module:
    c = 4 * width
    return TwoHeads(
        nn.Sequential(
            nn.Conv3d(1, c, 3, 2, 1),
            nn.InstanceNorm3d(c, affine=True),
            nn.SiLU(),
            nn.Conv3d(c, c, 3, 2, 1),
            nn.ELU(),
        ),
        8 * c,
    )


def pairs_of_pythae(found: Any) -> Any:
    return found["embedding"], found["log_covariance"]


def pythae(name: str, where: str, input_dim: tuple[int, ...], latents: int = 3) -> EncoderEntry:
    config = SimpleNamespace(latent_dim=latents, input_dim=input_dim)
    return EncoderEntry(
        f"pythae-{name}",
        build(f"pythae.models.nn.{where}", config),
        input_dim,
        latents,
        f"PyPI: pythae {version_of('pythae')}",
        "pythae",
        pairs_of_pythae,
    )


def disent(name: str, kind: str, **options: Any) -> EncoderEntry:
    options = {"x_shape": (1, 64, 64), "z_size": 3, "z_multiplier": 2, **options}
    return EncoderEntry(
        f"disent-{name}",
        build(f"disent.model.ae:{kind}", **options),
        options["x_shape"],
        3,
        f"PyPI: disent {version_of('disent')}",
        "disent",
    )


def monai(name: str, shape: tuple[int, ...], **options: Any) -> EncoderEntry:
    dims = len(shape) - 1
    return EncoderEntry(
        f"monai-{name}",
        build("monai.networks.nets:VarAutoEncoder", dims, shape, shape[0], 3, **options),
        shape,
        3,
        f"PyPI: monai {version_of('monai')}",
        "monai",
        lambda found: found[:2],
        "encode_forward",
    )


VECTOR, IMAGE = (24,), (1, 8, 8)

_ENTRIES = (
    EncoderEntry("mlp", lambda w: nn.Sequential(*dense(24, 16 * w), nn.Linear(16 * w, 6)), VECTOR),
    EncoderEntry("two-heads-mlp", lambda w: TwoHeads(dense(24, 16 * w, 16 * w), 16 * w), VECTOR),
    EncoderEntry("chunked", lambda w: Split(w, "chunk"), VECTOR),
    EncoderEntry("split-to-a-list", lambda w: Split(w, "split"), VECTOR),
    EncoderEntry("unbound", lambda w: Split(w, "unbind"), VECTOR),
    EncoderEntry("sliced", lambda w: Split(w, "slice"), VECTOR),
    EncoderEntry("two-heads-convolutional", lambda w: TwoHeads(strided(w), 32 * w), IMAGE),
    EncoderEntry("two-heads-batchnorm", lambda w: TwoHeads(strided(w, 3, norm=True), 32 * w), (3, 8, 8)),
    EncoderEntry("convolutional-heads", ConvolutionalHeads, IMAGE),
    EncoderEntry("vgg", vgg, IMAGE),
    EncoderEntry("resnet-batchnorm", lambda w: resnet(w, nn.BatchNorm2d, nn.ReLU()), IMAGE),
    EncoderEntry("resnet-groupnorm", lambda w: resnet(w, lambda c: nn.GroupNorm(4, c), nn.SiLU()), IMAGE),
    EncoderEntry("resnet-instancenorm", lambda w: resnet(w, nn.InstanceNorm2d, nn.ELU()), IMAGE),
    EncoderEntry("layernorm-residual", ResidualMLP, VECTOR),
    EncoderEntry("prelu", lambda w: TwoHeads(dense(24, 16 * w, 8 * w, activation=nn.PReLU), 8 * w), VECTOR),
    EncoderEntry("clamped-logvar", lambda w: Clamped(w, "clamp"), VECTOR),
    EncoderEntry("softplus-scale", lambda w: Clamped(w, "softplus"), VECTOR),
    EncoderEntry("bounded-logvar", lambda w: Clamped(w, "tanh"), VECTOR),
    EncoderEntry("single-cells", SingleCells, VECTOR),
    EncoderEntry("lstm", lambda w: Rows(w, nn.LSTM, num_layers=2), IMAGE),
    EncoderEntry("gru-both-ways", lambda w: Rows(w, nn.GRU, bidirectional=True), IMAGE),
    EncoderEntry("bag-of-tokens", lambda w: Tokens(w, False), (7,)),
    EncoderEntry("tokens-gru", lambda w: Tokens(w, True), (7,)),
    EncoderEntry("transformer", Patches, IMAGE),
    EncoderEntry("set-of-points", SetOfPoints, VECTOR),
    EncoderEntry("attention-pooling", AttentionPooling, IMAGE),
    EncoderEntry("squeeze-excitation", SqueezeExcitation, IMAGE),
    EncoderEntry("glu", Gated, VECTOR),
    EncoderEntry("weights-used-thrice", Recycled, VECTOR),
    EncoderEntry("weight-norm", lambda w: normalised(w, parametrizations.weight_norm), VECTOR),
    EncoderEntry("spectral-norm", lambda w: normalised(w, parametrizations.spectral_norm), VECTOR),
    EncoderEntry("time-series", layers_1d, (2, 16)),
    EncoderEntry("volume", layers_3d, (1, 8, 8, 8)),
    EncoderEntry("flattened-volume", lambda w: TwoHeads(dense(64, 8 * w), 8 * w), (1, 4, 4, 4)),
    pythae("mlp", "default_architectures:Encoder_VAE_MLP", (1, 6, 6)),
    pythae("mnist-convnet", "benchmarks.mnist:Encoder_Conv_VAE_MNIST", (1, 28, 28)),
    pythae("mnist-resnet", "benchmarks.mnist:Encoder_ResNet_VAE_MNIST", (1, 28, 28)),
    pythae("cifar-resnet", "benchmarks.cifar:Encoder_ResNet_VAE_CIFAR", (3, 32, 32)),
    disent("linear", "EncoderLinear", x_shape=(1, 16, 16)),
    disent("conv64", "EncoderConv64"),
    disent("conv64-batchnorm", "EncoderConv64Norm", norm="batch"),
    monai("2d", (1, 16, 16), channels=(4, 8), strides=(2, 2)),
    monai("2d-residual", (1, 16, 16), channels=(4, 8), strides=(2, 2), num_res_units=2, norm="batch"),
)

ENCODERS: dict[str, EncoderEntry] = {entry.name: entry for entry in _ENTRIES}
assert len(ENCODERS) == len(_ENTRIES), "two entries of one name"
