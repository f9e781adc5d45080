"""Models under torch.compile: every network of ours in one graph, by the operators that run outside of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_problems import MODELS, data, make, seeded
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import fastvae
from fastvae import ConsistencyVAE, JacobianL1VAE, architectures
from fastvae.models import HVAE, VAE, BaseVAE, Penalty, TrainingStep

Pair = tuple[nn.Module, nn.Module]


def two(name: str, *arguments: Any) -> Callable[[], Pair]:
    return lambda: tuple(
        getattr(architectures, f"{name}_{half}")(*arguments) for half in ("encoder", "decoder")
    )


NETWORKS: dict[str, tuple[Callable[[], Pair], tuple[int, ...]]] = {
    "hvae": (two("hvae", 4), (1, 28, 28)),
    "jacobian_l1": (
        lambda: (architectures.jacobian_l1_encoder(), architectures.jacobian_l1_decoder(width=4)),
        (1, 64, 64),
    ),
    "dcgan": (
        lambda: (
            architectures.dcgan_encoder(1, 4, 6),
            architectures.dcgan_decoder(1, 4, 6, values_per_element=1),
        ),
        (1, 32, 32),
    ),
    "tracin": (
        lambda: (architectures.tracin_encoder(12, 3, 8), architectures.tracin_decoder(12, 3, 8)),
        (12,),
    ),
    "image": (lambda: architectures.image_networks((1, 28, 28), 4, width=4), (1, 28, 28)),
    "table": (lambda: architectures.table_networks(7, 3), (7,)),
}
OPTIONS: dict[type[BaseVAE], dict[str, Any]] = {HVAE: {"num_steps": 2, "on_divergence": "ignore"}}


class Counter:
    """A backend that counts graphs, and the last one's calls by operator."""

    def __init__(self) -> None:
        self.graphs = 0
        self.calls: dict[str, int] = {}

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        self.calls = {}
        for node in graph.graph.nodes:
            name = str(node.target)
            self.calls[name] = self.calls.get(name, 0) + 1
        return aot_eager(graph, inputs)

    def of(self, name: str) -> int:
        return sum(count for called, count in self.calls.items() if called == f"fastvae.{name}")


@pytest.fixture
def counter() -> Iterator[Counter]:
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    )


def compare(model: BaseVAE, compiled: Any, x: Tensor) -> None:
    """A step of the model and of what was compiled of it, at the same noise."""
    noise = model.draw_noise(model.encode(x)[0], seeded()).detach()
    mine, theirs = compiled(x, noise=noise), model(x, noise=noise)
    torch.testing.assert_close(mine, theirs)
    for left, right in zip(gradients(model, mine.sum()), gradients(model, theirs.sum()), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-8)


QUICK = {("hvae", HVAE), ("dcgan", VAE)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in QUICK else [pytest.mark.slow])
        for name in NETWORKS
        for kind in (VAE, HVAE)
    ],
)
def test_networks_of_ours(name: str, kind: type[BaseVAE], counter: Counter) -> None:
    make_networks, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = kind(*make_networks(), **OPTIONS.get(kind, {})).double().eval()
    x = torch.rand(3, *shape, generator=seeded(1), dtype=torch.float64)
    compare(model, torch.compile(model, fullgraph=True, backend=counter), x)
    assert counter.of("hamiltonian_flow" if kind is HVAE else "elbo_terms") == 1, counter.calls


def test_the_objective_is_one_operator(counter: Counter) -> None:
    """As it is where nothing is compiled; of what is made of its parts, each has a graph of its own."""
    model, x = make(VAE).double(), data(dtype=torch.float64)
    compare(model, torch.compile(model, fullgraph=True, backend=counter), x)
    assert counter.of("elbo_terms") == 1

    def looked_into(x: Tensor, noise: Tensor) -> Tensor:
        step = model.objective(x, noise=noise)
        return step.loss + step.mu.square().sum(1)

    noise = model.draw_noise(model.encode(x)[0], seeded()).detach()
    compiled = torch.compile(looked_into, fullgraph=True, backend=counter)
    for left, right in zip(
        gradients(model, compiled(x, noise).sum()), gradients(model, looked_into(x, noise).sum()), strict=True
    ):
        torch.testing.assert_close(left, right)
    assert counter.of("elbo_terms") == 0


class CodeNorm(Penalty):
    """A user's own, which may differentiate one tensor of the step by another."""

    def forward(self, step: TrainingStep) -> Tensor:
        return step.z.square().sum(1)


@pytest.mark.parametrize(
    ("make_model", "fused"),
    [
        (lambda *of: ConsistencyVAE(*of, augment=lambda x, generator=None: 1 - x), True),
        (JacobianL1VAE, True),
        (lambda *of: VAE(*of, penalties=[CodeNorm()]), False),
        (lambda *of: VAE(*of, max_logvar=2.0), False),
        (lambda *of: VAE(*of, "gaussian"), True),
    ],
    ids=["consistency", "jacobian", "own", "max_logvar", "gaussian"],
)
def test_other_losses(make_model: Callable[..., BaseVAE], fused: bool, counter: Counter) -> None:
    plain = make(VAE)
    model = make_model(plain.encoder, plain.decoder).double()
    compare(model, torch.compile(model, fullgraph=True, backend=counter), data(dtype=torch.float64))
    assert counter.of("elbo_terms") == fused, counter.calls


def test_two_heads(counter: Counter) -> None:
    """mu and logvar of two layers on a trunk, as one layer."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(6, 5)
            self.mu, self.logvar = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.trunk(x))
            return self.mu(h), self.logvar(h)

    torch.manual_seed(0)
    model = VAE(Encoder(), make(VAE).decoder, latent_dim=2).double()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = data(dtype=torch.float64)
    compare(model, compiled, x)
    with torch.no_grad():
        model.encoder.mu.weight.mul_(2)
    compare(model, compiled, x)
    assert counter.graphs == 1 and counter.of("elbo_terms") == 1
    model.encoder.mu = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    compare(model, compiled, x)


@pytest.mark.parametrize("kind", MODELS)
def test_trains_in_one_graph(kind: type[BaseVAE], counter: Counter) -> None:
    """Steps of an optimizer, in which weights change; the loss is that of steps that are not compiled."""
    losses, graphs = [], 0
    for compiles in (True, False):
        model, x = make(kind, **OPTIONS.get(kind, {})).double(), data(dtype=torch.float64)
        noise = model.draw_noise(model.encode(x)[0], seeded()).detach()
        step = torch.compile(model, fullgraph=True, backend=counter) if compiles else model
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            loss = step(x, noise=noise).mean()
            loss.backward()
            optimizer.step()
            # A first graph may be one of two: Dynamo itself starts over for a float64 number of the model.
            graphs = graphs or counter.graphs
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    assert counter.graphs == graphs


def skipping(size: int) -> nn.Module:
    """Read, and not lowered."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, size)

        def forward(self, z: Tensor) -> Tensor:
            out: Tensor = self.second(z + torch.tanh(self.first(z)))
            return out

    return Skip()


@pytest.mark.parametrize("kind", [VAE, HVAE, fastvae.IWAE, JacobianL1VAE])
@pytest.mark.parametrize(
    "likelihood", ["bernoulli", fastvae.likelihoods.Laplace(0.5)], ids=["name", "laplace"]
)
@pytest.mark.parametrize("decoder", [None, skipping], ids=["kernels", "sweeps"])
def test_an_epoch_with_a_smaller_last_batch(
    decoder: Callable[[int], nn.Module] | None, likelihood: Any, kind: type[BaseVAE], counter: Counter
) -> None:
    """The noise is drawn in the graph, whose batch becomes a symbol; so it is where nothing asks for one graph."""
    plain = make(VAE)
    torch.manual_seed(2)
    decode = plain.decoder if decoder is None else decoder(6)
    model = kind(plain.encoder, decode, likelihood, latent_dim=2, **OPTIONS.get(kind, {}))
    compiled = torch.compile(model.loss, backend=counter, fullgraph=True)
    for batch in (5, 5, 3, 4, 5):
        losses = []
        for loss in (compiled, model.loss):
            torch.manual_seed(3)
            losses.append(loss(data(batch)))
        torch.testing.assert_close(*losses)
        gradients(model, losses[0])
    assert torch.isfinite(torch.compile(model.sample, backend=counter)(4)).all()


def test_under_autocast_and_function_transforms(counter: Counter) -> None:
    """Where the operator does not serve, a compiled model does what PyTorch's operations do."""
    model, x = make(VAE), data()
    noise = model.draw_noise(model.encode(x)[0], seeded()).detach()
    compiled = torch.compile(model, backend=counter)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, noise=noise), model(x, noise=noise), rtol=2e-2, atol=2e-2)
    assert counter.of("elbo_terms") == 0
    named = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, (x,), {"noise": noise})
        return out.sum()

    found = torch.compile(torch.func.grad(loss), backend=counter)(named)
    wanted = gradients(model, model(x, noise=noise).sum())
    for left, right in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_attributes_of_any_plain_kind_are_guarded(counter: Counter) -> None:
    """Dictionaries and nested lists, such as the settings that a network remembers it was made with."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 6)
            self.settings = {"slopes": [0.1, {"outer": (0.2, 3)}], "names": {"a"}}

        def forward(self, z: Tensor) -> Tensor:
            return torch.nn.functional.leaky_relu(self.linear(z), self.settings["slopes"][0])

    torch.manual_seed(0)
    decoder = Decoder().double()
    z, x = torch.randn(3, 2, dtype=torch.float64), data(3, torch.float64)
    arguments = torch.zeros_like(z), x, 0.1, torch.ones(2, dtype=torch.float64)
    compiled = torch.compile(fastvae.ops.hamiltonian_flow, fullgraph=True, backend=counter)
    graphs = []
    for slope in (0.1, 0.1, 0.5):
        decoder.settings["slopes"][0] = slope  # type: ignore[index]
        found = compiled(decoder, z, *arguments)
        wanted = fastvae.ops.hamiltonian_flow(decoder, z, *arguments)
        for left, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(left, right)
        graphs.append(counter.graphs)
    assert graphs[0] == graphs[1] < graphs[2]


def test_graphs_on_disk_are_those_of_one_build() -> None:
    """Beside what a user looks his own up by."""
    script = "import fastvae, torch.compiler.config as c; print(c.cache_key_tag)"
    tags = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "TORCH_COMPILE_CACHE_KEY_TAG": mine},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for mine in ("mine", "")
    ]
    library = Path(fastvae._C.__file__).stat()
    assert tags[0] == f"mine {tags[1]}"
    assert tags[1] == f"fastvae {library.st_size} {library.st_mtime_ns}"
