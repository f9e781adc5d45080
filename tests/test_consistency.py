"""Consistency and ConsistencyVAE: objective and gradient worked out separately, one batch, noise, other penalties."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from model_problems import DIM, MODELS, PIXELS, data, make, mlp, seeded
from torch import Tensor, nn
from torch.nn import functional

import fastvae
from fastvae.data import RandomAffine
from fastvae.models import HVAE, IWAE, VAE, BaseVAE
from fastvae.penalties import BetaAnnealing, Consistency, ConsistencyVAE, JacobianL1, JacobianL1VAE

ALL = [*MODELS, IWAE]


def mirror(x: Tensor) -> Tensor:
    return x.flip(1)


def noisy(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return (x + 0.1 * torch.rand(x.shape, generator=generator, dtype=x.dtype)) / 1.1


def build(kind: type[BaseVAE], **options: Any) -> BaseVAE:
    return make(kind, **({"num_samples": 3} if kind is IWAE else {}), **options)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


# --- objective and gradient --------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["independent", "common"])
def test_objective_and_gradient_by_hand(noise: str) -> None:
    """-ELBO(x) - ELBO(x~) + lambda KL(q(z | x~) || q(z | x)), in float64, with a gradient to both sides."""
    torch.manual_seed(0)
    model = ConsistencyVAE(
        mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), augment=mirror, consistency=0.7, noise=noise, beta=2.0
    ).double()
    x = data(dtype=torch.float64)
    rows = 2 * len(x) if noise == "independent" else len(x)
    drawn = torch.randn(rows, DIM, generator=seeded(), dtype=torch.float64).reshape(len(x), -1, DIM)
    parts = []
    expected = torch.zeros(len(x), dtype=torch.float64)
    for view, eps in ((x, drawn[:, 0]), (mirror(x), drawn[:, -1])):
        mu, logvar = model.encoder(view).chunk(2, 1)
        z = mu + (logvar / 2).exp() * eps
        bce = functional.binary_cross_entropy_with_logits(model.decoder(z), view, reduction="none").sum(1)
        expected = expected + bce + 2 * 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)
        parts.append(torch.distributions.Normal(mu, (logvar / 2).exp()))
    expected = expected + 0.7 * torch.distributions.kl_divergence(parts[1], parts[0]).sum(1)
    got = model(x, generator=seeded())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    cotangents = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    wanted, found = gradients(model, expected @ cotangents), gradients(model, got @ cotangents)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_composes_with_every_model(kind: type[BaseVAE]) -> None:
    """The sum of two objectives of the plain model and the divergence, values and gradients."""
    plain = build(kind).double()
    model = build(kind, penalties=[Consistency(mirror, 0.7)]).double()
    x = data(dtype=torch.float64)
    draws = model.draw_noise(model.encode(x)[0], seeded())
    steps = [plain.objective(view, noise=draws) for view in (x, mirror(x))]
    divergence = fastvae.reference.gaussian_kl(steps[1].mu, steps[1].logvar, steps[0].mu, steps[0].logvar)
    expected = steps[0].loss + steps[1].loss + 0.7 * divergence
    got = model(x, noise=draws)  # noise that is given is common to both views
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    wanted, found = gradients(plain, expected.sum()), gradients(model, got.sum())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.elbo(x, generator=seeded()), plain.elbo(x, generator=seeded()))
    assert model(x[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ALL)
def test_one_batch_through_encoder_and_decoder(kind: type[BaseVAE]) -> None:
    model = build(kind, penalties=[Consistency(mirror)])
    encoded: list[int] = []
    decoded: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    if isinstance(model, HVAE):  # the flow reads the decoder and does not call it
        flow = model.flow
        model.flow = lambda z, *rest: (decoded.append(len(z)), flow(z, *rest))[1]  # type: ignore[method-assign]
    else:
        model.decoder.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
    x = data()
    model(x)
    assert encoded == [2 * len(x)] and decoded == [2 * len(x) * (3 if kind is IWAE else 1)]


def test_batch_norm_normalises_over_both_views() -> None:
    norm = nn.BatchNorm1d(PIXELS)
    model = ConsistencyVAE(
        nn.Sequential(norm, nn.Linear(PIXELS, 2 * DIM)), mlp(DIM, PIXELS), augment=lambda x: x / 2
    )
    x = data()
    model(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.cat([x, x / 2]).mean(0))
    assert norm.num_batches_tracked == 1


def test_a_view_that_is_the_image_costs_nothing() -> None:
    model = ConsistencyVAE(
        mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), augment=lambda x: x, consistency=5, noise="common"
    )
    plain = VAE(model.encoder, model.decoder)
    x = data()
    torch.testing.assert_close(model(x, generator=seeded()), 2 * plain(x, generator=seeded()))


def test_training_brings_the_codes_of_views_together() -> None:
    """What it is for: with a large weight, q(z | x~) is nearer to q(z | x)."""
    x = torch.rand(64, PIXELS, generator=seeded()).round()
    ends = []
    for weight in (0.0, 10.0):
        model = make(VAE, penalties=[Consistency(mirror, weight)])
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for index in range(80):
            optimizer.zero_grad()
            model.loss(x, generator=seeded(index)).backward()
            optimizer.step()
        with torch.no_grad():
            ends.append(fastvae.ops.gaussian_kl(*model.encode(mirror(x)), *model.encode(x)).mean())
    assert ends[1] < 0.2 * ends[0]


# --- randomness --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("noise", ["independent", "common"])
def test_a_generator_decides_view_and_noise(kind: type[BaseVAE], noise: str) -> None:
    model, x = build(kind, penalties=[Consistency(noisy, noise=noise)]), data()
    first = model(x, generator=seeded())
    torch.manual_seed(99)
    assert torch.equal(model(x, generator=seeded()), first)
    assert not torch.equal(model(x, generator=seeded(8)), first)
    torch.manual_seed(3)
    without = model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), without)


def test_common_noise_lowers_the_noise_of_the_difference() -> None:
    x = data()
    spread = {}
    for noise in ("independent", "common"):
        seen: list[Tensor] = []

        class Watch(Consistency):
            def forward(self, step: Any, seen: list[Tensor] = seen) -> Tensor:
                seen.append(step.loss - step.view.loss)
                return super().forward(step)

        model = make(VAE, penalties=[Watch(lambda x: 0.9 * x, noise=noise)])
        for index in range(200):
            model(x, generator=seeded(index))
        spread[noise] = float(torch.stack(seen).std(0).mean().detach())
    assert spread["common"] < 0.5 * spread["independent"]


# --- with other penalties ----------------------------------------------------------------------


def test_other_penalties_see_the_image_alone() -> None:
    x = data(dtype=torch.float64)
    seen: list[Any] = []

    class Watch(nn.Module):
        def forward(self, step: Any) -> Tensor:
            seen.append(step)
            return torch.zeros_like(step.loss)

    both = [JacobianL1(0.3), Consistency(mirror, 0.5), Watch()]
    model = make(VAE, penalties=both).double()
    draws = model.draw_noise(model.encode(x)[0], seeded())
    alone = [make(VAE, penalties=[penalty]).double()(x, noise=draws) for penalty in both[:2]]
    plain = make(VAE).double()(x, noise=draws)
    torch.testing.assert_close(model(x, noise=draws), alone[0] + alone[1] - plain, rtol=1e-12, atol=0)
    assert len(seen) == 1 and seen[0].view is None and seen[0].x is x and seen[0].z.shape == (5, DIM)


def test_annealed_beta_anneals_both_bounds() -> None:
    x = data(dtype=torch.float64)
    model = make(VAE, beta=3.0, penalties=[Consistency(mirror, 0.0), BetaAnnealing(4)]).double()
    draws = model.draw_noise(model.encode(x)[0], seeded())
    for taken in range(5):
        steps = [model.objective(view, beta=3 * taken / 4, noise=draws) for view in (x, mirror(x))]
        torch.testing.assert_close(model(x, noise=draws), steps[0].loss + steps[1].loss)
        model.penalties[1].step()


def test_two_views() -> None:
    x = data(dtype=torch.float64)
    model = make(VAE, penalties=[Consistency(mirror, 0.5), Consistency(noisy, 0.2, noise="common")]).double()
    draws = torch.randn(1, 2 * len(x), DIM, generator=seeded(), dtype=torch.float64).unflatten(1, (5, 2))
    torch.manual_seed(1)
    third = noisy(x)
    plain = make(VAE).double()
    steps = [plain.objective(v, noise=draws[:, :, k]) for v, k in ((x, 0), (mirror(x), 1), (third, 0))]
    kl = [fastvae.reference.gaussian_kl(s.mu, s.logvar, steps[0].mu, steps[0].logvar) for s in steps]
    expected = sum(step.loss for step in steps) + 0.5 * kl[1] + 0.2 * kl[2]
    torch.manual_seed(1)

    def own(mu: Tensor, generator: Any = None, wanted: Any = None) -> Tensor:
        assert mu.shape == (10, DIM)
        return draws.flatten(1, 2)

    model.draw_noise = own  # type: ignore[method-assign]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=0)


def test_paper_names_combine() -> None:
    encoder, decoder = mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS)
    model = ConsistencyVAE(encoder, decoder, augment=mirror, penalties=[JacobianL1(0.1)])
    assert [type(penalty) for penalty in model.penalties] == [Consistency, JacobianL1]
    assert model.penalties[0].weight == 1e-3 and isinstance(model, VAE)
    other = JacobianL1VAE(encoder, decoder, anneal_steps=5, penalties=[Consistency(mirror)])
    assert other(data()).shape == (5,)
    assert "weight=0.001, noise='independent'" in repr(model)


# --- surroundings ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_autocast_keeps_the_loss_in_float32(kind: type[BaseVAE]) -> None:
    model = build(kind, penalties=[Consistency(mirror)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(data(), generator=seeded())
    assert loss.dtype == torch.float32
    loss.sum().backward()


@pytest.mark.parametrize("kind", [VAE, IWAE])
def test_compiles_whole(kind: type[BaseVAE]) -> None:
    torch._dynamo.reset()
    model = build(kind, penalties=[Consistency(mirror, noise="common"), JacobianL1(0.1)])
    x = data()
    noise = model.draw_noise(model.encode(x)[0], seeded())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, noise=noise), model(x, noise=noise))


def test_copies_and_pickles() -> None:
    model = make(VAE, penalties=[Consistency(RandomAffine(shape=(1, 2, 3)), 0.5)])
    x = data()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, generator=seeded()), model(x, generator=seeded()))


def test_integer_images_keep_their_type() -> None:
    byte = torch.randint(0, 256, (5, 1, 2, 3), dtype=torch.uint8, generator=seeded())
    encoder = nn.Sequential(nn.Flatten(), mlp(PIXELS, 2 * DIM))
    model = ConsistencyVAE(encoder, mlp(DIM, PIXELS), augment=RandomAffine())
    assert torch.isfinite(model(byte)).all()


def test_a_module_as_augmentation_is_part_of_the_model() -> None:
    class Learnt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(PIXELS))

        def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
            assert generator is not None
            return torch.sigmoid(x + self.shift)

    model = make(VAE, penalties=[Consistency(Learnt())])
    assert "penalties.0.augment.shift" in dict(model.named_parameters())
    model(data(), generator=seeded()).sum().backward()
    assert model.penalties[0].augment.shift.grad.any()


def test_refusals() -> None:
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Consistency: weight: expected a finite number of at least 0"):
            Consistency(mirror, weight)
    with pytest.raises(ValueError, match=r"noise: expected one of \('independent', 'common'\), got 'same'"):
        Consistency(mirror, noise="same")
    with pytest.raises(TypeError, match="augment: expected a callable, got str"):
        Consistency("flip")  # type: ignore[arg-type]
    x = data()
    for augment, message in (
        (lambda x: x[:, :3], r"expected \[5, 6\] torch.float32 on .* as x, got \[5, 3\]"),
        (lambda x: x.double(), r"got \[5, 6\] torch.float64"),
        (lambda x: (x, x), "expected a tensor, got tuple"),
    ):
        with pytest.raises(ValueError, match="Consistency: augment: .*" + message):
            make(VAE, penalties=[Consistency(augment)])(x)
    with pytest.raises(ValueError, match="x: expected values in"):
        make(VAE, penalties=[Consistency(lambda x: x + 1)])(x)
