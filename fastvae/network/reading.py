"""From a module to a program: its forward is run once by torch.export, on a private copy, and written down.

So control flow, assertions, sizes and functional calls are settled facts. What export does not see is looked for:
``no_grad`` and ``detach`` are kept as what they are, a user's ``autograd.Function`` is called as one operation, and
random numbers are refused.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastvae._compiling import exporting
from fastvae._second_order import twice_differentiable
from fastvae.held import INTERNAL, Held, Steps, UnknownValue
from fastvae.locks import READING
from fastvae.lowering.errors import UnsupportedLayer
from fastvae.lowering.tracing import in_line, line_in, line_that_raised
from fastvae.network.alignment import aligned
from fastvae.network.functions import Call, marked
from fastvae.network.pristine import BATCH, first_line, rows_of
from fastvae.network.program import Operation, Program, Slot, Source
from fastvae.network.quiet import quietly
from fastvae.network.simplifying import simplified

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default

Ways = dict[tuple[Any, ...], Steps]
"""The way to tensors that are not registered, by what tells them apart."""


class Copies(Protocol):
    """See :class:`fastvae.network.pristine.Pristine`."""

    examples: list[Tensor]
    writes: bool

    def fresh(self) -> nn.Module:
        """A module for one run."""


def read_program(copies: Copies, *, apart: bool = False) -> Program:
    """The program of a module, of which copies are run that only this thread uses.

    Args:
        copies: one for each run.
        apart: run it with two batches and compare, for what took the size of one for a constant.

    Raises:
        UnsupportedLayer: the forward cannot be run that way, or does what a program cannot say.
    """
    examples = copies.examples
    with READING, warnings.catch_warnings(), torch.autocast(examples[0].device.type, enabled=False):
        warnings.simplefilter("ignore")
        failure: _Untraced | None = None
        turns: tuple[int, ...] | None = None
        for batch in () if apart else ("named", "any"):
            try:
                traced = _traced(copies, examples, batch)
                turns = traced.turns
                if turns == ():
                    return Program(traced.sources, traced.operations, traced.output)
            except _Untraced as error:
                failure = failure or error
        try:
            return _of_two_batches(copies, examples, turns or ())
        except _Untraced as error:
            raise UnsupportedLayer(str(failure or error)) from error


class Called(nn.Module):
    """A module whose inputs have names, which torch.export asks for, and may be written to."""

    def __init__(self, module: nn.Module, writes: bool) -> None:
        super().__init__()
        self.module, self._writes = module, writes

    def forward(self, z: Tensor) -> Any:
        """What it returns."""
        return self.module(z.clone() if self._writes else z)


class _CalledWith(Called):
    def forward(self, z: Tensor, condition: Tensor) -> Any:  # type: ignore[override]
        return self.module(*((z.clone(), condition.clone()) if self._writes else (z, condition)))


def takes_any(module: nn.Module) -> bool:
    """Whether the forward takes ``*args`` and no argument by name."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    return bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL


class _Untraced(Exception):  # noqa: N818
    """Why torch.export could not run a forward."""


class _Traced(NamedTuple):
    """What a run wrote down."""

    sources: list[Source]
    operations: list[Operation]
    output: int
    turns: tuple[int, ...] | None
    """Numbers of samples at which the forward takes another way; None where the run's own is taken for a constant."""


def _traced(copies: Copies, examples: Sequence[Tensor], batch: str) -> _Traced:
    """One run. The number of samples is a symbol ("named"), or where it can be ("any"), or the examples' ("fixed")."""
    import torch._dynamo.config as settings
    from torch.export import Dim, export

    # A cache of the process that nothing empties: each reading would leave 70 KB in it and never ask for them.
    without_cache = settings.patch(fake_tensor_cache_enabled=False)
    size = {"named": Dim("batch"), "any": Dim.AUTO, "fixed": None}[batch]
    shapes = None if size is None else tuple({0: size} for _ in examples)
    module = copies.fresh()
    # What the module holds before its forward adds to it.
    held = _held_tensors(module)
    called = module
    if copies.writes or takes_any(module):
        called = (Called if len(examples) == 1 else _CalledWith)(module, copies.writes)
    try:
        with (
            torch.enable_grad(),
            twice_differentiable(),
            exporting(),
            quietly(),
            without_cache,
            marked() as calls,
        ):
            exported = simplified(export(called, tuple(examples), dynamic_shapes=shapes, strict=False))
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if type(error).__name__ == "GuardOnDataDependentSymNode":
            reason = "it asks for a number that is computed from its input, for a branch or for Python"
        text = f"torch.export cannot run its forward: {reason}"
        raise _Untraced(in_line(text, line_that_raised(error))) from error
    return _written_down(exported, held, calls, "" if called is module else "module.")


def _of_two_batches(copies: Copies, examples: Sequence[Tensor], turns: Sequence[int]) -> Program:
    """For a forward that takes the number of samples for a constant: from a run with 2 and one with 5."""
    batches = BATCH, BATCH + 3
    one, other = (
        _traced(copies, [rows_of(example, batch) for example in examples], "fixed") for batch in batches
    )
    if len(one.operations) != len(other.operations):
        counts = " and ".join(str(len(each.operations)) for each in (one, other))
        raise UnsupportedLayer(
            f"its forward does something else for batches of another size: {counts} operations for {batches[0]} and "
            f"{batches[1]} samples"
        )
    if [each[:3] for each in one.sources] != [
        each[:3] for each in other.sources
    ] or one.output != other.output:
        raise UnsupportedLayer("its forward does something else for batches of another size")
    operations, numbers = aligned(one.operations, other.operations, batches, 1 + len(one.sources))
    output = numbers.get(one.output, one.output)
    return Program(one.sources, operations, output, turns=turns, is_aligned=True)


def _written_down(exported: Any, held: Ways, calls: list[Call], prefix: str) -> _Traced:
    signature = exported.graph_signature
    constants = {**dict(exported.constants), **dict(exported.tensor_constants)}
    graph_module, numbers = exported.graph_module, {}
    by_name = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    codes = [node for node in placeholders if by_name[node.name].kind.name == "USER_INPUT"]
    changed = [str(spec.target) for spec in signature.output_specs if spec.kind.name != "USER_OUTPUT"]
    if changed:
        names = ", ".join(name.removeprefix(prefix) for name in changed)
        raise UnsupportedLayer(f"its forward changes buffers of the module ({names})")
    numbers[codes[0]] = 0
    sources: list[Source] = []
    operations: list[Operation] = []
    for node in placeholders:
        if node is codes[0]:
            continue
        spec = by_name[node.name]
        kind = spec.kind.name
        if kind == "USER_INPUT":
            source = Source("", node.name, is_condition=True)
        elif kind in ("PARAMETER", "BUFFER"):
            path, _, name = spec.target.removeprefix(prefix).rpartition(".")
            source = Source(path, name)
        elif kind == "CONSTANT_TENSOR" and isinstance(constants.get(spec.target), Tensor):
            constant = constants[spec.target]
            try:
                steps = held.get(_identity(constant), ())
            except RuntimeError as error:  # A wrapper of torch.func's, without memory of its own.
                raise UnsupportedLayer(
                    f"its forward keeps a tensor of a transform ({spec.target})"
                ) from error
            if constant.requires_grad and not steps:
                raise UnsupportedLayer(
                    "its forward reads a tensor that requires a gradient and is not its own"
                )
            source = Source("", spec.target, steps, None if steps else constant.detach())
        else:
            raise UnsupportedLayer(f"its forward reads a {kind.lower().replace('_', ' ')} ({spec.target})")
        sources.append(source)
        numbers[node] = len(sources)
    output = None
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            index = 1 + len(sources) + len(operations)
            operations.append(_operation(node, index, numbers, calls))
            numbers[node] = index
        elif node.op == "output":
            results = node.args[0]
            if len(results) != 1 or results[0] not in numbers:
                raise UnsupportedLayer("its forward returns more than one tensor")
            output = numbers[results[0]]
        elif node.op != "placeholder":
            raise UnsupportedLayer(f"its forward uses {node.op} ({node.target})")
    assert output is not None
    return _Traced(sources, operations, output, _turns(exported, codes[0]))


_LARGEST_TURN = 1024
"""Forwards that do something else from here on are refused: so many samples would have to be run to see what."""

_MOST_BY_CUDNN = 65535
"""Rows of a BatchNorm up to which PyTorch asks cuDNN on a GPU; its other kernel computes the same."""


def _turns(exported: Any, codes: Any) -> tuple[int, ...] | None:
    """Numbers of samples next to those for which the run holds; None if it holds for its own alone."""
    size = codes.meta["val"].shape[0]
    if isinstance(size, int) or size.node.expr.is_number:
        return None
    known = exported.range_constraints.get(size.node.expr)
    if known is None or known.upper >= 2**31:
        return ()
    if codes.meta["val"].is_cuda and known.upper == _MOST_BY_CUDNN:
        return ()
    if known.upper >= _LARGEST_TURN:
        raise UnsupportedLayer("its forward does something else for batches of another size")
    return (int(known.upper) + 1,)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors of the same memory, which torch.export wraps anew."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _held_tensors(module: nn.Module) -> Ways:
    """The way to tensors that are read past their registration, such as those in a plain list or in a closure.

    They may be registered as well.
    """
    found: Ways = {}
    for path, inner in module.named_modules():
        steps: Steps = tuple(("attribute", name) for name in path.split(".") if name)
        for name, part in (*inner._parameters.items(), *inner._buffers.items()):
            if part is not None and part.layout == torch.strided and part.numel():
                found.setdefault(_identity(part), (*steps, ("attribute", name)))
        held = Held(module)
        for name, value in vars(inner).items():
            if name not in INTERNAL:
                with contextlib.suppress(UnknownValue):
                    held.key(value, (*steps, ("attribute", name)))
        held.around(inner, steps)
        for way, tensor in held.tensors:
            if tensor.numel():
                found.setdefault(_identity(tensor), way)
    return found


def _operation(node: Any, index: int, numbers: dict[Any, int], calls: list[Call]) -> Operation:
    target, line = node.target, line_in(node.meta.get("stack_trace"))
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise UnsupportedLayer(in_line(f"its forward uses control flow of torch, {target.__name__}", line))
    if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) and _drops_out(node):
        raise UnsupportedLayer(in_line(f"its forward draws random numbers, {target}", line))
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in _schema(target)):
        raise UnsupportedLayer(in_line(f"its forward changes a tensor in place, {target}", line))

    def taken(tree: Any) -> Any:
        if isinstance(tree, torch.fx.Node):
            return Slot(numbers[tree])
        if isinstance(tree, (list, tuple)):
            return [taken(entry) for entry in tree]
        if isinstance(tree, slice):
            raise UnsupportedLayer(in_line(f"its forward indexes in a way that is not read, {node}", line))
        return tree

    if target is torch.ops.fastvae_marks.function_ends.default:
        number = node.args[1]
        begins = next(each for each in node.graph.nodes if _begins(each) and each.args[1] == number)
        return Operation(index, calls[number].__name__, calls[number], [taken(begins.args[0])], {})
    source: Any = node.args[0] if node.args else None
    if target is operator.getitem and getattr(source, "target", None) is _BATCH_NORM and node.args[1] == 0:
        # Its other results are of no use: as the one operation that it was.
        *tensors, momentum, eps = source.args
        target, args = torch.ops.aten.batch_norm.default, [*tensors, False, momentum, eps, False]
        return Operation(index, node.name, target, taken(args), {})
    is_number = isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
    kwargs = {key: taken(value) for key, value in node.kwargs.items()}
    is_complex = any(map(_is_complex, (node, *node.all_input_nodes)))
    return Operation(index, node.name, target, taken(node.args), kwargs, is_number, is_complex, line)


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val")
    return any(
        isinstance(each, Tensor) and each.is_complex()
        for each in (value if isinstance(value, (list, tuple)) else [value])
    )


def _begins(node: Any) -> bool:
    return node.target is torch.ops.fastvae_marks.function_begins.default


def _drops_out(node: Any) -> bool:
    """Whether an operation that may draw random numbers does: recurrent layers and attention without dropout do not."""
    names = [argument.name for argument in _schema(node.target)]
    values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    chances = [values.get(name, 0.0) for name in ("dropout", "dropout_p", "p") if name in names]
    return values.get("train", True) is not False and (not chances or any(chance != 0 for chance in chances))


def _schema(target: Any) -> list[Any]:
    schema = getattr(target, "_schema", None)
    return [] if schema is None else list(schema.arguments)


__all__ = ["Copies", "read_program"]
