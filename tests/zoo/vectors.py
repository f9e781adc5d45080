"""Decoders of vectors: fully connected ones, and those of single cells."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.likelihoods import Categorical, Gaussian

from .entry import Entry, labels
from .likelihoods import MeanAndLogScale, PoissonRates


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 32 * width),
        nn.Softplus(),
        nn.Linear(32 * width, 32 * width),
        nn.ReLU(),
        nn.Linear(32 * width, 49),
    )


class LayerNormMLP(nn.Module):
    """Blocks of Linear, LayerNorm and GELU with residual connections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 24 * width
        self.inp = nn.Linear(5, h)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(h), nn.Linear(h, h), nn.GELU(), nn.Linear(h, h)) for _ in range(2)
        )
        self.norm, self.out = nn.LayerNorm(h), nn.Linear(h, 40)

    def forward(self, z: Tensor) -> Tensor:
        h = self.inp(z)
        for block in self.blocks:
            h = h + block(h)
        return self.out(self.norm(h))


class Activations(nn.Module):
    """Every layer with another activation."""

    def __init__(self, width: int, *kinds: type[nn.Module]) -> None:
        super().__init__()
        h = 16 * width
        self.inp = nn.Linear(4, h)
        self.layers = nn.ModuleList(nn.Sequential(kind(), nn.Linear(h, h)) for kind in kinds)
        self.out = nn.Linear(h, 30)

    def forward(self, z: Tensor) -> Tensor:
        h = self.inp(z)
        for layer in self.layers:
            h = layer(h)
        return self.out(h)


class PlainList(nn.Module):
    """Layers in a list that registers nothing, their parameters given to the module by name, as some ports do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [4, 24 * width, 24 * width, 36]
        self.layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for i, layer in enumerate(self.layers):
            self.add_module(f"fc{i}", layer)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            z = F.leaky_relu(layer(z), 0.1)
        return self.layers[-1](z)


class Asserting(nn.Module):
    """Asserts, int(size), *size() and branches on shapes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = 8 * width
        self.fc = nn.Linear(6, 4 * self.width)
        self.conv = nn.Conv1d(4, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        assert z.ndim == 2 and z.size(1) == 6, f"expected [B, 6], got {z.shape}"
        batch = int(z.shape[0])
        h = torch.tanh(self.fc(z))
        h = h.view(*z.size()[:1], 4, -1)
        if h.dim() == 3:
            h = self.conv(h)
        assert h.shape == (z.size(0), 3, self.width)
        return h.reshape(batch, int(h.numel() / batch)) if batch else h.flatten(1)


class SkipOfCode(nn.Module):
    """The code goes to every layer (skip-VAE, Dieng et al. 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 24 * width
        self.fc1, self.fc2, self.out = nn.Linear(5, h), nn.Linear(h + 5, h), nn.Linear(h + 5, 36)

    def forward(self, z: Tensor) -> Tensor:
        h = F.silu(self.fc1(z))
        h = F.silu(self.fc2(torch.cat([h, z], 1)))
        return self.out(torch.cat([h, z], dim=-1))


class SharedTwice(nn.Module):
    """One hidden layer used three times, and an output layer with the input layer's weights, transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 20 * width
        self.embed, self.hidden = nn.Linear(6, h), nn.Linear(h, h)
        self.bias = nn.Parameter(torch.zeros(6))
        self.out = nn.Linear(6, 30)

    def forward(self, z: Tensor) -> Tensor:
        h = self.embed(z)
        for _ in range(3):
            h = torch.tanh(self.hidden(h))
        return self.out(F.linear(h, self.embed.weight.t(), self.bias))


class Normalised(nn.Module):
    """Weight and spectral normalisation, in the old form (hooks) or as parametrisations."""

    def __init__(self, width: int, old: bool) -> None:
        super().__init__()
        from torch.nn.utils import parametrizations

        weight_norm = nn.utils.weight_norm if old else parametrizations.weight_norm
        spectral_norm = nn.utils.spectral_norm if old else parametrizations.spectral_norm
        h = 20 * width
        self.net = nn.Sequential(
            weight_norm(nn.Linear(4, h)),
            nn.ELU(),
            spectral_norm(nn.Linear(h, h)),
            nn.ELU(),
            weight_norm(nn.Linear(h, 30)),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


class SeveralReturned(nn.Module):
    """A mean and a hidden layer, in a tuple, a dict or an object."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.trunk, self.mean = nn.Linear(4, 24 * width), nn.Linear(24 * width, 30)

    def forward(self, z: Tensor) -> object:
        h = torch.tanh(self.trunk(z))
        mean = self.mean(h)
        if self.form == "tuple":
            return mean, h
        return {"mean": mean, "hidden": h} if self.form == "dict" else SimpleNamespace(mean=mean, hidden=h)


class TwoHeads(nn.Module):
    """Mean and log scale on one trunk, the log scale squashed into a range."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 24 * width), nn.SiLU())
        self.head = nn.Linear(24 * width, 2 * 20)

    def forward(self, z: Tensor) -> Tensor:
        mean, log_scale = self.head(self.trunk(z)).chunk(2, dim=-1)
        return torch.cat([mean, -1 + 2 * torch.tanh(log_scale)], -1)


class Conditional(nn.Module):
    """A label beside the code, as conditional VAEs have it."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4 + classes, 24 * width), nn.Linear(24 * width, 36)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(torch.cat((z, c), dim=-1))))


class LabelEmbedding(nn.Module):
    """A class's embedding, looked up by its number, times the code's features."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        h = 24 * width
        self.inp, self.embedding = nn.Linear(4, h), nn.Embedding(classes, h)
        self.out = nn.Linear(h, 36)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.out(F.elu(self.inp(z) * self.embedding(y)))


class FiLM(nn.Module):
    """Features scaled and shifted by a function of a label (Perez et al. 2018)."""

    def __init__(self, width: int, classes: int = 4) -> None:
        super().__init__()
        h = 20 * width
        self.inp, self.mid, self.out = nn.Linear(4, h), nn.Linear(h, h), nn.Linear(h, 30)
        self.film = nn.Linear(classes, 2 * h)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        gamma, beta = self.film(c).chunk(2, 1)
        h = F.relu(self.mid(F.relu(self.inp(z))) * (1 + gamma) + beta)
        return self.out(h)


class SingleCell(nn.Module):
    """scVI's decoder: Linear, BatchNorm1d, ReLU; the share of each gene by softmax, times the library size."""

    def __init__(self, width: int, genes: int = 40, library: float = 60.0) -> None:
        super().__init__()
        h = 32 * width
        self.px_decoder = nn.Sequential(
            nn.Linear(6, h), nn.BatchNorm1d(h, momentum=0.01, eps=0.001), nn.ReLU(), nn.Dropout(p=0.1)
        )
        self.px_scale_decoder = nn.Sequential(nn.Linear(h, genes), nn.Softmax(dim=-1))
        self.library = library

    def forward(self, z: Tensor) -> Tensor:
        return self.library * self.px_scale_decoder(self.px_decoder(z))


class SingleCellWithLibrary(SingleCell):
    """The same with the library size of each cell as a second argument."""

    def forward(self, z: Tensor, library: Tensor) -> Tensor:
        return torch.exp(library) * self.px_scale_decoder(self.px_decoder(z))


class FourierFeatures(nn.Module):
    """Sines and cosines of random projections of the code (Tancik et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("B", torch.randn(3, 12))
        self.net = nn.Sequential(nn.Linear(24, 24 * width), nn.ReLU(), nn.Linear(24 * width, 30))

    def forward(self, z: Tensor) -> Tensor:
        projected = 2 * math.pi * 0.2 * z @ self.B
        return self.net(torch.cat([projected.sin(), projected.cos()], -1))


class Gated(nn.Module):
    """Linear layers with GLU, and a highway gate written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        h = 16 * width
        self.inp, self.gate, self.transform = nn.Linear(4, 2 * h), nn.Linear(h, h), nn.Linear(h, h)
        self.out = nn.Linear(h, 30)

    def forward(self, z: Tensor) -> Tensor:
        h = F.glu(self.inp(z), dim=-1)
        t = torch.sigmoid(self.gate(h))
        return self.out(t * F.relu(self.transform(h)) + (1 - t) * h)


class Simplex(nn.Module):
    """Softmax outputs: topics over words (ProdLDA: softmax of the code, BatchNorm of the logits)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beta, self.norm = nn.Linear(6, 30 * width, bias=False), nn.BatchNorm1d(30 * width, affine=False)

    def forward(self, z: Tensor) -> Tensor:
        return F.softmax(self.norm(self.beta(F.softmax(z, dim=1))), dim=1)


def class_numbers(samples: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 5, (samples,), generator=generator)


def library_sizes(samples: int, generator: torch.Generator) -> Tensor:
    return 3 + torch.rand(samples, 1, generator=generator)


ENTRIES = [
    Entry("mlp", mlp, (4,)),
    Entry("layernorm-mlp", LayerNormMLP, (5,)),
    Entry(
        "mish-hardswish-selu-celu",
        lambda w: Activations(w, nn.Mish, nn.Hardswish, nn.SELU, nn.CELU),
        (4,),
        Gaussian(0.5),
    ),
    Entry(
        "prelu-relu6-hardtanh-logsigmoid",
        lambda w: Activations(w, nn.PReLU, nn.ReLU6, nn.Hardtanh, nn.LogSigmoid),
        (4,),
        Gaussian(0.5),
    ),
    Entry("plain-list", PlainList, (4,)),
    Entry("asserts-and-sizes", Asserting, (6,)),
    Entry("skips-of-the-code", SkipOfCode, (5,)),
    Entry("weights-used-twice", SharedTwice, (6,)),
    Entry("weight-spectral-norm", lambda w: Normalised(w, old=False), (4,)),
    Entry("weight-spectral-norm-hooks", lambda w: Normalised(w, old=True), (4,)),
    Entry(
        "returns-tuple",
        lambda w: SeveralReturned(w, "tuple"),
        (4,),
        Gaussian(0.5),
        output=lambda found: found[0],
    ),
    Entry(
        "returns-dict",
        lambda w: SeveralReturned(w, "dict"),
        (4,),
        Gaussian(0.5),
        output=lambda found: found["mean"],
    ),
    Entry(
        "returns-object",
        lambda w: SeveralReturned(w, "object"),
        (4,),
        Gaussian(0.5),
        output=lambda found: found.mean,
    ),
    Entry("mean-and-log-scale", TwoHeads, (4,), MeanAndLogScale()),
    Entry("labels", Conditional, (4,), condition=labels(5)),
    Entry("label-embedding", LabelEmbedding, (4,), condition=class_numbers),
    Entry("film", FiLM, (4,), condition=labels(4)),
    Entry("single-cells", SingleCell, (6,), PoissonRates()),
    Entry(
        "single-cells-library",
        SingleCellWithLibrary,
        (6,),
        PoissonRates(),
        condition=library_sizes,
    ),
    Entry("fourier-features", FourierFeatures, (3,)),
    Entry("glu-highway", Gated, (4,)),
    Entry("topics-softmax", Simplex, (6,), Gaussian(0.1)),
    Entry(
        "categorical-mlp",
        lambda w: nn.Sequential(nn.Linear(4, 24 * w), nn.Tanh(), nn.Linear(24 * w, 12 * 5)),
        (4,),
        Categorical(5),
    ),
]
