"""Reads a custom forward, traced by torch.fx, as a chain of layers.

Every node that depends on z must take the newest tensor and make the next one, or ask for a size. So nothing
is skipped: a branch, a skip connection, an in-place call whose result is dropped, or a tensor of its own all
stop the reading with the node's name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from .activations import ACTIVATIONS, Words
from .errors import NotADecoder, UnsupportedLayer, join
from .reading import Reading, Shape, TensorRef, read_stock, render, stock_base
from .tracing import line_of, trace

_ACTIVATIONS: dict[Any, Callable[..., Words]] = {
    function: activation.words for activation in ACTIVATIONS for function in activation.functions
}


def _torch_dropout(reading: Reading, p: float, train: bool) -> None:
    reading.dropout(p, train)


def _functional_dropout(
    reading: Reading, p: float = 0.5, training: bool = True, inplace: bool = False
) -> None:
    reading.dropout(p, training)


def _alpha_dropout(reading: Reading, p: float = 0.5, training: bool = False, inplace: bool = False) -> None:
    reading.dropout(p, training)


class _Batch:
    """The batch size: it may be handed to a view as its first dimension, and nothing else."""

    def __repr__(self) -> str:
        return "B"


_BATCH = _Batch()


def _view(reading: Reading, *dims: Any, shape: Any = None) -> None:
    if shape is None:
        shape = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    first, *rest = sizes = list(shape)
    if any(dim is not None and not isinstance(dim, int) for dim in rest):
        raise reading.refuse(f"only the first dimension may be the batch size, got {sizes}")
    if first is _BATCH or (isinstance(first, int) and first == -1 and -1 not in rest):
        reading.reshape(rest)
    else:
        raise reading.refuse(f"the first dimension must be the batch size or -1, got {sizes}")


def _flatten(reading: Reading, start_dim: int = 0, end_dim: int = -1) -> None:
    reading.flatten(start_dim, end_dim)


def _unflatten(reading: Reading, dim: int, sizes: Any) -> None:
    reading.unflatten(dim, sizes)


def _unsqueeze(reading: Reading, dim: int) -> None:
    rank = len(reading.shape) + 1
    axis = dim if dim >= 0 else dim + rank + 1
    if axis < 1 or axis > rank:
        raise reading.refuse(f"unsqueeze({dim}) on {render(reading.shape)} moves the batch dimension")
    reading.reshape((*reading.shape[: axis - 1], 1, *reading.shape[axis - 1 :]))


def _squeeze(reading: Reading, dim: int) -> None:
    axis = dim % (len(reading.shape) + 1)
    if axis < 1 or reading.shape[axis - 1] != 1:
        raise reading.refuse(
            f"squeeze({dim}) on {render(reading.shape)}: only a dimension known to be 1 is taken out"
        )
    reading.reshape(reading.shape[: axis - 1] + reading.shape[axis:])


def _index(reading: Reading, index: Any) -> None:
    entries = list(index) if isinstance(index, tuple) else [index]
    if entries.count(Ellipsis) == 0:
        entries.append(Ellipsis)
    whole = slice(None)
    if entries.count(Ellipsis) == 1 and all(e is None or e is Ellipsis or e == whole for e in entries):
        at = entries.index(Ellipsis)
        missing = len(reading.shape) + 1 - sum(1 for entry in entries if entry == whole)
        entries[at : at + 1] = [whole] * missing
        if missing >= 0 and entries[0] == whole:
            sizes = iter(reading.shape)
            reading.reshape([1 if entry is None else next(sizes) for entry in entries[1:]])
            return
    raise reading.refuse(
        f"indexing with {index!r} is not a reshape; only ':', '...' and None after the batch are"
    )


def _halves(node: Node) -> bool:
    """Whether it takes the features of [B, n] apart in two halves."""
    numbers = [*node.args[1:], *node.kwargs.values()]
    return node.target in ("chunk", torch.chunk) and numbers in ([2, 1], [2, -1])


def _same(reading: Reading, **_: Any) -> None:
    reading.emit("identity")


_SHAPES: dict[Any, Callable[..., None]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _functional_dropout),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), _alpha_dropout),
    torch.dropout: _torch_dropout,
    **dict.fromkeys(("view", "reshape", torch.reshape), _view),
    **dict.fromkeys(("flatten", torch.flatten), _flatten),
    **dict.fromkeys(("unflatten", torch.unflatten), _unflatten),
    **dict.fromkeys(("unsqueeze", torch.unsqueeze), _unsqueeze),
    **dict.fromkeys(("squeeze", torch.squeeze), _squeeze),
    operator.getitem: _index,
    **dict.fromkeys(("contiguous", "clone", torch.clone), _same),
}


def _size(shape: Shape, dim: int | None = None) -> Any:
    whole = (_BATCH, *shape)
    return whole if dim is None else whole[dim]


def _attribute(shape: Shape, name: str) -> Any:
    return {"shape": (_BATCH, *shape), "ndim": len(shape) + 1}[name]


_SIZES: dict[Any, Callable[..., Any]] = {
    "size": _size,
    getattr: _attribute,
    "dim": lambda shape: len(shape) + 1,
}
_ARITHMETIC = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)


class _Chain:
    """Walks a graph in order and feeds the reading; ``latest`` is the only tensor a next layer may take."""

    def __init__(self, reading: Reading, module: nn.Module, path: str) -> None:
        self.reading, self.module, self.path = reading, module, path
        self.latest: Node | None = None
        self.shapes: dict[Node, Shape] = {}
        self.sizes: dict[Node, Any] = {}

    def walk(self, graph: torch.fx.Graph) -> None:
        heads = self.heads(graph) if self.reading.two_heads and self.path == "" else ()
        for node in graph.nodes:
            if node.op == "placeholder":
                if self.latest is None:
                    self.latest = node
                    self.shapes[node] = self.reading.shape
            elif node in heads:
                continue
            elif node.op == "output":
                if heads:
                    self.end_in(heads)
                else:
                    self.check_output(node)
            elif any(source in self.shapes or source in self.sizes for source in node.all_input_nodes):
                self.step(node)

    def heads(self, graph: torch.fx.Graph) -> tuple[Node, ...]:
        """The nodes of a mean and a log variance that the forward returns apart: two layers, or one's two halves."""
        (result,) = next(node for node in graph.nodes if node.op == "output").args
        pair = tuple(result) if isinstance(result, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(node, Node) for node in pair) or pair[0] is pair[1]:
            return ()
        if all(node.target is operator.getitem for node in pair):
            whole = {node.args[0] for node in pair}
            halves = whole.pop()
            if not whole and [node.args[1] for node in pair] == [0, 1] and _halves(halves):
                return (*pair, halves)
        return pair

    def end_in(self, heads: Sequence[Node]) -> None:
        """Read the heads: one layer, whose outputs are the mean and below it the log variance."""
        first = len(self.reading.layers)
        trunk, shape = self.latest, self.reading.shape
        self.reading.at(self.path, type(self.module).__name__)
        if any(user.op != "output" for node in heads[:2] for user in node.users):
            raise self.reading.refuse("something takes, or changes, one of the two tensors that it returns")
        if len(heads) == 3:
            if heads[2].args[0] is not trunk or len(shape) != 1:
                raise self.reading.refuse(
                    "its forward returns two tensors that are not the halves of its last"
                )
            return
        for node in heads:
            if node.all_input_nodes[:1] != [trunk]:
                raise self.reading.refuse("its two heads are not on one trunk")
            self.latest, self.reading.shape = trunk, shape
            self.step(node)
        self.reading.stack_heads(first)

    def check_output(self, node: Node) -> None:
        self.reading.at(self.path, type(self.module).__name__)
        result = node.args[0]
        for kind in (tuple, list, dict):
            if isinstance(result, kind):
                # Inside another module, that one may pick what it needs.
                error = NotADecoder if self.path == "" else UnsupportedLayer
                raise self.reading.refuse(
                    f"its forward returns a {kind.__name__}, expected one tensor", error
                )
        if result is not self.latest:
            raise self.reading.refuse("its forward does not return the last tensor that it computes")

    def name(self, node: Node) -> None:
        """Say in which submodule a function was called, and how it reads there."""
        stack = node.meta.get("nn_module_stack") or {}
        inner = next(reversed(stack.values()))[0] if stack else ""
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "function")
        self.reading.at(join(self.path, inner), target, line_of(node))

    def step(self, node: Node) -> None:
        if node.op == "call_module":
            kind = type(self.module.get_submodule(str(node.target))).__name__
            self.reading.at(join(self.path, str(node.target)), kind, line_of(node))
        else:
            self.name(node)
        tensors = [source for source in node.all_input_nodes if source in self.shapes]
        if not tensors or (node.target in _SIZES and node.op != "call_module"):
            self.sizes[node] = self.host_value(node, tensors)
            return
        if len(tensors) > 1:
            raise self.reading.refuse(
                "takes two tensors that both depend on z (a skip connection, a concatenation or a gate); "
                "only a chain of layers has the closed form"
            )
        if tensors[0] is not self.latest:
            raise self.reading.refuse(
                "takes an earlier tensor, so that the network branches; only a chain of layers has the "
                "closed form"
            )
        self.layer(node)
        self.latest = node
        self.shapes[node] = self.reading.shape

    def host_value(self, node: Node, tensors: list[Node]) -> Any:
        args = map_arg(node.args, lambda source: self.shapes.get(source, self.sizes.get(source)))
        kwargs = map_arg(node.kwargs, lambda source: self.sizes.get(source))
        function: Any = _SIZES[node.target] if tensors else node.target
        try:
            if tensors or function in _ARITHMETIC:
                return function(*args, **kwargs)
        except (TypeError, KeyError, IndexError):
            pass
        raise self.reading.refuse(
            "computes with the input's size or attributes in a way that is not followed here"
        )

    def layer(self, node: Node) -> None:
        others = [
            source
            for source in node.all_input_nodes
            if source is not self.latest and source not in self.sizes
        ]
        first = node.args[0] if node.args else node.kwargs.get("input")
        args = map_arg(node.args[1:], lambda source: self.sizes.get(source, source))
        kwargs = map_arg(node.kwargs, lambda source: self.sizes.get(source, source))
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}
        target = node.target
        if node.op == "call_module":
            if args or kwargs:
                raise self.reading.refuse("is called with more than one argument")
            inner = self.module.get_submodule(str(target))
            read_stock(self.reading, self.reading.path, inner)
            return
        if others and target is not F.linear:
            names = ", ".join(str(source.target) for source in others)
            raise self.reading.refuse(
                f"takes a tensor beside the layers' own ({names}), which has no closed form here"
            )
        try:
            if first is not self.latest:
                raise TypeError("the tensor is not the first of them")
            if target is F.linear:
                self.functional_linear(*args, **kwargs)
                return
            if target in _ACTIVATIONS:
                self.reading.activation(_ACTIVATIONS[target](*args, **kwargs))
                return
            if target in _SHAPES:
                _SHAPES[target](self.reading, *args, **kwargs)
                return
        except (TypeError, KeyError) as error:
            raise self.reading.refuse(f"is called with arguments that are not supported: {error}") from error
        raise self.reading.refuse("there is no closed form for this function here")

    def functional_linear(self, weight: Any, bias: Any = None) -> None:
        refs = []
        for source in (weight, bias):
            if source is not None and not (isinstance(source, Node) and source.op == "get_attr"):
                raise self.reading.refuse(
                    "its weight and bias must be parameters of the module, used as they are"
                )
            refs.append(None if source is None else self.reference(str(source.target)))
        if refs[0] is None or len(refs[0].shape) != 2:
            raise self.reading.refuse("its weight must be a matrix")
        self.reading.linear(refs[0], refs[1])

    def reference(self, target: str) -> TensorRef:
        owner, _, name = target.rpartition(".")
        holder = self.module.get_submodule(owner)
        if name not in holder._parameters:
            raise self.reading.refuse(f"{target} is not a parameter of the module")
        return TensorRef(join(self.path, owner), name, tuple(getattr(holder, name).shape))


_SEQUENTIAL = nn.Sequential.forward


def _keeps_sequence(cls: type[nn.Sequential]) -> bool:
    return cls.forward is _SEQUENTIAL and cls.__iter__ is nn.Sequential.__iter__


def read(reading: Reading, path: str, module: nn.Module) -> None:
    """Append what a module does: stock modules and Sequential by walking, anything else through torch.fx."""
    reading.at(path, type(module).__name__)
    inner = module._modules.get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None
    if inner is not None:
        read(reading, join(path, "_orig_mod"), inner)
    elif isinstance(module, nn.Sequential) and _keeps_sequence(type(module)):
        for name, child in module._modules.items():
            if child is None:
                raise reading.refuse(f"its entry {name!r} is None")
            read(reading, join(path, name), child)
    elif stock_base(module) is not None or type(module).__module__.startswith("torch.nn."):
        read_stock(reading, path, module)
    else:
        _Chain(reading, module, path).walk(trace(reading, module))
