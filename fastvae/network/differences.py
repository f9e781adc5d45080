"""The L1 norm of a network's difference quotients over sweeps, with the gradient of the quotients themselves.

The codes moved along one latent each are rows beside each other in one forward sweep. With s = sign(quotient) / step,
the gradient is one reverse sweep of s through the moved rows, and of minus its sum over latents through z's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.network.jacobian import Plan, Sums, at_once, directions, repeated_inputs
from fastvae.network.layers import Point, Products
from fastvae.network.sweeps import Inputs, Sweeps

FEWEST_HELD, MOST_HELD = 2**17, 2**25
"""Numbers of all rows that a forward pass holds for the backward pass, which otherwise computes them again: of fewer,
straight code (tape.py) is as fast."""


class Part:
    """What some number of rows a sample reads, and the gradients that come of it.

    Args:
        inputs: of all those rows.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.passive = inputs, inputs.detached()


class Differences(Plan):
    """How the latents are shared out: ``times`` moved codes a sample at a time, and what is left over.

    Where all of them go at once, the codes that they were moved from are rows in front of them.
    """

    def __init__(
        self,
        sweeps: Sweeps,
        tensors: Sequence[Tensor | None],
        z: Tensor,
        latents: list[int],
        p: int,
        step: float,
    ) -> None:
        self.sweeps, self.latents, self.p, self.step = sweeps, latents, p, step
        self.times = at_once(sweeps, z, len(latents))
        self.whole = self.times == len(latents)
        counts = {len(latents) + 1} if self.whole else {1, *(len(part) for part in self.terms())}
        program = sweeps.program
        # Nothing but z has a row for each sample: then all parts read the same.
        same = not program.passive and not any(source.is_condition for source in program.sources)
        self.parts: dict[int, Part] = {}
        for count in sorted(counts):
            known = next(iter(self.parts.values()), None) if same else None
            self.parts[count] = known or Part(repeated_inputs(sweeps, z, tensors, 1 if same else count))
        self.different = list(dict.fromkeys(self.parts.values()))
        self.parameters = [tensor for part in self.different for tensor in part.inputs.parameters]
        self.holds = FEWEST_HELD < (len(latents) + 1) * len(z) * sweeps.kept_numbers <= MOST_HELD

    def facts(self) -> tuple[Any, ...]:
        """See ``Plan``."""
        wanted = [tuple(part.inputs.wanted) for part in self.different]
        return tuple(self.latents), self.p, self.step, self.times, *wanted

    def numbers(self) -> list[Any]:
        """See ``Plan``."""
        return [part.passive for part in self.different]

    def sums(self, z: Tensor, weight: Tensor | None) -> Sums:
        """See ``Plan``."""
        return _Sums(self, z, weight)

    def hold(self, z: Tensor) -> Sums | None:
        """See ``Plan``."""
        if not self.holds:
            return None
        sums = _Sums(self, z, None, hold=True)
        for latents in self.terms():
            sums.add(latents)
        return sums


class _Quotients(NamedTuple):
    part: Part
    point: Point
    values: Tensor
    """[latents, B, ...]"""


class _Sums(Sums):
    """Absolute or squared quotients, added up; the reverse sweep through z's own rows comes last."""

    plan: Differences

    def __init__(self, plan: Differences, z: Tensor, weight: Tensor | None, hold: bool = False) -> None:
        self.plan, self.z, self.total = plan, z, z.new_zeros(len(z))
        self.held: list[_Quotients] | None = [] if hold else None
        if not plan.whole:
            self.at_z = self._forward(plan.parts[1], z)
            self.base = plan.sweeps.output(self.at_z)
        self.begin(weight)

    def begin(self, weight: Tensor | None) -> None:
        """Gradients of nothing, of the sum of weight [B] times value."""
        self.weight, self.of_z = weight, torch.zeros_like(self.z)
        self.of_base: Tensor | None = None
        self.gradients: dict[Part, dict[int, Tensor]] = {part: {} for part in self.plan.different}
        self.products_of = {
            part: Products(part.passive, part.inputs.wanted, found) for part, found in self.gradients.items()
        }

    def add(self, latents: list[int]) -> None:
        """The quotients of some latents more."""
        plan, count = self.plan, len(latents)
        rows = self.z + directions(self.z, latents, count, plan.step)
        if plan.whole:
            rows = torch.cat((self.z[None], rows))
        part = plan.parts[len(rows)]
        point = self._forward(part, rows.flatten(0, 1))
        output = plan.sweeps.output(point).unflatten(0, (len(rows), -1))
        base, moved = (output[0], output[1:]) if plan.whole else (self.base, output)
        found = _Quotients(part, point, (moved - base) / plan.step)
        size = found.values.abs() if plan.p == 1 else found.values.square()
        self.total = self.total + (size.flatten(2).sum((0, 2)) if size.dim() > 2 else size.sum(0))
        if self.held is not None:
            self.held.append(found)
        elif self.weight is not None:
            self._add_gradients(found, self.weight)

    def gradients_of_held(self, weight: Tensor) -> list[Tensor | None]:
        """To z and the trained tensors, of what was held."""
        self.begin(weight)
        for quotients in self.held or ():
            self._add_gradients(quotients, weight)
        return self.results()

    def results(self) -> list[Tensor | None]:
        """Gradients to z and the trained tensors."""
        if self.of_base is not None:
            of_z = self._reverse(self.plan.parts[1], self.at_z, self.of_base)
            if of_z is not None:
                self.of_z = self.of_z + of_z
        trained = [
            found.get(index) for part, found in self.gradients.items() for index in part.inputs.trained
        ]
        return [self.of_z, *trained]

    def _add_gradients(self, quotients: _Quotients, weight: Tensor) -> None:
        values, plan = quotients.values, self.plan
        seed = values.sign() if plan.p == 1 else 2 * values
        seed = seed * (weight / plan.step).reshape(-1, *[1] * (values.dim() - 2))
        of_base = -seed.sum(0)
        if plan.whole:
            seed = torch.cat((of_base[None], seed))
        else:
            self.of_base = of_base if self.of_base is None else self.of_base + of_base
        of_rows = self._reverse(quotients.part, quotients.point, seed.flatten(0, 1))
        if of_rows is not None:
            self.of_z = self.of_z + of_rows.unflatten(0, (len(seed), -1)).sum(0)

    def _forward(self, part: Part, rows: Tensor) -> Point:
        return self.plan.sweeps.forward(part.passive, rows, part.inputs.wanted)

    def _reverse(self, part: Part, point: Point, seed: Tensor) -> Tensor | None:
        """The gradient to the rows; those to the network's tensors are added up."""
        products, sweeps = self.products_of[part], self.plan.sweeps
        gradients = sweeps.adjoint(point, [None] * sweeps.program.size, {}, seed, products)
        of_rows: Tensor | None = gradients.pop(0, None)
        for index, gradient in gradients.items():
            products.put(index, gradient)
        products.finish()
        return of_rows
