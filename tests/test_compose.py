"""Hamiltonian flow, Jacobian penalty and consistency in all combinations: trained, resumed, scored."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_problems import DIM, PIXELS, mlp, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.data import RandomAffine
from fastvae.influence import TracIn
from fastvae.models import HVAE, VAE, BaseVAE
from fastvae.penalties import Consistency, JacobianL1

STEPS, BATCH = 50, 20
COMBINATIONS = list(itertools.product((False, True), repeat=3))
each_combination = pytest.mark.parametrize(
    "parts",
    COMBINATIONS,
    ids=lambda parts: (
        "+".join(
            name for name, on in zip(("hamiltonian", "jacobian", "consistency"), parts, strict=True) if on
        )
        or "plain"
    ),
)


def build(parts: tuple[bool, bool, bool]) -> BaseVAE:
    hamiltonian, jacobian, consistency = parts
    torch.manual_seed(0)
    penalties: list[nn.Module] = []
    if jacobian:
        penalties.append(JacobianL1(0.05))
    if consistency:
        penalties.append(Consistency(RandomAffine(shape=(1, 2, 3)), 0.1))
    networks = mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS)
    if hamiltonian:
        return HVAE(*networks, num_steps=3, penalties=penalties)
    return VAE(*networks, penalties=penalties)


@functools.cache
def images() -> Tensor:
    """Two kinds of images, so that there is something to learn."""
    kinds = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    flip = torch.rand(200, PIXELS, generator=seeded()) < 0.05
    return (kinds[torch.arange(200) % 2] - flip.float()).abs()


def train(parts: tuple[bool, bool, bool], folder: Path, epochs: int) -> tuple[BaseVAE, fastvae.History]:
    model = build(parts)
    history = fastvae.fit(
        model,
        DataLoader(TensorDataset(images()), batch_size=BATCH, shuffle=True),
        epochs=epochs,
        optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
        run_dir=folder,
        progress=False,
    )
    return model, history


@each_combination
def test_trains_and_resumes_to_the_same_losses(parts: tuple[bool, bool, bool], tmp_path: Path) -> None:
    epochs = STEPS * BATCH // len(images())
    whole, history = train(parts, tmp_path / "whole", epochs)
    assert history.steps[-1] == STEPS and all(map(math.isfinite, history.train_loss))
    assert history.train_loss[-1] < history.train_loss[0]
    train(parts, tmp_path / "parts", epochs // 2)
    resumed, again = train(parts, tmp_path / "parts", epochs)
    assert again.train_loss == history.train_loss
    fresh = build(parts)
    fastvae.training.load_checkpoint(fresh, history.checkpoints[-1])
    x = images()[:10]
    expected = whole(x, generator=seeded())
    for other in (resumed, fresh):
        assert torch.equal(other(x, generator=seeded()), expected)
    torch.testing.assert_close(
        fresh.log_likelihood(x, 20, generator=seeded()), whole.log_likelihood(x, 20, generator=seeded())
    )


def influence(model: BaseVAE, x: Tensor) -> Tensor:
    # The operators' own gradients do not pass a hook: of such models all parameters go by autograd.
    tracin = TracIn(model, x, [None], lambda *_: 1.0, num_samples=2, batch_size=4, uncovered="materialise")
    scores = tracin.influence(x)
    torch.testing.assert_close(scores.diagonal(), tracin.self_influence(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, scores.T, rtol=1e-4, atol=1e-5)
    # A sample's noise, its view included, does not depend on where it stands.
    torch.testing.assert_close(tracin.influence(x.flip(0)).flip(0), scores, rtol=1e-4, atol=1e-5)
    return scores


def regret(model: BaseVAE, x: Tensor) -> Tensor:
    return fastvae.ood.LikelihoodRegret(model, num_steps=3, num_samples=20).predict(x)


def scorer(name: str, call: Any, there: bool) -> Any:
    return pytest.param(
        call, id=name, marks=pytest.mark.skipif(not there, reason=f"fastvae has no {name} yet")
    )


@pytest.mark.parametrize(
    "score",
    [scorer("TracIn", influence, True), scorer("regret", regret, hasattr(fastvae.ood, "LikelihoodRegret"))],
)
# TracIn's hooks keep the operators from reading a decoder: autograd runs in their place, and they say so.
@pytest.mark.filterwarnings("ignore:.*this decoder cannot be lowered:UserWarning")
@each_combination
def test_is_scored(parts: tuple[bool, bool, bool], score: Any) -> None:
    scores = score(build(parts), images()[:6])
    assert scores.shape[0] == 6 and torch.isfinite(scores).all()


def test_consistency_alone_needs_no_gradient_by_autograd() -> None:
    """Views of a sample side by side: TracIn covers a VAE with consistency by its layers' own rules."""
    tracin = TracIn(build((False, False, True)), images()[:6], [None], lambda *_: 1.0, num_samples=2)
    assert torch.isfinite(tracin.self_influence(images()[:6])).all()
    assert all("autograd" not in row.rule for row in tracin.coverage().rows)
