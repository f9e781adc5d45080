"""A network that was read, with parameters of its own for every sample: evaluated, and the gradient to them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.lowering import UnsupportedLayer
from fastvae.network.layers import AutogradLayer, Layer, fuse, make_layer, without_cotangents
from fastvae.network.layers.base import MAKERS
from fastvae.network.program import Operation, Program, is_size

from .convolutions import CopiedConvolution, canonical, stored
from .layers import (
    BatchedLayer,
    CopiedGradient,
    CopiedGradients,
    CopiedLayer,
    CopiedPoint,
    Kinds,
    in_full,
    make_copied,
)
from .norms import with_activations
from .rows import FIRST, axis_of

__all__ = ["CopiedNetwork", "Start"]


class Start:
    """What all steps share: all that does not depend on what is trained.

    values: by number, of the whole batch.
    alone: by number, of a batch of one sample; None for what comes from data.
    """

    def __init__(self, values: list[Any], alone: list[Any], samples: int) -> None:
        self.values, self.alone, self.samples = values, alone, samples


class CopiedNetwork:
    """A program of which each sample trains its own copy.

    Args:
        program: see :class:`fastvae.network.program.Program`.
        trained: of each parameter that is trained the numbers of its sources.
        z: data of two samples, by which it is found out where values have their samples.
        tensors: the network's, by source; a condition of two samples.

    Raises:
        UnsupportedLayer: the output does not depend on what is trained, or its samples are not its rows.
    """

    def __init__(
        self,
        program: Program,
        trained: Sequence[Sequence[int]],
        z: Tensor,
        tensors: Sequence[Tensor | None],
    ) -> None:
        self.program, self.trained = program, tuple(map(tuple, trained))
        operations = sorted([*program.passive, *program.active], key=lambda each: each.index)
        of_data = [False] * program.size
        of_data[0] = True
        for place, source in enumerate(program.sources, 1):
            of_data[place] = source.is_condition
        is_copied, is_trained = [False] * program.size, [False] * program.size
        for index in (each for indices in self.trained for each in indices):
            is_copied[index] = is_trained[index] = True
        self.fixed: list[Operation] = []
        moving: list[Operation] = []
        uses = [0] * program.size
        uses[program.output] = 1
        for operation in operations:
            slots = operation.slots
            data = not is_size(operation.target) and any(of_data[slot] for slot in slots)
            of_data[operation.index] = data
            is_trained[operation.index] = any(is_trained[slot] for slot in slots)
            is_copied[operation.index] = is_trained[operation.index] and not data
            (moving if is_trained[operation.index] else self.fixed).append(operation)
            for slot in slots:
                uses[slot] += 1
        self._of_data = of_data
        if not is_trained[program.output] or not of_data[program.output]:
            raise UnsupportedLayer("its output is not computed from both data and parameters")
        self.is_trained = is_trained
        device = z.device.type
        self.kinds = Kinds(is_copied, is_trained, self._axes(operations, z, tensors), uses, device)
        if self.kinds.axes[program.output] != FIRST:
            raise UnsupportedLayer("its output has no row for each sample")
        layers = with_activations([self._layer(operation) for operation in moving], uses)
        stopped = without_cotangents(layers, program.output)
        # Copies are run by their own layers, whether something comes back or not.
        pairs = zip(layers, stopped, strict=True)
        layers = [layer if isinstance(layer, CopiedLayer) else other for layer, other in pairs]
        self.layers = fuse(layers, program.output, is_trained) if device == "cpu" else layers
        self._convolutions: dict[int, CopiedConvolution] = {}
        """Of weights that nothing but a convolution reads: they are kept as its kernels have them."""
        for layer in self.layers:
            if (
                isinstance(layer, CopiedConvolution)
                and (layer.weight,) in self.trained
                and uses[layer.weight] == 1
            ):
                weight = tensors[layer.weight - 1]
                assert weight is not None
                layer.is_stored, layer.kernel_size = True, tuple(weight.shape[2:])
                self._convolutions[layer.weight] = layer
        self.backwards = self.layers[::-1]
        self.read = sorted({slot for layer in self.layers for slot in layer.slots if not is_trained[slot]})
        """Numbers of the fixed values that layers read."""

    @property
    def by_autograd(self) -> list[str]:
        """Operations with parameters, or on them, that no rule knows: they go through torch.vmap and autograd."""
        return [
            layer.operation.kind
            for layer in self.layers
            if isinstance(layer, BatchedLayer) and not _is_known(layer.operation)
        ]

    def _layer(self, operation: Operation) -> Layer:
        if any(self.kinds.is_copied[slot] for slot in operation.slots) and operation.kind != "getitem":
            return make_copied(operation, self.kinds)
        return make_layer(operation, self.is_trained) or AutogradLayer(operation, self.is_trained)

    def _axes(
        self, operations: Sequence[Operation], z: Tensor, tensors: Sequence[Tensor | None]
    ) -> list[Any]:
        """By number, where what comes from data has its samples."""
        whole, *alone = [
            self._evaluated(operations, [z[part], *self._at(tensors, part)])
            for part in (slice(None), slice(0, 1), slice(1, 2))
        ]
        return [
            axis_of(whole[index], [values[index] for values in alone]) if self._of_data[index] else None
            for index in range(self.program.size)
        ]

    def _at(self, tensors: Sequence[Tensor | None], part: slice) -> list[Tensor | None]:
        """The tensors, of a condition some rows."""
        pairs = zip(tensors, self.program.sources, strict=True)
        return [
            tensor[part] if source.is_condition and tensor is not None else tensor for tensor, source in pairs
        ]

    def _evaluated(self, operations: Sequence[Operation], given: Sequence[Any]) -> list[Any]:
        values = [*given, *[None] * (self.program.size - len(given))]
        with torch.no_grad():
            for operation in operations:
                values[operation.index] = operation.call(values)
        return values

    def start(self, x: Tensor, tensors: Sequence[Tensor | None]) -> Start:
        """Evaluate what is fixed.

        Args:
            x: data [B, ...].
            tensors: the network's, by source; a condition of the whole batch.
        """
        values = self._evaluated(self.fixed, [x, *tensors])
        shared = [operation for operation in self.fixed if not self._of_data[operation.index]]
        alone = self._evaluated(shared, [x[:1], *tensors])
        alone = [None if of_data else value for of_data, value in zip(self._of_data, alone, strict=True)]
        return Start(values, alone, len(x))

    def copies_of(self, tensors: Sequence[Tensor | None], samples: int) -> list[Tensor]:
        """So many copies of each trained tensor, in the form in which ``forward`` takes them."""
        found = []
        for index, *_ in self.trained:
            tensor = tensors[index - 1]
            assert tensor is not None
            own = tensor.detach().unsqueeze(0)
            own = stored(own) if index in self._convolutions else own
            found.append(own.repeat(samples, *[1] * (own.dim() - 1)))
        return found

    def as_parameters(self, copies: Sequence[Any]) -> list[Any]:
        """Copies, or their gradients (None: there is none), in the form of the parameters."""
        found = []
        for (index, *_), own in zip(self.trained, copies, strict=True):
            layer = self._convolutions.get(index)
            found.append(own if layer is None or own is None else canonical(own, layer.kernel_size))
        return found

    def forward(self, start: Start, copies: Sequence[Tensor]) -> CopiedPoint:
        """Evaluate all copies, of which the parameters are given in the order of ``trained``, [B, *shape] each."""
        values = list(start.values)
        for indices, copy in zip(self.trained, copies, strict=True):
            for index in indices:
                values[index] = copy
        point = CopiedPoint(values, start.alone, self.is_trained, start.samples)
        for layer in self.layers:
            values[layer.index] = layer.forward(point)
        return point

    def reverse(self, point: CopiedPoint, seed: Tensor) -> list[CopiedGradient]:
        """The gradients to copies, given the output's; those of matrices [B, out, in] by their factors, if they can be.

        These are dy [B, out] and x [B, in], and the gradient is their outer product.
        """
        grads = CopiedGradients(point.values, self.is_trained)
        grads.add(self.program.output, seed)
        for layer in self.backwards:
            dy = in_full(grads.taken(layer.index))
            if dy is not None:
                layer.reverse(point, dy, grads, None)
        found: list[CopiedGradient] = []
        for first, *others in self.trained:
            found.append(grads.taken(first))
            for each in filter(lambda part: part is not None, map(grads.taken, others)):
                found[-1] = each if found[-1] is None else in_full(found[-1]) + in_full(each)
        return found


def _is_known(operation: Operation) -> bool:
    """Whether there is a rule for operations of this kind: PyTorch's batched operators do the same as it."""
    return getattr(operation.target, "overloadpacket", operation.target) in MAKERS
