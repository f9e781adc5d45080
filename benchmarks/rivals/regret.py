"""Likelihood regret one image at a time, and the copies of a batch by torch.vmap."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fastvae.models import VAE
from fastvae.models.observation import Observation
from fastvae.noise import SampleNoise, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.differentiated import VmappedCopies
from fastvae.ood.objective import PosteriorObjective
from fastvae.ood.sequential import refit_one


def published_steps(model: VAE, x: Tensor, num_steps: int) -> VAE:
    """The authors' loop over the steps: nothing is frozen, the optimiser has the encoder's parameters alone."""
    private = copy.deepcopy(model)
    optimizer = torch.optim.Adam(private.encoder.parameters(), lr=2e-4, weight_decay=5e-5)
    for _ in range(num_steps):
        optimizer.zero_grad()
        private(x).sum().backward()
        optimizer.step()
    return private


@torch.no_grad()
def published_likelihood(model: VAE, x: Tensor, num_samples: int) -> Tensor:
    """log p(x) from as many copies of one image, encoder and decoder run on each."""
    copies = x.expand(num_samples, *x.shape[1:]).contiguous()
    mu, logvar = model.encode(copies)
    weights = model.log_weight(copies, mu, logvar, torch.randn(1, *mu.shape, device=x.device))
    return weights.logsumexp(0)


def published_score(model: VAE, x: Tensor, num_steps: int, num_samples: int) -> Tensor:
    before = published_likelihood(model, x, num_samples)
    return published_likelihood(published_steps(model, x, num_steps), x, num_samples) - before


def careful_steps(model: VAE, x: Tensor, num_steps: int) -> Tensor:
    """Mean and log variance of one image's own posterior, [1, 2 d]."""
    private, _ = refit_one(model, x, SampleNoise(keys_of(x), 0), num_steps=num_steps)
    with torch.no_grad():
        return torch.cat(private.encode(x), 1)


def careful_score(model: VAE, x: Tensor, num_steps: int, num_samples: int) -> Tensor:
    noise = SampleNoise(keys_of(x), 0)
    private, _ = refit_one(model, x, noise, num_steps=num_steps)
    before, after = (m.log_likelihood(x, num_samples, noise=noise) for m in (model, private))
    return after - before


def vmapped_steps(detector: LikelihoodRegret, x: Tensor) -> Tensor:
    """Mean and log variance of each image's own posterior, [B, 2 d]."""
    copies = VmappedCopies(detector.model, x, detector.adam)
    with torch.no_grad():
        output = copies.forward()
        mu = output.chunk(2, 1)[0]
        objective = PosteriorObjective(detector.model, Observation(x), mu)
        noise = SampleNoise(keys_of(x), 0)(0, detector.num_steps, mu)
        for step in range(detector.num_steps):
            copies.update(objective(output, noise[:, step])[1])
            output = copies.forward()
    return output
