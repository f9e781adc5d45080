"""``torch.set_default_device``: what the package makes for its own use lies where it is used.

On "meta" no tensor has numbers, so that one made without a device fails wherever it is used; models and data are on the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_problems import DIM, PIXELS, Skip, data, make, mlp, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae import HVAE, IWAE, VAE, ConsistencyVAE, JacobianL1VAE, likelihoods, metrics, ood, ops, plot
from fastvae._compiling import is_watched
from fastvae.influence import TracIn
from fastvae.models import BaseVAE
from fastvae.network.tape import is_plain
from fastvae.noise import SampleNoise, key_of_weights, keys_of
from fastvae.ops.elbo import fused

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*this decoder (cannot be lowered|is not read)"),
]

Run = Callable[[], Any]


@pytest.fixture
def on_default() -> Iterator[Callable[[str | None], None]]:
    """``torch.set_default_device`` for the length of a test."""
    yield torch.set_default_device
    torch.set_default_device(None)


class Unreadable(nn.Module):
    """A decoder whose forward asks for numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(DIM, PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z) * (2.0 if float(z.detach().sum()) > 0 else 1.0)


def counts() -> Tensor:
    return torch.arange(4 * PIXELS).view(4, PIXELS) % 3 + 0.0


MODELS: dict[str, Callable[[], BaseVAE]] = {
    "VAE": lambda: make(VAE),
    "HVAE": lambda: make(HVAE),
    "HVAE, adapted step size": lambda: make(HVAE, step_size="adapted"),
    "HVAE, read": lambda: HVAE(mlp(PIXELS, 2 * DIM), Skip(), num_steps=2, latent_dim=DIM),
    "IWAE": lambda: make(IWAE, num_samples=3),
    "IWAE in tiles": lambda: make(IWAE, num_samples=100),
    "JacobianL1VAE": lambda: make(JacobianL1VAE),
    "JacobianL1VAE, read": lambda: JacobianL1VAE(mlp(PIXELS, 2 * DIM), Skip(), latent_dim=DIM),
    "ConsistencyVAE": lambda: make(ConsistencyVAE, augment=lambda x: x.flip(1)),
    "categorical": lambda: make(VAE, "categorical"),
    "learned scale": lambda: make(VAE, likelihoods.Gaussian("learned", initial=0.5)),
    "counts": lambda: make(VAE, likelihoods.NegativeBinomial("learned")),
    "unreadable": lambda: VAE(mlp(PIXELS, 2 * DIM), Unreadable(), latent_dim=DIM),
}


def of_model(name: str) -> tuple[BaseVAE, Tensor]:
    torch.manual_seed(0)
    x = counts() if name == "counts" else data(4)
    return MODELS[name](), (255 * x).to(torch.uint8) if name == "categorical" else x


def image_model(kind: type[BaseVAE] = VAE, **options: Any) -> tuple[BaseVAE, Tensor]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6))
    decoder = nn.Sequential(
        nn.Linear(3, 64), nn.ReLU(), nn.Unflatten(1, (4, 4, 4)), nn.ConvTranspose2d(4, 1, 4, 2, 1)
    )
    return kind(encoder, decoder, **options), torch.rand(8, 1, 8, 8, generator=seeded()).round()


def same(prepare: Callable[[], Run], on_default: Callable[[str | None], None]) -> None:
    """What a call gives by itself, with tensors by default on "meta"."""
    results = []
    for device in (None, "meta"):
        on_default(None)
        run = prepare()
        torch.manual_seed(1)
        on_default(device)
        results.append(run())
    on_default(None)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


def step(model: BaseVAE, x: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    losses = model(x, *args, **options)
    losses.mean().backward()
    return [losses.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


OF_MODELS: dict[str, Callable[[BaseVAE, Tensor], Any]] = {
    "loss": step,
    "loss with weights": lambda model, x: step(model, x, weight=torch.ones_like(x).cumsum(0)),
    "elbo": lambda model, x: model.elbo(x, generator=seeded()),
    "log_likelihood": lambda model, x: model.log_likelihood(x, 8, generator=seeded()),
    "log_likelihood, keyed": lambda model, x: model.log_likelihood(
        x, 8, noise=SampleNoise(keys_of(x), 0, model.noise_draws)
    ),
    "sample": lambda model, x: model.sample(3, generator=seeded()),
    "sample, global": lambda model, x: model.sample(3),
    "reconstruct": lambda model, x: model.reconstruct(x, generator=seeded()),
    "impute": lambda model, x: model.impute(x, torch.ones_like(x).triu(), num_samples=5, generator=seeded()),
    "impute, drawn": lambda model, x: model.impute(
        x, torch.ones_like(x).triu(), num_samples=5, draw=True, generator=seeded()
    ),
    "negative log-likelihood": lambda model, x: list(metrics.negative_log_likelihood(model, x, 5)),
    "key of weights": lambda model, x: key_of_weights(model),
    "TracIn": lambda model, x: influence(model, x),
}


def influence(model: BaseVAE, x: Tensor, **options: Any) -> list[Tensor]:
    found = TracIn(model, TensorDataset(x), None, uncovered="materialise", num_samples=2, **options)
    scores = found.influence(x[:2])
    largest = found.influence(x[:2], k=2)
    return [scores, found.self_influence(), *largest, *found.influence_with_error(x[:2])]


# What is the same for all models runs on a few of them.
FEW = ("HVAE", "JacobianL1VAE, read", "categorical", "learned scale")
EVERY = ("loss", "loss with weights", "log_likelihood")


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name in MODELS for call in OF_MODELS if call in EVERY or name in FEW]
)
def test_models(name: str, call: str, on_default: Callable[[str | None], None]) -> None:
    def prepare() -> Run:
        model, x = of_model(name)
        return lambda: OF_MODELS[call](model, x)

    same(prepare, on_default)


def codes() -> Tensor:
    return torch.randn(4, DIM, generator=seeded())


def operator(name: str, decoder: nn.Module) -> Run:
    z, x, noise = codes().requires_grad_(), data(4), torch.randn(2, 4, DIM, generator=seeded(1))
    encoder, size, alpha = mlp(PIXELS, 2 * DIM), torch.tensor(0.1), torch.full((3,), 0.9)
    gaussian = likelihoods.Gaussian()

    def values() -> Any:
        if name == "hamiltonian_flow":
            return ops.hamiltonian_flow(decoder, z, noise[0], x, size, alpha, gaussian)
        if name == "jacobian_l1":
            return (ops.jacobian_l1(decoder, z),)
        if name == "log_px_and_force":
            return ops.log_px_and_force(decoder, z, x, gaussian)
        if name == "elbo":
            return (ops.elbo(encoder, decoder, x, noise[0], gaussian),)
        return (ops.iwae_bound(encoder, decoder, x, gaussian, num_samples=2, noise=noise),)

    def run() -> list[Tensor]:
        if name == "log_px":
            return [ops.log_px(decoder, noise, x, gaussian)]
        outputs = [out for out in values() if isinstance(out, Tensor) and out.requires_grad]
        wanted = [z, *decoder.parameters()]
        total = torch.stack([out.sum() for out in outputs]).sum()
        return [total, *torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)]

    return run


@pytest.mark.parametrize("kind", ["chain", "read", "unreadable"])
@pytest.mark.parametrize(
    "name", ["hamiltonian_flow", "jacobian_l1", "log_px", "log_px_and_force", "elbo", "iwae_bound"]
)
def test_operators(name: str, kind: str, on_default: Callable[[str | None], None]) -> None:
    def prepare() -> Run:
        torch.manual_seed(0)
        return operator(name, {"chain": mlp(DIM, PIXELS), "read": Skip(), "unreadable": Unreadable()}[kind])

    same(prepare, on_default)


DETECTORS: dict[str, Callable[[BaseVAE, BaseVAE], Any]] = {
    "negative log-likelihood": lambda model, _: ood.NegativeLogLikelihood(model, num_samples=5),
    "input complexity": lambda model, _: ood.InputComplexity(model, num_samples=5),
    "likelihood ratio": lambda model, background: ood.LikelihoodRatio(model, background, num_samples=5),
    "likelihood regret": lambda model, _: ood.LikelihoodRegret(model, num_steps=3),
}


@pytest.mark.parametrize("kind", [VAE, HVAE, IWAE])
@pytest.mark.parametrize("name", [*DETECTORS, "self-influence"])
def test_detectors(name: str, kind: type[BaseVAE], on_default: Callable[[str | None], None]) -> None:
    def prepare() -> Run:
        (model, x), (background, _) = image_model(kind), image_model(kind)
        if name == "self-influence":
            return lambda: ood.SelfInfluence(model).predict(x)
        return lambda: DETECTORS[name](model, background).predict(x)

    same(prepare, on_default)


def dots() -> Any:
    return fastvae.data.three_dots(20, size=8)


METRICS: dict[str, Callable[[BaseVAE, Tensor], Any]] = {
    "ais": lambda model, x: list(metrics.ais(model, x[:2], 3, 1)),
    "bidirectional ais": lambda model, x: list(
        metrics.bidirectional_ais(model, 2, 3, 1, step_size=0.1).upper
    ),
    "posteriors": lambda model, x: list(metrics.posteriors(model, x)),
    "mutual information": lambda model, x: metrics.mutual_information(model, x, num_samples=2),
    "active units": metrics.active_units,
    "divergence by latent": metrics.divergence_by_latent,
    "local MIG": lambda model, x: metrics.local_mig(model, dots().space, 0.4, num_points=20, num_clusters=2),
    "MIG": lambda model, x: metrics.mig(x[:, 0, :2].flatten(1), x[:, 0, 0, 3:6].long()),
}


@pytest.mark.parametrize("kind", [VAE, HVAE])
@pytest.mark.parametrize("name", METRICS)
def test_metrics(name: str, kind: type[BaseVAE], on_default: Callable[[str | None], None]) -> None:
    def prepare() -> Run:
        model, x = image_model(kind)
        return lambda: METRICS[name](model, x)

    same(prepare, on_default)


PLOTS: dict[str, Callable[[BaseVAE, Tensor], Any]] = {
    "samples": lambda model, x: plot.samples(model, x, count=4),
    "reconstructions": lambda model, x: plot.reconstructions(model, x, columns=3),
    "traversals": lambda model, x: plot.traversals(model, x, columns=3),
    "Jacobian columns": lambda model, x: plot.jacobian_columns(model, x[:2], latents=2),
    "codes": lambda model, x: plot.latent_scatter(model, x, x[:, 0, 0, 0].long()),
    "energies": lambda model, x: plot.energies(model, x),  # type: ignore[arg-type]
    "influences": lambda model, x: plot.influences(
        x[:2], x, (torch.zeros_like(x[:2, 0, 0, :2], dtype=torch.int64), x[:2, 0, 0, :2])
    ),
    "scores": lambda model, x: plot.score_histograms({"a": {"in": x.flatten()[:9], "out": [1.0, 2.0, 3.0]}}),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots(name: str, on_default: Callable[[str | None], None]) -> None:
    pytest.importorskip("matplotlib")

    def prepare() -> Run:
        model, x = image_model(HVAE)
        return lambda: torch.frombuffer(bytearray(plot.png(PLOTS[name](model, x))), dtype=torch.uint8)

    same(prepare, on_default)


def test_sections_of_a_report(on_default: Callable[[str | None], None]) -> None:
    for package in ("matplotlib", "jinja2", "sklearn"):
        pytest.importorskip(package)
    from fastvae.report import Subject, sections_of

    (model, _), images = image_model(), dots().images[:12]
    labelled = fastvae.data.ImageDataset(images, torch.arange(12) % 2, "dots")
    on_default("meta")
    # A section that cannot be computed warns.
    assert len(list(sections_of(Subject.of(model, labelled, labelled.subset(range(8)), effort=1e-9)))) > 8


def test_data(on_default: Callable[[str | None], None]) -> None:
    images = torch.rand(9, 1, 8, 8, generator=seeded())

    def run() -> list[Tensor]:
        whole = fastvae.data.ImageDataset((255 * images).to(torch.uint8), images[:, 0, 0, 0].long())
        first, second = whole.split(3, 6)
        moved = fastvae.data.RandomAffine(5.0)(images, generator=seeded())
        drawn = fastvae.data.binarize(images, seeded())
        return [first.images, second.images, whole.subset([2, 1]).images, moved, drawn, dots().images]

    same(lambda: run, on_default)


@pytest.mark.parametrize("kind", [VAE, HVAE])
def test_saved_and_loaded(
    kind: type[BaseVAE], on_default: Callable[[str | None], None], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")

    def prepare() -> Run:
        torch.manual_seed(0)
        encoder, decoder = fastvae.architectures.image_networks((1, 8, 8), 2, width=2)
        kind(encoder, decoder, likelihoods.Gaussian("learned")).save(tmp_path / "model")
        return lambda: dict(fastvae.load(tmp_path / "model").state_dict())

    same(prepare, on_default)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_made_where_new_tensors_are(name: str, on_default: Callable[[str | None], None]) -> None:
    on_default("meta")
    model = MODELS[name]()
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


# --- kernels -------------------------------------------------------------------------------------


class Looking(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_default_device_is_no_spectator(on_default: Callable[[str | None], None]) -> None:
    assert not is_watched()
    with torch.device("cpu"):
        assert not is_watched()
    on_default("cpu")
    assert not is_watched()
    with torch.device("meta"):
        assert not is_watched()
        with Looking():
            assert is_watched()
    with Looking():
        assert is_watched()
    assert not is_watched()


def test_kernels_are_taken(on_default: Callable[[str | None], None]) -> None:
    torch.manual_seed(0)
    x, (encoder, decoder) = data(), (mlp(PIXELS, 2 * DIM), mlp(DIM, PIXELS))
    on_default("cpu")
    assert fused(encoder, decoder, x, likelihoods.Bernoulli(), DIM) is not None
    assert is_plain(x)
    with Looking():
        assert fused(encoder, decoder, x, likelihoods.Bernoulli(), DIM) is None
        assert not is_plain(x)


def test_a_run_on_a_data_set_is_continued_with_a_loader(tmp_path: Path) -> None:
    """The sampler that shuffles wherever the default device is draws the same order as PyTorch's."""
    found = []
    for loaders in ("set set", "set own", "own own"):
        for epochs, kind in enumerate(loaders.split(), 1):
            model, x = of_model("VAE")
            data: Any = TensorDataset(x)
            size = {"batch_size": 3}
            if kind == "own":
                data, size = DataLoader(data, 3, shuffle=True), {}
            fastvae.fit(model, data, epochs=epochs, run_dir=tmp_path / loaders, progress=False, **size)
        found.append(list(model.parameters()))
    torch.testing.assert_close(found[1:], [found[0]] * 2, rtol=0, atol=0)


def test_fit(on_default: Callable[[str | None], None]) -> None:
    """Only on the CPU: neither PyTorch's optimisers nor its loaders run where tensors have no numbers."""
    found = []
    for device in (None, "cpu"):
        on_default(device)
        model, x = of_model("HVAE")
        history = fastvae.fit(model, TensorDataset(x), epochs=2, batch_size=3, progress=False)
        found.append([*model.parameters(), torch.tensor(history.train_loss)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
