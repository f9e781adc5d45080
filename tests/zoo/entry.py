"""One decoder of the zoo: how it is built, what it takes, what it returns, and what fails on it today."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from layer_kinds import draw_statistics
from torch import Tensor, nn

from fastvae.likelihoods import Bernoulli, Categorical, Likelihood

from .likelihoods import PoissonRates

OPERATORS = ("log_px", "flow", "jacobian", "tracin", "regret")
"""What the zoo measures: keys of ``Entry.today``, each also with " float32" behind it."""


@dataclass(frozen=True)
class Entry:
    """A decoder as its author wrote it.

    Attributes:
        name: of the entry, in words joined by hyphens.
        make: width -> the module; 1 for tests, 4 in benchmarks. Networks of a fixed size ignore it.
        code: shape of one code, (d,) or (c, h, w).
        likelihood: of what the module returns.
        origin: "own", or "PyPI: package version".
        package: what must be installed to build it; empty for none.
        condition: (samples, generator) -> the second argument, for modules that take one.
        output: from what the module returns to one tensor; None: it returns one.
        method: of the module that decodes.
        own_gradients: why its gradients are the module's own and not the derivative of its output (a straight-through
            estimator, detach); empty where they are the derivative, as differences must then confirm.
        heavy: takes so long that only `make zoo` runs all of its tests, and no differences are taken: what it is made
            of is in lighter entries, too.
        today: what fails, operator -> why.
    """

    name: str
    make: Callable[[int], nn.Module]
    code: tuple[int, ...]
    likelihood: Likelihood = Bernoulli()  # noqa: RUF009  (frozen)
    origin: str = "own"
    package: str = ""
    condition: Callable[[int, torch.Generator], Tensor] | None = None
    output: Callable[[Any], Tensor] | None = None
    method: str = "forward"
    own_gradients: str = ""
    heavy: bool = False
    today: Mapping[str, str] = field(default_factory=dict)


class Adapted(nn.Module):
    """A module that decodes by another method, or returns more than a tensor, as operators call a decoder."""

    def __init__(self, network: nn.Module, method: str, output: Callable[[Any], Tensor] | None) -> None:
        super().__init__()
        self.network, self.method, self.output = network, method, output

    def forward(self, z: Tensor) -> Tensor:
        found = self.network(z) if self.method == "forward" else getattr(self.network, self.method)(z)
        return found if self.output is None else self.output(found)


class Problem(NamedTuple):
    """A decoder and data for it, in one dtype."""

    decoder: nn.Module
    z: Tensor
    condition: tuple[Tensor, ...]
    x: Tensor
    likelihood: Likelihood


def build(entry: Any, width: int = 1) -> nn.Module:
    """The module of an entry, of a decoder or an encoder, in float32 and eval mode, seeded.

    No tensor of it is where its initialisation put it on purpose: norms initialised to the identity, biases and gates
    to zero, would hide what goes wrong with them.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages, about what they use that is deprecated
        module: nn.Module = entry.make(width)
    if entry.output is not None or entry.method != "forward":
        module = Adapted(module, entry.method, entry.output)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() <= 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
        draw_statistics(module, 0.2)
    return module.eval()


def problem(
    entry: Entry, batch: int = 3, dtype: torch.dtype = torch.float64, width: int = 1, seed: int = 1
) -> Problem:
    """Codes, conditions and data for it, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    decoder = build(entry, width)
    z = torch.randn(batch, *entry.code, generator=generator)
    condition = () if entry.condition is None else (entry.condition(batch, generator),)
    with torch.no_grad():
        params = entry.likelihood.params_of_output(decoder(z, *condition))
        shape = entry.likelihood.mean(params).shape
    x = data(entry.likelihood, shape, generator)
    condition = tuple(part.to(dtype) if part.is_floating_point() else part for part in condition)
    return Problem(decoder.to(dtype), z.to(dtype), condition, x.to(dtype), entry.likelihood)


def data(likelihood: Likelihood, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if isinstance(likelihood, PoissonRates):
        return torch.randint(0, 6, shape, generator=generator).float()
    if isinstance(likelihood, Bernoulli):
        return torch.bernoulli(torch.full(shape, 0.4), generator=generator)
    if isinstance(likelihood, Categorical):
        last = likelihood.num_classes - 1
        return torch.randint(0, last + 1, shape, generator=generator).float() / last
    return torch.rand(shape, generator=generator)


def labels(classes: int) -> Callable[[int, torch.Generator], Tensor]:
    """One-hot labels, for ``Entry.condition``."""

    def draw(samples: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, classes, (samples,), generator=generator)
        return torch.nn.functional.one_hot(index, classes).float()

    return draw


NO_CONDITION = dict.fromkeys(("log_px", "flow", "jacobian"), "operators take no condition")
"""``Entry.today`` of a decoder with a second argument."""

VOLUME = {
    "regret": "LikelihoodRegret takes data of at most three dimensions a sample where the encoder is lowered"
}
"""``Entry.today`` of a decoder of volumes."""

SPATIAL = dict.fromkeys(("log_px", "flow", "jacobian"), "operators take codes [B, d] alone")
"""``Entry.today`` of a decoder of codes [B, c, h, w]."""
