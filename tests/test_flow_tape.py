"""Flows that are written down after a few calls: the same results, for other numbers, and none where that cannot be."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_modules import READ, Plain, of
from network_problems import codes
from test_network_reading import made
from torch import Tensor, nn
from zoo import ZOO, is_installed, oracles, problem

from fastvae import ops, reference
from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood
from fastvae.network.cache import read_network
from fastvae.network.layers import Layer, layer_of
from fastvae.network.layers.base import MAKERS
from fastvae.network.tape import most_numbers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*cannot be lowered"),
    pytest.mark.filterwarnings("ignore:.*without a kernel"),
    pytest.mark.filterwarnings("ignore:.*are all in \\[0, 1\\]"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CALLS = 4
"""Of one form, after which it is written down."""


def sine() -> nn.Module:
    return made(of(lambda m, z: m.last((m.first(z) + m.first(z).cos()).sin())))


def start(z: Tensor, steps: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=z.dtype)

    found = {"z": z + draw(*z.shape), "rho": draw(*z.shape), "steps": 0.05 + 0.05 * draw(steps, z.shape[1])}
    found["alpha"] = 0.8 + 0.2 * draw(steps)
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def results(
    function: Callable[..., Any],
    module: nn.Module,
    given: dict[str, Tensor],
    likelihood: str | Likelihood = "bernoulli",
    outputs: slice = slice(None),
    x: Tensor | None = None,
) -> list[Tensor]:
    """Outputs, and the gradients of a combination of some of them to everything."""
    z, rho, steps, alpha = given.values()
    x = torch.full((len(z), 4), 0.3, dtype=z.dtype) if x is None else x
    found = function(module, z, rho, x, steps, alpha, likelihood)
    leaves = [*given.values(), *module.parameters(), *([x] if x.requires_grad else [])]
    total = sum(output.sin().sum() for output in found[outputs])
    return [*found, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


def both(module: nn.Module, given: dict[str, Tensor], **options: Any) -> None:
    ours = results(ops.hamiltonian_flow, module, given, **options)
    wanted = results(reference.hamiltonian_flow, module, given, **options)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def tapes_of(module: nn.Module, z: Tensor) -> Any:
    return read_network(module, z).sweeps.flow_tapes


def test_other_numbers_weights_and_data() -> None:
    module = sine()
    for seed in range(CALLS + 3):
        both(module, start(codes(5), seed=seed), x=torch.rand(5, 4, dtype=torch.float64))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.1)
    tapes = tapes_of(module, codes(5))
    assert len(tapes._tapes) == 1 and not tapes.reasons


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", Gaussian(0.3), "categorical"])
def test_every_head_and_gradients_to_the_data(likelihood: str | Likelihood) -> None:
    module, wants = sine(), likelihood != "categorical"
    if likelihood == "categorical":
        module = made(lambda: nn.Sequential(Plain(), nn.Mish(), nn.Linear(4, 256 * 2)))
    for seed in range(CALLS + 2):
        x = torch.rand(3, 4 if wants else 2, dtype=torch.float64).requires_grad_(wants)
        both(module, start(codes(3), seed=seed), likelihood=likelihood, x=x)
    assert len(tapes_of(module, codes(3))._tapes) == 1


def test_a_likelihood_that_changes_and_one_of_ones_own() -> None:
    class Own(Bernoulli):
        def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
            return 0.5 * super().log_prob(params, x)

    module = sine()
    for likelihood in (Gaussian(0.7), Gaussian(0.4), Own(), Bernoulli()):
        for seed in range(CALLS + 1):
            both(module, start(codes(3), seed=seed), likelihood=likelihood)
    assert len(tapes_of(module, codes(3))._tapes) == 4


def test_forms_beside_each_other() -> None:
    """Batches, numbers of steps and frozen weights in turn; more forms than are remembered."""
    module = sine()
    for seed in range(CALLS + 2):
        for batch in (1, 2, 3, 4, 5, 6):
            both(module, start(codes(batch), seed=seed))
        both(module, start(codes(3), steps=1, seed=seed))
        module.first.bias.requires_grad_(seed % 2 == 0)
        z, rho, steps, alpha = start(codes(3), seed=seed).values()
        outputs = ops.hamiltonian_flow(module, z, rho, torch.zeros(3, 4).double(), steps, alpha)
        assert outputs[0].requires_grad
        module.requires_grad_()
    tapes = tapes_of(module, codes())
    assert len(tapes._tapes) <= 8 and len(tapes._seen) <= 8


def test_cotangents_of_another_form() -> None:
    module = sine()
    for seed in range(CALLS + 1):
        both(module, start(codes(3), seed=seed))
    for outputs in (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 2), slice(1, 3), slice(None)):
        for seed in range(2):
            both(module, start(codes(3), seed=seed), outputs=outputs)
    assert "several forms" in tapes_of(module, codes(3)).reasons[0]


def run_by_tape() -> tuple[nn.Module, dict[str, Tensor], tuple[Tensor, ...]]:
    """A network, its inputs, and the outputs of a flow that was written down before."""
    module, given = sine(), start(codes(3))
    for _ in range(CALLS):
        both(module, given)
    z, rho, steps, alpha = given.values()
    return module, given, ops.hamiltonian_flow(module, z, rho, torch.zeros(3, 4).double(), steps, alpha)


def test_flows_that_nobody_walks_back_are_let_go() -> None:
    """Nothing is left behind without the collector, and they are not written down each time."""
    module, given = sine(), start(codes(3))
    z, rho, steps, alpha = given.values()
    x = torch.zeros(3, 4).double()

    def tensors() -> int:
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    counts = []
    for _ in range(4):
        gc.collect()
        gc.disable()
        try:
            before = tensors()
            for _ in range(6):
                ops.hamiltonian_flow(module, z, rho, x, steps, alpha)
            counts.append(tensors() - before)
        finally:
            gc.enable()
    assert max(counts[1:]) <= 2, counts
    both(module, given)


def test_a_graph_that_is_walked_twice() -> None:
    module, given, found = run_by_tape()
    total = sum(output.sum() for output in found)
    leaves = [*given.values(), *module.parameters()]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(torch.autograd.grad(total, given["z"], create_graph=True)[0].sum(), given["z"])


def test_a_weight_changed_before_the_way_back_is_seen() -> None:
    module, _given, found = run_by_tape()
    with torch.no_grad():
        module.first.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found[0].sum().backward()


def test_threads() -> None:
    module, failures = sine(), []
    wanted = [results(reference.hamiltonian_flow, module, start(codes(3), seed=seed)) for seed in range(4)]

    def work(seed: int) -> None:
        try:
            for _ in range(8):
                found = results(ops.hamiltonian_flow, module, start(codes(3), seed=seed))
                torch.testing.assert_close(found, wanted[seed], rtol=1e-10, atol=1e-12)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("foreign", [True, False])
def test_a_layer_that_looks_at_numbers_is_not_written_down(foreign: bool) -> None:
    """Whose rule would be another one for other numbers; and none of a user's own."""
    before = dict(MAKERS)

    @layer_of("exp2")
    class Doubling(Layer):
        def forward(self, point: Any) -> Any:
            x = point.values[self.x]
            return x if float(x.detach().sum()) > 1e9 else 2 * x

        def reverse(self, point: Any, dy: Any, grads: Any, products: Any) -> None:
            grads.add(self.x, 2 * dy)

        def tangent(self, point: Any, dots: Any) -> Any:
            return 2 * dots[self.x]

    try:
        module = made(of(lambda m, z: m.last(m.first(z).sin())))
        sweeps = read_network(module, codes()).sweeps
        layer = next(each for each in sweeps.layers if each.operation.kind == "sin")
        looking = Doubling(layer.operation, sweeps.program.is_active)
        sweeps.layers[sweeps.layers.index(layer)] = looking
        sweeps.backwards[sweeps.backwards.index(layer)] = looking
        doubled = nn.Sequential(module.first, nn.Identity(), module.last)
        sweeps._is_ours = not foreign
        for seed in range(CALLS + 1):
            given = start(codes(3), seed=seed)
            ours = results(ops.hamiltonian_flow, module, given)[:3]
            linear = nn.Sequential(doubled[0], _Twice(), doubled[2])
            torch.testing.assert_close(
                ours, results(reference.hamiltonian_flow, linear, given)[:3], rtol=1e-10, atol=1e-12
            )
        assert not sweeps.flow_tapes._tapes
        assert (
            not sweeps.flow_tapes._seen if foreign else "_local_scalar_dense" in sweeps.flow_tapes.reasons[0]
        )
    finally:
        MAKERS.clear()
        MAKERS.update(before)


class _Twice(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return 2 * h


QUICK = (
    "labels",
    "layernorm-mlp",
    "gru-loop",
    "film",
    "mean-and-log-scale",
    "groupnorm-silu-attention-spatial",
)


each_of_the_zoo = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[
                *([] if name in QUICK else [pytest.mark.slow]),
                pytest.mark.skipif(not is_installed(entry), reason=f"{entry.package} is not installed"),
            ],
        )
        for name, entry in ZOO.items()
        if not entry.heavy
    ],
)


@each_of_the_zoo
def test_flows_of_the_zoo(name: str) -> None:
    """Written down for one set of numbers and run for another."""
    p = problem(ZOO[name], batch=3)
    options = {"condition": p.condition[0]} if p.condition else {}

    def decode(z: Tensor) -> Tensor:
        return p.decoder(z, *p.condition)

    for seed in range(CALLS + 1):
        generator = torch.Generator().manual_seed(seed)
        z, rho = (torch.randn(p.z.shape, generator=generator).to(p.z).requires_grad_() for _ in range(2))
        steps = (0.02 + 0.03 * torch.rand(2, *p.z.shape[1:], generator=generator)).to(p.z).requires_grad_()
        alpha = (0.8 + 0.2 * torch.rand(2, generator=generator)).to(p.z).requires_grad_()
        leaves = [z, rho, steps, alpha, *(t for t in p.decoder.parameters() if t.requires_grad)]
        found = list(ops.hamiltonian_flow(p.decoder, z, rho, p.x, steps, alpha, p.likelihood, **options))
        if seed in (2, CALLS):
            with oracles.careful(p.decoder):
                wanted = oracles.flow(decode, z, rho, p.x, steps, alpha, p.likelihood)
                expected = oracles.gradients(wanted, leaves)
            gradients = oracles.gradients(found, leaves)
            torch.testing.assert_close([o.detach() for o in found], [o.detach() for o in wanted])
            largest = max(float(g.abs().max()) for g in expected if g.numel())
            for mine, theirs in zip(gradients, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10 * largest)
        else:
            oracles.gradients(found, leaves)
    try:
        network = read_network(p.decoder, p.z, condition=p.condition[0] if p.condition else None)
    except Exception:
        return  # in kernels of its own, or by autograd
    tapes = network.sweeps.flow_tapes
    if tapes._seen:  # by sweeps
        assert tapes._tapes, tapes.reasons


@each_of_the_zoo
def test_jacobians_of_the_zoo(name: str) -> None:
    p = problem(ZOO[name], batch=2)
    options = {"condition": p.condition[0]} if p.condition else {}

    def decode(z: Tensor) -> Tensor:
        times = len(z) // len(p.z)
        return p.decoder(z, *(c.repeat_interleave(times, 0) for c in p.condition))

    for seed in range(CALLS):
        z = torch.randn(p.z.shape, generator=torch.Generator().manual_seed(seed)).to(p.z).requires_grad_()
        leaves = [z, *(t for t in p.decoder.parameters() if t.requires_grad)]
        value = ops.jacobian_l1(p.decoder, z, "mean", **options)
        found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        if seed == CALLS - 1:
            with oracles.careful(p.decoder):
                exact = oracles.jacobian_l1(decode, z).mean()
                wanted = torch.autograd.grad(exact, leaves, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-12)
            largest = max(float(g.abs().max()) for g in wanted if g.numel())
            for mine, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10 * largest)
    try:
        network = read_network(p.decoder, p.z, condition=p.condition[0] if p.condition else None)
    except Exception:
        return
    tapes = network.sweeps.tapes
    if tapes._seen:
        assert tapes._tapes, tapes.reasons


def test_without_a_way_back() -> None:
    """Flows, forces and Jacobians of which no gradient is wanted, or that keep nothing."""
    module = sine()
    x = torch.rand(3, 4, dtype=torch.float64)
    for seed in range(CALLS + 2):
        given = start(codes(3), seed=seed)
        z, rho, steps, alpha = given.values()
        with torch.no_grad():
            ours = ops.hamiltonian_flow(module, z, rho, x, steps, alpha)
            wanted = reference.hamiltonian_flow(module, z, rho, x, steps, alpha)
            torch.testing.assert_close(list(ours), list(wanted), rtol=1e-10, atol=1e-12)
            for p in (1, 2):
                torch.testing.assert_close(
                    ops.jacobian_l1(module, z, "none", p=p), reference.jacobian_l1(module, z, "none", p=p)
                )
        with torch.no_grad():
            found = ops.log_px_and_force(module, z.detach(), x)
        torch.testing.assert_close(found, reference.log_px_and_force(module, z.detach(), x))
        weight, leaves = torch.rand(3, dtype=torch.float64), [z, *module.parameters()]
        gradients = [
            torch.autograd.grad(
                jacobian(module, z, "none"), leaves, weight, allow_unused=True, materialize_grads=True
            )
            for jacobian in (ops.jacobian_l1, reference.jacobian_l1)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.1)
    tapes = read_network(module, codes(3)).sweeps.tapes
    kinds = {str(form).count("values") + 2 * str(form).count("gradients") for form in tapes._tapes}
    assert len(tapes._tapes) >= 5 and kinds == {0, 1, 2} and not tapes.reasons


def test_a_long_walk_is_not_written_down() -> None:
    """Its recorder would hold every evaluation, though the walk itself holds one."""
    module = sine()
    sweeps = read_network(module, codes(3)).sweeps
    sweeps.kept_numbers = most_numbers(sweeps.device) // 10
    for steps in (4, 2):  # 15 and 9 tenths
        for _ in range(CALLS):
            given = start(codes(3), steps=steps)
            with torch.no_grad():
                ops.hamiltonian_flow(
                    module,
                    *(given[k] for k in ("z", "rho")),
                    torch.zeros(3, 4).double(),
                    given["steps"],
                    given["alpha"],
                )
        assert len(sweeps.tapes._tapes) == (steps == 2)


def test_modules_are_let_go_by_their_tapes() -> None:
    module = made(READ["a closure"])
    for seed in range(CALLS + 1):
        both(module, start(codes(3), seed=seed))
    one = weakref.ref(module)
    del module
    gc.collect()
    assert one() is None
