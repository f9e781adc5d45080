"""From a module to a program: its forward is run once by torch.export, on a private copy, and written down.

So control flow, assertions, sizes and functional calls are settled facts. What export does not see is looked for:
``no_grad`` and ``detach`` are kept as what they are, a user's ``autograd.Function`` and random numbers are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._second_order import twice_differentiable
from fastvae.lowering.errors import UnsupportedLayer
from fastvae.lowering.tracing import READING
from fastvae.network.exporting import BATCHES, Called, example, export, first_line, quiet, takes_any
from fastvae.network.program import Operation, Program, Slot, Source, rows_of
from fastvae.private import private_copy

Held = dict[tuple[Any, ...], tuple[tuple[str, Any], ...]]


def copy_with_modes(module: nn.Module) -> nn.Module:
    """A private copy in the module's own training modes."""
    made = private_copy(module)
    for mine, own in zip(made.modules(), module.modules(), strict=True):
        mine.training = own.training
    return made


def read_program(module: nn.Module, z: Tensor, apart: bool = False) -> Program:
    """The program of a copy of a module, which only this thread uses.

    Args:
        module: see :func:`copy_with_modes`.
        z: one code [1 or more, ...]; its numbers do not matter.
        apart: run it with two batches and compare, for what took the size of one for a constant.

    Raises:
        UnsupportedLayer: the forward cannot be run that way, or does what a program cannot say.
    """
    # What the module holds before a forward of the copy adds to it.
    held = _held_tensors(module)
    called = Called(module) if takes_any(module) else module
    with READING, warnings.catch_warnings(), quiet(), torch.autocast(z.device.type, enabled=False):
        warnings.simplefilter("ignore")
        _refuse_functions(module, example(z, BATCHES[0]))
        exported = export(called, z, apart)
    return _program(exported, held, "" if called is module else "module.")


def _refuse_functions(module: nn.Module, codes: Tensor) -> None:
    """Refuse a user's autograd.Function, whose output torch.export sees but not its gradient."""
    with torch.enable_grad():
        try:
            with twice_differentiable():
                output = module(codes.clone().requires_grad_())
        except Exception as error:
            raise UnsupportedLayer(
                f"its forward raised {type(error).__name__}: {first_line(error)}"
            ) from error
    if not isinstance(output, Tensor):
        raise UnsupportedLayer(f"its forward returns a {type(output).__name__}, expected one tensor")
    if output.dim() == 0 or len(output) != BATCHES[0]:
        raise UnsupportedLayer(
            f"of {BATCHES[0]} codes its forward makes {list(output.shape)}, expected a row for each"
        )
    for node in _graph(output):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise UnsupportedLayer(
                f"it calls an autograd.Function ({type(node).__name__.removesuffix('Backward')})"
            )


def _graph(output: Tensor) -> Iterator[Any]:
    stack: list[Any] = [output.grad_fn]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += [below for below, _ in node.next_functions]


def _program(exported: list[Any], held: Held, prefix: str) -> Program:
    first = exported[0]
    signature = first.graph_signature
    constants = {**dict(first.constants), **dict(first.tensor_constants)}
    by_name = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    nodes, *others = (list(each.graph_module.graph.nodes) for each in exported)
    if any(_outline(other) != _outline(nodes) for other in others):
        raise UnsupportedLayer("its forward does something else for batches of another size")
    twins = {node: twin for other in others for node, twin in zip(nodes, other, strict=True)}
    placeholders = [node for node in nodes if node.op == "placeholder"]
    codes = [node for node in placeholders if by_name[node.name].kind.name == "USER_INPUT"]
    if len(codes) != 1:
        raise UnsupportedLayer(f"its forward takes {len(codes)} inputs, expected one")
    if any(spec.kind.name != "USER_OUTPUT" for spec in signature.output_specs):
        raise UnsupportedLayer("its forward changes buffers of the module")
    numbers = {codes[0]: 0}
    sources: list[Source] = []
    for node in placeholders:
        if node is not codes[0]:
            sources.append(_source(by_name[node.name], constants, held, prefix))
            numbers[node] = len(sources)
    written = _Written(numbers, 1 + len(sources))
    output = None
    for node in nodes:
        if node.op == "call_function":
            written.add(node, twins.get(node, node))
        elif node.op == "output":
            results = node.args[0]
            if len(results) != 1 or results[0] not in numbers:
                raise UnsupportedLayer("its forward returns more than one tensor")
            output = numbers[results[0]]
        elif node.op != "placeholder":
            raise UnsupportedLayer(f"its forward uses {node.op} ({node.target})")
    assert output is not None
    return Program(sources, written.operations, output)


def _outline(nodes: list[Any]) -> list[tuple[str, str]]:
    return [(node.op, node.name if node.op == "placeholder" else str(node.target)) for node in nodes]


def _source(spec: Any, constants: dict[str, Any], held: Held, prefix: str) -> Source:
    kind, target = spec.kind.name, spec.target
    if kind in ("PARAMETER", "BUFFER"):
        path, _, name = target.removeprefix(prefix).rpartition(".")
        return Source(path, name)
    if kind == "CONSTANT_TENSOR" and isinstance(constants.get(target), Tensor):
        constant = constants[target]
        steps = held.get(_identity(constant), ())
        return Source("", target, steps, None if steps else constant.detach())
    raise UnsupportedLayer(f"its forward reads a {kind.lower().replace('_', ' ')} ({target})")


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors of the same memory, which torch.export wraps anew."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _held_tensors(module: nn.Module) -> Held:
    """The way from the module to tensors that it holds unregistered, such as those of modules in a plain list."""
    found: Held = {}

    def look(value: Any, steps: tuple[tuple[str, Any], ...], depth: int) -> None:
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.numel():
                found.setdefault(_identity(value), steps)
        elif depth == 0:
            return
        elif isinstance(value, nn.Module):
            stores = (vars(value), value._parameters, value._buffers, value._modules)
            for name in dict.fromkeys(name for store in stores for name in store if not name.startswith("_")):
                look(getattr(value, name), (*steps, ("attribute", name)), depth - 1)
        elif isinstance(value, (list, tuple)):
            for place, entry in enumerate(value):
                look(entry, (*steps, ("item", place)), depth - 1)
        elif isinstance(value, dict):
            for key, entry in value.items():
                look(entry, (*steps, ("item", key)), depth - 1)

    look(module, (), 12)
    return found


def follow(module: nn.Module, steps: tuple[tuple[str, Any], ...]) -> Tensor:
    """The tensor at the end of a source's steps."""
    value: Any = module
    for kind, key in steps:
        value = getattr(value, key) if kind == "attribute" else value[key]
    if not isinstance(value, Tensor):
        raise TypeError
    return value


class _Written:
    """Operations in order, as they are written down from nodes."""

    def __init__(self, numbers: dict[Any, int], start: int) -> None:
        self.numbers, self.start = numbers, start
        self.operations: list[Operation] = []

    def add(self, node: Any, twin: Any) -> None:
        """The operation of a node; ``twin`` is the same node of another batch, or the node itself."""
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise UnsupportedLayer(f"its forward uses control flow of torch ({target.__name__})")
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) and _drops_out(node):
            raise UnsupportedLayer(f"its forward draws random numbers ({target})")
        if any(arg.alias_info is not None and arg.alias_info.is_write for arg in _schema(target)):
            raise UnsupportedLayer(f"its forward changes a tensor in place ({target})")
        args = self._taken(node.args, twin.args)
        kwargs = {key: self._taken(value, twin.kwargs[key]) for key, value in node.kwargs.items()}
        is_number = isinstance(
            node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
        )
        self.numbers[node] = self._append(node.name, target, args, kwargs, is_number)

    def _append(self, name: str, target: Any, args: Any, kwargs: dict[str, Any], is_number: bool) -> int:
        index = self.start + len(self.operations)
        self.operations.append(Operation(index, name, target, args, kwargs, is_number))
        return index

    def _taken(self, tree: Any, twin: Any) -> Any:
        if isinstance(tree, torch.fx.Node):
            return Slot(self.numbers[tree])
        if isinstance(tree, (list, tuple)):
            return [self._taken(*pair) for pair in zip(tree, twin, strict=True)]
        if isinstance(tree, slice):
            raise UnsupportedLayer("its forward indexes in a way that is not read")
        if tree is twin or tree == twin:
            return tree
        if type(tree) is int and type(twin) is int:
            small, large = BATCHES
            times = (twin - tree) // (large - small)
            return Slot(self._append("rows", rows_of, [Slot(0), times, tree - times * small], {}, True))
        raise UnsupportedLayer(f"its forward makes {tree} of one batch and {twin} of another")


def _drops_out(node: Any) -> bool:
    """Whether an operation that may draw random numbers does: recurrent layers and attention without dropout do not."""
    names = [argument.name for argument in _schema(node.target)]
    values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    chances = [values.get(name, 0.0) for name in ("dropout", "dropout_p", "p") if name in names]
    return values.get("train", True) is not False and (not chances or any(chance != 0 for chance in chances))


def _schema(target: Any) -> list[Any]:
    schema = getattr(target, "_schema", None)
    return [] if schema is None else list(schema.arguments)


__all__ = ["copy_with_modes", "follow", "read_program"]
