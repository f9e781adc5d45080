"""Decoders without kernels under torch.compile: their sweeps are one call of its graph."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flow_problems import Residual
from torch import Tensor, nn

import fastvae
from fastvae import ops
from fastvae.likelihoods import Gaussian, Laplace, Likelihood
from fastvae.ops import _in_graphs

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel")


class Own(Likelihood):
    """A user's, which has no kernel."""

    def __init__(self, power: float) -> None:
        self.power = power

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return -((params - x).square() + 1).pow(self.power).flatten(1).sum(1)


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(z)) * c)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(batch: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    found = {
        "z": torch.randn(batch, 3, generator=g, dtype=torch.float64),
        "rho": torch.randn(batch, 3, generator=g, dtype=torch.float64),
        "x": torch.rand(batch, 4, generator=g, dtype=torch.float64),
        "step_size": torch.full((2, 3), 0.1, dtype=torch.float64),
        "alpha": torch.tensor([0.9, 1.0], dtype=torch.float64),
    }
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


Step = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def flow(decoder: nn.Module, given: dict[str, Tensor], **options: Any) -> Tensor:
    z, rho, log_px = ops.hamiltonian_flow(decoder, *(t * 1 for t in given.values()), **options)
    return (z.square().sum(1) + torch.sin(rho).sum(1) + log_px).sum()


def force(decoder: nn.Module, given: dict[str, Tensor], **options: Any) -> Tensor:
    log_px, force = ops.log_px_and_force(decoder, given["z"] * 1, given["x"], **options)
    return (log_px + torch.sin(force).sum(1)).sum()


def jacobian(decoder: nn.Module, given: dict[str, Tensor], **options: Any) -> Tensor:
    options.pop("likelihood", None)
    return ops.jacobian_l1(decoder, given["z"] * 1, **options) ** 2


STEPS: dict[str, Step] = {"flow": flow, "force": force, "jacobian": jacobian}


def gradients(loss: Tensor, decoder: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = [*given.values(), *decoder.parameters()]
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def compare(step: Step, decoder: nn.Module, given: dict[str, Tensor], compiled: Any, **options: Any) -> None:
    mine, theirs = compiled(decoder, given, **options), step(decoder, given, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for left, right in zip(gradients(mine, decoder, given), gradients(theirs, decoder, given), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual(3, 4).double()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STEPS)
def test_one_graph(name: str, backend: str) -> None:
    step, decoder, given = STEPS[name], residual(), inputs()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    compare(step, decoder, given, compiled)
    # Steps of an optimiser change what it computes; numbers are not compiled in.
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(step, decoder, given, compiled)
    with torch.no_grad():
        torch.testing.assert_close(compiled(decoder, given), step(decoder, given))


@pytest.mark.parametrize("name", STEPS)
def test_a_force_of_kernels_networks_too(name: str) -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 4)).double()
    compare(STEPS[name], decoder, inputs(), torch.compile(STEPS[name], fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("name", STEPS)
def test_batches_of_any_size(name: str) -> None:
    step, decoder = STEPS[name], residual()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    compare(step, decoder, inputs(6), compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 3):
            compare(step, decoder, inputs(batch), compiled)


@pytest.mark.parametrize("name", STEPS)
def test_a_condition(name: str) -> None:
    torch.manual_seed(0)
    step, decoder, given = STEPS[name], Conditioned().double(), inputs()
    condition = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compare(step, decoder, given, compiled, condition=condition)
    (mine,) = torch.autograd.grad(compiled(decoder, given, condition=condition), condition)
    (theirs,) = torch.autograd.grad(step(decoder, given, condition=condition), condition)
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_a_condition_that_is_not_used() -> None:
    class Ignores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = residual()

        def forward(self, z: Tensor, c: Tensor) -> Tensor:
            out: Tensor = self.inner(z)
            return out

    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    compare(flow, Ignores(), inputs(), compiled, condition=torch.zeros(5, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["flow", "force"])
@pytest.mark.parametrize(
    "likelihood",
    ["gaussian", Gaussian(0.3), Laplace(0.5), Own(0.7)],
    ids=["name", "gaussian", "laplace", "own"],
)
def test_likelihoods(name: str, likelihood: Any) -> None:
    step = STEPS[name]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compare(step, residual(), inputs(), compiled, likelihood=likelihood)


def test_another_likelihood_is_compiled_anew() -> None:
    decoder, given = residual(), inputs()
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for scale in (0.3, 0.6, 0.3):
        compare(flow, decoder, given, compiled, likelihood=Gaussian(scale))
    own = Own(0.5)
    compare(flow, decoder, given, compiled, likelihood=own)
    own.power = 0.7
    compare(flow, decoder, given, compiled, likelihood=own)


def test_a_forward_that_asks_for_its_batch() -> None:
    """It is read for batches up to 65, and compared with the module for larger ones."""

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(3, 4), nn.Parameter(torch.ones(1, 4))

        def forward(self, z: Tensor) -> Tensor:
            rows = self.table.repeat(int(z.shape[0]), 1)
            return self.linear(z) + torch.sin(rows * z[:, :1])

    torch.manual_seed(0)
    decoder = Repeats().double()
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for batch in (5, 70, 130):
        compare(flow, decoder, inputs(batch), compiled)


def test_options_of_the_jacobian() -> None:
    decoder, given = residual(), inputs()

    def step(decoder: nn.Module, given: dict[str, Tensor], **options: Any) -> Tensor:
        return ops.jacobian_l1(decoder, given["z"], **options).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for options in (
        {"reduction": "none"},
        {"reduction": "sum", "output": "sigmoid"},
        {"latents": [0, 2], "p": 2},
    ):
        compare(step, decoder, given, compiled, **options)
    with pytest.raises(Exception, match="latents"):
        compiled(decoder, given, latents=[0, 0])


def test_a_changed_decoder_is_read_again() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 4), 0.5

        def forward(self, z: Tensor) -> Tensor:
            y = self.linear(z)
            return y + self.scale * torch.sin(y)

    torch.manual_seed(0)
    decoder, given = Scaled().double(), inputs()
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    compare(flow, decoder, given, compiled)
    decoder.scale = 2.0
    compare(flow, decoder, given, compiled)
    decoder.linear = nn.Linear(3, 4).double()
    compare(flow, decoder, given, compiled)


def test_what_cannot_be_part_of_a_graph_breaks_it_and_says_why() -> None:
    decoder, given = residual(), inputs()
    weight = torch.ones(5, 4, dtype=torch.float64)
    compiled = torch.compile(flow, backend="aot_eager")
    compare(flow, decoder, given, compiled, weight=weight)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"hamiltonian_flow: .* it is given weights"):
        torch.compile(flow, fullgraph=True, backend="aot_eager")(decoder, given, weight=weight)

    class Branch(Residual):
        def forward(self, z: Tensor) -> Tensor:
            y: Tensor = super().forward(z)
            return y if bool(z.sum() > 0) else 2 * y

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="hamiltonian_flow: the decoder is swept outside"):
        torch.compile(flow, fullgraph=True, backend="aot_eager")(Branch(3, 4).double(), given)


@pytest.mark.slow
def test_memory_that_a_compiler_uses_again() -> None:
    """Inductor writes over what it has computed, before the call and after it, once nothing in its graph reads it."""

    def step(decoder: nn.Module, given: dict[str, Tensor]) -> Tensor:
        z, rho = torch.sin(given["z"]) * 1.5, torch.cos(given["rho"]) + 0.5
        x = torch.sigmoid(given["x"] * 2)
        end, momentum, log_px = ops.hamiltonian_flow(decoder, z, rho, x, given["step_size"], given["alpha"])
        log_px_2, force = ops.log_px_and_force(decoder, end * 2, x)
        return (
            (torch.tanh(end * 3) + torch.exp(-momentum.square()) + force.sin()).sum()
            + log_px.sum()
            + log_px_2.sum()
        )

    compare(step, residual(), inputs(64), torch.compile(step, fullgraph=True))


@pytest.mark.parametrize("name", STEPS)
def test_in_inference_mode(name: str) -> None:
    decoder, given = residual(), inputs()
    compiled = torch.compile(STEPS[name], fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(decoder, given), STEPS[name](decoder, given))


def test_no_steps_at_all() -> None:
    """Gradients are then the cotangents themselves, which a graph must not be given back."""

    def still(decoder: nn.Module, given: dict[str, Tensor]) -> Tensor:
        few = {**given, "step_size": given["step_size"][:0], "alpha": given["alpha"][:0]}
        return flow(decoder, few)

    compare(still, residual(), inputs(), torch.compile(still, fullgraph=True, backend="aot_eager"))


def test_torch_export_refuses_a_name_of_this_process() -> None:
    """A strict one, which goes through Dynamo."""

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = residual()

        def forward(self, z: Tensor, rho: Tensor, x: Tensor, step_size: Tensor, alpha: Tensor) -> Tensor:
            return ops.hamiltonian_flow(self.decoder, z, rho, x, step_size, alpha)[0]

    with pytest.raises(Exception, match=r"torch.export would save a call|UnsupportedLayer"):
        torch.export.export(Flow(), tuple(inputs().values()), strict=True)


def test_graphs_live_as_long_as_their_results() -> None:
    """One for each forward pass whose backward pass may come; a pass more is evaluated again."""
    decoder, given = residual(), inputs()
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    wanted = gradients(flow(decoder, given), decoder, given)
    gc.collect()
    before = len(_in_graphs._graphs)
    losses = [compiled(decoder, given) for _ in range(3)]
    assert len(_in_graphs._graphs) == before + 3
    del losses[1:]
    gc.collect()
    assert len(_in_graphs._graphs) == before + 1
    leaves = [*given.values(), *decoder.parameters()]
    for keeps in (True, True, False):
        found = torch.autograd.grad(losses[0], leaves, retain_graph=keeps)
        for left, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)
        assert len(_in_graphs._graphs) == before
    with torch.no_grad():
        compiled(decoder, given)
    assert len(_in_graphs._graphs) == before


@pytest.mark.parametrize(
    "wrong", [{"likelihood": "nothing"}, {"likelihood": 3}, {"memory": "much"}, {"decoder": 5}], ids=str
)
def test_wrong_arguments_are_refused_as_ever(wrong: dict[str, Any]) -> None:
    """A number in place of an object was taken for its address."""
    given, step = inputs(), force if "decoder" in wrong else flow
    options = {"decoder": residual(), "given": given, **wrong}
    with pytest.raises((TypeError, ValueError)) as expected:
        step(**options)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        torch.compile(step, backend="aot_eager")(**options)


def test_a_name_of_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"fastvae::swept: call: expected a name that torch.compile .* got 'it'"
    ):
        torch.ops.fastvae.swept([torch.zeros(1)], "it", [0])


def test_operators_of_pytorch() -> None:
    """opcheck of the call as a graph has it."""
    decoder, given = residual(), inputs()
    found: list[tuple[Any, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*arguments: Tensor) -> Any:
            class Watch(torch.fx.Interpreter):
                def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                    if "swept" in str(target):
                        found.append(args)
                    return super().call_function(target, args, kwargs)

            return Watch(graph).run(*arguments)

        return run

    torch.compile(flow, fullgraph=True, backend=backend)(decoder, given)
    ((tensors, call, needs),) = found
    tensors = [
        tensor.detach().requires_grad_(bool(need)) for tensor, need in zip(tensors, needs, strict=True)
    ]
    # Its last result is another number each time, as its purpose is.
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.fastvae.swept, (tensors, call, needs), test_utils=checks)


@pytest.mark.slow
def test_models_train_and_a_cache_on_disk_is_no_danger() -> None:
    """Compilers keep graphs on disk, and another process has another decoder under the same shapes."""
    code = """
import sys, torch
sys.path[:0] = {path!r}
from flow_problems import Residual
import fastvae

torch.manual_seed({seed})
decoder = Residual(3, 4).double()
if {seed}:
    decoder = torch.nn.Sequential(decoder, torch.nn.Identity())
model = fastvae.HVAE(torch.nn.Linear(4, 6).double(), decoder, num_steps=2, on_divergence="ignore", latent_dim=3)
x = torch.rand(5, 4, dtype=torch.float64)
noise = model.draw_noise(model.encode(x)[0]).detach()
mine, theirs = torch.compile(model, fullgraph=True)(x, noise=noise), model(x, noise=noise)
torch.testing.assert_close(mine, theirs)
leaves = list(model.parameters())
for a, b in zip(*(torch.autograd.grad(each.sum(), leaves) for each in (mine, theirs))):
    torch.testing.assert_close(a, b)
"""
    for seed in (0, 1):
        done = subprocess.run(
            [sys.executable, "-c", code.format(path=[p for p in sys.path if p], seed=seed)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert fastvae.__version__
