"""Networks that return dicts, objects and more than two tensors, in every method."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from influence_problems import images, tracin, vae_gradients
from torch import Tensor, nn

from fastvae.models import HVAE, VAE, SelectOutputs
from fastvae.ood import LikelihoodRegret


class Named(NamedTuple):
    mu: Tensor
    logvar: Tensor


@dataclasses.dataclass
class Posterior:
    mu: Tensor
    logvar: Tensor
    hidden: Tensor


class Trunk(nn.Module):
    """Two heads on a trunk, returned in the form of ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.trunk, self.mu, self.logvar = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.trunk(x))
        mu, logvar = self.mu(h), self.logvar(h)
        forms: dict[str, Any] = {
            "dict": {"hidden": h, "mu": mu, "logvar": logvar},
            "named tuple": Named(mu, logvar),
            "dataclass": Posterior(mu, logvar, h),
            "three": (h, mu, logvar),
            "list": [mu, logvar, h],
        }
        return forms[self.kind]


PLACES: dict[str, tuple[str | int, str | int]] = {
    "dict": ("mu", "logvar"),
    "named tuple": ("mu", "logvar"),
    "dataclass": ("mu", "logvar"),
    "three": (1, -1),
    "list": (0, 1),
}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 12))

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": self.layers(z), "codes": z}


def model_of(form: str, kind: Any = VAE) -> Any:
    torch.manual_seed(0)
    encoder = SelectOutputs(Trunk(form), *PLACES[form])
    return kind(encoder, SelectOutputs(Decoder(), "reconstruction"), "gaussian").double().eval()


@pytest.mark.parametrize("kind", [VAE, HVAE])
@pytest.mark.parametrize("form", PLACES)
def test_models_and_scores(form: str, kind: Any) -> None:
    model, plain, x = model_of(form, kind), model_of("list", kind), images(5, 12)
    assert model.latent_dim == 3
    losses = [m(x, generator=torch.Generator().manual_seed(1)) for m in (model, plain)]
    torch.testing.assert_close(*losses)
    model.loss(x).backward()
    assert all(p.grad is not None for p in model.parameters())
    g = vae_gradients(model, x, 3).mean(1)
    torch.testing.assert_close(tracin(model, x).influence(x), g @ g.T, rtol=1e-10, atol=1e-10)
    mine, theirs = (LikelihoodRegret(m, num_steps=5, num_samples=2).refit(x).mu for m in (model, plain))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(again.encode(x)[0], model.encode(x)[0])


@pytest.mark.filterwarnings("error")
def test_chains_of_them_train_in_kernels() -> None:
    LikelihoodRegret(model_of("dict"), num_steps=2, num_samples=1).refit(images(3, 12))


def test_refusals_say_what_there_is() -> None:
    x = images(2, 12).float()
    decoder = nn.Linear(3, 12)
    for form, names in (
        ("dict", "'hidden', 'mu', 'logvar'"),
        ("three", "places 0 to 2"),
        ("dataclass", "'mu', "),
    ):
        with pytest.raises(ValueError, match=f"got .*{names}.*fastvae.models.SelectOutputs"):
            VAE(Trunk(form), decoder).elbo(x)
    with pytest.raises(
        ValueError, match="Trunk: expected an output at 'sigma', got none; there are 'hidden', "
    ):
        VAE(SelectOutputs(Trunk("dict"), "mu", "sigma"), decoder).elbo(x)
    with pytest.raises(ValueError, match=r"expected an output at 3, got none; there are places 0 to 2"):
        VAE(SelectOutputs(Trunk("three"), 1, 3), decoder).elbo(x)
    with pytest.raises(ValueError, match="there are no parts: it is one tensor"):
        VAE(SelectOutputs(nn.Linear(12, 6), "mu", "logvar"), decoder).elbo(x)
    with pytest.raises(TypeError, match="network: expected a torch module, got function"):
        SelectOutputs(lambda x: x, "mu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="places: expected strings or integers, got bool"):
        SelectOutputs(decoder, True)
    with pytest.raises(ValueError, match="places: expected at least one"):
        SelectOutputs(decoder)


class OfDistributions(nn.Module):
    """An encoder or a decoder that returns what it made of its outputs."""

    def __init__(
        self, inputs: int, outputs: int, made: Callable[[Tensor], torch.distributions.Distribution]
    ) -> None:
        super().__init__()
        self.layer, self.made = nn.Linear(inputs, outputs), made

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        return self.made(self.layer(x))


def test_distributions_are_refused_with_what_to_return() -> None:
    """A normal distribution's scale is no log variance, which its parts named beside mu and logvar passed for."""

    def normal(h: Tensor) -> torch.distributions.Distribution:
        mu, scale = h.chunk(2, 1)
        return torch.distributions.Normal(mu, scale.exp())

    encoder = OfDistributions(8, 4, normal)
    decoder = OfDistributions(2, 8, lambda h: torch.distributions.Bernoulli(logits=h, validate_args=False))
    x = torch.rand(3, 8).round()
    with pytest.raises(
        ValueError, match=r"got a distribution, Normal; .* \(q\.mean, 2 \* q\.stddev\.log\(\)\)"
    ):
        VAE(encoder, nn.Linear(2, 8), latent_dim=2).loss(x)
    with pytest.raises(
        TypeError, match=r"got Bernoulli, a distribution; .*SelectOutputs\(decoder, 'logits'\)"
    ):
        VAE(nn.Linear(8, 4), decoder).loss(x)
    VAE(nn.Linear(8, 4), SelectOutputs(decoder, "logits"), latent_dim=2).loss(x).backward()
    HVAE(nn.Linear(8, 4), SelectOutputs(decoder, "logits"), latent_dim=2, num_steps=2).loss(x).backward()
