"""Encoders and decoders of TorchScript: what models and scores make of them is what they make of the modules inside."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from model_problems import DIM, PIXELS, data, seeded
from torch import Tensor, nn

from fastvae import HVAE, VAE, ood, ops
from fastvae.influence import TracIn, UncoveredParameter
from fastvae.models import BaseVAE
from fastvae.private import private_copy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TorchScript|.*trained one after the other|.*is called once"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(PIXELS, 2 * DIM), nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Linear(6, PIXELS))


def traced(module: nn.Module) -> nn.Module:
    first = next(inner for inner in module.modules() if isinstance(inner, nn.Linear))
    found: nn.Module = torch.jit.trace(module, torch.randn(2, first.in_features))
    return found


def codes() -> Tensor:
    return torch.randn(5, DIM, generator=seeded())


def influence(model: BaseVAE, x: Tensor) -> Tensor:
    tracin = TracIn(model, x, [None], lambda m, c: 1.0, num_samples=2, uncovered="materialise")
    found: Tensor = tracin.influence(x[:2])
    return found


CALLS: dict[str, Callable[[BaseVAE, Tensor], Tensor]] = {
    "loss": lambda model, x: model(x, generator=seeded()),
    "flow": lambda model, x: HVAE(model.encoder, model.decoder, num_steps=2, latent_dim=DIM)(
        x, generator=seeded()
    ),
    "log_likelihood": lambda model, x: model.log_likelihood(x, 5, generator=seeded()),
    "jacobian": lambda model, x: ops.jacobian_l1(model.decoder, codes(), "none"),
    "force": lambda model, x: ops.log_px_and_force(model.decoder, codes(), x)[1],
    "regret": lambda model, x: ood.LikelihoodRegret(model, num_steps=2, num_samples=3).predict(x),
    "influence": influence,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("made", [torch.jit.script, traced], ids=["script", "trace"])
def test_a_scripted_network_is_the_module_that_it_was_made_from(
    made: Callable[[nn.Module], nn.Module], call: str
) -> None:
    expected = CALLS[call](VAE(*networks()), data())
    scripted = [made(copy.deepcopy(network)) for network in networks()]
    found = CALLS[call](VAE(*scripted, latent_dim=DIM), data())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32


def test_influence_leaves_no_scripted_parameter_out_in_silence() -> None:
    """A copy of TorchScript's had parameters without gradients, and scores were those of the rest."""
    encoder, decoder = networks()
    model = VAE(encoder, torch.jit.script(decoder), latent_dim=DIM)
    with pytest.raises(UncoveredParameter, match=r"decoder\.0\.weight: no rule for RecursiveScriptModule"):
        TracIn(model, data(), [None], lambda m, c: 1.0).influence(data()[:2])
    model.decoder[0].weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in private_copy(model).parameters()] == wanted
