"""hamiltonian_flow under torch.compile(fullgraph=True), with gradients equal to eager ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_problems import MEMORY, Problem, Residual, assert_near, conv, gradients, mlp, problem
from torch import Tensor

import fastvae

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(
    p: Problem, backend: str, dynamic: bool | None = None, **options: object
) -> Callable[..., tuple]:
    """The flow between other operations, as it stands in a training step."""

    def step(z: Tensor, rho: Tensor, x: Tensor, step_size: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        q = replace(p, z=z * 1.5, rho=rho, x=x, step_size=step_size.sigmoid(), alpha=alpha)
        return tuple(torch.tanh(t) for t in q.run(**options)[:3])

    step.eager = step  # type: ignore[attr-defined]
    graph = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    graph.eager = step
    return graph


def check(step: Callable[..., tuple], p: Problem) -> None:
    inputs = [t for _, t in p.tensors()]
    expected, actual = step.eager(*inputs), step(*inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e.cpu(), 1e-12)
    wanted = gradients(p, expected)
    for name, gradient in gradients(p, actual).items():
        assert_near(gradient, wanted[name].cpu(), 1e-11, name)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("decoder", [mlp, conv], ids=["mlp", "conv"])
@each_backend
def test_gradients_equal_eager(backend: str, decoder, memory: str, device: torch.device) -> None:
    p = problem(decoder, "bernoulli").to(device).require()
    check(compiled(p, backend, memory=memory), p)


@each_backend
def test_frozen_decoder_and_auto_memory(backend: str, device: torch.device) -> None:
    p = problem(mlp, "gaussian").to(device).require(["z", "rho", "alpha"])
    check(compiled(p, backend), p)


@each_backend
def test_dynamic_batch(backend: str, device: torch.device) -> None:
    """One graph for every batch size above 1."""
    p = problem(mlp, "gaussian", batch=9).to(device).require()
    step = compiled(p, backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (9, 4, 7):
            q = replace(
                p, **{n: getattr(p, n).detach()[:batch].clone().requires_grad_() for n in ("z", "rho", "x")}
            )
            check(step, q)


def test_trajectory(device: torch.device) -> None:
    p = problem(mlp, "bernoulli").to(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(z: Tensor) -> tuple:
        return replace(p, z=z).trajectory()

    for a, b in zip(run(p.z), p.trajectory(), strict=True):
        assert torch.equal(a, b)


def test_no_grad(device: torch.device) -> None:
    p = problem(conv, "bernoulli").to(device).require()
    step = compiled(p, "aot_eager")
    with torch.no_grad():
        for a, b in zip(
            step(*(t for _, t in p.tensors())), step.eager(*(t for _, t in p.tensors())), strict=True
        ):
            assert not a.requires_grad
            assert_near(a, b.cpu(), 1e-12)


def test_autocast(device: torch.device) -> None:
    p = problem(mlp, "gaussian").to(device, torch.float32).require()
    step = compiled(p, "aot_eager")
    with torch.autocast(device.type, torch.bfloat16):
        inputs = [t.bfloat16() if name in ("z", "rho") else t for name, t in p.tensors()]
        actual, expected = step(*inputs), step.eager(*inputs)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert_near(a, e.cpu(), 1e-6)


def test_parameters_are_not_constants(device: torch.device) -> None:
    """A step of the optimiser changes what the compiled graph computes, without another compilation."""
    p = problem(mlp, "gaussian").to(device).require()
    step = compiled(p, "aot_eager")
    check(step, p)
    with torch.no_grad():
        for parameter in p.decoder.parameters():
            parameter.mul_(1.25)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(step, p)


def test_a_decoder_without_kernels_is_one_call(device: torch.device) -> None:
    p = problem(Residual(3, 4)).to(device).require()
    check(compiled(p, "aot_eager"), p)


class Through(torch.nn.Module):
    def __init__(
        self, encoder: torch.nn.Module, decoder: torch.nn.Module, kind: type, **options: Any
    ) -> None:
        super().__init__()
        self.model = kind(encoder, decoder, latent_dim=3, **options).double()

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) * 2).sum()


@pytest.mark.filterwarnings("ignore:.*cannot be lowered")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (fastvae.HVAE, {"num_steps": 2, "on_divergence": "ignore"}),
        (fastvae.JacobianL1VAE, {"beta": 1.0, "gamma": 0.1}),
    ],
    ids=["flow", "jacobian"],
)
def test_models_of_a_decoder_that_is_read(kind: type, options: dict[str, Any]) -> None:
    """With noise that the graph draws."""
    torch.manual_seed(0)
    module = Through(torch.nn.Linear(4, 6), Residual(3, 4), kind, **options)
    x = torch.rand(5, 4, dtype=torch.float64)
    results = []
    for call in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        loss = call(x)
        results.append([loss, *torch.autograd.grad(loss, list(module.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)  # rounding in float64
