"""Conditional models: p(x | z, c) and q(z | x, c) in training, flow, Jacobian, evidence and sampling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_problems import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae import HVAE, IWAE, VAE, ConsistencyVAE, JacobianL1VAE, fit, reference
from fastvae.influence import TracIn
from fastvae.models import SelectOutputs
from fastvae.models.base import BaseVAE
from fastvae.noise import SampleNoise, Stream, draws_of, key_of_weights, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.sequential import refit_one

PIXELS, CLASSES, DIM = 6, 3, 2


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.labels, self.layers = nn.Embedding(CLASSES, 4), mlp(PIXELS + 4, 2 * DIM)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.layers(torch.cat((x, self.labels(label)), 1))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.labels, self.layers = nn.Embedding(CLASSES, 4), mlp(DIM + 4, PIXELS)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.layers(torch.cat((z, self.labels(label)), 1))


class Bound(nn.Module):
    """A network with its condition, of one sample, built in."""

    def __init__(self, network: nn.Module, label: Tensor) -> None:
        super().__init__()
        self.network, self.label = network, label

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, self.label.expand(len(x)))


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Softplus(), nn.Linear(8, outputs))


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "VAE": (VAE, {}),
    "HVAE": (HVAE, {"num_steps": 2, "step_size": 0.05}),
    "HVAE, dropping": (HVAE, {"num_steps": 2, "step_size": 0.05, "on_divergence": "drop"}),
    "IWAE": (IWAE, {"num_samples": 3}),
    "ConsistencyVAE": (ConsistencyVAE, {"augment": lambda x: x.flip(1)}),
    "JacobianL1VAE": (JacobianL1VAE, {"gamma": 0.1}),
}
each = pytest.mark.parametrize("name", KINDS)


def model_of(name: str) -> BaseVAE:
    torch.manual_seed(0)
    kind, options = KINDS[name]
    return kind(Encoder(), Decoder(), "gaussian", latent_dim=DIM, **options).double()  # type: ignore[no-any-return]


def data(rows: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.rand(rows, PIXELS, generator=seeded(), dtype=torch.float64)
    return x, torch.randint(CLASSES, (rows,), generator=seeded(1))


def of_each(model: BaseVAE, label: Tensor) -> BaseVAE:
    """The model for one label, which knows of no conditions."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.encoder, twin.decoder = Bound(model.encoder, label), Bound(model.decoder, label)
    return twin


@each
def test_each_sample_has_its_own_condition(name: str) -> None:
    """Against models that have one label built in, sample by sample, with the same noise."""
    model = model_of(name)
    x, labels = data()
    noise = torch.randn(model.noise_draws, len(x), DIM, generator=seeded(2), dtype=torch.float64)
    losses = model(x, noise=noise, condition=labels)
    expected = torch.cat([
        of_each(model, label)(x[[i]], noise=noise[:, [i]]) for i, label in enumerate(labels)
    ])  # fmt: skip
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected.sum(), list(model.parameters()), allow_unused=True)
    for mine, theirs in zip(grads, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    other = model(x, noise=noise, condition=(labels + 1) % CLASSES)
    assert not torch.allclose(losses, other)


@each
@pytest.mark.filterwarnings("ignore:fastvae.ops.log_px")
def test_evidence_codes_and_reconstructions(name: str) -> None:
    model = model_of(name).eval()
    x, labels = data()

    def noise(first: int, count: int, mu: Tensor) -> Tensor:
        shape = model.weight_draws, count, PIXELS - 1, mu.shape[1]
        drawn = torch.randn(shape, generator=seeded(first + 10), dtype=mu.dtype)
        return drawn[:, :, : len(mu)] if len(mu) > 1 else drawn[:, :, [noise.row]]  # type: ignore[attr-defined]

    found = model.log_likelihood(x, 7, noise=noise, condition=labels, chunk_size=10)
    for i, label in enumerate(labels):
        noise.row = i  # type: ignore[attr-defined]
        alone = of_each(model, label).log_likelihood(x[[i]], 7, noise=noise, chunk_size=2)
        torch.testing.assert_close(found[[i]], alone, rtol=1e-9, atol=1e-9)
    mu, _ = model.encode(x, labels)
    torch.testing.assert_close(mu, model.encoder(x, labels).chunk(2, 1)[0])
    assert model.reconstruct(x, condition=labels).shape == x.shape
    assert model.sample_posterior(x, condition=labels).shape == (5, DIM)
    assert model.elbo(x, condition=labels).shape == (5,)
    drawn = model.sample(4, condition=torch.tensor([0, 1, 2, 0]), generator=seeded())
    z = torch.randn(4, DIM, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(drawn, model.decoder(z, torch.tensor([0, 1, 2, 0])).detach())


@each
def test_fit_takes_the_condition_from_the_loader(name: str, tmp_path: Path) -> None:
    x, _ = data(30)
    # Each label has a brightness of its own, which only a condition can tell a decoder of so few codes.
    labels = torch.arange(30) % CLASSES
    x = (0.05 * x + labels[:, None] / 2).float()
    loader = DataLoader(TensorDataset(x, labels), 10)
    model = model_of(name).float()
    history = fit(model, loader, epochs=30, val_loader=loader, condition=1, progress=False, run_dir=tmp_path,
                  optimizer=lambda p: torch.optim.Adam(p, 1e-2))  # fmt: skip
    assert history.train_loss[-1] < history.train_loss[0] and history.val_loss[-1] is not None
    means = model.sample(30, condition=labels, generator=seeded()).mean(1)
    by_label = torch.stack([means[labels == label].mean() for label in range(CLASSES)])
    assert (by_label.diff() > 0.2).all()
    again = model_of(name).float()
    batches = [{"data": a, "label": b} for a, b in loader]
    fit(again, batches, epochs=2, condition="label", progress=False)
    third = model_of(name).float()
    fit(third, batches, epochs=2, condition=lambda batch: batch["label"], progress=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), third.parameters(), strict=True))


@pytest.mark.parametrize("name", ["VAE", "IWAE", "HVAE"])
def test_influence(name: str) -> None:
    model = model_of(name).eval()
    (x, labels), (queries, others) = data(6), data(3)
    parameters = list(model.parameters())

    def gradients(x: Tensor, labels: Tensor) -> Tensor:
        rows = []
        for sample, label in zip(x.split(1), labels.split(1), strict=True):
            mean = 0
            for key in draws_of(keys_of(sample) ^ key_of_weights(model), 0, 3):
                noise = Stream(key[None]).normal((model.noise_draws, DIM)).transpose(0, 1)
                loss = model(sample, noise=noise, condition=label).sum()
                grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
                mean = mean + torch.cat([grad.flatten() for grad in grads]) / 3
            rows.append(mean)
        return torch.stack(rows).cpu()

    g, h = gradients(x, labels), gradients(queries, others)
    options: dict[str, Any] = {"num_samples": 3, "uncovered": "materialise" if name == "HVAE" else "error"}
    found = TracIn(model, (x, labels), None, condition=1, **options)
    torch.testing.assert_close(found.influence((queries, others)), h @ g.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.self_influence(), g.square().sum(1), rtol=1e-10, atol=1e-10)
    scores, errors = found.influence_with_error((queries, others))
    torch.testing.assert_close(scores, h @ g.T, rtol=1e-10, atol=1e-10)
    assert (errors > 0).all()
    samples = [{"data": a, "label": b} for a, b in zip(x, labels, strict=True)]
    by_name = TracIn(model, DataLoader(Named(samples), 4), None, condition="label", **options)
    some = [{"data": queries, "label": others}]
    torch.testing.assert_close(by_name.influence(some), h @ g.T, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="TracIn: condition: expected a fastvae model and its own loss"):
        TracIn(nn.Linear(2, 2), x, None, condition=1)


@pytest.mark.filterwarnings("ignore:.*copies are trained", "ignore:fastvae.ops.log_px")
@pytest.mark.parametrize("name", ["VAE", "IWAE", "HVAE", "a decoder alone"])
def test_likelihood_regret(name: str) -> None:
    model = model_of("VAE" if name == "a decoder alone" else name).eval()
    if name == "a decoder alone":
        model.encoder = mlp(PIXELS, 2 * DIM).double()
    x, labels = data(3)
    detector = LikelihoodRegret(model, num_steps=6, num_samples=3, lr=1e-3)
    found = detector.refit(x, condition=labels, parameters=True)
    for i, label in enumerate(labels):
        noise = SampleNoise(keys_of(x[[i]]), 0, model.noise_draws)
        own, losses = refit_one(model, x[[i]], noise, num_steps=6, lr=1e-3, condition=label[None])
        torch.testing.assert_close(found.losses[i], losses, rtol=1e-8, atol=1e-8)
        for key, parameter in own.encoder.named_parameters():
            torch.testing.assert_close(found.parameters[key][i], parameter.detach(), rtol=1e-7, atol=1e-8)
    scores = detector.predict(x, condition=labels)
    one_by_one = torch.cat([detector.predict(x[[i]], condition=labels[[i]]) for i in range(3)])
    torch.testing.assert_close(scores, one_by_one, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match=r"LikelihoodRegret: condition: expected 3 rows"):
        detector.predict(x, condition=labels[:2])


class Named(torch.utils.data.Dataset[Any]):
    """Samples with names."""

    def __init__(self, samples: list[dict[str, Tensor]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return self.samples[at]


def test_a_run_with_another_condition_is_no_continuation(tmp_path: Path) -> None:
    x, labels = data(6)
    loader = DataLoader(TensorDataset(x, labels, (labels + 1) % CLASSES), 3)
    fit(model_of("VAE"), loader, epochs=1, condition=1, progress=False, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"same condition \(2\), found 1"):
        fit(model_of("VAE"), loader, epochs=2, condition=2, progress=False, run_dir=tmp_path)


class Tempered(nn.Module):
    """Its second argument is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(PIXELS, 2 * DIM)

    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        return self.layers(x) / temperature


def test_a_second_argument_that_is_no_condition() -> None:
    x, labels = data()
    model = VAE(Tempered(), Decoder(), "gaussian", latent_dim=DIM).double()
    noise = torch.ones(1, 5, DIM).double()
    found = model(x, noise=noise, condition=labels)
    model.encoder = model.encoder.layers
    torch.testing.assert_close(found, model(x, noise=noise, condition=labels))


class OwnWeights(HVAE):
    """Overrides methods without knowing of conditions."""

    def log_weight(self, x: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:  # type: ignore[override]
        return super().log_weight(x, mu, logvar, noise)

    def forward(self, x: Tensor, *, noise: Tensor | None = None, generator: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, noise=noise, generator=generator)


def test_subclasses_need_not_know_of_conditions() -> None:
    x, _ = data()
    model = OwnWeights(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), "gaussian", num_steps=2).double()
    assert model.log_likelihood(x, 3).shape == (5,) and model.loss(x).isfinite()


def test_wrapped_networks_say_what_they_take() -> None:
    x, labels = data()
    encoder = SelectOutputs(NamedEncoder(), "mu", "logvar")
    model = VAE(encoder, SelectOutputs(NamedDecoder(Decoder()), "y"), "gaussian", latent_dim=DIM).double()
    assert model.loss(x, condition=labels).isfinite()
    plain = VAE(
        encoder, SelectOutputs(NamedPlain(mlp(DIM, PIXELS)), "y"), "gaussian", latent_dim=DIM
    ).double()
    with pytest.raises(ValueError, match="expected a decoder that takes one"):
        plain.loss(x, condition=labels)
    by_name = VAE(ByName(), Decoder(), "gaussian", latent_dim=DIM).double()
    with pytest.raises(ValueError, match="got ByName, whose forward takes it by name alone"):
        by_name.loss(x, condition=labels)
    alone = HVAE(mlp(PIXELS, 2 * DIM), Decoder(), "gaussian", latent_dim=DIM).double()
    with pytest.raises(TypeError, match="the decoder takes a condition, and none was given; pass condition="):
        alone.loss(x)
    with pytest.raises(ValueError, match=r"condition: expected 5 rows as x has, got \[12\]"):
        model.log_likelihood(x, 3, posterior=model.encode(x), chunk_size=2, condition=torch.zeros(12).long())


class NamedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(PIXELS, 2 * DIM)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mu, logvar = self.inner(x).chunk(2, 1)
        return {"mu": mu, "logvar": logvar}


class NamedDecoder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {"y": self.inner(z, label)}


class NamedPlain(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        return {"y": self.inner(z)}


class ByName(Encoder):
    def forward(self, x: Tensor, *, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, condition)


def test_influence_under_a_jacobian_penalty() -> None:
    model = model_of("JacobianL1VAE").eval()
    x, labels = data(4)
    tracin = TracIn(model, (x, labels), None, condition=1, num_samples=2, uncovered="materialise")
    assert tracin.influence((x, labels)).isfinite().all()


def test_a_decoder_alone_may_take_it() -> None:
    torch.manual_seed(0)
    model = VAE(mlp(PIXELS, 2 * DIM), Decoder(), "gaussian", latent_dim=DIM).double()
    x, labels = data()
    model.loss(x, condition=labels).backward()
    assert model.decoder.labels.weight.grad is not None


@pytest.mark.filterwarnings("error")
def test_an_image_as_condition_of_a_flow() -> None:
    class Below(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(DIM, 16), nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, z: Tensor, image: Tensor) -> Tensor:
            return self.out(torch.cat((self.up(z).unflatten(1, (1, 4, 4)), image), 1))

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 2 * DIM))
    model = HVAE(encoder, Below(), "gaussian", num_steps=2, step_size=0.05, latent_dim=DIM).double()
    x, image = (torch.rand(3, 1, 4, 4, generator=seeded(i), dtype=torch.float64) for i in range(2))
    noise = torch.randn(2, 3, DIM, generator=seeded(2), dtype=torch.float64)
    for _ in range(4):
        loss = model(x, noise=noise, condition=image)
    mu, logvar = model.encode(x)
    alpha, beta_0 = model.tempering()
    z = mu + torch.exp(logvar / 2) * noise[0]
    rho = noise[1] / beta_0.sqrt()
    end = reference.hamiltonian_flow(
        lambda codes: model.decoder(codes, image),
        z,
        rho,
        x,
        model.step_size.double(),
        alpha.double(),
        "gaussian",
    )
    expected = -end[2] - 0.5 * (logvar + noise.square().sum(0) - end[0].square() - end[1].square()).sum(1)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)


def test_refusals() -> None:
    x, labels = data()
    model = model_of("VAE")
    plain = VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), "gaussian").double()
    with pytest.raises(ValueError, match=r"VAE: condition: expected 5 rows as x has, got \[4\]"):
        model.loss(x, condition=labels[:4])
    with pytest.raises(TypeError, match=r"VAE: condition: expected a tensor .*, got list"):
        model.loss(x, condition=labels.tolist())  # type: ignore[arg-type]
    for other in (plain, HVAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), "gaussian").double()):
        with pytest.raises(
            ValueError, match=r"condition: expected a decoder that takes one, .* got Sequential"
        ):
            other.loss(x, condition=labels)
    with pytest.raises(TypeError, match="fit: condition: expected a tensor at 2, got NoneType"):
        fit(model, [(x, labels)], epochs=1, condition=2, progress=False)
    with pytest.raises(TypeError, match="the encoder takes a condition, and none was given; pass condition="):
        model.loss(x)
    assert fastvae.data.condition_of((x, labels), 1) is labels
