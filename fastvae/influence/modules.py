"""Modules without a rule: the gradients of their parameters sample by sample, side by side under torch.vmap.

Only the module itself is run again, on what its hook saw, with the gradient of the losses to what it returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastvae._second_order import batchable

__all__ = ["ModuleCall", "WholeModule", "places_of"]


_NEVER_CALLED = nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, ParametrizationList


@dataclass
class ModuleCall:
    """One call of a module."""

    inputs: list[Any]
    """Positional and keyword arguments, flat; tensors are detached."""
    form: TreeSpec
    versions: list[int]
    """Of those that are tensors, in order."""
    outputs: dict[int, GradientEdge]
    """Of the flat result, by place, those that the losses can depend on."""
    grads: dict[int, Tensor] = field(default_factory=dict)
    """The gradients of the losses to them."""

    @classmethod
    def seen(cls, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ModuleCall | None:
        """What a hook is given; None where nothing of it can be differentiated."""
        edges = {
            place: get_gradient_edge(each)
            for place, each in enumerate(tree_flatten(output)[0])
            if isinstance(each, Tensor) and each.requires_grad
        }
        if not edges:
            return None
        given, form = tree_flatten((args, kwargs))
        inputs = [each.detach() if isinstance(each, Tensor) else each for each in given]
        return cls(inputs, form, [each._version for each in _tensors(inputs)], edges)

    @property
    def was_changed(self) -> bool:
        """Whether an input was changed in place since."""
        return [each._version for each in _tensors(self.inputs)] != self.versions


@dataclass
class WholeModule:
    """A module, of some of whose parameters the gradients are taken through all of it."""

    name: str
    module: nn.Module
    parameters: list[str] = field(default_factory=list)
    """Their names in the module, those of its children with dots."""
    axis: int = 0
    """The dimension of its first tensor that has the samples, those of one side by side. A tensor of another size
    there has them along the other one of its first two dimensions, or none."""
    _axes: dict[Any, list[int | None]] = field(default_factory=dict)
    """Where the samples are in each argument, by the arguments' dimensions."""

    @property
    def names(self) -> list[str]:
        """Their names in the model."""
        return [self.full_name(name) for name in self.parameters]

    def full_name(self, name: str) -> str:
        """The name in the model of a parameter by its name in the module."""
        return f"{self.name}.{name}"

    def look_along(self, axis: int) -> None:
        """Have the samples along another dimension."""
        self.axis = axis
        self._axes.clear()

    def gradients(self, calls: Sequence[ModuleCall], samples: int) -> Tensor:
        """[B, numel] the gradient of each sample.

        Raises:
            ValueError: arguments in which the samples cannot be told.
        """
        total: Tensor | None = None
        for call in calls:
            found = self._of_call(call, samples)
            total = found if total is None else total + found
        assert total is not None
        return total

    def _of_call(self, call: ModuleCall, samples: int) -> Tensor:
        axes = self._axes_of(call)
        tensors = [_of_samples(each, axis, samples) for each, axis in zip(call.inputs, axes, strict=True)]
        rows = next(
            each.shape[axis] for each, axis in zip(call.inputs, axes, strict=True) if axis is not None
        )
        grads = {}
        for place, grad in call.grads.items():
            axis = self._axis_in(grad, rows)
            if axis is None:
                raise ValueError("TracIn: a module returned a tensor without a row for each sample")
            grads[place] = _of_samples(grad, axis, samples)
        # Each tensor under all its names: functional_call, left to tie weights by itself, does not put back those of
        # a module that is registered twice.
        aliases = {
            f"{path}.{name}".lstrip("."): tensor
            for path, module in self.module.named_modules(remove_duplicate=False)
            for name, tensor in module._parameters.items()
            if tensor is not None
        }
        wanted = {name: self.module.get_parameter(name) for name in self.parameters}

        def product(own: dict[str, Tensor], given: list[Any], grads: dict[int, Tensor]) -> Tensor:
            by_id = {id(wanted[name]): tensor for name, tensor in own.items()}
            named = {name: by_id.get(id(tensor), tensor.detach()) for name, tensor in aliases.items()}
            args, kwargs = tree_unflatten(given, call.form)
            result = torch.func.functional_call(self.module, named, args, kwargs, tie_weights=False)
            flat = tree_flatten(result)[0]
            return torch.stack([(flat[place] * grad).sum() for place, grad in grads.items()]).sum()

        constants = [None if axis is not None else each for each, axis in zip(tensors, axes, strict=True)]
        moving = [each for each, axis in zip(tensors, axes, strict=True) if axis is not None]

        def of_one(moving: list[Tensor], grads: dict[int, Tensor]) -> dict[str, Tensor]:
            rest: Iterator[Tensor] = iter(moving)
            given = [
                next(rest) if axis is not None else constant
                for constant, axis in zip(constants, axes, strict=True)
            ]
            own = {name: tensor.detach() for name, tensor in wanted.items()}
            gradient: dict[str, Tensor] = torch.func.grad(product)(own, given, grads)
            return gradient

        with torch.no_grad(), batchable():
            found: dict[str, Tensor] = torch.vmap(of_one)(moving, grads)
        return torch.cat([found[name].reshape(samples, -1) for name in self.parameters], 1)

    def _axes_of(self, call: ModuleCall) -> list[int | None]:
        """As at the first call of this form: later a tensor without samples may happen to have as many rows."""
        key = tuple(each.dim() if isinstance(each, Tensor) else None for each in call.inputs)
        if key not in self._axes:
            first = next(iter(_tensors(call.inputs)), None)
            if first is None or first.dim() <= self.axis:
                raise ValueError("TracIn: a module was called without a tensor that has samples")
            rows = first.shape[self.axis]
            self._axes[key] = [
                self._axis_in(each, rows) if isinstance(each, Tensor) else None for each in call.inputs
            ]
        return self._axes[key]

    def _axis_in(self, tensor: Tensor, rows: int) -> int | None:
        for axis in (self.axis, 1 - self.axis):
            if tensor.dim() > axis and tensor.shape[axis] == rows:
                return axis
        return None


def places_of(owners: Sequence[str], root: nn.Module) -> Iterator[str]:
    """The names of the modules that parameters of all these modules may be differentiated through, innermost first.

    The root itself is none.
    """
    common: list[str] = []
    for level in zip(*(owner.split(".") for owner in owners), strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    modules = dict(root.named_modules(remove_duplicate=False))
    for length in range(len(common), 0, -1):
        name = ".".join(common[:length])
        # These are never called.
        if name and not isinstance(
            modules[name], (nn.ModuleList, nn.ModuleDict, nn.ParameterList, ParametrizationList)
        ):
            yield name


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    return (each for each in values if isinstance(each, Tensor))


def _of_samples(value: Any, axis: int | None, samples: int) -> Any:
    """[B, ...] each sample's own part, of the same number of dimensions."""
    if axis is None:
        return value
    if value.shape[axis] % samples:
        raise ValueError(f"TracIn: a module was given {value.shape[axis]} rows for {samples} samples")
    return value.unflatten(axis, (samples, -1)).movedim(axis, 0)
