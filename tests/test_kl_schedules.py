"""Cyclical annealing of beta, and free bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_problems import data, make, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastvae import HVAE, IWAE, VAE, ConsistencyVAE, fit
from fastvae.influence import TracIn
from fastvae.penalties import BetaAnnealing, Consistency, FreeBits


def test_cycles_of_beta() -> None:
    annealing = BetaAnnealing(4, cycle_steps=6, num_cycles=2)
    ramps = []
    for _ in range(16):
        ramps.append(float(annealing.ramp()))
        annealing.step()
    cycle = [0, 0.25, 0.5, 0.75, 1, 1]
    assert ramps == [*cycle, *cycle, 1, 1, 1, 1]
    for_ever = BetaAnnealing(4, cycle_steps=6)
    for_ever.load_state_dict(annealing.state_dict())
    assert float(for_ever.ramp()) == 1 and float(for_ever.steps_taken) == 16
    for_ever.step(), for_ever.step(), for_ever.step()
    assert float(for_ever.ramp()) == 0.25
    assert "cycle_steps=6, num_cycles=2" in repr(annealing)


def test_a_cycle_begins_without_kl() -> None:
    model = make(VAE, penalties=[BetaAnnealing(2, cycle_steps=3)])
    x = data()
    plain = model.objective(x, generator=seeded())
    assert plain.kl is not None
    for factor in (0, 0.5, 1, 0, 0.5):
        found = model(x, generator=seeded())
        torch.testing.assert_close(found, -plain.log_px + factor * plain.kl)
        for penalty in model.penalties:
            penalty.step()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycle_steps": 3}, "cycle_steps: expected an int of at least anneal_steps = 4, got 3"),
        ({"cycle_steps": 4.5}, "cycle_steps: expected an int"),
        ({"num_cycles": 2}, "num_cycles: expected an int of at least 1, with cycle_steps, got 2"),
        ({"cycle_steps": 5, "num_cycles": 0}, "num_cycles: expected an int of at least 1"),
    ],
)
def test_refused_cycles(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BetaAnnealing(4, **options)


def kl_of(model: VAE, x: Tensor) -> Tensor:
    mu, logvar = model.encode(x)
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_free_bits_are_the_published_bound(per: str) -> None:
    plain = make(VAE, beta=1.5).double()
    x = data(dtype=torch.float64)
    kl = kl_of(plain, x)
    # Between two of the means: at one of them rounding would decide which way the bound's gradient goes.
    means = kl.mean(0).sort().values
    nats = float(means[len(means) // 2 - 1 : len(means) // 2 + 1].mean())
    free = VAE(plain.encoder, plain.decoder, beta=1.5, penalties=[FreeBits(nats, per=per)]).double()
    compared = kl.mean(0) if per == "batch" else kl
    bound = compared.clamp(min=nats).sum(-1).mean()
    step = plain.objective(x, generator=seeded())
    expected = (-step.log_px).mean() + 1.5 * bound
    found = free.loss(x, generator=seeded())
    torch.testing.assert_close(found, expected)
    parameters = list(plain.parameters())
    mine, theirs = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    if per == "sample":
        alone = torch.cat([free(each, noise=torch.ones(1, 1, kl.shape[1]).double()) for each in x.split(1)])
        torch.testing.assert_close(free(x, noise=torch.ones(1, *kl.shape).double()), alone)


def test_all_or_nothing_is_free() -> None:
    model, x = make(VAE), data()
    assert torch.equal(FreeBits(0.0)(model.objective(x)), torch.zeros(len(x)))
    step = model.objective(x, generator=seeded())
    assert step.kl is not None
    everything = step.loss + FreeBits(100.0)(step)
    torch.testing.assert_close(everything, -step.log_px + 100.0 * step.mu.shape[1], rtol=1e-5, atol=1e-2)


def test_free_bits_keep_latent_variables_alive() -> None:
    """Data of almost no structure: the KL alone switches all of them off."""
    x = torch.rand(256, 6, generator=seeded())
    loader = DataLoader(TensorDataset(x), 64)
    left = []
    for penalties in ([], [FreeBits(0.3)]):
        torch.manual_seed(0)
        model = VAE(nn.Linear(6, 4), nn.Linear(2, 6), "gaussian", penalties=penalties)
        fit(model, loader, epochs=60, progress=False, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
        left.append(kl_of(model, x).mean(0).detach())
    assert (left[0] < 0.1).all() and (left[1] > 0.2).all()


def test_free_bits_under_an_annealed_beta() -> None:
    annealing = BetaAnnealing(4)
    model = make(VAE, beta=2.0, penalties=[FreeBits(0.05, per="sample"), annealing])
    x, kl = data(), kl_of(make(VAE, beta=2.0), data())
    for _ in range(3):
        annealing.step()
    step = model.objective(x, generator=seeded())
    expected = -step.log_px + 0.75 * 2 * kl.clamp(min=0.05).sum(1)
    torch.testing.assert_close(model(x, generator=seeded()), expected)


def test_with_views_and_models_that_have_no_closed_kl() -> None:
    x = data()
    model = make(VAE, penalties=[FreeBits(0.5), Consistency(lambda x: x.flip(1))])
    model.loss(x).backward()
    assert isinstance(make(VAE), VAE) and ConsistencyVAE.has_closed_kl
    for kind in (HVAE, IWAE):
        with pytest.raises(
            ValueError, match=f"FreeBits: expected a model .*closed form.*got {kind.__name__}"
        ):
            make(kind, penalties=[FreeBits(0.5)])(x)
    for arguments, message in (((-1.0,), "nats: expected a finite number of at least 0, got -1.0"),):
        with pytest.raises(ValueError, match=message):
            FreeBits(*arguments)
    with pytest.raises(ValueError, match="per: expected one of"):
        FreeBits(0.5, per="dimension")


def test_order_of_penalties_under_a_view() -> None:
    annealing = BetaAnnealing(10)
    for _ in range(5):
        annealing.step()
    free, x = FreeBits(2.0, per="sample"), data()
    consistency = Consistency(lambda x: x, 0.0, noise="common")
    model = make(VAE)
    noise = torch.ones(1, len(x), model.latent_dim or 0)
    losses = []
    for penalties in ([free, annealing, consistency], [annealing, free, consistency], [free, annealing]):
        losses.append(VAE(model.encoder, model.decoder, penalties=penalties)(x, noise=noise).detach())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], 2 * losses[2])


def test_influence_wants_terms_of_each_sample_alone() -> None:
    x = data()
    with pytest.raises(ValueError, match=r"TracIn: FreeBits: expected a term of each sample alone"):
        TracIn(make(VAE, penalties=[FreeBits(0.5)]), x, None)
    assert (
        TracIn(make(VAE, penalties=[FreeBits(0.5, per="sample")]), x, None, num_samples=2)
        .influence(x)
        .isfinite()
        .all()
    )
