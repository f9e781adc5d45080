"""What PyTorch needs to differentiate a decoder twice, and one sentence where it cannot."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from fastvae._compiling import is_compiling

# What autograd puts where a backward pass has no derivative. torch.autograd.grad leaves such a node out in silence.
_DEAD_ENDS = frozenset({"torch::autograd::NotImplemented", "torch::autograd::Error"})
_LEAF = "torch::autograd::AccumulateGrad"


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by matrix products; the fused kernels' backward passes have no derivative."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(torch.softmax(scores, -1), dropout_p) @ value


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """multi_head_attention_forward, always by the products that give its weights, too."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    wanted = bound.arguments.get("need_weights", True)
    bound.arguments["need_weights"] = True
    output, weights = F.multi_head_attention_forward(*bound.args, **bound.kwargs)
    return output, weights if wanted else None


def lstm_cell(x: Tensor, state: tuple[Tensor, Tensor], *weights: Tensor) -> tuple[Tensor, Tensor]:
    """torch.lstm_cell, for a state that is a projection, too (``proj_size``)."""
    of_input, of_state, *biases = weights
    gates = F.linear(x, of_input, *biases[:1]) + F.linear(state[0], of_state, *biases[1:])
    enter, forget, candidate, leave = gates.chunk(4, 1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def gru_cell(x: Tensor, state: Tensor, *weights: Tensor) -> Tensor:
    """torch.gru_cell, which on a CPU writes into its own products."""
    of_input, of_state, *biases = weights
    entered = F.linear(x, of_input, *biases[:1]).chunk(3, 1)
    kept = F.linear(state, of_state, *biases[1:]).chunk(3, 1)
    reset, update = ((a + b).sigmoid() for a, b in zip(entered[:2], kept[:2], strict=True))
    new = (entered[2] + reset * kept[2]).tanh()
    return new + update * (state - new)


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """torch.rnn_tanh_cell and its like, which on a CPU add into their own products."""

    def cell(x: Tensor, state: Tensor, *weights: Tensor) -> Tensor:
        of_input, of_state, *biases = weights
        return activation(F.linear(x, of_input, *biases[:1]) + F.linear(state, of_state, *biases[1:]))

    return cell


def _layers_of_cells(cell: Callable[..., Any], several: bool) -> Callable[..., Any]:
    """torch.lstm and its like as a loop over layers, directions and steps of one cell."""

    def run(
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        states = list(hx) if several else [hx]
        each = 2 + 2 * has_biases
        projected = several and states[0].shape[-1] != states[1].shape[-1]
        each += projected
        h = input.transpose(0, 1) if batch_first else input
        directions = 1 + bidirectional
        ends: list[list[Tensor]] = [[] for _ in states]
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                at = layer * directions + direction
                weights = list(params[at * each : (at + 1) * each])
                project = weights.pop() if projected else None
                state = [part[at] for part in states]
                steps: list[Tensor] = []
                for x in h if direction == 0 else h.flip(0):
                    new = cell(x, tuple(state) if several else state[0], *weights)
                    state = list(new) if several else [new]
                    if project is not None:
                        state[0] = state[0] @ project.mT
                    steps.append(state[0])
                outputs.append(torch.stack(steps if direction == 0 else steps[::-1]))
                for column, part in zip(ends, state, strict=True):
                    column.append(part)
            h = torch.cat(outputs, -1)
            if layer < num_layers - 1:
                h = F.dropout(h, dropout, train)
        return (h.transpose(0, 1) if batch_first else h, *(torch.stack(column) for column in ends))

    return run


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """F.hardsigmoid, whose backward pass has no derivative, by F.relu6, whose has."""
    output = F.relu6(input + 3) / 6
    return input.copy_(output) if inplace else output


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch._weight_norm, whose backward pass torch.vmap runs one sample at a time."""
    others = None if dim == -1 else [each for each in range(v.dim()) if each != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.bilinear, which torch.vmap runs one sample at a time."""
    output = torch.einsum("...i,oij,...j->...o", x, weight, y)
    return output if bias is None else output + bias


_MATH: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    F.hardsigmoid: _hardsigmoid,
    F.bilinear: _bilinear,
    torch._weight_norm: _weight_norm,
}
CELLS: dict[str, Callable[..., Any]] = {
    "lstm_cell": lstm_cell,
    "gru_cell": gru_cell,
    "rnn_tanh_cell": _rnn_cell(torch.tanh),
    "rnn_relu_cell": _rnn_cell(torch.relu),
}
# cuDNN's recurrent layers have no second derivative; PyTorch's own on a CPU have.
RECURRENT: dict[str, Callable[..., Any]] = {
    name.removesuffix("_cell"): _layers_of_cells(cell, name == "lstm_cell") for name, cell in CELLS.items()
}


class _ByProducts(TorchFunctionMode):
    """Runs attention, recurrent layers and hardsigmoid by operations that have two derivatives.

    It holds for this thread alone, where the flags of torch.backends hold for all.

    Args:
        unrolled: recurrent layers on a CPU as well, whose own derivatives are not what is missing.
    """

    def __init__(self, unrolled: bool = False) -> None:
        super().__init__()
        self._unrolled = unrolled

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MATH:
            return _MATH[func](*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self._unrolled and name in CELLS:
            given = [each for each in args if each is not None]
            return CELLS[name](*given, **kwargs)
        recurrent = RECURRENT.get(name)
        # The form for packed sequences has its parameters in the place of has_biases.
        asked = recurrent is not None and (self._unrolled or args[0].is_cuda)
        if recurrent is not None and asked and isinstance(args[3], bool):
            return recurrent(*args, **kwargs)
        return func(*args, **kwargs)


def twice_differentiable() -> contextlib.AbstractContextManager[Any]:
    """The context in which a decoder is called whose gradient is to be differentiated again."""
    return contextlib.nullcontext() if is_compiling() else _ByProducts()


def batchable() -> contextlib.AbstractContextManager[Any]:
    """The context in which torch.vmap runs attention, a transformer's layers and recurrent layers: by products."""
    return _ByProducts(unrolled=True)


def _nodes(tensor: Tensor, until: Any) -> Iterator[Any]:
    """The nodes of a tensor's graph down to its leaves, or to the node ``until``."""
    stack: list[Any] = [tensor.grad_fn]
    visited = {None, until}
    while stack:
        node = stack.pop()
        if node not in visited:
            visited.add(node)
            yield node
            stack += [below for below, _ in node.next_functions]


def own_leaf(z: Tensor) -> Tensor:
    """z as a leaf of ours that requires a gradient, with its tangent where it carries one."""
    tangent = forward_ad.unpack_dual(z).tangent if forward_ad._current_level >= 0 else None
    leaf = z.detach().requires_grad_()
    return leaf if tangent is None else forward_ad.make_dual(leaf, tangent)


def needs_a_graph(output: Tensor, point: Tensor) -> bool:
    """Whether anything but ``point``, a leaf of ours, would get a gradient from ``output``."""
    return any(node.name() == _LEAF and node.variable is not point for node in _nodes(output, None))


def check_output(name: str, y: object, rows: int) -> None:
    """Raise unless a decoder gave a tensor with a row for each of its ``rows`` codes."""
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{name}: decoder: expected it to return one tensor [B, ...], got a {type(y).__name__}"
        )
    if y.dim() == 0 or y.shape[0] != rows:
        raise ValueError(
            f"{name}: decoder: expected an output [{rows}, ...] as z has rows, got {list(y.shape)}"
        )


def no_gradient(name: str) -> ValueError:
    """The error for a decoder whose output has no gradient to z."""
    return ValueError(
        f"{name}: decoder: expected an output that can be differentiated with respect to z, got one without a gradient "
        "to it: quantised, rounded, detached, or not computed from z"
    )


@contextlib.contextmanager
def in_our_words(name: str) -> Iterator[None]:
    """Say of what autograd raises while it differentiates that the decoder is the reason."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise _not_twice(name, lines[0] if lines else type(error).__name__) from error


CANNOT = ", and it cannot: "


def _not_twice(name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: decoder: expected one that PyTorch can differentiate twice{CANNOT}{reason}"
    )


def check_twice(name: str, gradient: Tensor, point: Tensor) -> None:
    """Raise if a gradient, taken with its graph, cannot be differentiated again where it should be."""
    for node in _nodes(gradient, point.grad_fn):
        kind = node.name()
        compiled = kind.startswith("CompiledFunction") and kind.endswith("BackwardBackward")
        if compiled:
            reason = "a part of it was compiled by torch.compile; pass the module as it was before"
        elif kind in _DEAD_ENDS:
            reason = _words_of(node)
        else:
            continue
        raise _not_twice(name, reason)


def _words_of(dead_end: Any) -> str:
    """What a dead end would say if the backward pass came to it."""
    try:
        dead_end(torch.zeros((), device="cpu"))
    except Exception as error:
        lines = str(error).strip().splitlines()
        if lines and ("derivative" in lines[0] or "differentia" in lines[0]):
            return lines[0]
    return "a function of its own has a backward pass without a derivative (once_differentiable?)"
