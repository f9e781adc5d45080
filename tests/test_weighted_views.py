"""Views of samples whose elements have weights: the loss by hand, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_problems import seeded
from torch import Tensor, nn

from fastvae import HVAE, IWAE, VAE
from fastvae.data import RandomFlip
from fastvae.models.base import BaseVAE
from fastvae.ops import gaussian_kl
from fastvae.penalties import Consistency

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, tuple[type[BaseVAE], dict[str, Any]]] = {
    "VAE": (VAE, {}),
    "IWAE": (IWAE, {"num_samples": 3}),
    "HVAE": (HVAE, {"num_steps": 2, "step_size": 0.05}),
}


def model_of(name: str, augment: Any) -> BaseVAE:
    torch.manual_seed(0)
    kind, options = MODELS[name]
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    decoder = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (1, 3, 4)))
    penalty = Consistency(augment, 0.3, noise="common")
    return kind(encoder, decoder, "gaussian", penalties=[penalty], **options).double()  # type: ignore[arg-type]


def data() -> tuple[Tensor, Tensor]:
    x = torch.rand(4, 1, 3, 4, generator=seeded(), dtype=torch.float64)
    return x, (torch.rand(x.shape, generator=seeded(1)) > 0.4).double()


@pytest.mark.parametrize("name", MODELS)
def test_the_view_has_weights_of_its_own(name: str) -> None:
    model, (x, weight) = model_of(name, RandomFlip(1.0)), data()
    mu = torch.zeros(4, 2, dtype=torch.float64)
    noise = model.draw_noise(mu, seeded(2))
    missing = x.masked_fill(weight == 0, math.nan)
    found = model(missing, noise=noise, weight=weight)
    own = model.objective(missing, noise=noise, weight=weight)
    view = model.objective((x * weight).flip(3), noise=noise, weight=weight.flip(3))
    expected = own.loss + view.loss + 0.3 * gaussian_kl(view.mu, view.logvar, own.mu, own.logvar)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    bare, ones = model(x, noise=noise), torch.ones(4, 1, 3, 4)
    torch.testing.assert_close(model(x, noise=noise, weight=ones), bare, rtol=1e-12, atol=1e-12)
    found.mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_one_weight_a_sample_is_that_of_its_view() -> None:
    model, (x, _) = model_of("VAE", lambda x: x.roll(1, 3)), data()
    noise = model.draw_noise(torch.zeros(4, 2, dtype=torch.float64), seeded(2))
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)[:, None, None, None]
    own = model.objective(x, noise=noise, weight=weight)
    view = model.objective(x.roll(1, 3), noise=noise, weight=weight)
    expected = own.loss + view.loss + 0.3 * gaussian_kl(view.mu, view.logvar, own.mu, own.logvar)
    torch.testing.assert_close(model(x, noise=noise, weight=weight), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"Consistency: weight: expected one weight .*RandomFlip"):
        model(x, weight=data()[1])


def test_flips_move_weights_of_any_dtype_and_shape() -> None:
    x, weight = data()
    for given in (weight.bool(), weight.long(), weight.float()):
        view, moved = RandomFlip(0.5, 0.5)(x, seeded(3), weight=given)
        assert moved.dtype == given.dtype
        torch.testing.assert_close(view, RandomFlip(0.5, 0.5)(x, seeded(3)))
        # The same element of both.
        torch.testing.assert_close(RandomFlip(0.5, 0.5)(x * weight, seeded(3)), view * moved)
    flat = RandomFlip(1.0, shape=(1, 3, 4))(x.flatten(1), weight=weight.flatten(1))
    assert torch.equal(flat[1], weight.flip(3).flatten(1)) and torch.equal(flat[0], x.flip(3).flatten(1))


def test_an_augment_that_takes_weights_must_return_them() -> None:
    def forgetful(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return x.flip(3)

    x, weight = data()
    with pytest.raises(ValueError, match=r"Consistency: augment: expected \(view, its weights\)"):
        model_of("VAE", forgetful)(x, weight=weight)
