"""Training and scores with weights of elements and of samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_problems import DIM, PIXELS, data, make, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from weight_problems import holed, weights

from fastvae import HVAE, IWAE, VAE, fit
from fastvae.influence import TracIn
from fastvae.likelihoods.weights import filled
from fastvae.metrics import negative_log_likelihood, posteriors
from fastvae.models import BaseVAE
from fastvae.noise import SampleNoise, Stream, draws_of, key_of_weights, keys_of
from fastvae.ood import LikelihoodRegret
from fastvae.ood.sequential import refit_one

SGD: Any = lambda parameters: torch.optim.SGD(parameters, 1e-2)  # noqa: E731


@pytest.mark.parametrize("kind", [VAE, HVAE, IWAE])
def test_fit_with_missing_values(kind: type[BaseVAE]) -> None:
    """Two features of three are one number; each is seen in a part of the data and never with the other."""
    weight = torch.ones(60, PIXELS)
    weight[:30, :3], weight[30:, 3:] = 0, 0
    x = holed(torch.rand(60, 1, generator=seeded()).expand(-1, PIXELS), weight)
    loader = DataLoader(TensorDataset(x, weight), 20, shuffle=True, generator=seeded())
    model = make(kind, "gaussian")
    history = fit(model, loader, epochs=4, val_loader=loader, weight=1, optimizer=SGD, progress=False)
    assert history.train_loss[-1] < history.train_loss[0] and history.val_loss[-1] is not None
    batches = [{"data": a, "weight": b} for a, b in loader]
    again, third = make(kind, "gaussian"), make(kind, "gaussian")
    fit(again, batches, epochs=2, weight="weight", optimizer=SGD, progress=False)
    fit(third, batches, epochs=2, weight=lambda batch: batch["weight"], optimizer=SGD, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), third.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in again.parameters())
    with pytest.raises(TypeError, match="fit: weight: expected a tensor at 2, got NoneType"):
        fit(again, loader, epochs=1, weight=2, progress=False)


def test_samples_count_by_their_weights() -> None:
    """A step is one along the gradient of sum(w l) / sum(w), and an epoch's loss the mean over all samples."""
    x, count = data(12), torch.tensor([0, 1, 2, 0, 3, 1, 1, 0.5, 2, 1, 0, 4])
    model = make(VAE)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loader = DataLoader(TensorDataset(x, count), 6)
    history = fit(model, loader, epochs=1, val_loader=loader, sample_weight=1, optimizer=SGD, progress=False)
    other = make(VAE)
    seeds = fit_noise(other, x)
    losses, optimizer = [], SGD(other.parameters())
    for rows, noise in seeds:
        each = other(x[rows], noise=noise)
        loss = (each * count[rows]).sum() / count[rows].sum()
        losses.append(float((each * count[rows]).sum().detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for mine, theirs, start in zip(model.parameters(), other.parameters(), before, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert not torch.equal(mine, start)
    assert history.train_loss[0] == pytest.approx(sum(losses) / float(count.sum()), rel=1e-6)
    # What counts is how the weights compare.
    doubled = DataLoader(TensorDataset(x, 2 * count), 6)
    again = make(VAE)
    same = fit(again, doubled, epochs=1, val_loader=doubled, sample_weight=1, optimizer=SGD, progress=False)
    assert same.val_loss[0] == pytest.approx(history.val_loss[0], rel=1e-6)


def fit_noise(model: BaseVAE, x: Tensor) -> list[tuple[slice, Tensor]]:
    """The noise that ``fit`` draws in its first epoch, by watching a run that trains nothing."""
    drawn: list[Tensor] = []

    class Watched(VAE):
        def draw_noise(self, *args: Any, **kwargs: Any) -> Tensor:
            drawn.append(super().draw_noise(*args, **kwargs))
            return drawn[-1]

    watched = Watched(model.encoder, model.decoder)
    fit(watched, DataLoader(TensorDataset(x), 6), epochs=1, progress=False,
        optimizer=lambda p: torch.optim.SGD(p, 0.0))  # fmt: skip
    return [(slice(6 * i, 6 * i + 6), noise) for i, noise in enumerate(drawn)]


def test_binary_images_with_missing_pixels() -> None:
    weight = (weights(12) != 0).float()
    loader = DataLoader(TensorDataset(holed(data(12), weight), weight), 6)
    history = fit(make(VAE), loader, epochs=2, weight=1, binarize=True, progress=False)
    assert all(loss == loss for loss in history.train_loss)
    with pytest.raises(ValueError, match=r"fit: weight: expected the shape of x, \[6, 6\]"):
        fit(make(VAE), [(data(6), weight[0])], epochs=1, weight=1, progress=False)


def test_ones_as_sample_weights_change_nothing() -> None:
    x = data(12)
    plain, weighted = make(VAE), make(VAE)
    first = fit(plain, DataLoader(TensorDataset(x), 4), epochs=2, progress=False)
    other = fit(
        weighted, DataLoader(TensorDataset(x, torch.ones(12)), 4), epochs=2, sample_weight=1, progress=False
    )
    assert other.train_loss == pytest.approx(first.train_loss, rel=1e-6)
    for a, b in zip(plain.parameters(), weighted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_unfit_sample_weights_are_refused() -> None:
    for weight, message in (
        (torch.zeros(6), "in each batch one above 0, got values from 0 to 0"),
        (torch.tensor([1.0, -1, 1, 1, 1, 1]), "got values from -1 to 1"),
        (torch.full((6,), float("nan")), "got values from nan"),
        (torch.ones(6, 1), r"expected one number a sample, \[6\], got \[6, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(
                make(VAE),
                DataLoader(TensorDataset(data(6), weight), 6),
                epochs=1,
                sample_weight=1,
                progress=False,
            )


@pytest.mark.parametrize("kind", [VAE, IWAE, HVAE])
def test_influence(kind: type[BaseVAE]) -> None:
    model = make(kind, "gaussian", **({"num_samples": 3} if kind is IWAE else {})).double().eval()
    weight, other = weights(6), weights(3, 8)
    x, queries = holed(data(6, torch.float64), weight), holed(data(3, torch.float64), other)
    parameters = list(model.parameters())

    def gradients(x: Tensor, weight: Tensor) -> Tensor:
        rows = []
        for sample, own in zip(x.split(1), weight.split(1), strict=True):
            mean: Any = 0
            for key in draws_of(keys_of(filled(sample, own)) ^ key_of_weights(model), 0, 3):
                noise = Stream(key[None]).normal((model.noise_draws, DIM)).transpose(0, 1)
                loss = model(sample, noise=noise, weight=own).sum()
                grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
                mean = mean + torch.cat([grad.flatten() for grad in grads]) / 3
            rows.append(mean)
        return torch.stack(rows)

    g, h = gradients(x, weight), gradients(queries, other)
    options: dict[str, Any] = {"num_samples": 3, "uncovered": "materialise" if kind is HVAE else "error"}
    found = TracIn(model, (x, weight), None, weight=1, **options)
    torch.testing.assert_close(found.influence((queries, other)), h @ g.T, rtol=1e-10, atol=1e-10)
    missing = torch.where(other > 0, queries, torch.inf)
    torch.testing.assert_close(found.influence((missing, other)), h @ g.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.self_influence(), g.square().sum(1), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="TracIn: weight: expected a fastvae model and its own loss"):
        TracIn(nn.Linear(2, 2), x, None, weight=1)


@pytest.mark.filterwarnings("ignore:.*copies are trained", "ignore:fastvae.ops.log_px")
@pytest.mark.parametrize("kind", [VAE, IWAE, HVAE])
def test_likelihood_regret(kind: type[BaseVAE]) -> None:
    model = make(kind, "gaussian").double().eval()
    weight = weights(3)
    x = holed(data(3, torch.float64), weight)
    detector = LikelihoodRegret(model, num_steps=6, num_samples=3, lr=1e-3)
    found = detector.refit(x, weight=weight, parameters=True)
    for i in range(3):
        noise = SampleNoise(keys_of(filled(x[[i]], weight[[i]])), 0, model.noise_draws)
        own, losses = refit_one(model, x[[i]], noise, num_steps=6, lr=1e-3, weight=weight[[i]])
        torch.testing.assert_close(found.losses[i], losses, rtol=1e-8, atol=1e-8)
        for key, parameter in own.encoder.named_parameters():
            torch.testing.assert_close(found.parameters[key][i], parameter.detach(), rtol=1e-7, atol=1e-8)
    scores = detector.predict(x, weight=weight)
    one_by_one = torch.cat([detector.predict(x[[i]], weight=weight[[i]]) for i in range(3)])
    torch.testing.assert_close(scores, one_by_one, rtol=1e-6, atol=1e-8)
    other = torch.where(weight > 0, x, torch.inf)
    torch.testing.assert_close(detector.predict(other, weight=weight), scores, rtol=0, atol=0)
    with pytest.raises(ValueError, match="LikelihoodRegret: weight: expected the shape of x"):
        detector.predict(x, weight=weight[:2])


def test_metrics() -> None:
    model, weight = make(VAE, "gaussian").double(), weights(8)
    x = holed(data(8, torch.float64), weight)
    loader = DataLoader(TensorDataset(x, weight), 3)
    mu, logvar = posteriors(model, loader, weight=1)
    wanted = model.encode(x, weight=weight)
    torch.testing.assert_close((mu, logvar), tuple(each.detach() for each in wanted))
    assert negative_log_likelihood(model, loader, 5, weight=1).mean > 0
    with pytest.raises(
        ValueError, match="expected batches of images and of condition and weight, got a tensor"
    ):
        negative_log_likelihood(model, x, 5, weight=1)


def test_lightning() -> None:
    pytest.importorskip("lightning")
    from fastvae.integrations.lightning import LitVAE

    model, weight, count = make(VAE, "gaussian"), weights(6).float(), torch.arange(6.0)
    x = holed(data(6), weight)
    lit = LitVAE(model, weight="weight", sample_weight=lambda batch: batch["count"])
    torch.manual_seed(0)
    found = lit.training_step({"data": x, "weight": weight, "count": count}, 0)
    torch.manual_seed(0)
    losses = model(x, weight=weight)
    torch.testing.assert_close(found, (losses * count).sum() / 15)
