"""Noise keyed by sample: what it depends on, and what it does not."""

from __future__ import annotations

import math

import pytest
import torch
from influence_problems import build, convolutional_vae, generator, hamiltonian_vae, images
from torch import Tensor, nn

from fastvae._extension import raw
from fastvae.noise import SampleNoise, Stream, draws_of, key_of_weights, keys_of


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


MASK = 2**64 - 1


def mixed(bits: int) -> int:
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & MASK
    return bits ^ bits >> 31


def numbered(key: int, number: int) -> int:
    return mixed(key + (number + 1) * 0x9E3779B97F4A7C15 & MASK)


def unsigned(numbers: Tensor) -> list[int]:
    return [number & MASK for number in numbers.flatten().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bool, torch.int16])
def test_keys_and_numbers_are_those_of_the_formula(dtype: torch.dtype, device: torch.device) -> None:
    x = (100 * torch.rand(3, 5, generator=generator(0)) - (50 if dtype.is_floating_point else 0)).to(dtype)
    expected = []
    for row in x:
        data = row.numpy().tobytes()
        words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
        terms = [(word ^ word >> 32) * (numbered(0, w) | 1) for w, word in enumerate(words)]
        expected.append(mixed((sum(terms) + 8 * len(words)) & MASK))
    keys = keys_of(x.to(device))
    assert unsigned(keys) == expected
    draws = draws_of(keys, 7, 2, first=3)
    seeded = [mixed(key ^ numbered(7, 0)) for key in expected]
    assert unsigned(draws) == [numbered(key, number) for key in seeded for number in (3, 4)]
    stream = Stream(draws)
    stream.normal((4,))
    uniform = stream.uniform((2, 3)).cpu().flatten(1)
    assert uniform.tolist() == [
        [((numbered(key, 4 + j) >> 11) + 0.5) * 2.0**-53 for j in range(6)] for key in unsigned(draws)
    ]
    normal = Stream(draws).normal((4,)).cpu()
    for row, key in zip(normal.tolist(), unsigned(draws), strict=True):
        for j, number in enumerate(row):
            u, v = ((half + 0.5) * 2.0**-32 for half in divmod(numbered(key, j), 2**32))
            # cos loses digits near its zeros in the oracle, not in the kernel.
            wanted = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)
            assert number == pytest.approx(wanted, rel=1e-13, abs=1e-14)


def test_key_of_weights_is_of_their_values_in_order() -> None:
    """Not of dtype, device or file, nor of buffers; every parameter counts, and so does which is which."""
    model = build(convolutional_vae).float()
    key, count = key_of_weights(model), len(list(model.parameters()))
    assert key == key_of_weights(build(convolutional_vae)) == key_of_weights(model.double())
    model.register_buffer("steps", torch.ones((), dtype=torch.int64))
    assert key == key_of_weights(model)
    found = {key}
    for value in model.parameters():
        value.detach().view(-1)[0] += 1e-6
        found.add(key_of_weights(model))
    for shape in ((), (0,), (2, 0), (3,)):
        module = nn.Module()
        module.scale = nn.Parameter(torch.ones(shape, dtype=torch.int64), requires_grad=False)
        found.add(key_of_weights(module))
    module.scale, module.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    found.add(key_of_weights(module))
    module.scale, module.shift = module.shift, module.scale
    found |= {key_of_weights(module), key_of_weights(nn.ReLU())}
    assert len(found) == 1 + count + 7


def test_keys_depend_on_values_alone(device: torch.device) -> None:
    x = images(6, 8).float().to(device)
    loose = torch.empty(6 * 8 + 1, device=device)[1:].view(6, 8).copy_(x)  # aligned to no word
    assert torch.equal(keys_of(loose), keys_of(x)) and torch.equal(keys_of(x.T.contiguous().T), keys_of(x))
    assert torch.equal(keys_of(x[2:]), keys_of(x)[2:]) and keys_of(x[:0]).shape == (0,)
    x[0, 3] = x[0, 3].nextafter(x.new_tensor(9.0))
    assert keys_of(x)[0] != keys_of(loose)[0]


def test_noise_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"fastvae::sample_keys: x: expected shape \[B, \.\.\.\]"):
        raw.sample_keys(torch.tensor(1.0))
    with pytest.raises(ValueError, match="fastvae::sample_keys: x: expected a dense tensor"):
        raw.sample_keys(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="fastvae::keyed_bits: keys: expected int64"):
        raw.keyed_bits(torch.ones(3), 0, 1)
    with pytest.raises(ValueError, match=r"fastvae::keyed_normal: keys: expected shape \[rows\]"):
        raw.keyed_normal(torch.ones(3, 1, dtype=torch.int64), 0, 1)
    with pytest.raises(ValueError, match="fastvae::keyed_normal: count: expected at least 0"):
        raw.keyed_normal(torch.ones(3, dtype=torch.int64), 0, -1)


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
