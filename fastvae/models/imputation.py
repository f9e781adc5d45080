"""What is missing of x, given what was observed, by self-normalised importance sampling with streamed weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.arguments import given
from fastvae.likelihoods.weights import expanded
from fastvae.models.evidence import check_request, codes_by_outputs, draws_in_parts, warn_of_nan
from fastvae.models.observation import Observation

if TYPE_CHECKING:
    from fastvae.models.base import BaseVAE

__all__ = ["imputed"]


def imputed(
    model: BaseVAE,
    observation: Observation,
    num_samples: int,
    draw: bool,
    chunk_size: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """See ``BaseVAE.impute``, which calls it without gradients."""
    check_request("impute", model, observation, num_samples, chunk_size)
    x = observation.x
    weight = expanded("impute", observation.weight, x)
    mu, logvar = model.encode(x, **observation.given)
    observed = model.likelihood.as_float(x, mu.dtype)
    rows = codes_by_outputs(model, x) if chunk_size is None else chunk_size
    guess = mu.new_full(x.shape, math.nan)
    total = mu.new_full((len(x),), -math.inf)  # the logarithm of the sum of weights so far
    for part, noise in draws_in_parts(model, mu, num_samples, rows, generator) if len(x) else ():
        own, count = observation.at(part), noise.shape[1]
        codes, log_weights = model.weighted_codes(
            own.repeated(count), mu[part].repeat(count, 1), logvar[part].repeat(count, 1), noise.flatten(1, 2)
        )
        # Trajectories that were given up have weight 0, and codes that may be anything.
        codes = torch.where((log_weights > -math.inf)[:, None], codes, 0)
        log_weights, before = log_weights.reshape(count, -1), total[part].clone()
        total[part] = torch.logaddexp(before, log_weights.logsumexp(0))
        # Where no weight is above 0 yet, shares of their sum would be NaN.
        whole = total[part].clamp(min=torch.finfo(before.dtype).min)
        shares, of_before = (log_weights - whole).exp(), (before - whole).exp()
        if draw:
            guess[part] = _redrawn(model, own, codes, guess[part], shares, of_before, generator)
        else:
            guess[part] = _averaged(model, own, codes, guess[part], shares, of_before)
    found = torch.where(weight == 0, guess, observed)
    warn_of_nan("impute", model, found)
    return found


def _averaged(
    model: BaseVAE, observation: Observation, codes: Tensor, guess: Tensor, shares: Tensor, of_before: Tensor
) -> Tensor:
    """The mean of the decoder's means at ``codes`` [draws * samples, d] and of the guess before, by their shares."""
    means = model.likelihood.mean(model.decode(codes, **_condition_of(observation.repeated(len(shares)))))
    means = means.reshape(*shares.shape, -1).to(guess.dtype)
    new = torch.einsum("sb,sbn->bn", shares, means).reshape(guess.shape)
    old, known = (_as_rows(each, guess) for each in (of_before, shares.sum(0) + of_before))
    return torch.where(known > 0, torch.where(old > 0, old * guess, 0) + new, math.nan)


def _redrawn(
    model: BaseVAE,
    observation: Observation,
    codes: Tensor,
    guess: Tensor,
    shares: Tensor,
    of_before: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """A draw from p(x | z) at one of ``codes`` [draws * samples, d], or the guess before, each with its share."""
    draws, samples = shares.shape
    choices = torch.cat((shares, of_before[None]))
    # Where there is nothing to choose from, the guess before stays: NaN.
    known = choices.sum(0) > 0
    choices = torch.where(
        known, choices, torch.eye(draws + 1, 1, dtype=choices.dtype, device=choices.device).flip(0)
    )
    chosen = torch.multinomial(choices.T, 1, generator=generator)[:, 0]
    rows = (chosen % draws) * samples + torch.arange(samples, device=codes.device)
    params = model.decode(codes[rows], **_condition_of(observation))
    new = model.likelihood.sample(params, generator=generator).reshape(guess.shape).to(guess.dtype)
    return torch.where(_as_rows(chosen, guess) < draws, new, guess)


def _as_rows(numbers: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...]"""
    return numbers.reshape(-1, *[1] * (like.dim() - 1))


def _condition_of(observation: Observation) -> dict[str, Tensor]:
    return given(condition=observation.condition)
