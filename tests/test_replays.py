"""Operators that are called again and again, which a GPU replays from CUDA graphs: nobody sees another number."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvae import cuda_graphs, ops, reference
from fastvae._extension import raw

STEPS, DIM, PIXELS = 4, 5, 12
CALLS = 8
"""More than it takes to capture, and some replays."""


class Skip(nn.Module):
    """No chain of layers, so it is read as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        return self.last(z + torch.tanh(self.first(z)))


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(DIM, 400), nn.Softplus(), nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, PIXELS)
    )


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 8), nn.ELU(), nn.Linear(8, PIXELS))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Linear(DIM, 8),
        nn.ELU(),
        nn.Unflatten(1, (2, 2, 2)),
        nn.ConvTranspose2d(2, 3, 2, stride=2),
        nn.Softplus(),
        nn.Conv2d(3, 1, 1),
        nn.Flatten(),
        nn.Linear(16, PIXELS),
    )


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "dense": dense,
    "small": small,
    "images": images,
    "read": Skip,
}

on_every_decoder = pytest.mark.parametrize("name", DECODERS)


def made(name: str, device: torch.device, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return DECODERS[name]().double().to(device).eval()


def draw(device: torch.device, seed: int, batch: int = 6) -> list[Tensor]:
    """z, rho, x, step size and alpha."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    z, rho = (torch.randn(batch, DIM, **options).to(device).requires_grad_() for _ in range(2))
    x = torch.rand(batch, PIXELS, **options).to(device)
    step = (0.05 + 0.1 * torch.rand(STEPS, 1, **options)).to(device).requires_grad_()
    alpha = (0.8 + 0.2 * torch.rand(STEPS, **options)).to(device).requires_grad_()
    return [z, rho, x, step, alpha]


def flow(
    decoder: nn.Module, inputs: list[Tensor], function: Callable[..., Any] = ops.hamiltonian_flow
) -> Tensor:
    """A number that depends on every result."""
    z, rho, log_px, *_ = function(decoder, *inputs, "bernoulli")
    return z.sin().sum() + rho.cos().sum() + log_px.sum()


def gradients(value: Tensor, decoder: nn.Module, inputs: list[Tensor], **options: bool) -> list[Tensor]:
    leaves = [each for each in (*inputs, *decoder.parameters()) if each.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves, **options)]


def wanted(decoder: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return gradients(flow(decoder, inputs, reference.hamiltonian_flow), decoder, inputs)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def train(decoder: nn.Module, found: list[Tensor]) -> None:
    """A step of every parameter, in place."""
    with torch.no_grad():
        for parameter, gradient in zip(
            decoder.parameters(), found[-len(list(decoder.parameters())) :], strict=True
        ):
            parameter -= 1e-2 * gradient / (1 + gradient.norm())


@on_every_decoder
def test_training_steps(name: str, device: torch.device) -> None:
    """Other inputs and weights each time, and other batches between."""
    decoder = made(name, device)
    for call in range(CALLS):
        for batch in (6, 3):
            inputs = draw(device, call, batch)
            expected = wanted(decoder, inputs)
            found = gradients(flow(decoder, inputs), decoder, inputs)
            assert_same(found, expected)
            train(decoder, found)


@on_every_decoder
def test_graphs_take_the_place_of_launches(name: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("a CPU launches nothing")
    decoder = made(name, device)
    for call in range(2 * CALLS):
        captures, replays, _ = raw.replay_counts()
        inputs = draw(device, call)
        gradients(flow(decoder, inputs), decoder, inputs)
    now = raw.replay_counts()
    assert now[0] == captures and now[1] == replays + 2, "one for the way there and one for the way back"


def test_graphs_are_released(device: torch.device) -> None:
    """But for those whose results are held."""
    decoder, held = made("dense", device), []
    for call in range(CALLS):
        inputs = draw(device, call)
        found = gradients(flow(decoder, inputs), decoder, inputs)
        if call == CALLS - 1:
            cuda_graphs.release()
            held.append((found, wanted(decoder, inputs)))
    inputs = draw(device, CALLS)
    assert_same(gradients(flow(decoder, inputs), decoder, inputs), wanted(decoder, inputs))
    for mine, theirs in held:
        assert_same(mine, theirs)
    del held, found, mine
    cuda_graphs.release()
    assert raw.replay_counts()[2] == 0


@on_every_decoder
def test_several_passes_before_a_way_back(name: str, device: torch.device) -> None:
    decoder = made(name, device)
    for call in range(CALLS):
        several = [draw(device, 10 * call + part) for part in range(3)]
        expected = [wanted(decoder, inputs) for inputs in several]
        values = [flow(decoder, inputs) for inputs in several]
        for value, inputs, each in reversed(list(zip(values, several, expected, strict=True))):
            assert_same(gradients(value, decoder, inputs), each)


@on_every_decoder
def test_what_is_kept_stays(name: str, device: torch.device) -> None:
    """Results and gradients of all calls are held; so are graphs of autograd, which are gone through twice."""
    decoder = made(name, device)
    held = []
    for call in range(CALLS):
        inputs = draw(device, call)
        value = flow(decoder, inputs)
        first = gradients(value, decoder, inputs, retain_graph=True)
        held.append((value, inputs, first, wanted(decoder, inputs)))
    for value, inputs, first, expected in held:
        assert_same(first, expected)
        assert_same(gradients(value, decoder, inputs), expected)


@on_every_decoder
def test_gradients_that_accumulate(name: str, device: torch.device) -> None:
    decoder, by_autograd = made(name, device), made(name, device)
    for call in range(CALLS):
        inputs = draw(device, call)
        flow(decoder, inputs).backward()
        flow(by_autograd, draw(device, call), reference.hamiltonian_flow).backward()
        assert_same([p.grad for p in decoder.parameters()], [p.grad for p in by_autograd.parameters()])


@on_every_decoder
def test_without_gradients(name: str, device: torch.device) -> None:
    """The whole trajectories of all calls, held."""
    decoder = made(name, device)
    held = []
    with torch.no_grad():
        for call in range(CALLS):
            inputs = draw(device, call)
            found = ops.trajectory(decoder, *inputs, "bernoulli")
            expected = reference.trajectory(decoder, *inputs, "bernoulli")
            held.append((found, expected))
    for found, expected in held:
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@on_every_decoder
def test_weights_elsewhere(name: str, device: torch.device) -> None:
    """Two models of one form in turn, and weights that are replaced by others of other memory."""
    decoders = [made(name, device, seed) for seed in range(2)]
    for call in range(2 * CALLS):
        decoder = decoders[call % 2]
        if call % 5 == 4:
            for parameter in decoder.parameters():
                parameter.data = parameter.data.clone() * 1.01
        inputs = draw(device, call)
        assert_same(gradients(flow(decoder, inputs), decoder, inputs), wanted(decoder, inputs))


@on_every_decoder
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_jacobian(name: str, reduction: str, device: torch.device) -> None:
    decoder = made(name, device)
    held = []
    for call in range(CALLS):
        inputs = draw(device, call)[:1]
        results = []
        for function in (ops.jacobian_l1, reference.jacobian_l1):
            value = function(decoder, inputs[0], reduction=reduction).cos().sum()
            leaves = [*inputs, *decoder.parameters()]
            found = torch.autograd.grad(value, leaves, allow_unused=True)
            results.append([value.detach(), *(g for g in found if g is not None)])
        held.append(results)
        train(decoder, [torch.ones_like(p) for p in decoder.parameters()])
    for mine, theirs in held:
        assert_same(mine[:2], theirs[:2])


def test_several_threads(device: torch.device) -> None:
    """Each with a stream of its own and one decoder."""
    decoder = made("dense", device)
    expected = {seed: wanted(decoder, draw(device, seed)) for seed in range(2 * CALLS)}
    failures: list[BaseException] = []

    def work(seeds: range) -> None:
        try:
            stream = torch.cuda.Stream() if device.type == "cuda" else None
            with torch.cuda.stream(stream):
                for seed in seeds:
                    inputs = draw(device, seed)
                    assert_same(gradients(flow(decoder, inputs), decoder, inputs), expected[seed])
        except BaseException as error:
            failures.append(error)

    if device.type == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(range(part, 2 * CALLS, 2),)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_copy_has_its_own_weights(device: torch.device) -> None:
    decoder = made("read", device)
    for call in range(CALLS):
        inputs = draw(device, call)
        assert_same(gradients(flow(decoder, inputs), decoder, inputs), wanted(decoder, inputs))
    other = copy.deepcopy(decoder)
    train(other, [torch.ones_like(p) for p in other.parameters()])
    del decoder
    for call in range(CALLS):
        inputs = draw(device, call)
        assert_same(gradients(flow(other, inputs), other, inputs), wanted(other, inputs))
