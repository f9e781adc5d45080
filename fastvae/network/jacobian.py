"""The Jacobian's L1 norm over sweeps: one tangent sweep for all latents beside one forward sweep, then its adjoint.

With s = sign(ydot) and without a graph for it, the sum over latents of |J e_i| is that of <s_i, J e_i>; its gradient is
one reverse sweep of s for all latents, and one adjoint sweep. For squares, s = 2 ydot.
"""

from __future__ import annotations

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


class Plan:
    """How the latents are shared out.

    They go through the network ``times`` at a time: in front of one forward sweep's values or, where a part of the
    network knows no latents, as rows of their own (then also in ``inputs``).
    """

    def __init__(
        self, sweeps: Sweeps, tensors: Sequence[Tensor | None], z: Tensor, latents: list[int], p: int
    ) -> None:
        self.sweeps, self.latents, self.p = sweeps, latents, p
        self.in_front = all(layer.many for layer in sweeps.layers)
        room = NUMBERS_AT_ONCE.get(z.device.type, NUMBERS_AT_ONCE["cuda"])
        parts = -(-len(latents) * len(z) * sweeps.widest // room)
        self.times = -(-len(latents) // max(1, min(parts, len(latents))))
        rows = z if self.in_front else z.detach().repeat(max(self.times, 1), *[1] * (z.dim() - 1))
        if not self.in_front:
            # A condition goes with its code.
            tensors = [
                tensor.repeat(max(self.times, 1), *[1] * (tensor.dim() - 1))
                if source.is_condition and tensor is not None
                else tensor
                for source, tensor in zip(sweeps.program.sources, tensors, strict=True)
            ]
        self.inputs = Inputs(sweeps, rows, tensors)
        self.passive = self.inputs.detached()

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
        facts = kind, tuple(self.latents), self.p, tuple(self.inputs.wanted), self.in_front, self.times
        given = [z, *others, *tensors_in(self.passive)]
        form = None
        if self.sweeps.can_be_written_down(len(self.latents), len(z)) and is_plain(z):
            form = *facts, form_of(self.passive), form_of([z, *others])
        return self.sweeps.tapes.run(form, given, function)

    def values(self, z: Tensor) -> Tensor:
        """Of each sample: [B]."""

        def found() -> list[Tensor]:
            total = z.new_zeros(len(z))
            for latents in self.terms():
                total = total + Term(self, z, latents).value()
            return [total]

        (total,) = self.run("values", z, [], found)
        assert total is not None
        return total

    def gradients(self, z: Tensor, weight: Tensor) -> Sequence[Tensor | None]:
        """Of the sum of weight [B] times values, to z and the trained tensors."""

        def found() -> list[Tensor | None]:
            sums = _Gradient(self, z, weight)
            for latents in self.terms():
                sums.add(Term(self, z, latents))
            return sums.results()

        return self.run("gradients", z, [weight], found)

    def value_and_gradients(self, z: Tensor, weight: float) -> Sequence[Tensor | None]:
        """The sum of weight times value over samples [], and its gradients to z and the trained tensors."""

        def found() -> list[Tensor | None]:
            sums, total = _Gradient(self, z, z.new_full((len(z),), weight)), z.new_zeros(len(z))
            for latents in self.terms():
                term = Term(self, z, latents)
                total = total + term.value()
                sums.add(term)
            return [total.sum() * weight, *sums.results()]

        return self.run(f"both, {weight!r}", z, [], found)


class Term:
    """The share of some latents in the sum."""

    def __init__(self, plan: Plan, z: Tensor, latents: list[int]) -> None:
        self.plan, self.shape = plan, z.shape
        # Rows of their own are as many in the last part, of which some then have no direction.
        self.count = len(latents) if plan.in_front else plan.times
        directions = z.new_zeros(self.count, 1, z[0].numel())
        # Not by indices, which would be copied to a GPU.
        for row, latent, length in _runs(latents):
            directions[row : row + length, 0, latent : latent + length].diagonal().fill_(1)
        along = directions.expand(self.count, len(z), -1).reshape(self.count, *z.shape)
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


def _runs(latents: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Where consecutive latents start, in the list and among all, and how many they are."""
    start = 0
    for end in range(1, len(latents) + 1):
        if end == len(latents) or latents[end] != latents[end - 1] + 1:
            yield start, latents[start], end - start
            start = end


class _Gradient:
    """Gradients of terms, added up."""

    def __init__(self, plan: Plan, z: Tensor, weight: Tensor) -> None:
        self.plan, self.weight, self.of_z = plan, weight, torch.zeros_like(z)
        self.found: dict[int, Tensor] = {}
        self.products = Products(plan.passive, plan.inputs.wanted, self.found)

    def add(self, term: Term) -> None:
        """One term more."""
        of_z = term.adjoint(self.weight, self.products)
        self.products.finish()
        if of_z is not None:
            self.of_z = self.of_z + of_z

    def results(self) -> list[Tensor | None]:
        """Gradients to z and the trained tensors."""
        return [self.of_z, *(self.found.get(index) for index in self.plan.inputs.trained)]


class _JacobianL1(torch.autograd.Function):
    """The sum over latents for each sample [B]; with a ``weight``, the sum of weight times that over samples [].

    The gradient of the latter is computed in the same pass and held.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, weight: float | None, z: Tensor, *parameters: Tensor) -> Tensor:
        ctx.plan, ctx.early = plan, None
        # All of them, so that autograd sees what is changed in place.
        ctx.save_for_backward(z, *parameters)
        z = z.detach()
        if weight is not None and any(ctx.needs_input_grad):
            value, *ctx.early = plan.value_and_gradients(z, weight)
            assert value is not None
            return value
        total = plan.values(z)
        return total if weight is None else total.sum() * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = ctx.saved_tensors
        with backward_pass(gradient):
            if ctx.early is not None:
                found = [None if part is None else part * gradient for part in ctx.early]
            else:
                found = ctx.plan.gradients(inputs[0].detach(), gradient.detach())
        return None, None, *differentiable_once("jacobian_l1", found, [*inputs, gradient])


def jacobian_l1(
    sweeps: Sweeps, tensors: Sequence[Tensor | None], z: Tensor, latents: list[int], p: int, reduction: str
) -> Tensor:
    """See :func:`fastvae.ops.jacobian_l1`; ``tensors`` by source."""
    plan = Plan(sweeps, tensors, z, latents, p)
    # The mean of no samples is not a number, as PyTorch has it.
    weight = {"none": None, "sum": 1.0, "mean": 1 / len(z) if len(z) else float("nan")}[reduction]
    return _JacobianL1.apply(plan, weight, z, *plan.inputs.parameters)
