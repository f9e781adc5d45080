"""Modules without a rule: the gradients of their parameters sample by sample, side by side under torch.vmap.

Only the module itself is run again, on what its hook saw, with the gradient of the losses to what it returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastvae._second_order import batchable

__all__ = ["ModuleCall", "WholeModule", "places_of", "sample_axis", "split_samples"]


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
    def of_output(cls, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ModuleCall | None:
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
    def form_of_inputs(self) -> Form:
        """See ``Form``."""
        return tuple(each.dim() if isinstance(each, Tensor) else None for each in self.inputs)

    def rows_along(self, axes: Sequence[int | None], samples: int) -> list[float]:
        """Rows a sample in each input that has samples, which lie along its axis."""
        return [
            each.shape[axis] / samples
            for each, axis in zip(self.inputs, axes, strict=True)
            if axis is not None
        ]

    @property
    def was_changed(self) -> bool:
        """Whether an input was changed in place since."""
        return [each._version for each in _tensors(self.inputs)] != self.versions


Form = tuple[int | None, ...]
"""Of a call the dimensions of its inputs; None for what is no tensor."""


@dataclass
class WholeModule:
    """A module, of some of whose parameters the gradients are taken through all of it."""

    name: str
    module: nn.Module
    parameters: list[str] = field(default_factory=list)
    """Their names in the module, those of its children with dots."""
    _axes: dict[Form, tuple[list[int | None], dict[int, int]]] = field(default_factory=dict)
    """Of the calls of a form, the dimension of each input and of each result that has the samples, those of one side by
    side; None for an input without samples."""
    _rows: dict[Form, list[float]] = field(default_factory=dict)
    """Of the calls of a form, rows a sample in each input that has samples."""

    @property
    def names(self) -> list[str]:
        """Their names in the model."""
        return [self.full_name(name) for name in self.parameters]

    def full_name(self, name: str) -> str:
        """The name in the model of a parameter by its name in the module."""
        return f"{self.name}.{name}"

    def learn(
        self, calls: Sequence[ModuleCall], samples: int, others: Sequence[ModuleCall], other_samples: int
    ) -> None:
        """Where the samples are: in the dimensions that differ between two batches as their numbers of samples do.

        Raises:
            ValueError: that is not so.
        """
        self._axes.clear()
        self._rows.clear()
        if len(calls) != len(others):
            raise ValueError(f"TracIn: {self.name}: not called as often for another batch")
        for call, other in zip(calls, others, strict=True):
            if call.form_of_inputs != other.form_of_inputs or call.grads.keys() != other.grads.keys():
                raise ValueError(f"TracIn: {self.name}: called in another way for another batch")
            inputs = [
                sample_axis(a, b, samples, other_samples) if isinstance(a, Tensor) else None
                for a, b in zip(call.inputs, other.inputs, strict=True)
            ]
            outputs = {
                place: sample_axis(grad, other.grads[place], samples, other_samples)
                for place, grad in call.grads.items()
            }
            if all(axis is None for axis in inputs) or None in outputs.values():
                raise ValueError(f"TracIn: {self.name}: a call without samples")
            found = inputs, {place: axis for place, axis in outputs.items() if axis is not None}
            if self._axes.setdefault(call.form_of_inputs, found) != found:
                raise ValueError(
                    f"TracIn: {self.name}: calls of one form have their samples in different places"
                )
            rows = call.rows_along(inputs, samples)
            if self._rows.setdefault(call.form_of_inputs, rows) != rows:
                raise ValueError(f"TracIn: {self.name}: calls of one form have other numbers of rows")

    def gradients(self, calls: Sequence[ModuleCall], samples: int, draws: int = 1) -> Tensor:
        """[B, numel] the gradient of each sample.

        Args:
            calls: what a hook saw.
            samples: B, or B * draws where each draw counts as a sample, which then has as many rows fewer.
            draws: see above.

        Raises:
            ValueError: calls that are not like those that ``learn`` saw.
        """
        total: Tensor | None = None
        for call in calls:
            self._check_rows(call, samples, draws)
            found = self._of_call(call, samples)
            total = found if total is None else total + found
        assert total is not None
        return total

    def _check_rows(self, call: ModuleCall, samples: int, draws: int) -> None:
        """Rows that are chosen by the data cannot be told apart by sample."""
        if call.form_of_inputs not in self._axes:
            raise ValueError(f"TracIn: {self.name}: called in another way than for the first samples")
        found = call.rows_along(self._axes[call.form_of_inputs][0], samples)
        known = self._rows[call.form_of_inputs]
        for rows, expected in zip(found, known, strict=True):
            if rows != expected and rows * draws != expected:
                raise ValueError(
                    f"TracIn: {self.name}: expected {expected:g} rows a sample, as the first samples had, got "
                    f"{rows:g}: of rows that are chosen nobody knows whose they are. Leave the module out by layers=, "
                    "or have samples first that show it, with uncovered='materialise'"
                )

    def _of_call(self, call: ModuleCall, samples: int) -> Tensor:
        axes, axes_of_grads = self._axes[call.form_of_inputs]
        tensors = [self._split(each, axis, samples) for each, axis in zip(call.inputs, axes, strict=True)]
        grads = {
            place: self._split(grad, axes_of_grads[place], samples) for place, grad in call.grads.items()
        }
        # Each tensor under all its names, each module once: functional_call, left to tie weights by itself or given one
        # module under two names, does not put back what it exchanged.
        aliases = {
            f"{path}.{name}".lstrip("."): tensor
            for path, module in self.module.named_modules()
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
            if any(flat[place].shape != grad.shape for place, grad in grads.items()):
                raise ValueError(f"TracIn: {self.name}: one sample alone gives a result of another shape")
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

        with torch.no_grad(), batchable(), _left_as_it_was(self.module, self.name):
            found: dict[str, Tensor] = torch.vmap(of_one)(moving, grads)
        return torch.cat([found[name].reshape(samples, -1) for name in self.parameters], 1)

    def _split(self, value: Any, axis: int | None, samples: int) -> Any:
        """[B, ...] each sample's own part, of the same number of dimensions."""
        if axis is None:
            return value
        if value.shape[axis] % samples:
            raise ValueError(f"TracIn: {self.name}: {value.shape[axis]} rows for {samples} samples")
        return split_samples(value, axis, samples)


def split_samples(tensor: Tensor, axis: int, samples: int) -> Tensor:
    """[B, ...] each sample's own part, with as many dimensions as the tensor has, of rows side by side on an axis."""
    return tensor.unflatten(axis, (samples, -1)).movedim(axis, 0)


def sample_axis(a: Tensor, b: Tensor, samples: int, other_samples: int) -> int | None:
    """The one dimension that differs; None if none does. ValueError where it is not the samples' alone."""
    if a.dim() != b.dim():
        raise ValueError("TracIn: a tensor of other dimensions for another batch")
    differ = [axis for axis in range(a.dim()) if a.shape[axis] != b.shape[axis]]
    if not differ:
        return None
    if len(differ) > 1 or a.shape[differ[0]] * other_samples != b.shape[differ[0]] * samples:
        raise ValueError(
            f"TracIn: {list(a.shape)} for {samples} samples and {list(b.shape)} for {other_samples}"
        )
    return differ[0]


@contextmanager
def _left_as_it_was(module: nn.Module, name: str) -> Iterator[None]:
    """Put back what a forward assigns to its module: under torch.vmap such tensors are no use outside.

    Raises:
        ValueError: it assigned buffers, which are state.
    """
    before = [(each, dict(vars(each)), dict(each._buffers)) for each in module.modules()]
    try:
        yield
    finally:
        changed = False
        for each, attributes, buffers in before:
            changed |= any(value is not buffers.get(key) for key, value in each._buffers.items())
            vars(each).clear()
            vars(each).update(attributes)
            each._buffers.clear()
            each._buffers.update(buffers)
    if changed:
        raise ValueError(f"TracIn: {name}: its forward changes its buffers")


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
        # These are never called, and TorchScript's modules take no hooks.
        if name and not isinstance(
            modules[name],
            (nn.ModuleList, nn.ModuleDict, nn.ParameterList, ParametrizationList, torch.jit.ScriptModule),
        ):
            yield name


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    return (each for each in values if isinstance(each, Tensor))
