"""The parts of the operators' suite: a problem with its contestants, and the least work that it is.

A problem is a network (one without parameters for operators that take none), tensors, and functions of both, one a
contestant. "forward" is a call under ``torch.no_grad``; "backward" is a call with gradients and the gradients to every
differentiable tensor and parameter, for cotangents that are the same for all contestants.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import common, flow, flow_rivals
from . import suite_rivals as rivals
from .suite_rivals import Function

OURS, EAGER, FAIR, COMPILED, JAX = "ours", "eager", "fair eager", "torch.compile", "JAX jit"
CONTESTANTS = (OURS, EAGER, FAIR, COMPILED, JAX)
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Rates:
    """Of this machine, measured in the same session."""

    gflops: float
    """float32 operations of a large square matrix product"""
    gigabytes: float
    """read and written by a large copy"""


@dataclass(frozen=True)
class Cost:
    """The fewest floating-point operations of matrix products, and the fewest bytes of memory read and written."""

    operations: int = 0
    bytes: int = 0

    def floor_ms(self, rates: Rates) -> float:
        return max(self.operations / rates.gflops, self.bytes / rates.gigabytes) / 1e6


@dataclass(frozen=True)
class Problem:
    title: str
    network: nn.Module
    inputs: tuple[Tensor, ...]
    functions: dict[str, Function]
    """of OURS, EAGER and FAIR"""
    exact: Function
    """what all of them are checked against, in float64"""
    costs: dict[str, Cost]
    """by direction; an operator without a gradient has no "backward" """
    tolerance: float = 1e-5
    """|difference| / |exact| of an output or gradient: float32 round-off"""
    jax: Callable[..., Any] | None = None
    """of the inputs and then the parameters"""
    jax_flow: bool = False
    """flow_rivals.JaxFlow, which always takes gradients"""

    def contestant(self, name: str, direction: str, threads: int = 0) -> common.Contestant:
        """How a contestant computes outputs, or outputs and gradients; building or running a rival may fail.

        Raises:
            NotImplementedError: there is no such rival here.
            ImportError, RuntimeError: JAX is not there, or not for this device.
        """
        backward = direction == BACKWARD
        if name == JAX:
            if self.jax_flow and backward:
                assert isinstance(self.network, nn.Sequential)
                z, rho, x, step_size, alpha = self.inputs
                return flow_rivals.JaxFlow(self.network, z, rho, x, step_size, alpha, threads)
            if self.jax is None:
                raise NotImplementedError("no twin in JAX")
            tensors = [*self.inputs, *self.network.parameters()]
            return rivals.JaxFunction(self.jax, tensors, backward, threads)
        if name == COMPILED:
            torch._dynamo.reset()  # else the shapes of the problem before make this one's dynamic
            function = torch.compile(self.functions.get(COMPILED, self.functions[FAIR]), dynamic=False)
        else:
            function = self.functions[name]
        network = flow.channels_last(self.network) if name in (FAIR, COMPILED) else self.network
        return call(function, network, self.inputs, backward)

    def expected(self, direction: str) -> list[Tensor]:
        """The results in float64."""
        inputs = [
            x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for x in self.inputs
        ]
        return call(self.exact, copy.deepcopy(self.network).double(), inputs, direction == BACKWARD)()


def checked(
    problem: Problem, name: str, direction: str, expected: Sequence[Tensor], threads: int = 0
) -> tuple[common.Contestant, float]:
    """A contestant that has run and agrees with what is expected, and its error.

    Raises:
        ArithmeticError: it does not agree; and what building and running it raises.
    """
    contestant: Any = problem.contestant(name, direction, threads)
    result = contestant()
    error = common.relative_error(result if isinstance(result, list) else contestant.tensors(), expected)
    if not error <= problem.tolerance:
        raise ArithmeticError(f"differs from float64 by {error:.1e}, over {problem.tolerance:.0e}")
    return contestant, error


def call(
    function: Function, network: nn.Module, inputs: Sequence[Tensor], backward: bool
) -> Callable[[], list[Tensor]]:
    """A function's outputs, or its outputs and the gradients to inputs and parameters that require one."""
    wanted = [tensor for tensor in (*inputs, *network.parameters()) if tensor.requires_grad]
    weights: list[Tensor] = []

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            outputs = function(network, *inputs)
        found = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if not backward:
            return found
        if not weights:
            like = {"device": found[0].device, "dtype": found[0].dtype}
            weights.extend(rivals.cotangents([out.detach() for out in found], torch.linspace, **like))
        gradients = torch.autograd.grad(found, wanted, weights, allow_unused=True, materialize_grads=True)
        return [*(out.detach() for out in found), *gradients]

    return run
