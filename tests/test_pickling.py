"""Models, scores and what was read of networks, copied and pickled after use: the same results, caches or not."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from influence_problems import mlp
from torch import Tensor, nn
from zoo.encoders import ENCODERS, encoder_of

import fastvae
from fastvae.influence import TracIn
from fastvae.models import HVAE, IWAE, VAE
from fastvae.ood import LikelihoodRegret, SelfInfluence

USES: dict[str, Callable[[Any, Tensor], tuple[Any, Callable[[Any], Tensor]]]] = {
    "model": lambda m, x: (m, lambda m: m.loss(x, generator=torch.Generator().manual_seed(0)).detach()),
    "regret": lambda m, x: (LikelihoodRegret(m, num_steps=3, num_samples=2), lambda d: d.refit(x).mu),
    "self-influence": lambda m, x: (SelfInfluence(m, num_samples=2), lambda d: torch.as_tensor(d.predict(x))),
    "TracIn": lambda m, x: (TracIn(m, x, None, num_samples=2), lambda t: t.influence(x)),
    "network": lambda m, x: (
        fastvae.Network(m.decoder, "gaussian"),
        lambda n: n.force(torch.ones(len(x), m.latent_dim), x)[1],
    ),
}


@pytest.mark.filterwarnings("ignore:.*copies are trained")
@pytest.mark.parametrize("kind", [VAE, HVAE, IWAE])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "name",
    ["two-heads-mlp", "resnet-groupnorm", pytest.param("lstm", marks=pytest.mark.slow), "transformer"],
)
def test_copies_of_used_objects(name: str, use: str, kind: Any) -> None:
    entry = ENCODERS[name]
    torch.manual_seed(0)
    decoder = nn.Sequential(mlp(entry.latents, 8, math.prod(entry.shape)), nn.Unflatten(1, entry.shape))
    model = kind(encoder_of(entry), decoder, "gaussian", latent_dim=entry.latents).eval()
    x = torch.rand(3, *entry.shape)
    used, result = USES[use](model, x)
    expected = result(used)
    for again in (copy.deepcopy(used), pickle.loads(pickle.dumps(used))):
        torch.testing.assert_close(result(again), expected, rtol=1e-4, atol=1e-4)
