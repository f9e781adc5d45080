"""log p(x) by importance sampling, the weights streamed."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae._compiling import is_captured, is_compiling
from fastvae.arguments import expect_numbers
from fastvae.decoding import transformed
from fastvae.models.inputs import check_condition, check_is_tensor
from fastvae.models.observation import Observation

if TYPE_CHECKING:
    from fastvae.models.base import BaseVAE, NoiseSource

__all__ = ["importance_sampled"]


def importance_sampled(
    model: BaseVAE,
    seen: Observation,
    num_samples: int,
    chunk_size: int | None,
    generator: torch.Generator | None,
    noise: NoiseSource | None,
    posterior: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """See ``BaseVAE.log_likelihood``, which calls it without gradients: [B]."""
    expect_numbers("log_likelihood", num_samples=num_samples, chunk_size=chunk_size)
    x = seen.x
    check_is_tensor(model, x)
    if num_samples < 1:
        raise ValueError(f"log_likelihood: num_samples: expected at least 1, got {num_samples}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"log_likelihood: chunk_size: expected at least 1, got {chunk_size}")
    if seen.condition is not None:
        check_condition(model, seen.condition, len(x))
    mu, logvar = model.encode(x, **seen.given) if posterior is None else posterior
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
    done = 0
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
            own = seen.at(part)
            weights = model.log_weights(own.x, mu[part], logvar[part], drawn[:, :, part], **own.given)
            total[part] = torch.logaddexp(total[part], weights.logsumexp(0))
        done += count
    found = total - math.log(num_samples)
    _warn_of_nan(model, found)
    return found


def _warn_of_nan(model: BaseVAE, log_px: Tensor) -> None:
    if is_compiling() or is_captured(log_px) or transformed():
        return
    bad = int(torch.isnan(log_px).sum())
    if bad:
        warnings.warn(
            f"{type(model).__name__}: log_likelihood: NaN for {bad} of {len(log_px)} samples: x, the encoder's or "
            "the decoder's outputs (their weights?) are not finite",
            RuntimeWarning,
            stacklevel=5,  # log_likelihood and its torch.no_grad stand in between
        )
