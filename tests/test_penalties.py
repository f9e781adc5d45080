"""fastvae.penalties and JacobianL1VAE: objective and gradient worked out separately, annealing, training."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from model_problems import DIM, MODELS, PIXELS, data, make, mlp, seeded
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.likelihoods import Bernoulli, Gaussian
from fastvae.models import VAE, BaseVAE
from fastvae.penalties import BetaAnnealing, JacobianL1, JacobianL1VAE


def jacobian_sum(decode: Any, z: Tensor) -> Tensor:
    """Sum of |dy/dz| for each sample, from the whole Jacobian [P, B, d] by reverse mode."""
    whole = torch.autograd.functional.jacobian(lambda at: decode(at).sum(0), z, create_graph=True)
    return whole.abs().sum((0, 2))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=False))


# --- objective and gradient --------------------------------------------------------------------


def test_objective_and_gradient_of_jacobian_l1_vae() -> None:
    """BCE + beta KL + gamma J1, written down here, in float64: values and gradients of all parameters."""
    torch.manual_seed(0)
    model = JacobianL1VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), beta=4.0, gamma=0.3).double()
    x = data(dtype=torch.float64)
    noise = torch.randn(1, len(x), DIM, generator=seeded(), dtype=torch.float64)
    mu, logvar = model.encoder(x).chunk(2, 1)
    z = mu + (logvar / 2).exp() * noise[0]
    bce = functional.binary_cross_entropy_with_logits(model.decoder(z), x, reduction="none").sum(1)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
    j1 = jacobian_sum(lambda at: torch.sigmoid(model.decoder(at)), z.detach())
    expected = bce + 4 * kl + 0.3 * j1
    got = model(x, noise=noise)
    assert got.shape == (len(x),)
    # Float64; the two ways to the Jacobian sum in another order.
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    cotangents = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    wanted, found = gradients(model, expected @ cotangents), gradients(model, got @ cotangents)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_closed_form_of_one_linear_layer() -> None:
    """y = sigmoid(W z + b): J1 = sum_p s_p (1 - s_p) sum_i |W_pi|, and its gradients by hand."""
    torch.manual_seed(1)
    decoder = nn.Linear(DIM, PIXELS).double()
    model = VAE(nn.Linear(PIXELS, 2 * DIM).double(), decoder, penalties=[JacobianL1(0.7)])
    x = data(dtype=torch.float64)
    step = model.objective(x, generator=seeded())
    term = model.penalties[0](step)
    s = torch.sigmoid(decoder(step.z)).detach()
    size = decoder.weight.detach().abs().sum(1)
    torch.testing.assert_close(term, 0.7 * (s * (1 - s) * size).sum(1), rtol=1e-12, atol=0)
    bend = s * (1 - s) * (1 - 2 * s) * size
    weight, bias = torch.autograd.grad(term.sum(), [decoder.weight, decoder.bias])
    torch.testing.assert_close(bias, 0.7 * bend.sum(0), rtol=1e-11, atol=1e-12)
    slope = (s * (1 - s)).sum(0)[:, None] * decoder.weight.detach().sign()
    torch.testing.assert_close(weight, 0.7 * (slope + bend.T @ step.z.detach()), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("likelihood", ["bernoulli", Gaussian(0.5)])
def test_composes_with_every_model(kind: type[BaseVAE], likelihood: Any) -> None:
    """The penalty at the code that was decoded, with no gradient to where it came from."""
    plain, model = (
        make(kind, likelihood, penalties=penalties).double() for penalties in ([], [JacobianL1(0.2)])
    )
    x = data(dtype=torch.float64)
    z = model.objective(x, generator=seeded()).z.detach()
    probabilities = torch.sigmoid if likelihood == "bernoulli" else lambda y: y
    j1 = jacobian_sum(lambda at: probabilities(model.decoder(at)), z)
    loss = model(x, generator=seeded())
    torch.testing.assert_close(loss, plain(x, generator=seeded()) + 0.2 * j1, rtol=1e-11, atol=0)
    torch.testing.assert_close(model.elbo(x, generator=seeded()), plain.elbo(x, generator=seeded()))
    loss.sum().backward()
    plain(x, generator=seeded()).sum().backward()
    of_penalty = torch.autograd.grad(0.2 * j1.sum(), list(model.decoder.parameters()), allow_unused=True)
    for parameter, before, extra in zip(
        model.decoder.parameters(), plain.decoder.parameters(), of_penalty, strict=True
    ):
        wanted = before.grad if extra is None else before.grad + extra  # type: ignore[operator]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-11)
    for parameter, before in zip(model.encoder.parameters(), plain.encoder.parameters(), strict=True):
        assert torch.equal(parameter.grad, before.grad)  # type: ignore[arg-type]


def test_a_decoder_that_ends_in_its_own_sigmoid() -> None:
    """Bernoulli(probs=True): the sigmoid is taken once."""
    logits = make(VAE, penalties=[JacobianL1(1.0)])
    probs = VAE(
        logits.encoder,
        nn.Sequential(*logits.decoder, nn.Sigmoid()),
        Bernoulli(probs=True),
        penalties=[JacobianL1(1.0)],
    )
    x = data()
    terms = [model.penalties[0](model.objective(x, generator=seeded())) for model in (logits, probs)]
    torch.testing.assert_close(*terms)


def test_penalised_decoders_have_smaller_jacobians() -> None:
    """What it is for: at the same steps, J1 comes out smaller, and most of the ELBO is kept."""
    torch.manual_seed(0)
    x = torch.rand(64, PIXELS).round()
    ends = []
    for gamma in (0.0, 1.0):
        model = make(VAE, penalties=[JacobianL1(gamma)])
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for index in range(80):
            optimizer.zero_grad()
            model.loss(x, generator=seeded(index)).backward()
            optimizer.step()
        step = model.objective(x, generator=seeded())
        decode = nn.Sequential(model.decoder, nn.Sigmoid())
        ends.append(float(fastvae.reference.jacobian_l1(decode, step.z.detach()).detach()))
    assert ends[1] < 0.5 * ends[0]


# --- annealing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_beta_and_gamma_ramp_from_zero(kind: type[BaseVAE]) -> None:
    penalties = [JacobianL1(0.4, anneal_steps=4), BetaAnnealing(4)]
    model = make(kind, beta=3.0, penalties=penalties).double()
    x = data(dtype=torch.float64)
    for taken in range(6):
        share = min(1, taken / 4)
        step = model.objective(x, beta=3 * share, generator=seeded())
        j1 = fastvae.reference.jacobian_l1(model.decoder, step.z.detach(), "none", output="sigmoid")
        torch.testing.assert_close(
            model(x, generator=seeded()), step.loss + 0.4 * share * j1, rtol=1e-12, atol=1e-12
        )
        for penalty in penalties:
            penalty.step()
    assert [int(penalty.steps_taken) for penalty in penalties] == [6, 6]


def test_no_ramp_and_both_ramps_of_the_papers_name() -> None:
    encoder, decoder = mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS)
    model = JacobianL1VAE(encoder, decoder, gamma=0.2)
    assert [type(penalty) for penalty in model.penalties] == [JacobianL1] and model.penalties[0].gamma == 0.2
    assert float(model.penalties[0].ramp()) == 1
    further = nn.Identity()
    model = JacobianL1VAE(encoder, decoder, beta=4, gamma=0.2, anneal_steps=10, penalties=[further])
    assert [type(penalty) for penalty in model.penalties] == [JacobianL1, BetaAnnealing, nn.Identity]
    assert model.beta == 4 and [model.penalties[index].anneal_steps for index in (0, 1)] == [10, 10]
    assert isinstance(JacobianL1VAE(encoder, decoder), VAE)
    assert "gamma=0.2, anneal_steps=10" in repr(model)


def test_the_count_is_saved_copied_and_moved() -> None:
    model = make(VAE, penalties=[JacobianL1(0.1, anneal_steps=10)])
    for _ in range(3):
        model.penalties[0].step()
    fresh = make(VAE, penalties=[JacobianL1(0.1, anneal_steps=10)])
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model), model.half()):
        assert int(other.penalties[0].steps_taken) == 3 and float(other.penalties[0].ramp()) == pytest.approx(
            0.3
        )


def test_a_resumed_training_gives_the_same_losses(tmp_path: Path) -> None:
    """fit counts the steps; killed within the ramp and started again, it ends bit for bit the same."""
    x = torch.rand(44, PIXELS, generator=seeded())

    def train(epochs: int, folder: str) -> tuple[BaseVAE, fastvae.History]:
        torch.manual_seed(0)
        model = JacobianL1VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), beta=2.0, gamma=0.5, anneal_steps=15)
        loader = DataLoader(TensorDataset(x), batch_size=8, shuffle=True)
        optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
        history = fastvae.fit(
            model, loader, epochs=epochs, optimizer=optimizer, run_dir=tmp_path / folder, progress=False
        )
        return model, history

    whole, history = train(4, "whole")
    half, _ = train(2, "parts")
    assert int(half.penalties[0].steps_taken) == 12
    resumed, again = train(4, "parts")
    assert again.train_loss == history.train_loss and history.steps[-1] == 24
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert int(resumed.penalties[1].steps_taken) == 24


# --- surroundings ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_autocast_keeps_the_loss_in_float32(kind: type[BaseVAE]) -> None:
    model = make(kind, penalties=[JacobianL1(0.3, anneal_steps=2), BetaAnnealing(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(data(), generator=seeded())
    assert loss.dtype == torch.float32
    loss.sum().backward()


def test_compiles_whole() -> None:
    model = make(VAE, penalties=[JacobianL1(0.3, anneal_steps=2), BetaAnnealing(2)])
    x = data()
    noise = model.draw_noise(model.encode(x)[0], seeded())
    model.penalties[0].step()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, noise=noise), model(x, noise=noise))


def test_refusals() -> None:
    for gamma in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JacobianL1: gamma: expected a finite number of at least 0"):
            JacobianL1(gamma)
    for steps in (-1, 1.5, True):
        with pytest.raises(ValueError, match="BetaAnnealing: anneal_steps: expected an int of at least 0"):
            BetaAnnealing(steps)  # type: ignore[arg-type]
    model = VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), penalties=[BetaAnnealing(1)])
    assert float(model.penalties[0].ramp()) == 0
