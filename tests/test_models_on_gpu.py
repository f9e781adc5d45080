"""Models, training, influence and scores on a GPU, in float64 against the same on the CPU."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from influence_problems import SHAPES, build, images, tracin
from model_problems import DIM, PIXELS, Skip, mlp, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastvae.data import RandomAffine
from fastvae.likelihoods import Gaussian
from fastvae.models import HVAE, IWAE, VAE, BaseVAE
from fastvae.penalties import ConsistencyVAE, JacobianL1VAE
from fastvae.training import fit, load_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def image_networks() -> tuple[nn.Module, nn.Module]:
    """Of 1x8x8 images, with convolutions of both kinds."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2 * DIM)
    )
    decoder = nn.Sequential(
        nn.Linear(DIM, 32),
        nn.Softplus(),
        nn.Unflatten(1, (8, 2, 2)),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
        nn.ELU(),
        nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1),
    )
    return encoder, decoder


MAKERS: dict[str, Callable[[], BaseVAE]] = {
    "vae": lambda: VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS)),
    "vae-categorical": lambda: VAE(mlp(PIXELS, 2 * DIM), mlp(DIM, 256 * PIXELS), "categorical"),
    "vae-images": lambda: VAE(*image_networks(), "gaussian"),
    "hvae": lambda: HVAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), num_steps=3, step_size=0.2),
    "hvae-adapted": lambda: HVAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), Gaussian(0.02), num_steps=3),
    "hvae-images": lambda: HVAE(*image_networks(), num_steps=2, step_size=0.2),
    "hvae-read-as-a-graph": lambda: HVAE(mlp(PIXELS, 2 * DIM), Skip(), num_steps=3, step_size=0.2),
    "iwae": lambda: IWAE(mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS), num_samples=4),
    "jacobian-l1": lambda: JacobianL1VAE(*image_networks()),
    "consistency": lambda: ConsistencyVAE(*image_networks(), augment=RandomAffine()),
}


def made(name: str) -> tuple[BaseVAE, Tensor]:
    torch.manual_seed(0)
    model = MAKERS[name]().double().eval()
    shape = (1, 8, 8) if isinstance(model.encoder[0], nn.Conv2d) else (PIXELS,)  # type: ignore[index]
    return model, torch.rand(5, *shape, generator=seeded(1), dtype=torch.float64)


def loss_and_gradients(model: BaseVAE, x: Tensor, **besides: Tensor) -> dict[str, Tensor]:
    """Of noise from a CPU's generator, which is the same for both."""
    loss = model(x, generator=seeded(), **besides)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
    named = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    return {"loss": loss.detach(), **named}


def assert_same(on_gpu: Any, on_cpu: Any) -> None:
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MAKERS)
def test_losses_and_gradients_on_cuda(name: str) -> None:
    model, x = made(name)
    expected = loss_and_gradients(model, x)
    found = loss_and_gradients(copy.deepcopy(model).cuda(), x.cuda())
    assert found.keys() == expected.keys() and all(tensor.is_cuda for tensor in found.values())
    for key in expected:
        assert_same(found[key], expected[key])


@pytest.mark.parametrize("name", MAKERS)
def test_evidence_and_samples_on_cuda(name: str) -> None:
    model, x = made(name)
    moved = copy.deepcopy(model).cuda()
    assert_same(
        moved.log_likelihood(x.cuda(), 20, generator=seeded()),
        model.log_likelihood(x, 20, generator=seeded()),
    )
    assert moved.sample(3, generator=torch.Generator("cuda").manual_seed(0)).is_cuda


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "consistency"])
def test_missing_values_on_cuda(name: str) -> None:
    model, x = made(name)
    weight = (torch.rand(x.shape, generator=seeded(5)) < 0.7).double()
    x = x.masked_fill(weight == 0, math.nan)
    moved = copy.deepcopy(model).cuda()
    expected = loss_and_gradients(model, x, weight=weight)
    found = loss_and_gradients(moved, x.cuda(), weight=weight.cuda())
    for key in expected:
        assert_same(found[key], expected[key])
    assert_same(
        moved.impute(x.cuda(), weight.cuda(), num_samples=20, generator=seeded()),
        model.impute(x, weight, num_samples=20, generator=seeded()),
    )
    on_gpu = torch.Generator("cuda").manual_seed(0)
    assert moved.impute(x.cuda(), weight.cuda(), num_samples=20, draw=True, generator=on_gpu).isfinite().all()


@pytest.mark.parametrize("name", MAKERS)
def test_fit_on_cuda(name: str, tmp_path: Any) -> None:
    """Two epochs, and a checkpoint that a CPU reads."""
    model, x = made(name)
    model.cuda().float().train()
    history = fit(
        model, DataLoader(TensorDataset(x.float()), 2), epochs=2, run_dir=tmp_path, seed=3, progress=False
    )
    assert len(history.train_loss) == 2 and all(map(math.isfinite, history.train_loss))
    assert next(model.parameters()).is_cuda
    other = MAKERS[name]()
    load_checkpoint(other, history.checkpoints[-1])
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected.cpu())


SGD = functools.partial(torch.optim.SGD, lr=1e-3)


def fit_both_ways(name: str, epochs: int = 3, **options: Any) -> tuple[Any, Any, BaseVAE, BaseVAE]:
    """Histories and models of a run as it is and of one from CUDA graphs; batches of 5, the last of an epoch of 2."""
    model, x = made(name)
    x = torch.rand(37, *x.shape[1:], generator=seeded(4), dtype=torch.float64)
    found: list[Any] = []
    for cuda_graph in (False, True):
        own = copy.deepcopy(model).cuda().train()
        loader = DataLoader(TensorDataset(x), 5)
        found.append(
            (fit(own, loader, epochs=epochs, seed=3, progress=False, cuda_graph=cuda_graph, **options), own)
        )
    (plain, plain_model), (graphed, graphed_model) = found
    return plain, graphed, plain_model, graphed_model


@pytest.mark.parametrize("name", MAKERS)
def test_fit_from_cuda_graphs(name: str) -> None:
    """The same noise, losses and weights; with gradients clipped and data drawn anew, too."""
    plain, graphed, plain_model, graphed_model = fit_both_ways(name, clip_grad_norm=1.0, binarize=True)
    torch.testing.assert_close(graphed.train_loss, plain.train_loss, rtol=1e-9, atol=0)
    for found, expected in zip(graphed_model.parameters(), plain_model.parameters(), strict=True):
        assert_same(found.detach(), expected.detach().cpu())


def test_step_sizes_are_adapted_under_cuda_graphs() -> None:
    """Steps that measure run as they are; those between them, from step 51 on, come from graphs and count."""
    plain, graphed, plain_model, graphed_model = fit_both_ways("hvae-adapted", epochs=12)
    torch.testing.assert_close(graphed.train_loss, plain.train_loss, rtol=1e-9, atol=0)
    for found, expected in zip(graphed_model.buffers(), plain_model.buffers(), strict=True):
        assert_same(found, expected.cpu())


class Halved(nn.Module):
    """A schedule that changes a plain setting of the model after some steps."""

    def __init__(self, model: BaseVAE) -> None:
        super().__init__()
        self.models = [model]
        self.taken = torch.zeros(())

    def forward(self, step: Any) -> Tensor:
        return torch.zeros_like(step.loss)

    def step(self) -> None:
        self.taken += 1
        self.models[0].beta = 0.5 if self.taken > 12 else 1.0


def test_settings_that_change_under_cuda_graphs() -> None:
    losses = []
    for cuda_graph in (False, True):
        model, x = made("vae")
        model.penalties.append(Halved(model))
        loader = DataLoader(TensorDataset(x), 5)
        history = fit(model.cuda().train(), loader, epochs=25, seed=3, progress=False, cuda_graph=cuda_graph)
        losses.append(history.train_loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)


class Spoiled(Halved):
    """Spoils a weight once steps come from graphs."""

    def step(self) -> None:
        self.taken += 1
        if self.taken == 6:
            with torch.no_grad():
                next(self.models[0].decoder.parameters()).fill_(float("inf"))


@pytest.mark.parametrize(("name", "what"), [("hvae", "samples have no finite"), ("vae", "reconstruction")])
def test_what_is_not_finite_under_cuda_graphs_is_named(name: str, what: str) -> None:
    model, x = made(name)
    model.penalties.append(Spoiled(model))
    with pytest.raises(FloatingPointError, match=f"step 7.*{what}"):
        fit(model.cuda(), [x] * 9, epochs=1, progress=False, cuda_graph=True)


def test_data_is_checked_under_cuda_graphs() -> None:
    model, x = made("vae")
    batches = [x] * 6 + [x + 2]
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\]"):
        fit(model.cuda(), batches, epochs=1, progress=False, cuda_graph=True)


def test_a_step_that_waits_for_the_gpu_is_not_captured() -> None:
    model, x = made("hvae")
    model.on_divergence = "drop"
    with pytest.raises(RuntimeError, match=r"fit: cuda_graph: expected .* HVAE .* got 'drop'"):
        fit(model.cuda(), [x] * 6, epochs=1, progress=False, cuda_graph=True)


class MeanLoss(nn.Module):
    """The mean loss as a function of tensors alone."""

    def __init__(self, model: BaseVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.model(x, noise=noise).mean()


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "consistency"])
def test_graphed_callables_on_cuda(name: str) -> None:
    """A model's forward and backward pass as CUDA graphs, replayed on other images and weights."""
    model, x = made(name)
    model.cuda()
    draws = torch.randn(4, model.noise_draws, 5, DIM, generator=seeded(5), dtype=torch.float64).cuda()
    images = torch.rand(4, *x.shape, generator=seeded(6), dtype=torch.float64).cuda()
    plain = MeanLoss(copy.deepcopy(model))
    plain(images[0], draws[0])  # latent_dim and what else is learned from a first batch
    model(images[0], noise=draws[0])
    graphed = torch.cuda.make_graphed_callables(MeanLoss(model), (images[0], draws[0]))
    for step in range(1, 4):
        losses = []
        for module in (plain, graphed):
            module.zero_grad()
            loss = module(images[step], draws[step])
            loss.backward()
            losses.append(loss.detach().clone())
        assert_same(losses[1], losses[0].cpu())
        for found, expected in zip(graphed.parameters(), plain.parameters(), strict=True):
            assert (found.grad is None) == (expected.grad is None)
            if expected.grad is not None:
                assert_same(found.grad, expected.grad.cpu())
        for module in (plain, graphed):
            # A narrow Gaussian's gradients are of 1e5: as they are, they would throw the weights far away.
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad


@pytest.mark.parametrize("make", SHAPES)
def test_influence_on_cuda(make: Callable[[], nn.Module]) -> None:
    model, x, queries = build(make), images(9, *SHAPES[make]), images(4, *SHAPES[make], seed=2)
    on_cpu = tracin(model, x, (1.0, 0.5))
    on_gpu = tracin(copy.deepcopy(model).cuda(), x, (1.0, 0.5))
    assert_same(on_gpu.influence(queries), on_cpu.influence(queries))
    assert_same(on_gpu.self_influence(), on_cpu.self_influence())
    for found, expected in zip(
        on_gpu.influence_with_error(queries), on_cpu.influence_with_error(queries), strict=True
    ):
        assert_same(found, expected)
    assert torch.equal(on_gpu.influence(queries, k=3)[0], on_cpu.influence(queries, k=3)[0])
