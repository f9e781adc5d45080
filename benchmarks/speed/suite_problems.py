"""What the operators' suite times: every public operator at three sizes, and sweeps of single numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import ops, reference
from fastvae.architectures import dcgan_decoder, jacobian_l1_decoder

from . import common, floors, flow, flow_rivals, jacobian
from . import suite_rivals as rivals
from .networks import mlp, softplus_mlp
from .suite_problem import BACKWARD, COMPILED, EAGER, FAIR, FORWARD, OURS, Cost, Problem
from .suite_rivals import Function

SIZES = ("small", "paper", "large")
FLOAT = 4
"""bytes"""


def bare(function: Callable[..., Any]) -> Function:
    """A function of tensors alone in the form that takes a network too."""
    return lambda network, *inputs: function(*inputs)


def differentiable(device: torch.device, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape).to(device).requires_grad_() for shape in shapes)


def layers_of(network: nn.Sequential, latent_dim: int, device: torch.device) -> list[floors.Product]:
    """Of one sample, so that the peak of memory before a measurement stays low."""
    return floors.products(network, torch.zeros(1, latent_dim, device=device))


FLOWS = {
    "small": next(case for case in flow.cases(quick=False) if case.key == "small"),
    "paper": next(case for case in flow.cases(quick=False) if case.key == "conv"),
    "large": flow.Case(
        "large",
        "64-1024-1024-3072, batch 256, K = 10",
        lambda: softplus_mlp(64, 1024, 1024, 3072),
        64,
        256,
        10,
        0,
    ),
}


def flow_problem(case: flow.Case, device: torch.device) -> Problem:
    p = flow.Problem(case, device)
    forces = case.num_steps + 1
    layers = layers_of(p.decoder, case.latent_dim, device)
    forward = case.batch * 2 * forces * sum(layer.operations for layer in layers)
    backward = case.batch * floors.second_order_operations(layers, forces)
    return Problem(
        case.title,
        p.decoder,
        (p.z, p.rho, p.x, p.step_size, p.alpha),
        {
            OURS: rivals.flow_loss(ops.hamiltonian_flow),
            EAGER: rivals.flow_loss(reference.hamiltonian_flow_2k),
            FAIR: rivals.flow_loss(reference.hamiltonian_flow),
            COMPILED: rivals.flow_loss(flow_rivals.functional_flow),
        },
        rivals.flow_loss(reference.hamiltonian_flow),
        {FORWARD: Cost(forward), BACKWARD: Cost(backward)},
        flow.TOLERANCE,
        jax_flow=True,
    )


def hamiltonian_flow(size: str, device: torch.device) -> Problem:
    return flow_problem(FLOWS[size], device)


ELEMENTWISE = {"small": (16, 2), "paper": (100, 64), "large": (32768, 256)}
"""[B, d]: of the flow's small and paper sizes, and beyond every cache"""


def leapfrog_kick_drift(size: str, device: torch.device) -> Problem:
    shape = ELEMENTWISE[size]
    inputs = differentiable(device, shape, shape, shape, shape[1:])
    tensor = FLOAT * shape[0] * shape[1]
    return Problem(
        f"[{shape[0]}, {shape[1]}]",
        nn.Identity(),
        inputs,
        {
            OURS: bare(ops.leapfrog_kick_drift),
            EAGER: bare(reference.leapfrog_kick_drift),
            FAIR: rivals.kick_drift,
        },
        bare(reference.leapfrog_kick_drift),
        # Reads 3 and writes 2; then reads 2 gradients, rho and force, and writes 2: that of z is one it was given.
        {FORWARD: Cost(bytes=5 * tensor), BACKWARD: Cost(bytes=(5 + 6) * tensor)},
        jax=reference.leapfrog_kick_drift,
    )


def leapfrog_kick_temper(size: str, device: torch.device) -> Problem:
    shape = ELEMENTWISE[size]
    inputs = differentiable(device, shape, shape, shape[1:], ())
    tensor = FLOAT * shape[0] * shape[1]
    return Problem(
        f"[{shape[0]}, {shape[1]}]",
        nn.Identity(),
        inputs,
        {
            OURS: bare(ops.leapfrog_kick_temper),
            EAGER: bare(reference.leapfrog_kick_temper),
            FAIR: rivals.kick_temper,
        },
        bare(reference.leapfrog_kick_temper),
        {FORWARD: Cost(bytes=3 * tensor), BACKWARD: Cost(bytes=(3 + 5) * tensor)},
        jax=reference.leapfrog_kick_temper,
    )


def gaussian_kl(size: str, device: torch.device) -> Problem:
    shape = ELEMENTWISE[size]
    tensor = FLOAT * shape[0] * shape[1]
    return Problem(
        f"[{shape[0]}, {shape[1]}] to the standard normal",
        nn.Identity(),
        differentiable(device, shape, shape),
        {OURS: bare(ops.gaussian_kl), EAGER: rivals.distributions_kl, FAIR: bare(reference.gaussian_kl)},
        bare(reference.gaussian_kl),
        {FORWARD: Cost(bytes=2 * tensor), BACKWARD: Cost(bytes=(2 + 4) * tensor)},
        jax=rivals.jax_kl,
    )


DECODERS: dict[str, tuple[str, Callable[[], nn.Sequential], int]] = {
    "small": ("10-64-64-64, batch 16", lambda: mlp(10, 64, 64, 64), 16),
    "paper": ("the paper's convolutional, 1x64x64, batch 64", jacobian_l1_decoder, 64),
    "large": ("the paper's convolutional, 3x64x64, batch 128", lambda: jacobian_l1_decoder(3), 128),
}


def jacobian_l1(size: str, device: torch.device) -> Problem:
    title, decoder, batch = DECODERS[size]
    network, z = jacobian.problem(jacobian.Case(size, title, decoder, 10, batch, 0), device)
    layers = layers_of(network, 10, device)
    # Tangents start at the second layer: those of the first are its columns.
    forward = z.numel() * sum(layer.operations for layer in layers[1:])
    return Problem(
        title,
        network,
        (z,),
        {OURS: ops.jacobian_l1, EAGER: reference.jacobian_l1, FAIR: jacobian.forward_mode},
        reference.jacobian_l1,
        {FORWARD: Cost(forward), BACKWARD: Cost(z.numel() * floors.tangent_operations(layers))},
        # An entry so near zero that float32 loses its sign moves a gradient by its share.
        1e-3,
        jax=rivals.jax_jacobian(network),
    )


LAYERS = {"small": (32, 32, 1, 64, 64), "paper": (256, 64, 16, 784, 400), "large": (1024, 128, 1, 784, 1024)}
"""N, M, T, in and out; the paper's draws S are the T of a decoder's layers"""


def grad_dot_problem(
    samples: int, others: int, terms: int, inner: int, columns: int, device: torch.device
) -> Problem:
    inputs = differentiable(
        device,
        (samples, terms, inner),
        (samples, terms, columns),
        (others, terms, inner),
        (others, terms, columns),
    )
    layer = floors.InfluenceLayer(terms, inner, columns, first=True)
    operations = floors.contraction_operations(layer, samples, others)
    moved = sum(tensor.nbytes for tensor in inputs) + FLOAT * samples * others
    return Problem(
        f"{inner} to {columns}, T = {terms}, {samples} x {others}",
        nn.Identity(),
        inputs,
        {OURS: bare(ops.grad_dot), EAGER: rivals.materialised, FAIR: bare(reference.grad_dot)},
        bare(reference.grad_dot),
        # The gradient to each of the two factors costs as much as the product.
        {FORWARD: Cost(operations, moved), BACKWARD: Cost(3 * operations, 3 * moved)},
        1e-4,
        jax=rivals.jax_grad_dot,
    )


def grad_dot(size: str, device: torch.device) -> Problem:
    return grad_dot_problem(*LAYERS[size], device)


IMAGES = {"small": (1, 8, 1, 16), "paper": (1, 32, 1, 200), "large": (3, 32, 4, 50)}
"""channels, width, images and draws; the paper's are those of likelihood regret"""


def log_px(size: str, device: torch.device) -> Problem:
    channels, width, images, draws = IMAGES[size]
    torch.manual_seed(0)
    network = dcgan_decoder(channels, width).to(device).eval().requires_grad_(False)
    z = torch.randn(draws, images, 100).to(device)
    classes = torch.randint(256, (images, channels, 32, 32)).to(device)
    operations = draws * images * sum(layer.operations for layer in layers_of(network, 100, device))

    def of_floats(flow: Callable[..., Tensor]) -> Function:
        return lambda network, z, classes: flow(network, z, classes.to(z.dtype) / 255, "categorical")

    return Problem(
        f"DCGAN {channels}x32x32 of width {width}, 256 classes, {images} x {draws}",
        network,
        (z, classes),
        {OURS: of_floats(ops.log_px), EAGER: rivals.log_px_of_copies, FAIR: rivals.log_px_in_tiles},
        of_floats(reference.log_px),
        {FORWARD: Cost(operations)},
    )


OPERATORS: dict[str, Callable[[str, torch.device], Problem]] = {
    function.__name__: function
    for function in (
        hamiltonian_flow,
        leapfrog_kick_drift,
        leapfrog_kick_temper,
        jacobian_l1,
        grad_dot,
        gaussian_kl,
        log_px,
    )
}


@functools.lru_cache(maxsize=1)
def problem(operator: str, size: str, device: torch.device) -> Problem:
    return OPERATORS[operator](size, device)


@functools.lru_cache(maxsize=1)
def expected(operator: str, size: str, device: torch.device, direction: str) -> list[Tensor]:
    return problem(operator, size, device).expected(direction)


SWEEPS: dict[str, tuple[int, ...]] = {
    "hamiltonian_flow, B": (8, 32, 128, 512),
    "hamiltonian_flow, K": (1, 3, 10, 30),
    "hamiltonian_flow, d": (2, 8, 32, 128),
    "grad_dot, N": (64, 256, 1024, 4096),
}
SWEPT = flow.Case("sweep", "256-256-784, batch 32, d = 32, K = 5", lambda: nn.Sequential(), 32, 32, 5, 0)


@functools.lru_cache(maxsize=1)
def swept(sweep: str, value: int, device: torch.device) -> Problem:
    """A point of a sweep: one number of a middling problem is changed."""
    if sweep == "grad_dot, N":
        return grad_dot_problem(value, 128, 1, 784, 400, device)
    field = {"B": "batch", "K": "num_steps", "d": "latent_dim"}[sweep[-1]]
    case = replace(SWEPT, **{field: value})  # type: ignore[arg-type]
    return flow_problem(replace(case, decoder=lambda: softplus_mlp(case.latent_dim, 256, 256, 784)), device)


def memory_probe(operator: str, size: str, name: str, device: str) -> common.Contestant:
    """A call with gradients where there are any, warmed up at the small size."""
    on = torch.device(device)

    def contestant(size: str) -> common.Contestant:
        p = OPERATORS[operator](size, on)
        return p.contestant(name, BACKWARD if BACKWARD in p.costs else FORWARD)

    contestant("small")()
    return contestant(size)
