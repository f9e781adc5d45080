"""The Jacobian's L1 norm over sweeps: one tangent sweep for all latents beside one forward sweep, then its adjoint.

With s = sign(ydot) and without a graph for it, the sum over latents of |J e_i| is that of <s_i, J e_i>; its gradient is
one reverse sweep of s for all latents, and one adjoint sweep. For squares, s = 2 ydot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.layers import Products
from fastvae.network.once import backward_pass, differentiable_once
from fastvae.network.sweeps import Inputs, Sweeps
from fastvae.network.tape import form_of, is_plain, tensors_in

NUMBERS_AT_ONCE = {"cpu": 2**21, "cuda": 2**24}
"""Numbers of the widest value, times latents and samples, that a sweep holds at once: 8 MiB of float32 stay in a CPU's
cache; on a GPU launches cost more."""


def at_once(sweeps: Sweeps, z: Tensor, latents: int) -> int:
    """How many of so many latents go through the network together, in parts that are about equal."""
    most_numbers = NUMBERS_AT_ONCE.get(z.device.type, NUMBERS_AT_ONCE["cuda"])
    parts = -(-latents * len(z) * sweeps.widest // most_numbers)
    return -(-latents // max(1, min(parts, latents)))


def repeated_inputs(sweeps: Sweeps, z: Tensor, tensors: Sequence[Tensor | None], times: int) -> Inputs:
    """The passive part for z and its condition taken several times, one after the other."""
    if times == 1:
        return Inputs(sweeps, z, tensors)
    given = [
        tensor.repeat(times, *[1] * (tensor.dim() - 1))
        if source.is_condition and tensor is not None
        else tensor
        for source, tensor in zip(sweeps.program.sources, tensors, strict=True)
    ]
    return Inputs(sweeps, z.detach().repeat(times, *[1] * (z.dim() - 1)), given)


class Plan:
    """How the latents are shared out.

    They go through the network ``times`` at a time: in front of one forward sweep's values or, where a part of the
    network knows no latents, as rows of their own (then also in ``inputs``).

    Args:
        tensors: the network's, by source.
    """

    def __init__(
        self, sweeps: Sweeps, tensors: Sequence[Tensor | None], z: Tensor, latents: list[int], p: int
    ) -> None:
        self.sweeps, self.latents, self.p = sweeps, latents, p
        self.in_front = all(layer.many for layer in sweeps.layers)
        self.times = at_once(sweeps, z, len(latents))
        rows = 1 if self.in_front else max(self.times, 1)
        self.inputs = repeated_inputs(sweeps, z, tensors, rows)
        self.passive = self.inputs.detached()
        self.parameters = self.inputs.parameters

    def facts(self) -> tuple[Any, ...]:
        """All that a run depends on besides tensors and its kind."""
        return tuple(self.latents), self.p, tuple(self.inputs.wanted), self.in_front, self.times

    def numbers(self) -> list[Any]:
        """What the sweeps read besides z."""
        return self.passive

    def sums(self, z: Tensor, weight: Tensor | None) -> Sums:
        """Where terms are added up; with weight [B], their gradients, too."""
        return Sums(self, z, weight)

    def hold(self, z: Tensor) -> Sums | None:
        """The terms with all that their gradients will need; None where that is to be computed again."""
        return None

    def terms(self) -> list[list[int]]:
        """The latents of each part."""
        return [
            self.latents[start : start + self.times]
            for start in range(0, len(self.latents), max(self.times, 1))
        ]

    def run(
        self, kind: str, z: Tensor, others: Sequence[Tensor], function: Callable[[], Sequence[Tensor | None]]
    ) -> Sequence[Tensor | None]:
        """What a function makes of z and others, by straight code (tape.py) if it can be.

        Args:
            kind: all that it depends on besides tensors and this plan.
        """
        numbers = self.numbers()
        given = [z, *others, *tensors_in(numbers)]
        form = None
        if self.sweeps.can_be_written_down(len(self.latents), len(z)) and is_plain(z):
            form = kind, *self.facts(), form_of(numbers), form_of([z, *others])
        return self.sweeps.tapes.run(form, given, function)

    def values(self, z: Tensor) -> Tensor:
        """Of each sample: [B]."""

        def found() -> list[Tensor]:
            sums = self.sums(z, None)
            for latents in self.terms():
                sums.add(latents)
            return [sums.total]

        (total,) = self.run("values", z, [], found)
        assert total is not None
        return total

    def gradients(self, z: Tensor, weight: Tensor) -> Sequence[Tensor | None]:
        """Of the sum of weight [B] times values, to z and the trained tensors."""

        def found() -> list[Tensor | None]:
            sums = self.sums(z, weight)
            for latents in self.terms():
                sums.add(latents)
            return sums.results()

        return self.run("gradients", z, [weight], found)

    def value_and_gradients(self, z: Tensor, weight: float) -> Sequence[Tensor | None]:
        """The sum of weight times value over samples [], and its gradients to z and the trained tensors."""

        def found() -> list[Tensor | None]:
            sums = self.sums(z, z.new_full((len(z),), weight))
            for latents in self.terms():
                sums.add(latents)
            return [sums.total.sum() * weight, *sums.results()]

        return self.run(f"both, {weight!r}", z, [], found)


class Term:
    """The share of some latents in the sum."""

    def __init__(self, plan: Plan, z: Tensor, latents: list[int]) -> None:
        self.plan, self.shape = plan, z.shape
        # Rows of their own are as many in the last part, of which some then have no direction.
        self.count = len(latents) if plan.in_front else plan.times
        along = directions(z, latents, self.count)
        if not plan.in_front:
            z, along = z.repeat(self.count, *[1] * (z.dim() - 1)), along.flatten(0, 1)
        self.point = plan.sweeps.forward(plan.passive, z, plan.inputs.wanted)
        self.dots = plan.sweeps.tangent(self.point, along)
        dot = self.dots[plan.sweeps.program.output]
        self.dot: Tensor = torch.zeros_like(plan.sweeps.output(self.point)) if dot is None else dot
        """J e_i; [latents, B, ...], or with the two in one."""

    def value(self) -> Tensor:
        """[B]."""
        size = self.dot.abs() if self.plan.p == 1 else self.dot.square()
        if not self.plan.in_front:
            size = size.unflatten(0, (self.count, -1))
        return size.flatten(2).sum((0, 2)) if size.dim() > 2 else size.sum(0)

    def adjoint(self, weight: Tensor, products: Products) -> Tensor | None:
        """The gradient to z of the sum of weight [B] times value; those to the network's tensors go to ``products``."""
        sweeps = self.plan.sweeps
        seed = self.dot.sign() if self.plan.p == 1 else 2 * self.dot
        if not self.plan.in_front:
            weight = weight.repeat(self.count)
        output = sweeps.output(self.point)
        seed = seed * weight.reshape(-1, *[1] * (output.dim() - 1))
        _, cotangents = sweeps.reverse(self.point, seed)
        gradients = sweeps.adjoint(self.point, self.dots, cotangents, None, products)
        of_z = gradients.pop(0, None)
        for index, gradient in gradients.items():
            products.put(index, gradient)
        if of_z is None or self.plan.in_front:
            return of_z
        return of_z.reshape(self.count, *self.shape).sum(0)


def directions(z: Tensor, latents: Sequence[int], count: int, length: float = 1.0) -> Tensor:
    """Along each latent, for every sample: [count, B, ...]; beyond the latents zero."""
    dim = math.prod(z.shape[1:])
    found = z.new_zeros(count, 1, dim)
    # Not by indices, which would be copied to a GPU.
    for row, latent, run in _runs(latents):
        found[row : row + run, 0, latent : latent + run].diagonal().fill_(length)
    return found.expand(count, len(z), dim).reshape(count, *z.shape)


def _runs(latents: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Where consecutive latents start, in the list and among all, and how many they are."""
    start = 0
    for end in range(1, len(latents) + 1):
        if end == len(latents) or latents[end] != latents[end - 1] + 1:
            yield start, latents[start], end - start
            start = end


class Sums:
    """Terms, added up; with a weight [B], gradients of the sum of weight times value, too."""

    def __init__(self, plan: Plan, z: Tensor, weight: Tensor | None) -> None:
        self.plan, self.z, self.weight = plan, z, weight
        self.total, self.of_z = z.new_zeros(len(z)), torch.zeros_like(z)
        self.found: dict[int, Tensor] = {}
        self.products = Products(plan.passive, plan.inputs.wanted, self.found)

    def add(self, latents: list[int]) -> None:
        """The term of some latents more."""
        term = Term(self.plan, self.z, latents)
        self.total = self.total + term.value()
        if self.weight is None:
            return
        of_z = term.adjoint(self.weight, self.products)
        self.products.finish()
        if of_z is not None:
            self.of_z = self.of_z + of_z

    def gradients_of_held(self, weight: Tensor) -> list[Tensor | None]:
        """Of what ``Plan.hold`` held."""
        raise NotImplementedError

    def results(self) -> list[Tensor | None]:
        """Gradients to z and the trained tensors."""
        return [self.of_z, *(self.found.get(index) for index in self.plan.inputs.trained)]


class _JacobianL1(torch.autograd.Function):
    """The sum over latents for each sample [B]; with a ``weight``, the sum of weight times that over samples [].

    The gradient of the latter is computed in the same pass and held.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, weight: float | None, z: Tensor, *parameters: Tensor) -> Tensor:
        ctx.plan, ctx.early, ctx.held = plan, None, None
        # All of them, so that autograd sees what is changed in place.
        ctx.save_for_backward(z, *parameters)
        z = z.detach()
        if weight is not None and any(ctx.needs_input_grad):
            value, *ctx.early = plan.value_and_gradients(z, weight)
            assert value is not None
            return value
        if weight is None and any(ctx.needs_input_grad):
            ctx.held = plan.hold(z)
        total = plan.values(z) if ctx.held is None else ctx.held.total
        return total if weight is None else total.sum() * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = ctx.saved_tensors
        with backward_pass(gradient):
            if ctx.early is not None:
                found = [None if part is None else part * gradient for part in ctx.early]
            elif ctx.held is not None:
                found = ctx.held.gradients_of_held(gradient.detach())
            else:
                found = ctx.plan.gradients(inputs[0].detach(), gradient.detach())
        return None, None, *differentiable_once("jacobian_l1", found, [*inputs, gradient])


def jacobian_l1(plan: Plan, z: Tensor, reduction: str) -> Tensor:
    """See :func:`fastvae.ops.jacobian_l1`."""
    # The mean of no samples is not a number, as PyTorch has it.
    weight = {"none": None, "sum": 1.0, "mean": 1 / len(z) if len(z) else float("nan")}[reduction]
    return _JacobianL1.apply(plan, weight, z, *plan.parameters)
