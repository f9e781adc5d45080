"""Noise keyed by sample: what it depends on, and what it does not."""

from __future__ import annotations

import pytest
import torch
from influence_problems import build, convolutional_vae, generator, hamiltonian_vae, images

from fastvae.noise import SampleNoise, keys_of


def test_sample_noise_is_of_the_sample_and_the_draw_alone() -> None:
    x, like = images(5, 7), torch.zeros(5, 3)
    noise = SampleNoise(keys_of(x), seed=1, draws=2)
    whole = noise(0, 6, like)
    assert whole.shape == (2, 6, 5, 3) and whole.dtype == torch.float32
    assert torch.equal(torch.cat((noise(0, 2, like), noise(2, 4, like)), 1), whole)
    assert torch.equal(noise[1:3](0, 6, like[1:3]), whole[:, :, 1:3])
    assert torch.equal(SampleNoise(keys_of(x.flip(0)), 1, 2)(0, 6, like), whole.flip(2))
    assert torch.equal(SampleNoise(keys_of(x), 1, 2, start=4)(0, 2, like), whole[:, 4:])
    assert not torch.isin(SampleNoise(keys_of(x), 2, 2)(0, 6, like), whole).any()
    assert whole.unique().numel() == whole.numel()


def test_sample_noise_is_standard_normal() -> None:
    drawn = SampleNoise(keys_of(images(4, 7)), seed=0)(0, 20000, torch.zeros(4, 2, dtype=torch.float64))
    assert drawn.mean((0, 1)).abs().max() < 0.03 and (drawn.std((0, 1)) - 1).abs().max() < 0.03


@pytest.mark.parametrize("make", [convolutional_vae, hamiltonian_vae])
def test_log_likelihood_takes_noise_and_a_posterior(make) -> None:  # type: ignore[no-untyped-def]
    model = build(make).eval()
    x = images(5, *((1, 8, 8) if make is convolutional_vae else (20,)))
    noise = SampleNoise(keys_of(x), 0, model.noise_draws)
    whole = model.log_likelihood(x, 9, noise=noise)
    assert torch.allclose(whole, model.log_likelihood(x, 9, noise=noise, chunk_size=2), atol=1e-12, rtol=0)
    part = model.log_likelihood(x[3:], 9, noise=noise[3:])
    assert torch.allclose(whole[3:], part, atol=1e-10, rtol=0)
    mu, logvar = model.encode(x)
    given = model.log_likelihood(x, 9, noise=noise, posterior=(mu, logvar))
    assert torch.equal(whole, given) and not given.requires_grad
    moved = model.log_likelihood(x, 9, generator=generator(0), posterior=(mu + 1, logvar))
    assert not torch.allclose(moved, whole)
    with pytest.raises(ValueError, match="posterior: expected mean and log variance of 5 samples, got"):
        model.log_likelihood(x, 9, posterior=(mu[:4], logvar[:4]))
