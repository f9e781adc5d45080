"""The four sweeps over a program, in torch operators: the readable form, and what runs where no kernel of ours can.

A sweep walks the program in order or in reverse, adds where a value is used more than once, and knows no kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.network.flow_tape import FlowTapes
from fastvae.network.layers import (
    AutogradLayer,
    Gradients,
    Layer,
    Point,
    Products,
    choose_layout,
    fuse,
    make_layer,
    without_cotangents,
)
from fastvae.network.program import Program
from fastvae.network.tape import Tapes, most_numbers

Watch = Callable[[Layer, Point, Any, Any, list[Any]], None]
"""Of a layer, a point, the cotangents of its tangent and of its result, and all tangents; None is zero."""


class Sweeps:
    """A program with its layers.

    Args:
        program: see :class:`fastvae.network.program.Program`.
        device: "cpu" or another type, which has no kernels of ours for single layers.
    """

    def __init__(self, program: Program, device: str) -> None:
        self.program, self.device = program, device
        active = program.is_active
        layers: list[Layer] = [
            make_layer(operation, active) or AutogradLayer(operation, active) for operation in program.active
        ]
        layers = without_cotangents(layers, program.output)
        self.layers = fuse(layers, program.output, active) if device == "cpu" else layers
        if device == "cpu":
            choose_layout(self.layers)
        self.backwards = self.layers[::-1]
        self.by_autograd = [layer for layer in self.layers if layer.by_autograd]
        # What no rule looks at again is let go after a forward sweep.
        kept = {0, program.output}
        for layer in self.layers:
            kept.update(layer.slots if layer.keeps_inputs else ())
            kept.update((layer.index,) if layer.keeps_output else ())
        self.widest = 1
        """Numbers of a sample's widest value; see :meth:`measure`."""
        self.kept_numbers = 1
        """Numbers of a sample that a sweep keeps for the next ones, about."""
        self._with_sigmoid: Sweeps | None = None
        self.flow_tapes, self.tapes = FlowTapes(), Tapes()
        self.copied: Any = None
        """What likelihood regret made of it; see fastvae/ood/read_copies.py."""
        self.uses: Any = None
        """What TracIn made of it; see fastvae/influence/uses.py."""
        self._is_ours = all(type(layer).__module__.startswith("fastvae.") for layer in self.layers)
        self.dropped = [layer.index for layer in self.layers if layer.index not in kept]
        # Whose output's cotangent is needed once more, by bends.
        self.bent = frozenset(layer.index for layer in self.layers if not layer.linear)

    def forward(self, passive: list[Any], z: Tensor, wanted: Sequence[bool], keep: bool = True) -> Point:
        """Evaluate the network at z.

        Args:
            passive: from :meth:`fastvae.network.program.Program.start`, detached.
            wanted: by number, which cotangents will be of use.
            keep: for sweeps to come.
        """
        point = Point(list(passive), wanted)
        values = point.values
        values[0] = z
        for layer in self.layers:
            values[layer.index] = layer.forward(point)
        if keep:
            for index in self.dropped:
                values[index] = None
        return point

    def measure(self, passive: list[Any], z: Tensor) -> None:
        """Find the sizes at one batch."""
        values = self.forward(passive, z, self.program.is_active, keep=False).values
        sizes = [
            values[layer.index].numel() for layer in self.layers if isinstance(values[layer.index], Tensor)
        ]
        self.widest = max([z.numel(), *sizes]) // max(len(z), 1)
        # Values and their cotangents.
        self.kept_numbers = 2 * sum(sizes) // max(len(z), 1)

    def on(self, program: Program) -> Sweeps:
        """The sweeps of a program that differs in its last operations alone."""
        sweeps = Sweeps(program, self.device)
        sweeps.widest, sweeps.kept_numbers = self.widest, self.kept_numbers
        return sweeps

    def followed_by_sigmoid(self) -> Sweeps:
        """The sweeps of the network with a sigmoid at its end."""
        if self._with_sigmoid is None:
            self._with_sigmoid = self.on(self.program.followed_by(torch.ops.aten.sigmoid.default))
        return self._with_sigmoid

    def can_be_written_down(self, evaluations: int, samples: int) -> bool:
        """Whether runs of so many evaluations may become code (tape.py): of rules that are ours, and not too large.

        Rules of a user's may fill a tensor in ways that nobody sees.
        """
        return self._is_ours and evaluations * samples * self.kept_numbers <= most_numbers(self.device)

    def output(self, point: Point) -> Tensor:
        """The network's output at a point."""
        return point.values[self.program.output]

    def reverse(self, point: Point, seed: Tensor) -> tuple[Tensor | None, dict[int, Any]]:
        """The gradient of <seed, output> to z, and the cotangents that bends will ask for."""
        grads = Gradients(point.values, self.program.is_active)
        grads.add(self.program.output, seed)
        kept = {}
        for layer in self.backwards:
            dy = grads.found.pop(layer.index, None)
            if dy is not None:
                if layer.index in self.bent:
                    kept[layer.index] = dy
                layer.reverse(point, dy, grads, None)
        return grads.found.get(0), kept

    def tangent(self, point: Point, along: Tensor) -> list[Any]:
        """The tangents of all values along zdot; None is zero."""
        dots: list[Any] = [None] * self.program.size
        dots[0] = along
        for layer in self.layers:
            if any(dots[slot] is not None for slot in layer.slots):
                dots[layer.index] = layer.tangent(point, dots)
        return dots

    def adjoint(
        self,
        point: Point,
        dots: list[Any],
        cotangents: dict[int, Any],
        seed: Tensor | None,
        products: Products,
        watch: Watch | None = None,
    ) -> dict[int, Any]:
        """The gradients, by number, of <seed, output> and of the tangents' own cotangents times the tangents.

        reverse of the first plus the bends of the second; weights are left in ``products``. ``watch`` is told of every
        layer that takes part: what ``Layer.adjoint`` is given.
        """
        grads = Gradients(point.values, point.wanted)
        grads.add(self.program.output, seed)
        for layer in self.backwards:
            dy_dot, dy = grads.found.pop(layer.index, None), cotangents.get(layer.index)
            if dy_dot is not None or dy is not None:
                if watch is not None:
                    watch(layer, point, dy_dot, dy, dots)
                layer.adjoint(point, dy_dot, dy, dots, grads, products)
        return grads.found


def usual_tensor(tensor: Tensor) -> Tensor:
    """A copy of what inference mode left behind, which cannot be saved for a backward pass; others as they are."""
    return tensor.detach().clone() if tensor.is_inference() else tensor


class Inputs:
    """The passive part of a call: what autograd differentiates once, and the numbers that sweeps read.

    Args:
        sweeps: of the network.
        z: codes, for the batch.
        tensors: the network's, by source; None where the source is not used.
    """

    def __init__(self, sweeps: Sweeps, z: Tensor, tensors: Sequence[Tensor | None]) -> None:
        program, self.layers = sweeps.program, sweeps.layers
        self.passive = program.start(z, [None if t is None else usual_tensor(t) for t in tensors])
        read = sorted({slot for operation in program.active for slot in operation.slots})
        self.trained = [
            index
            for index in read
            if isinstance(self.passive[index], Tensor) and self.passive[index].requires_grad
        ]
        """Numbers of passive tensors to which gradients flow, in the order in which a Function takes them."""
        self.wanted = list(program.is_active)
        for index in self.trained:
            self.wanted[index] = True

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors of ``trained``."""
        return [self.passive[index] for index in self.trained]

    def detached(self) -> list[Any]:
        """The values that sweeps read, without graphs."""
        values = [value.detach() if isinstance(value, Tensor) else value for value in self.passive]
        for layer in self.layers:
            layer.prepare(values)
        return values
