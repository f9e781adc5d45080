"""Small networks through the sweeps of fastvae.network, and their comparison with PyTorch's autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from flow_problems import assert_near, cotangents
from jacobian_problems import entries
from torch import Tensor, nn

from fastvae import reference
from fastvae._second_order import twice_differentiable
from fastvae.likelihoods import Gaussian, Likelihood, resolve
from fastvae.network.cache import ReadNetwork, read_network
from fastvae.network.flow import hamiltonian_flow
from fastvae.network.heads import make_head
from fastvae.network.jacobian import Plan, jacobian_l1
from fastvae.network.layers import Products
from fastvae.network.sweeps import Inputs

# Both sides sum a few hundred products in another order; a term left out shows at 1e-2.
NEAR = 1e-11
GAUSSIAN = Gaussian(0.7)


def codes(batch: int = 3, latents: int = 3, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, latents, generator=generator, dtype=torch.float64)


def drawn(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kinds(network: ReadNetwork) -> list[str]:
    """The operators that depend on z, in order."""
    return [operation.kind for operation in network.sweeps.program.active]


def by_autograd(network: ReadNetwork) -> list[str]:
    """Those that no rule took."""
    return [layer.operation.kind for layer in network.sweeps.by_autograd]


def leaves(module: nn.Module, *others: Tensor) -> list[Tensor]:
    """Everything that a gradient may be asked for."""
    return [*others, *(p for p in module.parameters() if p.requires_grad)]


def grads(outputs: Any, wanted: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
    pairs = [(output, seed) for output, seed in zip(outputs, seeds, strict=True) if output.requires_grad]
    return list(
        torch.autograd.grad(
            [pair[0] for pair in pairs], wanted, [pair[1] for pair in pairs], allow_unused=True,
            materialize_grads=True,
        )
    )  # fmt: skip


def assert_all_near(found: Any, expected: Any, names: Iterator[str] | list[str], tolerance: float) -> None:
    """Each within the tolerance of its own size, or of a thousandth of the largest one's."""
    scale = max((float(e.detach().abs().max()) for e in expected if e.numel()), default=1.0)
    for name, a, e in zip(names, found, expected, strict=True):
        size = max(float(e.detach().abs().max()) if e.numel() else 0.0, 1e-3 * scale, 1e-3)
        assert_near(a.detach() / size, e.detach() / size, tolerance, name)


def names_of(module: nn.Module, *others: str) -> list[str]:
    return [*others, *(name for name, p in module.named_parameters() if p.requires_grad)]


def check_rules(network: ReadNetwork, module: nn.Module, z: Tensor, tolerance: float = NEAR) -> None:
    """Forward, reverse, tangent and bend against reverse over reverse: the gradient of <w, y> + <u, J^T v>."""
    sweeps = network.sweeps
    point = z.detach().clone().requires_grad_()
    with twice_differentiable():
        own = module(point)
    v, w, u = drawn(own.shape, 1), drawn(own.shape, 2), drawn(z.shape, 3)
    (pulled,) = torch.autograd.grad(own, point, v, create_graph=True)
    zeros = torch.zeros_like(own, requires_grad=True)
    (linear,) = torch.autograd.grad(own, point, zeros, create_graph=True)
    pushed = torch.zeros_like(own)
    if linear.requires_grad:
        (pushed,) = torch.autograd.grad(linear, zeros, u, retain_graph=True)
    wanted = grads([own, pulled], leaves(module, point), [w, u])
    inputs = Inputs(sweeps, z, network.tensors)
    with torch.no_grad():
        passive = inputs.detached()
        at = sweeps.forward(passive, z, inputs.wanted)
        dz, cotangents_of = sweeps.reverse(at, v)
        dots = sweeps.tangent(at, u)
        moved = dots[sweeps.program.output]
        found: dict[int, Tensor] = {}
        products = Products(passive, inputs.wanted, found)
        gradients = sweeps.adjoint(at, dots, cotangents_of, w, products)
        of_z = gradients.pop(0)
        for index, gradient in gradients.items():
            products.put(index, gradient)
        products.finish()
    trained = leaves(module)
    given = [(inputs.passive[index], gradient) for index, gradient in found.items()]
    of_leaves = [torch.zeros_like(leaf) for leaf in trained]
    if given and trained:
        of_leaves = grads([pair[0] for pair in given], trained, [pair[1] for pair in given])
    results = [sweeps.output(at), dz, torch.zeros_like(own) if moved is None else moved]
    assert_all_near(results, [own, pulled, pushed], ["output", "reverse", "tangent"], tolerance)
    assert_all_near([of_z, *of_leaves], wanted, names_of(module, "z"), tolerance)


def check_jacobian(network: ReadNetwork, module: nn.Module, z: Tensor, p: int) -> None:
    """Value and gradients, all latents at once in front of one forward sweep, against the reference."""

    def with_gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        point = z.detach().clone().requires_grad_()
        value = function(point)
        return [value, *grads([value], leaves(module, point), [torch.linspace(0.5, 1.5, len(z)).to(z)])]

    latents = list(range(z.shape[1]))
    found = with_gradients(
        lambda point: jacobian_l1(Plan(network.sweeps, network.tensors, point, latents, p), point, "none")
    )
    try:
        wanted = with_gradients(lambda point: reference.jacobian_l1(module, point, "none", p=p))
    except RuntimeError as error:
        # From torch 2.14 on: the reference's p = 2 takes a third derivative, which InstanceNorm then refuses.
        if "3rd+ order" not in str(error):
            raise
        wanted = with_gradients(lambda point: entries(module, point, p))
    names = names_of(module, f"p = {p}: value", f"p = {p}: z")
    assert_all_near(found, wanted, names, 10 * NEAR)


def flow_by_sweeps(
    network: ReadNetwork, z: Tensor, rho: Tensor, x: Tensor, steps: Tensor, alpha: Tensor,
    likelihood: Likelihood, memory: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = Inputs(network.sweeps, z, network.tensors)
    steps = reference.expand_step_size(steps, len(alpha), z.shape[1], z)
    found = hamiltonian_flow(
        network.sweeps, inputs, make_head(likelihood, x, z), z, rho, steps, alpha, memory == "store"
    )
    return found[:3]


def check_flow(
    network: ReadNetwork,
    module: nn.Module,
    z: Tensor,
    memory: str,
    likelihood: str | Likelihood = GAUSSIAN,
) -> None:
    """Results and the gradients to everything, against the reference."""
    like = resolve(likelihood)
    with torch.no_grad():
        shape = module(z).shape
    given = {
        "z": 0.7 * z,
        "rho": 0.5 * drawn(z.shape, 5),
        "x": 0.3 * drawn(shape, 6),
        "steps": 0.05 + 0.02 * drawn((2, z.shape[1]), 7).abs(),
        "alpha": torch.tensor([0.9, 0.8], dtype=z.dtype),
    }
    results = []
    for by_sweeps in (True, False):
        mine = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
        if by_sweeps:
            outputs = flow_by_sweeps(network, *mine.values(), like, memory)
        else:
            outputs = reference.hamiltonian_flow(module, *mine.values(), like)
        results.append([*outputs, *grads(outputs, leaves(module, *mine.values()), cotangents(outputs))])
    names = names_of(module, "z_K", "rho_K", "log_px", *given)
    assert_all_near(*results, names, 10 * NEAR)


def check_network(module: nn.Module, z: Tensor) -> ReadNetwork:
    """All of the above; returns what was read."""
    network = read_network(module, z)
    check_rules(network, module, z)
    for p in (1, 2):
        check_jacobian(network, module, z, p)
    for memory in ("store", "recompute"):
        check_flow(network, module, z, memory)
    return network
