"""log p(x) by importance sampling, the weights streamed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae._compiling import is_captured, is_compiling
from fastvae.arguments import expect_at_least, expect_numbers
from fastvae.decoding import transformed
from fastvae.models.inputs import check_condition, check_is_tensor
from fastvae.models.observation import Observation

if TYPE_CHECKING:
    from fastvae.models.base import BaseVAE, NoiseSource

__all__ = ["check_request", "codes_by_outputs", "draws_in_parts", "importance_sampled", "warn_of_nan"]

# Decoder outputs held at once while importance sampling: 16 MiB of float32.
_OUTPUTS_AT_ONCE = 2**22


def importance_sampled(
    model: BaseVAE,
    observation: Observation,
    num_samples: int,
    chunk_size: int | None,
    generator: torch.Generator | None,
    noise: NoiseSource | None,
    posterior: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """See ``BaseVAE.log_likelihood``, which calls it without gradients: [B]."""
    check_request("log_likelihood", model, observation, num_samples, chunk_size)
    x = observation.x
    mu, logvar = model.encode(x, **observation.given) if posterior is None else posterior
    batch = mu.shape[0]
    if mu.shape != logvar.shape or batch != len(x):
        raise ValueError(
            f"log_likelihood: posterior: expected mean and log variance of {len(x)} samples, "
            f"got {list(mu.shape)} and {list(logvar.shape)}"
        )
    if batch == 0:
        return mu.new_zeros(0)
    rows = chunk_size if chunk_size is not None else model._codes_at_once(x, mu)
    total = mu.new_full((batch,), -math.inf)
    for part, drawn in draws_in_parts(model, mu, num_samples, rows, generator, noise):
        own = observation.at(part)
        weights = model.log_weights(own.x, mu[part], logvar[part], drawn, **own.given)
        total[part] = torch.logaddexp(total[part], weights.logsumexp(0))
    found = total - math.log(num_samples)
    warn_of_nan("log_likelihood", model, found)
    return found


def check_request(
    owner: str, model: BaseVAE, observation: Observation, num_samples: int, chunk_size: int | None
) -> None:
    """Raise, as of ``owner``, for numbers below 1, no tensor, or a condition that does not fit x."""
    expect_numbers(owner, num_samples=num_samples, chunk_size=chunk_size)
    check_is_tensor(model, observation.x)
    expect_at_least(owner, 1, num_samples=num_samples)
    expect_at_least(owner, 1, optional=True, chunk_size=chunk_size)
    if observation.condition is not None:
        check_condition(model, observation.condition, len(observation.x))


def draws_in_parts(
    model: BaseVAE,
    mu: Tensor,
    num_samples: int,
    rows: int,
    generator: torch.Generator | None,
    noise: NoiseSource | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Some of the samples and noise [weight_draws, draws, samples, d] for them, ``rows`` codes at once."""
    batch, done = len(mu), 0
    while done < num_samples:
        count = max(1, min(rows // batch, num_samples - done))
        if noise is None:
            drawn = torch.stack(
                [model.draw_noise(mu, generator, model.weight_draws) for _ in range(count)], 1
            )
        else:
            drawn = noise(done, count, mu)
        for start in range(0, batch, rows):
            part = slice(start, start + rows)
            yield part, drawn[:, :, part]
        done += count


def codes_by_outputs(model: BaseVAE, x: Tensor) -> int:
    """Codes that may be decoded at once, by the outputs that they stand for."""
    outputs = math.prod(x.shape[1:]) * model.likelihood.values_per_element
    return max(1, _OUTPUTS_AT_ONCE // max(1, outputs))


def warn_of_nan(owner: str, model: BaseVAE, found: Tensor) -> None:
    """Warn of NaN in what was found of each sample, [B, ...]; called by what a model's method under no_grad calls."""
    if is_compiling() or is_captured(found) or transformed() or not len(found):
        return
    bad = int(torch.isnan(found).reshape(len(found), -1).any(1).sum())
    if bad:
        warnings.warn(
            f"{type(model).__name__}: {owner}: NaN for {bad} of {len(found)} samples: x, the encoder's or "
            "the decoder's outputs (their weights?) are not finite",
            RuntimeWarning,
            stacklevel=5,  # the method and its torch.no_grad stand in between
        )
