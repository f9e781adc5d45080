"""The operators that have no benchmark of their own, forward and backward, at three sizes.

    python -m benchmarks.speed operators                    about ten minutes on 2 cores, torch.compile included
    python -m benchmarks.speed operators --only grad_dot    one of them
    python -m benchmarks.speed operators --quick            small sizes: does everything run?

"forward" is a call without gradients, "backward" a call with them and the gradients to all inputs, for cotangents that
are the same for all. Rivals: the leapfrog's formulas as they stand and with torch.addcmul; gaussian_kl by
torch.distributions and by its formula; grad_dot by gradients of 64 samples at a time and their product, and by Gram
matrices; the second of each also through torch.compile; JAX. Floor: the fewest operations of matrix products, or the
fewest bytes read and written, at the rates of a large product and copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae import ops, reference

from ..rivals import jax_twins
from ..rivals.jax_twins import JaxFunction, cotangents
from ..rivals.operators import distributions_kl, kick_drift, kick_temper, materialised
from . import floors, harness, timing

OURS, EAGER, FAIR, JAX = "ours", "eager", "fair eager", "JAX jit"
FORWARD, BACKWARD = "forward", "backward"
FLOAT = 4
"""bytes"""

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """An operator at a size: what computes it, of tensors that all require a gradient, and the least that takes."""

    title: str
    shapes: tuple[tuple[int, ...], ...]
    functions: tuple[Function, Function, Function]
    """ours, eager and fair; the last one is also what all are checked against, in float64"""
    jax: Callable[..., object]
    bytes: tuple[int, int]
    """forward and backward"""
    operations: tuple[int, int] = (0, 0)
    tolerance: float = 1e-5


def problems(size: str) -> dict[str, Problem]:
    """Every operator at a size: [B, d] of the flow's small and paper sizes, and beyond every cache."""
    shape = {"small": (16, 2), "paper": (100, 64), "large": (32768, 256)}[size]
    tensor, title = FLOAT * shape[0] * shape[1], f"{list(shape)}"
    n, m, t, inner, columns = {
        "small": (32, 32, 1, 64, 64), "paper": (256, 64, 16, 784, 400), "large": (1024, 128, 1, 784, 1024)
    }[size]  # fmt: skip
    factors = ((n, t, inner), (n, t, columns), (m, t, inner), (m, t, columns))
    layer = floors.InfluenceLayer(t, inner, columns, first=True)
    operations = floors.contraction_operations(layer, n, m)
    moved = FLOAT * (t * (inner + columns) * (n + m) + n * m)
    layer_title = f"{inner} to {columns}, T = {t}, {n} x {m}"
    drift = ops.leapfrog_kick_drift, reference.leapfrog_kick_drift, kick_drift
    temper = ops.leapfrog_kick_temper, reference.leapfrog_kick_temper, kick_temper
    divergence = ops.gaussian_kl, distributions_kl, reference.gaussian_kl
    products = ops.grad_dot, materialised, reference.grad_dot
    # The leapfrog's half: reads 3 and writes 2; then reads 2 gradients, rho and force, and writes 2, as that of z is
    # one it was given. The gradient to each of grad_dot's two factors costs as much as the product.
    of_drift, of_temper = (5 * tensor, 11 * tensor), (3 * tensor, 8 * tensor)
    of_products, work = (moved, 3 * moved), (operations, 3 * operations)
    like_z = shape[1:]
    return {
        "leapfrog_kick_drift": Problem(title, (shape, shape, shape, like_z), drift, drift[1], of_drift),
        "leapfrog_kick_temper": Problem(title, (shape, shape, like_z, ()), temper, temper[1], of_temper),
        "gaussian_kl": Problem(title, (shape, shape), divergence, jax_twins.kl, (2 * tensor, 6 * tensor)),
        "grad_dot": Problem(layer_title, factors, products, jax_twins.grad_dot, of_products, work, 1e-4),
    }


def contestant(function: Function, inputs: Sequence[Tensor], backward: bool) -> Callable[[], list[Tensor]]:
    """A function's outputs, or its outputs and the gradients to the inputs."""
    weights: list[Tensor] = []

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            outputs = function(*inputs)
        found = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if not backward:
            return found
        if not weights:
            like = {"device": found[0].device, "dtype": found[0].dtype}
            weights.extend(cotangents([out.detach() for out in found], torch.linspace, **like))
        gradients = torch.autograd.grad(found, inputs, weights, allow_unused=True, materialize_grads=True)
        return [*(out.detach() for out in found), *gradients]

    return run


def build(options: harness.Options, problem: Problem, backward: bool) -> harness.Trial:
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(options.device).requires_grad_() for shape in problem.shapes]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    ours, eager, fair = problem.functions
    contestants: dict[str, Callable[[], timing.Contestant]] = {
        name: functools.partial(contestant, function, inputs, backward)
        for name, function in ((OURS, ours), (EAGER, eager), (FAIR, fair))
    }
    if options.compile:
        contestants[FAIR + harness.COMPILED] = lambda: contestant(timing.compiled(fair), inputs, backward)
    if options.jax:
        contestants[JAX] = lambda: JaxFunction([problem.jax], inputs, options.threads, backward=backward)
    return harness.Trial(
        contestants,
        contestant(fair, doubles, backward)(),
        problem.tolerance,
        operations=problem.operations[backward],
        bytes=problem.bytes[backward],
    )


def cases(quick: bool) -> list[harness.Case]:
    return [
        harness.Case(
            f"{operator}, {size}, {direction}",
            f"{operator}, {direction}, {problem.title}",
            build,
            (problem, direction == BACKWARD),
            0.02 if quick else 2,
            group=operator,
        )
        for size in (["small"] if quick else ["small", "paper", "large"])
        for operator, problem in problems(size).items()
        for direction in (FORWARD, BACKWARD)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.parse(harness.parser(__doc__), arguments)
    harness.Benchmark("operators", "Operators", cases(options.quick)).run(options)
