"""Random graphs of layers through the sweeps of fastvae.network: the flow and the Jacobian against the reference.

In float64, with the gradients to everything. A sample's result does not depend on its batch; now and then both methods
are held against central differences, too.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from network_problems import (
    assert_all_near,
    by_autograd,
    check_rules,
    flow_by_sweeps,
    grads,
    kinds,
    leaves,
    names_of,
)
from torch import Tensor, nn

from fastvae import reference
from fastvae.likelihoods import Bernoulli, Gaussian
from fastvae.network.cache import ReadNetwork, read_network
from fastvae.network.jacobian import Plan, jacobian_l1

from .graph_layers import drawn_graph

CASES = 8
# Both sides add the same numbers in another order; deep graphs make rounding larger, and a lost term shows at 1e-2.
NEAR = 1e-8
FAR = 1e6


def run_case(seed: int) -> str:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    latents, batch = rng.randint(1, 4), rng.choice([1, 2, 5])
    module = drawn_graph(rng, (latents,)).double().eval()
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for parameter in module.parameters():
            # As after training: a new norm's rows have a mean of zero, but for rounding, which may be a kink's place.
            parameter.add_(0.1 * torch.randn_like(parameter))
    for parameter in module.parameters():
        parameter.requires_grad_(rng.random() < 0.85)
    z = torch.randn(batch, latents, dtype=torch.float64)
    if not module(z.clone().requires_grad_()).requires_grad:
        return "no gradient to z"
    network = read_network(module, z)
    check_rules(network, module, z, NEAR)
    agrees_in_jacobian(rng, network, module, z)
    agrees_in_flow(rng, network, module, z)
    return "agreed, in part by autograd" if by_autograd(network) else "agreed"


def agrees_in_jacobian(rng: random.Random, network: ReadNetwork, module: nn.Module, z: Tensor) -> None:
    p, chosen = rng.choice([1, 2]), rng.sample(range(z.shape[1]), rng.randint(0, z.shape[1]))
    chosen = chosen if rng.random() < 0.5 else list(range(z.shape[1]))
    results = []
    for by_sweeps in (True, False):
        point = z.detach().clone().requires_grad_()
        if by_sweeps:
            value = jacobian_l1(Plan(network.sweeps, network.tensors, point, chosen, p), point, "none")
        else:
            value = reference.jacobian_l1(module, point, "none", latents=chosen, p=p)
        weights = torch.linspace(0.5, 1.5, len(z)).to(z)
        # Where an entry is next to zero its sign is rounding's.
        found = [] if p == 1 and has_kink(module, z) else grads([value], leaves(module, point), [weights])
        results.append([value, *found])
    names = names_of(module, f"Jacobian, p = {p}: value", "z")
    assert_all_near(*results, names[: len(results[0])], NEAR)
    alone = jacobian_l1(Plan(network.sweeps, network.tensors, z[-1:], chosen, p), z[-1:], "none")
    torch.testing.assert_close(results[0][0][-1:], alone, rtol=1e-10, atol=1e-12)
    if rng.random() < 0.2 and not stops(network):
        step = 1e-6 * torch.eye(z.shape[1]).to(z)
        with torch.no_grad():
            columns = [(module(z + step[i]) - module(z - step[i])) / 2e-6 for i in chosen]
        total = sum((column.abs() ** p).sum(1) for column in columns) if chosen else z.new_zeros(len(z))
        torch.testing.assert_close(results[0][0].detach(), total, rtol=1e-4, atol=1e-4)


def stops(network: ReadNetwork) -> bool:
    """Whether differences see more than derivatives do."""
    return "detach" in kinds(network)


def has_kink(module: nn.Module, z: Tensor) -> bool:
    """Whether an entry of the Jacobian is next to zero."""
    point = z.detach().clone().requires_grad_()
    columns = module(point).unbind(1)
    sizes = torch.stack(
        [torch.autograd.grad(c.sum(), point, retain_graph=True)[0].abs() for c in columns if c.requires_grad]
    )
    present = sizes[sizes > 0]
    return bool(len(present)) and float(present.min() / present.max()) < 1e-9


def agrees_in_flow(rng: random.Random, network: ReadNetwork, module: nn.Module, z: Tensor) -> None:
    like = rng.choice([Bernoulli(), Gaussian(0.7)])
    steps = rng.randint(0, 3)
    with torch.no_grad():
        x = torch.rand_like(module(z))
    given: dict[str, Tensor] = {
        "z": z,
        "rho": torch.randn_like(z),
        "x": x,
        "steps": 0.02
        + 0.05 * torch.rand(rng.choice([(steps, z.shape[1]), (steps, 1), (z.shape[1],), ()])).to(z),
        "alpha": 0.7 + 0.3 * torch.rand(steps).to(z),
    }
    # A trajectory that runs away, or is nearly chaotic, makes of a rounding whatever there is.
    for _ in range(6):
        point = z.clone().requires_grad_()
        ends = reference.hamiltonian_flow(module, point, *list(given.values())[1:], like)[:3]
        (slope,) = torch.autograd.grad(sum(end.sum() for end in ends[:2]), point)
        if all(bool((end.abs() < FAR).all()) for end in (*ends, 1e3 * slope)):
            break
        given["steps"] = 1e-3 * given["steps"]
    results: list[Any] = []
    for by_sweeps in (True, False):
        mine = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
        if by_sweeps:
            outputs = flow_by_sweeps(network, *mine.values(), like, rng.choice(["store", "recompute"]))
        else:
            outputs = reference.hamiltonian_flow(module, *mine.values(), like)
        seeds = [torch.full_like(output, 0.3) + 0.1 * output.detach() for output in outputs]
        results.append([*outputs, *grads(outputs, leaves(module, *mine.values()), seeds)])
    names = names_of(module, "z_K", "rho_K", "log_px", *given)
    assert_all_near(*results, names, NEAR)
    first = {name: tensor[:1] if name in ("z", "rho", "x") else tensor for name, tensor in given.items()}
    for whole, alone in zip(
        results[0][:3], flow_by_sweeps(network, *first.values(), like, "store"), strict=True
    ):
        torch.testing.assert_close(whole[:1].detach(), alone.detach(), rtol=1e-9, atol=1e-9)
    if rng.random() < 0.2 and not stops(network):
        along = torch.randn_like(z)

        def log_px(z: Tensor) -> Tensor:
            return reference.hamiltonian_flow(module, z, *list(given.values())[1:], like)[2]

        with torch.no_grad():
            slope = (log_px(z + 1e-6 * along) - log_px(z - 1e-6 * along)) / 2e-6
        point = z.clone().requires_grad_()
        value = flow_by_sweeps(network, point, *list(given.values())[1:], like, "store")[2]
        (found,) = torch.autograd.grad(value.sum(), point)
        error = abs(float((found * along).sum() - slope.sum()))
        assert error <= 1e-4 * (1 + abs(float(slope.sum()))) and math.isfinite(error), error
